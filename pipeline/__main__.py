"""Train in stages, each usable alone.

    python -m pipeline STAGE|all --configs PRESET --logdir FOLDER [--strict] [--key value ...]

The same command again continues. Keys of the group ``pipeline`` may be written without it, those of
the stage without its name: --agent is --pipeline.collect.agent for ``collect``. ``all`` runs every
stage that is not finished, and writes FOLDER/report.html. --strict ends with 1 where a metric is no
better than its baseline.
"""

# ruff: noqa: E402  what needs no torch is done before it is loaded

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import tools
from hidreamer import app
from tools import ConfigError

NAMES = ("collect", "encoder", "tokenizer", "world_model", "policy")


def full_key(key: str, name: str, keys: Iterable[str]) -> str:
    """The config key that ``key`` stands for on the command line of stage ``name``.

    Raises ConfigError where it could be several stages' own, or is another stage's.
    """
    keys = set(keys)
    for candidate in (f"pipeline.{name}.{key}", f"pipeline.{key}"):
        if candidate in keys:
            return candidate
    if name == "all":
        found = [f"pipeline.{other}.{key}" for other in NAMES]
        found = [candidate for candidate in found if candidate in keys]
        if len(found) > 1:
            raise ConfigError(f"--{key} could be {' or '.join('--' + x for x in found)}")
        if found:
            return found[0]
    others = [f"pipeline.{other}.{key}" for other in NAMES if f"pipeline.{other}.{key}" in keys]
    if key in keys and others:  # a key of dreamer.py of that name would be taken and do nothing
        written = " or ".join("--" + other for other in others)
        raise ConfigError(f"--{key} is no key of {name}: write {written}")
    return key


def configured(argv: list[str]) -> tuple[str, tools.Config, bool]:
    """-> stage, config, and whether gates are ``--strict``. Raises ConfigError."""
    name, *rest = argv
    if name not in (*NAMES, "all"):
        raise ConfigError(f"there is no stage {name!r}; {tools.nearest(name, (*NAMES, 'all'))}")
    return name, *stage_config(name, tools.parse(rest))


def stage_config(name: str, args: tools.Args) -> tuple[tools.Config, bool]:
    """-> config of the stage ``name`` (or "all"), and whether gates are ``--strict``. Raises
    ConfigError.
    """
    if args.resume or args.capacity:
        raise ConfigError("--resume and --capacity are dreamer.py's: a stage continues by itself")
    values: dict[str, Any] = dict(args.overrides)
    strict = tools.coerce("strict", values.pop("strict", "false"), False, "")
    known = tools.load_config([], {}).flat()
    overrides = {full_key(key, name, known): value for key, value in values.items()}
    config = tools.load_config(args.presets, overrides)
    if not config.logdir:
        raise ConfigError("--logdir is missing: the folder that all stages share")
    return config, strict


def answer(argv: list[str]) -> int | None:
    """--help and wrong arguments need nothing that takes seconds to load. -> exit status, None
    where there is more to do.
    """
    if not argv or "--help" in argv or "-h" in argv:
        text = __doc__.replace("python -m pipeline", " ".join(app.command("pipeline")))
        print(tools.help_text(f"{text}\nStages: {', '.join(NAMES)}."))
        return 0 if argv else 2
    try:
        configured(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return None


if __name__ == "__main__" and (status := app.run(answer)) is not None:
    sys.exit(status)

import models
from signals import Signals, Stop, guarded
from training import Failure

try:
    from pipeline import gate, report, stage
    from pipeline.collect import Collect
    from pipeline.encoder import Encoder
    from pipeline.policy import Policy
    from pipeline.stage import StageError
    from pipeline.token_model import check_config
    from pipeline.tokenizer import Tokenizer
    from pipeline.world_model import WorldModel
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    message = f"error: the pipeline needs its extra: {app.install_line('compare')} ({error})"
    print(message, file=sys.stderr)
    sys.exit(2)

FAILURES = (StageError, Failure)
AGAIN = "; the same command continues"  # what is said of a signal
STAGES = {kind.name: kind for kind in (Collect, Encoder, Tokenizer, WorldModel, Policy)}


def start(argv: list[str], signals: Signals) -> int:
    """-> exit status. Raises what ``main`` turns into a line."""
    name, config, strict = configured(argv)
    check_config(config)
    root, device = tools.user_path(config.logdir), models.pick_device(config)
    signals.defer()
    for kind in STAGES.values() if name == "all" else [STAGES[name]]:
        found = stage.run(kind, config, root, device, signals.check, (Stop,))
        print(gate.markdown(found))
        if strict and not found["passed"]:
            return 1
    if name == "all":
        print(f"report: {report.write(root, config, STAGES, device, signals.check)}")
    return 0


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 1 failure or, with --strict, a gate with warnings; 2 bad arguments,
    folders or inputs; 128 + signal.
    """
    if (status := answer(argv)) is not None:
        return status
    return guarded(functools.partial(start, argv), FAILURES, AGAIN)


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
