"""What a world model sees, as strips of frames: images and boards only, vectors have no picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

import networks
from analysis import latents
from analysis.latents import CONTEXT, Latents
from analysis.loading import Episode, Subject, preprocessed
from comparison.parts import Strip, png
from hidreamer.dynamics.base import Feat
from hidreamer.evaluation import board

TILES = 8  # in a row
SIDE = 64  # pixels of a tile, about
MOST_ACTIONS = 5  # action sequences that are dreamed side by side
MOMENTS = (0, 1, 2, 3, 5, 8, 11, 15)  # steps of a dream that are shown


class Scene(NamedTuple):
    """One episode, followed by one subject's world model."""

    subject: Subject
    obs: Mapping[str, Tensor]  # preprocessed, (1, T, ...)
    carry: Any
    post: Any

    @property
    def length(self) -> int:
        return self.obs["reward"].shape[1]


@torch.no_grad()
def follow(subject: Subject, episode: Episode, seed: int = 0) -> Scene:
    obs = preprocessed(subject.agent, episode.rows)
    with subject.agent.autocast():
        random = latents.generator(obs, seed)
        carry, post, _ = subject.agent.world_model.observe(obs, generator=random)
    return Scene(subject, obs, carry, post)


def drawable(subject: Subject) -> bool:
    """Whether anything that is decoded is an image or a board."""
    kinds = subject.agent.world_model.decoder.kinds
    return bool(kinds["image"] or kinds["grid"])


def tiles(obs: Mapping[str, Tensor]) -> np.ndarray:
    """Observations (1, n, ...) in [0, 1] -> (n, H, W, 3) uint8."""
    frames = board([{key: x.float() for key, x in obs.items()}])
    stride = max(1, frames.shape[1] // SIDE)
    return frames[:, ::stride, ::stride]


def row(frames: Sequence[np.ndarray] | np.ndarray, count: int = TILES) -> str:
    """Frames (H, W, 3) side by side with gaps, padded with blanks to ``count``, as a data URI."""
    gap = max(1, frames[0].shape[1] // 24)
    blank = np.full_like(frames[0], 255)
    parts = [*frames, *[blank] * (count - len(frames))][:count]
    white = np.full((frames[0].shape[0], gap, 3), 255, np.uint8)
    joined = [part for frame in parts for part in (white, frame, white)]
    return png(np.concatenate(joined, 1))


def spread(length: int, count: int = TILES) -> np.ndarray:
    """``count`` steps of ``length``, evenly spaced, without repeats."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def truth(scene: Scene, steps: Any) -> np.ndarray:
    shown = scene.subject.agent.world_model.postprocess(scene.obs)
    return tiles({key: x[:, steps] for key, x in shown.items()})


def decoded(subject: Subject, feat: Feat, coarse: bool = False) -> list[np.ndarray]:
    """Tiles of features (1, n, .): of all levels, then those of the coarse ones alone."""
    with subject.agent.autocast():
        random = latents.generator(feat._asdict(), 0)
        found = subject.agent.world_model.decode(feat, coarse, random)
    return [tiles(x) for x in found]


# ---------------------------------------------------------------- what levels show


def decodes(scene: Scene) -> Strip:
    """The truth, the coarsest level's picture, and so on up to all levels."""
    steps = spread(scene.length)
    feat = scene.post.feat.map(lambda x: x[:, steps])
    names = list(scene.subject.agent.world_model.dynamics.coarse_features(feat))
    everything, *coarse = decoded(scene.subject, feat, coarse=True)
    rows = [("truth at the steps above", row(truth(scene, steps)))]
    shown = {"top": "L0, the bottom level drawn from its prior"}
    for name, frames in zip(names, coarse, strict=True):
        rows.append((shown.get(name, name), row(frames)))
    rows.append(("all levels" if names else "the flat state", row(everything)))
    return Strip(scene.subject.name, rows, [str(t) for t in steps], TILES)


def resampled(scene: Scene) -> Strip | None:
    """One level drawn anew from its prior while the others are held; None for a flat state."""
    dynamics = scene.subject.agent.world_model.dynamics
    names = latents.names(dynamics)
    if len(names) < 2:
        return None
    steps = spread(scene.length)
    random = latents.generator(scene.obs, 0)
    pick = lambda feat: feat.map(lambda x: x[:, steps])
    fine = set(range(1, len(names)))
    rows = [("truth at the steps above", row(truth(scene, steps)))]
    rows.append(("as observed", row(decoded(scene.subject, pick(scene.post.feat))[0])))
    for label, which in (
        ("finer levels drawn anew, L0 held", fine),
        ("L0 drawn anew, finer held", {0}),
    ):
        for _ in range(2):
            feat = latents.resampled(dynamics, scene.post, which, random)
            rows.append((label, row(decoded(scene.subject, pick(feat))[0])))
    note = (
        "Each row of a draw is one sample per step. What stays in the picture is what the held"
        " levels and the memory hold; what changes is what the drawn level decides."
    )
    return Strip(scene.subject.name, rows, [str(t) for t in steps], TILES, note)


def code_map(subject: Subject, episodes: Sequence[Episode], found: Sequence[Latents]) -> Strip:
    """Frames on which one variable of the coarsest level has the same class: its busiest variable,
    its most used classes, the mean of all such frames first.
    """
    codes = np.concatenate([one.codes["L0"] for one in found])  # (N, S)
    classes = int(codes.max()) + 1
    share = np.stack([np.bincount(x, minlength=classes) / len(x) for x in codes.T])
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    variable = int(entropy.argmax())
    model = subject.agent.world_model
    keys = [*model.decoder.kinds["image"], *model.decoder.kinds["grid"]]
    rng = np.random.default_rng(0)
    rows = []
    where = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode))]
    for code in np.argsort(-share[variable])[:6]:
        steps = np.flatnonzero(codes[:, variable] == code)
        if len(steps) < TILES:
            break
        some = rng.choice(steps, min(len(steps), 400), replace=False)
        batch = {}
        for key in keys:
            frames = [episodes[i].rows[key][t] for i, t in (where[n] for n in some)]
            batch[key] = torch.from_numpy(np.stack(frames))[None]
        obs = model.postprocess(preprocessed_frames(subject, batch))
        frames = tiles({key: x[:, : TILES - 1] for key, x in obs.items()})
        mean = tiles({key: x.float().mean(1, keepdim=True) for key, x in obs.items()})
        label = f"class {code}: {100 * share[variable, code]:.0f}% of all steps"
        rows.append((label, row([*mean, *frames])))
    columns = ["mean", *[""] * (TILES - 1)]
    title = f"{subject.name}: variable {variable} of L0"
    return Strip(title, rows, columns, TILES)


def preprocessed_frames(subject: Subject, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw observations (1, n, ...) preprocessed, with zeros for vectors that are decoded too."""
    decoder = subject.agent.world_model.decoder
    out = networks.preprocess(batch)
    count = next(iter(batch.values())).shape[1]
    for key in decoder.sizes:
        out.setdefault(key, torch.zeros(1, count, decoder.sizes[key]))
    return out


# ---------------------------------------------------------------- dreams


def sequences(act_space: spaces.Space, names: Sequence[str]) -> dict[str, np.ndarray]:
    """{label: action (A,)}: what is done at every step of a dream."""
    if isinstance(act_space, spaces.Box):
        out = {"nothing": np.zeros(act_space.shape, np.float32)}
        for i in range(min(2, act_space.shape[0])):
            for sign, word in ((-1.0, "least"), (1.0, "most")):
                action = np.zeros(act_space.shape, np.float32)
                action[i] = sign
                out[f"{word} of action {i}"] = action
        return out
    widths = [int(act_space.n)] if isinstance(act_space, spaces.Discrete) else list(act_space.nvec)
    rest = [np.eye(int(n), dtype=np.float32)[0] for n in widths[1:]]
    out = {}
    for i in range(min(MOST_ACTIONS, int(widths[0]))):
        first = np.eye(int(widths[0]), dtype=np.float32)[i]
        label = names[i] if i < len(names) else f"action {i}"
        out[label] = np.concatenate([first, *rest])
    return out


def counterfactual(scene: Scene, act_space: spaces.Space, names: Sequence[str]) -> Strip | None:
    """Dreams from one state, each with an action of its own at every step; None for an episode
    that is too short.

    names: of the actions, as of ``action_names``.
    """
    horizon = max(MOMENTS)
    start = min(max(CONTEXT, scene.length // 3), scene.length - 2 - horizon)
    if start < 1:
        return None
    subject, device = scene.subject, scene.obs["reward"].device
    with torch.no_grad(), subject.agent.autocast():
        before = {key: x[:, : start + 1] for key, x in scene.obs.items()}
        random = latents.generator(before, 0)
        carry, post, _ = subject.agent.world_model.observe(before, generator=random)
        begin = subject.agent.world_model.dynamics.starts(carry, post, 1)
        real = scene.obs["prev_action"][:, start + 1 : start + 1 + horizon]
        plans = {"dream, with the actions that were taken": real}
        for label, action in sequences(act_space, names).items():
            held = torch.from_numpy(action).to(device).expand(1, horizon, -1)
            plans[f"dream: {label}"] = held
        moments = list(MOMENTS)
        rows = [("truth", row(truth(scene, [start + m for m in moments])))]
        for label, action in plans.items():
            random = latents.generator(before, 0)  # the same numbers for every plan
            model = subject.agent.world_model
            feat = model.dynamics.imagine(begin, action, horizon, generator=random)[1]
            feat = feat.map(lambda x: x[:, moments])
            rows.append((label, row(decoded(subject, feat)[0])))
    columns = ["start", *(f"+{m}" for m in moments[1:])]
    return Strip(subject.name, rows, columns, TILES)


def surprises(scene: Scene, found: Latents) -> Strip | None:
    """The moments at which posterior and prior disagree most, and what was expected instead."""
    kl = found.kl.sum(1)
    kl[: min(CONTEXT, len(kl))] = -1.0
    order = [t for t in np.argsort(-kl) if kl[t] > 0]
    steps: list[int] = []
    for t in order:  # not several of one event
        if all(abs(t - other) > 1 for other in steps):
            steps.append(int(t))
        if len(steps) == TILES:
            break
    if not steps:
        return None
    steps = sorted(steps)
    subject = scene.subject
    expected = found.feat[1].map(lambda x: x[None, steps])
    rows = [("the step before", row(truth(scene, [t - 1 for t in steps])))]
    rows.append(("expected (one step of the prior)", row(decoded(subject, expected)[0])))
    rows.append(("what came", row(truth(scene, steps))))
    columns = [f"{t}: {kl[t]:.1f}" for t in steps]
    note = "Above: step and nats of KL between posterior and prior, all levels together."
    return Strip(subject.name, rows, columns, TILES, note)


def code_raster(subject: Subject, found: Latents) -> Strip:
    """Classes of every variable along an episode, a colour for each class."""
    rng = np.random.default_rng(3)
    rows = []
    for (name, codes), (_, classes) in zip(
        found.codes.items(), subject.agent.world_model.dynamics.shapes, strict=True
    ):
        palette = rng.integers(40, 235, (classes, 3)).astype(np.uint8)
        image = palette[codes.T[:, :160]]  # (S, T, 3)
        rows.append(
            (
                f"{name}: {codes.shape[1]} variables, from left to right the steps",
                png(image.repeat(4, 0).repeat(3, 1)),
            )
        )
    return Strip(subject.name, rows, tiles=6)


def action_names(env: Any) -> list[str]:
    """What the task calls its discrete actions, where it has names for them."""
    suite = env.suite
    if hasattr(suite, "buttons"):
        return [name.lower().replace("_", " ") for name in suite.buttons]
    actions = getattr(suite, "actions", [])
    if hasattr(suite, "game") and hasattr(suite.game, "env"):  # MinAtar's letters
        words = {"n": "nothing", "l": "left", "u": "up", "r": "right", "d": "down", "f": "fire"}
        return [words[suite.game.env.action_map[a]] for a in actions]
    return [action.name.lower() for action in actions]
