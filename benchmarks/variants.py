"""Variants of one stage of the pipeline on the same inputs, and one table of them.

What encoders.py and experts.py share. Every variant is a stage of its own in FOLDER/GROUP/NAME,
with the same seed; the same command continues, and trains nothing again that is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import measure  # noqa: F401  puts the repository on the path
import torch

import models
import tools
from hidreamer import checkpoint
from hidreamer.provenance import provenance
from pipeline import __main__ as command
from pipeline import gate, manifest, stage
from pipeline.stage import Stage
from signals import Signals, Stop, guarded
from tools import Config, ConfigError

Columns = Mapping[str, Mapping[str, float | None]]  # {column: {metric: value}}


class Variant(NamedTuple):
    """One that is trained."""

    folder: Path  # as LOGDIR of the pipeline
    config: Config


def folder(root: Path, group: str, name: str, needs: tuple[str, ...]) -> Path:
    """Of a variant: the finished stages ``needs`` are linked into it."""
    here = root / group / name.replace(" ", "_").replace(",", "")
    here.mkdir(parents=True, exist_ok=True)
    for needed in needs:
        if not (here / needed).exists():
            (here / needed).symlink_to((root / needed).resolve())
    return here


def table(columns: Columns) -> str:
    """Markdown, a variant a column, in the rows of the first."""
    lines = [f"|  | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for metric in next(iter(columns.values())):
        cells = [gate.number(column.get(metric)) for column in columns.values()]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def origin(kind: type[Stage], found: Mapping[str, Variant]) -> str:
    """One sentence: commits, seed, hardware, time and command."""
    bodies = [manifest.read(one.folder / kind.name) for one in found.values()]
    one_of = lambda key: ", ".join(sorted({str(body[key]) for body in bodies}))
    minutes = sum(body["seconds"] for body in bodies) / 60.0
    now = provenance()
    return (
        f"{len(bodies)} variants trained at commit {one_of('commit')}, seed {one_of('seed')}, on"
        f" {one_of('hardware')}, in {minutes:.0f} minutes; tabulated at {now['commit']} by"
        f" `{now['command']}`.\n"
    )


def run(
    argv: list[str],
    doc: str,
    kind: type[Stage],
    group: str,
    changes: Callable[[Config], Mapping[str, Mapping[str, Any]]],
    columns: Callable[[Mapping[str, Variant], torch.device], Columns],
) -> int:
    """A benchmark's ``main``. -> exit status, as of ``python -m pipeline``.

    changes: of the config, {name: config keys}. columns: of the variants that are trained so far.
    """
    if "--help" in argv or "-h" in argv:
        print(doc)
        return 0

    def work(signals: Signals) -> int:
        args = tools.parse(argv)
        out = args.overrides.pop("out", "")
        if not out:
            raise ConfigError("--out is missing: the file that gets the table")
        base, _ = command.stage_config(kind.name, args)
        root, device, found = Path(base.logdir).expanduser(), models.pick_device(base), {}
        for needed in kind.needs:  # before a folder is made
            manifest.check_input(root, needed, group, base.flat())
        signals.defer()
        for name, keys in changes(base).items():
            config = tools.load_config([], base.flat() | dict(keys))
            here = folder(root, group, name, kind.needs)
            stage.run(kind, config, here, device, signals.check, (Stop,))
            found[name] = Variant(here, config)
        text = f"{table(columns(found, device))}\n{origin(kind, found)}"
        checkpoint.replace_text(Path(str(out)).expanduser(), text)
        print(text)
        return 0

    return guarded(work, command.FAILURES, command.AGAIN)
