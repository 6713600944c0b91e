"""Train a DreamerV3 agent whose latent state is chosen by config.

    python dreamer.py --configs PRESET [PRESET ...] --task SUITE_NAME --logdir FOLDER
        [--key value | --group.key value]

The same command again continues the run. In one process (docs/population.md), each in FOLDER/SEED:
  --seeds SEED ...       Train these seeds.
  --population COUNT     Train so many, from --seed on.
"""

# ruff: noqa: E402  what needs no torch is done before it is loaded

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import run_config
import tools
from hidreamer import app
from seeds import member_args, member_seeds, members_in, several
from tools import Config, ConfigError


def answer(argv: list[str]) -> int | None:
    """--help and wrong arguments need no torch, which takes seconds to load. -> exit status, None
    where there is more to do.
    """
    if not argv or "--help" in argv or "-h" in argv:
        command = " ".join(app.command("dreamer"))
        print(tools.help_text(__doc__.replace("python dreamer.py", command)))
        return 0 if argv else 2
    try:
        args = tools.parse(argv)
        if member_seeds(args.overrides) and args.capacity:
            raise ConfigError("--capacity trains nothing: leave out --seeds and --population")
        for name in args.capacity or args.presets[-1:] or ["defaults"]:
            tools.load_config([*args.presets[:-1], name], args.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return None


if __name__ == "__main__" and (status := app.run(answer)) is not None:
    sys.exit(status)

# Before torch is loaded: threads that wait for each other sleep. On a busy machine spinning ones
# wait for threads whose cores they take.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import models
from envs import EnvError, env_for_spaces
from hidreamer import checkpoint, cost, process
from hidreamer.logger import SERVICES, Rates, Screen
from hidreamer.provenance import script
from hidreamer.spaces import random_rows
from signals import Signals, Stop, guarded
from training import Failure, Run

# ---------------------------------------------------------------- command line


def prepare(args: tools.Args) -> tuple[Config, Path, Path | None]:
    """-> config, folder of the run, checkpoint of another run to start from. Raises ConfigError."""
    source = tools.user_path(args.resume) if args.resume else None
    if source is not None and source.is_dir():
        names = ("checkpoints/latest.pt", "checkpoints/previous.pt", "latest.pt")
        source = next((source / x for x in names if (source / x).exists()), source / names[0])
    if source is not None and not source.exists():
        seeds = members_in(tools.user_path(args.resume))
        hint = f": {several(seeds)}, which --seeds names" if seeds else ""
        raise ConfigError(f"--resume: there is no checkpoint {source}{hint}")
    home = None if source is None else home_of(source)
    # Without presets the config is what the run has saved, also for another run from its weights.
    saved = {}
    if home is not None and not args.presets:
        other = "logdir" in args.overrides and not (home / "config.yaml").exists()
        saved = {} if other else read_config(home)  # of weights alone nothing is known
    config = tools.load_config(args.presets, saved | args.overrides)
    if config.logger in SERVICES and importlib.util.find_spec(config.logger) is None:
        extra = config.logger
        raise ConfigError(f"logger {extra} needs its extra: {app.install_line(extra)}")
    logdir = tools.user_path(
        config.logdir or home or f"runs/{config.task}-{config.dynamics.type}-{config.seed}"
    )
    if seeds := members_in(logdir):
        raise ConfigError(
            f"{logdir} is no folder of one run: {several(seeds)}, which --seeds continues; for"
            " another run choose another --logdir"
        )
    own = home is not None and logdir.resolve() == home.resolve()
    if own and source.name == "previous.pt" and source.with_name("latest.pt").exists():
        raise ConfigError(
            f"--resume {source}: a run continues from its latest.pt; to go back, move that away"
        )
    return config, logdir, None if own else source


def home_of(source: Path) -> Path | None:
    """The folder of the run that a checkpoint is one of; None where it lies in no checkpoints/."""
    folder = source.parent
    if folder.name != "checkpoints":  # by a relative path from inside
        folder = Path(os.path.abspath(folder))
    return folder.parent if folder.name == "checkpoints" else None


def read_config(home: Path) -> dict[str, Any]:
    """{"group.key": value} of a run's config.yaml, checked. Raises ConfigError, naming the file."""
    saved = run_config.saved_config(home)
    saved.pop("logdir", None)  # a run may be moved
    try:
        tools.load_config([], saved)
    except ConfigError as error:
        raise ConfigError(
            f"{home / 'config.yaml'}: {error}; correct it, "
            "or continue the run by its --configs and keys"
        ) from None
    return saved


def capacity(args: tools.Args) -> str:
    """The agent of --configs beside those with its last preset replaced by each of --capacity."""
    columns = {}
    for name in [args.presets[-1] if args.presets else "defaults", *args.capacity]:
        config = tools.load_config([*args.presets[:-1], name], args.overrides)
        env = env_for_spaces(config.task, config.env.tree())
        agent = models.make_agent(env, config, torch.device("cpu"))
        agent.make_optimizers()
        rows = random_rows(env.obs_space, env.act_space, config.replay.batch, config.replay.length)
        batch = {key: torch.from_numpy(x) for key, x in rows.items()}
        update = functools.partial(agent.update, batch)
        update()  # the first one allocates the optimisers' states
        columns[name] = (
            cost.sizes(agent) | {"FLOPs per update": cost.flops(update)} | cost.operators(update)
        )
    return cost.table(columns)


# ---------------------------------------------------------------- the loop


def train(run: Run, screen: Screen, signals: Signals) -> None:
    """Train ``run`` to its last step, showing it on ``screen``.

    Raises Stop, where the run can be saved, and what Run raises.
    """
    screen.rates, shown = Rates(run.step, run.updates), run.every["log"].last

    def poll() -> None:
        nonlocal shown
        signals.check()
        if screen.due() or run.every["log"].last != shown:
            shown = run.every["log"].last
            metrics = run.metrics() or run.logged
            losses = {}
            for name in ("model", "actor", "critic"):
                if f"{name}_loss" in metrics:
                    losses[name] = metrics[f"{name}_loss"]
            screen.update(run.step, run.updates, losses, run.last_return)

    run.poll = poll
    while run.step < run.config.steps:
        run.advance()
    run.finish()
    poll()


def train_population(args: tools.Args, argv: list[str], seeds: list[int], signals: Signals) -> int:
    """Train a run of every seed, in LOGDIR/SEED, all at once. -> exit status."""
    import population

    plans = [prepare(one) for one in member_args(args, seeds)]
    folders = {logdir: config for config, logdir, _ in plans}
    population.check_alike(folders)
    screen = Screen(plans[0][0].steps)
    screen.console.on_broken_pipe = functools.partial(hide_output, screen)
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(checkpoint.locked(folder))
        population.roll_back(folders)
        runs, lines = [], population.Lines(screen.line)
        with lines:
            for seed, (config, logdir, source) in zip(seeds, plans, strict=True):
                report = functools.partial(lines, seed)
                runs.append(Run(config, logdir, source, models.pick_device(config), report))
                stack.callback(runs[-1].close)
        if plans[0][0].compile == "on" and len(runs) > 1 and runs[0].device.type == "cuda":
            screen.line("compile on: the update of several seeds is not compiled")
        members = population.Population(runs, screen.line)
        screen.rates = Rates(*members.totals()[:2])

        def poll() -> None:
            signals.check()
            if screen.due():
                step, updates, score = members.totals()
                screen.update(step, updates, {}, score)

        members.poll = poll
        try:
            signals.defer()
            with screen:
                members.train()
        except Stop as stop:
            name = signal.Signals(stop.signum).name
            screen.line(f"{name}: writing {len(members.active)} checkpoints; Ctrl-C ends at once")
            members.save()
            screen.line(f"stopped by {name}; the same command continues")
            return 128 + stop.signum
        lines = [f"{run.logdir}: {run.step} steps, {run.updates} updates" for run in runs]
        again = continuation(argv, max(plans[0][0].steps, *(run.step for run in runs)))
        screen.line("\n".join([*lines, f"continue:   {again}"]))
        if members.failed:
            first = next(iter(members.failed.values()))
            raise Failure(f"{len(members.failed)} of {len(runs)} seeds failed, the first: {first}")
        return 0


def start(argv: list[str], signals: Signals) -> int:
    """Train as the command line says. -> exit status. Raises what ``main`` turns into a line."""
    process.keep_freed_memory()
    args = tools.parse(argv)
    if seeds := member_seeds(args.overrides):
        return train_population(args, argv, seeds, signals)
    if args.capacity:
        print(capacity(args))
        return 0
    config, logdir, source = prepare(args)
    with checkpoint.locked(logdir):
        screen = Screen(config.steps)
        screen.console.on_broken_pipe = functools.partial(hide_output, screen)
        run = Run(config, logdir, source, models.pick_device(config), screen.line)
        with contextlib.closing(run):
            try:
                signals.defer()
                with screen:
                    train(run, screen, signals)
            except Stop as stop:
                name = signal.Signals(stop.signum).name
                screen.line(
                    f"{name}: writing a checkpoint; Ctrl-C ends at once and leaves the last one as "
                    "it is"
                )
                run.save()
                screen.line(
                    f"stopped by {name} at step {run.step}; checkpoint {run.folder / 'latest.pt'}"
                )
                return 128 + stop.signum
            except EnvError as error:
                raise Failure(
                    f"{error}; the last checkpoint is {run.folder / 'latest.pt'}"
                ) from error
            screen.line(summary(run, argv))
            return 0


def hide_output(screen: Screen) -> None:
    """The screen's pipe is closed, where rich would exit: the run continues without output."""
    screen.console.quiet = True
    app.hide_stdout()


# ---------------------------------------------------------------- main


def continuation(argv: list[str], steps: int) -> str:
    """The same command, for as many steps again."""
    path = Path(sys.argv[0])
    started = path.suffix == ".py" and getattr(sys.modules["__main__"], "__spec__", None) is None
    if started and app.ROOT not in path.resolve().parents:  # it may add what this has not
        return f"{shlex.join(script())} with --steps {2 * steps}"
    kept = []
    for before, word in zip(["", *argv], argv, strict=False):
        if word.partition("=")[0] != "--steps" and before != "--steps":
            kept.append(word)
    return shlex.join([*app.command("dreamer"), *kept, "--steps", str(2 * steps)])


def summary(run: Run, argv: list[str]) -> str:
    """Where everything is, and which command continues."""
    videos = sorted((run.logdir / "videos").glob(f"{run.step:09d}-*.mp4"))
    again = continuation(argv, max(run.step, run.config.steps))
    lines = [f"done: {run.step} steps, {run.updates} updates"]
    lines += [f"video:      {path}" for path in videos]
    return "\n".join([*lines, f"checkpoint: {run.folder / 'latest.pt'}", f"continue:   {again}"])


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 2 bad arguments or folders, 1 failure, 128 + signal."""
    if (status := answer(argv)) is not None:
        return status
    members = any(word.startswith(("--seeds", "--population")) for word in argv)
    also = ", or fewer seeds at a time" if members else ""
    return guarded(functools.partial(start, argv), (Failure,), " before the first step", also)


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
