"""Train an agent for a few minutes, and show what it has learned beside random play.

    python demo.py [--configs PRESET ...] [--logdir FOLDER] [--key value | --group.key value]

Without --configs it is the preset `demo`: MinAtar Breakout, in runs/demo. --steps is its length in
environment frames; all other keys are those of python dreamer.py. The same command again continues,
or shows the result again.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tools
from hidreamer import app

PRESET, LOGDIR = "demo", "runs/demo"
FILM = 400  # frames of the video of both players
FPS = 15
CAPTION = 28  # pixels above each player
SMOOTH = 20  # training episodes that the curve averages


def arguments(argv: Sequence[str]) -> tuple[list[str], Path]:
    """-> arguments of dreamer.py, the run's folder. Raises ConfigError."""
    args, words = tools.parse(list(argv)), list(argv)
    if args.capacity or args.resume:
        raise tools.ConfigError(
            "the demo takes no --capacity and no --resume; dreamer.py does. "
            "The same command again continues it"
        )
    if several := {"seeds", "population"} & args.overrides.keys():
        raise tools.ConfigError(
            f"the demo shows one run; dreamer.py takes --{min(several)}. Here write --seed"
        )
    if not args.presets:
        words += ["--configs", PRESET]
    if "logdir" not in args.overrides:
        words += ["--logdir", LOGDIR if not args.presets else f"runs/{args.presets[0]}"]
    return words, tools.user_path(str(tools.parse(words).overrides["logdir"]))


# ---------------------------------------------------------------- both players


def returns(agent: Any, player: Any, mode: str) -> list[float]:
    """Of the episodes of the run's last evaluation, played by ``player``."""
    from hidreamer import evaluation
    from run_setup import evaluation_generator, make_envs

    config, step = agent.config, agent.facts["step"]
    count = max(1, config.eval_episodes)
    generator = evaluation_generator(config, step, agent.device)
    made = make_envs(config, min(config.env.count, count), step, evaluating=True)
    with contextlib.closing(made) as envs:
        limit = evaluation.time_limit(config)
        played = evaluation.play(player, envs, count, mode, limit=limit, generator=generator)
    return [episode["return"] for episode in played.episodes]


def frames(agent: Any, player: Any, mode: str) -> Iterator[tuple[Any, float]]:
    """Endless (picture (H,W,3) uint8, points so far) of one environment, episode after episode."""
    from run_setup import evaluation_generator, make_envs

    config, step = agent.config, agent.facts["step"]
    generator = evaluation_generator(config, step, agent.device)
    with contextlib.closing(make_envs(config, 1, step, evaluating=True)) as envs:
        state, action, points = player.initial(1), None, 0.0
        while True:
            obs = envs.step(action)
            points += float(obs["reward"][0])
            yield envs.render(0), points
            seen = player.tensors({key: obs[key] for key in (*envs.obs_space, "is_first")})
            state = player.act(state, seen, mode, generator)
            action = state.action.cpu().numpy()


def captioned(picture: Any, text: str) -> Any:
    """(H,W,3) -> (H + CAPTION, W,3), the text above it."""
    import cv2
    import numpy as np

    out = np.full((picture.shape[0] + CAPTION, picture.shape[1], 3), 24, np.uint8)
    out[CAPTION:] = picture
    cv2.putText(out, text, (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (240,) * 3, 1, cv2.LINE_AA)
    return out


def beside(agent: Any, players: Mapping[str, tuple[Any, str]]) -> Iterator[Any]:
    """Pictures of all ``players`` {name: (player, mode)} side by side, with their points."""
    import numpy as np

    games = {name: frames(agent, *player) for name, player in players.items()}
    for both in islice(zip(*games.values(), strict=True), FILM):
        parts = []
        for name, (picture, points) in zip(games, both, strict=True):
            parts += [
                captioned(picture, f"{name}: {points:g}"),
                np.zeros_like(captioned(picture, ""))[:, :8],
            ]
        yield np.concatenate(parts[:-1], axis=1)


# ---------------------------------------------------------------- the curve


def training_returns(logdir: Path) -> tuple[list[int], list[float]]:
    """Frames at which training episodes ended, and their returns."""
    from comparison.runs import metrics

    ended = [line for line in metrics(logdir) if line.get("train_return") is not None]
    return [line["step"] for line in ended], [line["train_return"] for line in ended]


def draw_curve(logdir: Path, random: float, path: Path) -> None:
    """The return of training episodes over environment frames, beside random play. Raises
    ImportError without matplotlib.
    """
    import numpy as np
    from matplotlib.figure import Figure

    steps, scores = map(np.array, training_returns(logdir))
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, scores, ".", color="#b9c0cc", markersize=3, label="training episodes")
    if len(scores) >= SMOOTH:
        mean = np.convolve(scores, np.full(SMOOTH, 1 / SMOOTH), "valid")
        label = f"mean of {SMOOTH} episodes"
        axes.plot(steps[SMOOTH - 1 :], mean, color="#0072b2", linewidth=2, label=label)
    axes.axhline(random, color="#d55e00", linestyle="--", label="random play")
    axes.set(xlabel="environment frames", ylabel="return of an episode (points)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- the last lines


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    import numpy as np

    return float(np.mean(scores)), float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(
        scores
    ) > 1 else 0.0


def verdict(now: Sequence[float], random: Sequence[float]) -> list[str]:
    """Lines: return now, of random play, and how they compare."""
    (own, error), (chance, chance_error) = mean_and_error(now), mean_and_error(random)
    lines = []
    for name, mean, wide, count in (
        ("return now:", own, error, len(now)),
        ("random play:", chance, chance_error, len(random)),
    ):
        lines.append(f"{name:<16} {mean:6.2f} points an episode (+- {wide:.2f}, {count} episodes)")
    if own - chance <= 2.0 * (error**2 + chance_error**2) ** 0.5:
        lines.append("that is not better than random play: train longer, see continue above")
    elif chance > 0:
        lines.append(f"that is          {own / chance:6.1f} times the return of random play")
    else:
        lines.append(f"that is          {own - chance:6.2f} points better than random play")
    return lines


def show(logdir: Path) -> list[str]:
    """Play, film and draw; the numbers go to LOGDIR/demo.json. -> lines for the screen."""
    from hidreamer import evaluation
    from hidreamer.checkpoint import replace_text
    from hidreamer.logger import stack, write_video
    from hidreamer.provenance import provenance
    from library.agent import load

    agent = load(logdir)
    config, step = agent.config, agent.facts["step"]
    mode = "greedy" if config.eval_greedy else "train"
    chance = lambda: evaluation.RandomAgent(agent.act_space, config.seed)
    now, random = returns(agent, agent.model, mode), returns(agent, chance(), mode)
    found = {"task": config.task, "step": step, "seed": config.seed, "returns": now}
    found |= {"random_returns": random, "made_by": provenance()}
    replace_text(logdir / "demo.json", json.dumps(found, indent=1) + "\n")
    lines = ["", f"{config.task} after {step:,} frames", *verdict(now, random), ""]

    players = {"trained agent": (agent.model, mode), "random play": (chance(), mode)}
    video, curve = logdir / "videos" / "beside_random.mp4", logdir / "learning_curve.png"
    video.parent.mkdir(exist_ok=True)
    try:
        write_video(video, stack(beside(agent, players)), FPS)
        lines.append(f"agent beside random play:        {video}")
    except Exception as error:  # a renderer or a codec may raise anything
        lines.append(f"no video of agent beside random play: {error}")
    for path in sorted((logdir / "videos").glob(f"{step:09d}-open_loop.mp4")):
        lines.append(f"the model's open-loop prediction: {path} (truth, model, error)")
    try:
        draw_curve(logdir, sum(random) / len(random), curve)
        lines.append(f"learning curve:                  {curve}")
    except ImportError:
        lines.append(f"no learning curve without matplotlib: {app.install_line('compare')}")
    if first := app.activation():
        lines += ["", f"first, in each terminal: {first}"]
    return [*lines, "", "next:", *(f"  {line}" for line in next_commands(logdir, config.task))]


def next_commands(logdir: Path, task: str) -> list[str]:
    """Three, each with what it is for."""
    commands = {
        shlex.join([*app.command("play"), str(logdir)]): "play in its dream, on a local page",
        shlex.join([*app.command("analysis"), str(logdir)]): "what its latent state holds",
    }
    if task.startswith("minatar"):
        words = [*app.command("run_comparison"), "--steps", "20000", "--seeds", "1"]
        commands[shlex.join(words)] = "flat, two levels, tokens: an hour"
    else:
        words = ["--configs", "atari100k", "tiny_dreamerv3", "--task", task]
        words += ["--logdir", f"runs/{task}"]
        commands[shlex.join([*app.command("dreamer"), *words])] = "the benchmark: days on a CPU"
    width = max(map(len, commands))
    return [f"{command:<{width}}  # {what}" for command, what in commands.items()]


def main(argv: Sequence[str]) -> int:
    """-> exit status: as dreamer.py's."""
    if "--help" in argv or "-h" in argv:
        text = __doc__.strip()
        for name in ("demo", "dreamer"):
            text = text.replace(f"python {name}.py", " ".join(app.command(name)))
        print(text)
        return 0
    try:
        words, logdir = arguments(argv)
    except tools.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import dreamer  # torch, which takes seconds to load
    from hidreamer.process import resource

    if status := dreamer.main(words):
        return status
    print("playing beside random play ...", flush=True)
    try:
        print("\n".join(show(logdir)))
    except KeyboardInterrupt:
        print(f"stopped; the run is whole in {logdir}")
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {resource(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
