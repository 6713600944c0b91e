"""Train a DreamerV3 agent whose latent state is chosen by config.

    python dreamer.py --configs PRESET [PRESET ...] --task SUITE_NAME --logdir FOLDER [--key value | --group.key value]

The same command again continues the run.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

import torch

import models
import tools
from envs import EnvError, make_env
from hidreamer import cost
from tools import CheckpointError, Config, ConfigError
from training import Failure, Run, Stop

# ---------------------------------------------------------------- command line


def prepare(args: tools.Args) -> tuple[Config, Path, Path | None]:
    """-> config, folder of the run, checkpoint of another run to start from. Raises ConfigError."""
    source = Path(args.resume) if args.resume else None
    if source is not None and source.is_dir():
        found = [p for p in (source / "checkpoints" / "latest.pt", source / "latest.pt") if p.exists()]
        source = found[0] if found else source / "checkpoints" / "latest.pt"
    if source is not None and not source.exists():
        raise ConfigError(f"--resume: there is no checkpoint {source}")
    home = source.parent.parent if source is not None and source.parent.name == "checkpoints" else None
    alone = home is not None and not args.presets and "logdir" not in args.overrides  # it goes on as it was
    saved = {}
    if alone:
        known = tools.load_config([], {}).flat().keys() - {"logdir"}  # what no longer exists is told as a change, later
        saved = {key: x for key, x in tools.saved_config(home).items() if key in known}
    config = tools.load_config(args.presets, saved | args.overrides)
    if config.logger == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger wandb needs its extra: pip install -e '.[wandb]'")
    logdir = Path(config.logdir or home or f"runs/{config.task}-{config.dynamics.type}-{config.seed}").expanduser()
    own = home is not None and logdir.resolve() == home.resolve()
    return config, logdir, None if own else source


def capacity(args: tools.Args) -> str:
    """The agent of --configs beside those with its last preset replaced by each of --capacity."""
    columns = {}
    for name in [args.presets[-1] if args.presets else "defaults", *args.capacity]:
        config = tools.load_config([*args.presets[:-1], name], args.overrides)
        env = make_env(config.task, config.env.tree(), 0)
        agent = models.make_agent(env, config, torch.device("cpu"))
        agent.make_optimizers()
        rows = cost.random_rows(env.obs_space, env.act_space, config.replay.batch, config.replay.length)
        batch = {key: torch.from_numpy(x) for key, x in rows.items()}
        update = functools.partial(agent.update, batch)
        update()  # the first one allocates the optimisers' states
        columns[name] = cost.sizes(agent) | {"FLOPs per update": cost.flops(update)} | cost.operators(update)
    return cost.table(columns)


# ---------------------------------------------------------------- main


def summary(run: Run, argv: list[str]) -> str:
    """Where everything is, and which command goes on."""
    videos = sorted((run.logdir / "videos").glob(f"{run.step:09d}-*.mp4"))
    kept = [word for i, word in enumerate(argv) if not word.startswith("--steps") and argv[i - 1] != "--steps"]
    again = shlex.join(["python", "dreamer.py", *kept, "--steps", str(2 * run.config.steps)])
    lines = [f"done: {run.step} steps, {run.updates} updates"]
    lines += [f"video:      {path}" for path in videos]
    return "\n".join([*lines, f"checkpoint: {run.folder / 'latest.pt'}", f"continue:   {again}"])


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 2 bad arguments, 1 failure, 128 + signal after a signal."""
    if not argv or "--help" in argv or "-h" in argv:
        print(tools.help_text(__doc__))
        return 0 if argv else 2
    run = None
    try:
        args = tools.parse(argv)
        if args.capacity:
            print(capacity(args))
            return 0
        config, logdir, source = prepare(args)
        run = Run(config, logdir, source, models.pick_device(config))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, run.heed)
        with run.screen.bar:
            run.train()
            run.finish()
        print(summary(run, argv))
        return 0
    except Stop as stop:
        run.save()
        print(
            f"stopped by {signal.Signals(stop.signum).name} at step {run.step}; checkpoint {run.folder / 'latest.pt'}"
        )
        return 128 + stop.signum
    except (ConfigError, CheckpointError, EnvError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) or (run and isinstance(error, EnvError)) else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: the disk is full ({error}); the last checkpoint in {logdir / 'checkpoints'} is whole",
            file=sys.stderr,
        )
        return 1
    finally:
        if run is not None:
            run.close()


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of --help | head: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
