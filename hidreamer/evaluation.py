"""Episodes and pictures of an agent as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from hidreamer.metrics import EpisodeScores
from hidreamer.spaces import random_action

Frames = list[np.ndarray]  # (H,W,3) uint8 each
LONGEST = 1000  # frames of a video
STEPS = 10_000  # agent steps of an evaluation episode that no key limits

Summary = Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]]


class Played(NamedTuple):
    """What ``play`` saw."""

    # Of each episode: "return", "length" in agent steps, "truncated" (1.0 where the limit cut it),
    # and the sum of every ``log_*`` key of the environment.
    episodes: list[dict[str, float]]
    videos: dict[str, Frames]  # environment 0's first episode, as "agent" and "levels"
    problem: Exception | None  # why the video is not whole


class Chosen(NamedTuple):
    """A state of ``RandomAgent``."""

    action: torch.Tensor  # (N,A)


class RandomAgent:
    """What ``play`` asks of an agent, acting at random.

    act_space: of the environments. seed: of its actions.
    """

    def __init__(self, act_space: spaces.Space, seed: int):
        self.act_space, self.rng = act_space, np.random.default_rng(seed)

    def initial(self, count: int) -> Chosen:
        return Chosen(torch.from_numpy(random_action(self.act_space, count, self.rng)))

    def tensors(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return rows

    def act(
        self, state: Chosen, obs: Mapping[str, np.ndarray], mode: str, generator: Any = None
    ) -> Chosen:
        return self.initial(len(state.action))


def time_limit(config: Any) -> int:
    """Frames after which an evaluation episode is cut. There always is a limit: a policy may stand
    still for ever.
    """
    return config.eval_time_limit or config.env.time_limit or STEPS * config.env.action_repeat


def play(
    agent: Any,
    envs: Any,
    episodes: int,
    mode: str,
    *,
    limit: int,
    video: bool = False,
    levels: bool = False,
    check: Callable[[], None] = lambda: None,
    generator: torch.Generator | None = None,
) -> Played:
    """Play ``episodes`` in ``envs``, each environment its share.

    Taking whoever finishes first would favour short episodes. One that ended because its
    environment crashed is played again.

    mode: as of ``Agent.act``. limit: the frames after which ``envs`` cut an episode. video: film
    environment 0's first episode, up to LONGEST frames; an error ends the film only. levels: also
    show what each level of the state decodes to.
    check: called before every step; what it raises is not caught. generator: of the agent's random
    numbers, None being torch's default one.
    """
    count = envs.count
    quota = np.array([episodes // count + (i < episodes % count) for i in range(count)])
    ended, videos, problem = [], {"agent": [], "levels": []}, None
    drawing: torch.Generator | None = None  # of its own: what is filmed changes no score
    running = EpisodeScores(count, envs.log_keys)
    state, action = agent.initial(count), None
    while quota.any():
        check()
        obs = envs.step(action)
        running.add(obs)
        inputs = agent.tensors({key: obs[key] for key in (*envs.obs_space, "is_first")})
        state = agent.act(state, inputs, mode, generator)
        action = state.action.cpu().numpy()
        if envs.crashed[0] and video:
            # What is new now has not been reset and cannot be drawn: the film starts again.
            videos = {"agent": [], "levels": []}
        elif video:
            try:
                videos["agent"].append(envs.render(0))
                if levels:
                    drawing = drawing or torch.Generator(state.action.device).manual_seed(0)
                    decoded = agent.decode_state(inputs, state, drawing)
                    videos["levels"] += list(board(decoded))
            except Exception as error:  # a renderer may raise anything
                video, problem = False, error
            video = video and not obs["is_last"][0] and len(videos["agent"]) < LONGEST
        cut = ~obs["is_terminal"] & (running.sums["length"] * envs.repeat >= limit)
        for i in np.flatnonzero(obs["is_last"] & ~envs.crashed & (quota > 0)):
            sums = {key: float(total[i]) for key, total in running.sums.items()}
            ended.append(sums | {"truncated": float(cut[i])})
            quota[i] -= 1
    return Played(ended, videos, problem)


def scores(
    episodes: Sequence[Mapping[str, float]], summary: Summary | None = None
) -> dict[str, float]:
    """``eval_*`` metrics of at least one episode as ``play`` has them: means over the episodes.

    A key ``log_x`` becomes ``eval_x``. summary: a suite's metrics of all episodes together, {name:
    value}.
    """
    means = {}
    for key in episodes[0]:
        means[key] = float(np.mean([episode[key] for episode in episodes]))
    named = {key.removeprefix("log_"): mean for key, mean in means.items()} | dict(
        summary(episodes) if summary else {}
    )
    named |= {
        "return": means["return"],
        "return_std": float(np.std([episode["return"] for episode in episodes])),
    }
    named |= {"length": means["length"], "episodes": len(episodes)}
    named["truncated"] = sum(int(episode["truncated"]) for episode in episodes)
    return {f"eval_{name}": value for name, value in named.items()}


def evaluate(
    agent: Any,
    envs: Any,
    config: Any,
    drawable: bool,
    check: Callable[[], None],
    generator: torch.Generator | None = None,
) -> tuple[dict[str, float], Played]:
    """Play as the run's ``config`` asks for, in environments that cut an episode at
    ``time_limit``. -> scores, Played.

    drawable: whether the environments can be drawn, as far as is known. check, generator: see
    ``play``.
    """
    played = play(
        agent,
        envs,
        config.eval_episodes,
        "greedy" if config.eval_greedy else "train",
        limit=time_limit(config),
        video=config.video and drawable,
        levels=config.decode_levels,
        check=check,
        generator=generator,
    )
    return scores(played.episodes, getattr(envs, "summary", None)), played


def line(found: Mapping[str, float]) -> str:
    """The ``scores`` as a line on the screen."""
    text = f"eval return {found['eval_return']:.2f} over {found['eval_episodes']} episodes"
    cut = found["eval_truncated"]
    return f"{text}, {cut} of them cut by the limit (eval_time_limit)" if cut else text


def record(
    logger: Any,
    step: int,
    agent: Any,
    played: Played,
    batch: Mapping[str, np.ndarray],
    levels: bool,
    generator: torch.Generator | None = None,
) -> None:
    """Log the videos of an evaluation, and what the agent predicts of replayed sequences, a raw
    ``batch`` (B,T,...).
    """
    for name, frames in played.videos.items():
        logger.video(step, name, frames)
    logger.video(step, "open_loop", open_loop(agent, batch, levels, generator), fps=5)


def open_loop(
    agent: Any,
    batch: Mapping[str, np.ndarray],
    levels: bool,
    generator: torch.Generator | None = None,
    context: int = 5,
) -> np.ndarray:
    """(T,H,W,3) truth, model and error above each other for six sequences, open loop after
    ``context`` steps.
    """
    batch = {key: x[:6] for key, x in batch.items() if key != "is_last"}
    if batch["reward"].shape[1] <= context:
        return np.zeros(0)
    with agent.autocast():
        rows = agent.world_model.open_loop(agent.tensors(batch), context, levels, generator)
    return board(rows, error=True)


def board(rows: list[dict[str, torch.Tensor]], error: bool = False) -> np.ndarray:
    """Frames (T,H,W,3) of every image or grid among ``rows`` of (B,T,...) tensors; (0,) if there
    is none.
    """
    boards = []
    for key, x in rows[0].items():
        if x.ndim == 5:
            boards.append(picture([row[key] for row in rows], error))
    height = max((frames.shape[1] for frames in boards), default=0)
    padded = [np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, 0), (0, 0))) for x in boards]
    return np.concatenate(padded, 2) if boards else np.zeros(0)


def picture(rows: list[torch.Tensor], error: bool) -> np.ndarray:
    """Images or grids (B,T,H,W,C) in [0, 1], truth first -> frames (T, H rows, B W, 3) uint8, one
    above the other.

    With ``error`` the difference of the second and the first comes third; grey is no error.
    """
    rows = [in_colour(row.float().cpu()) for row in rows]
    if error:
        rows = [*rows[:2], (rows[1] - rows[0] + 1.0) / 2.0, *rows[2:]]
    x = torch.cat(rows, 2)  # (B, T, H rows, W, 3)
    scale = max(1, 128 // x.shape[3])
    frames = x.permute(1, 2, 0, 3, 4).flatten(2, 3).clamp(0.0, 1.0)  # (T, H rows, B W, 3)
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return (255.0 * frames).round().byte().numpy()


def in_colour(x: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (..., 3) in [0, 1]: grey or RGB images as they are, each plane of a board in a
    colour of its own.
    """
    channels = x.shape[-1]
    if channels == 1:
        x = x.expand(*x.shape[:-1], 3)
    elif channels != 3:
        hue = torch.arange(channels).unsqueeze(1) * (2.0 * torch.pi / channels)
        x = x @ (0.5 + 0.5 * torch.cos(hue + torch.tensor([0.0, 2.1, 4.2])))
    return x.clamp(0.0, 1.0)
