"""The seeds that a command line asks for, and the folders of their runs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tools
from tools import Args, ConfigError

HINT = "--seeds 0 1 2, or --population 3"


def member_seeds(overrides: dict[str, Any]) -> list[int]:
    """What --seeds or --population asks for, taken out of ``overrides``. Raises ConfigError."""
    for key in overrides.keys() - {"seed", "seeds", "population"}:
        if near := difflib.get_close_matches(key, ("seeds", "population"), 1, 0.8):
            raise ConfigError(f"there is no config key {key!r}; did you mean {near[0]}?")
    if isinstance(overrides.get("seed"), list):
        raise ConfigError(f"--seed names one seed; several in one process are {HINT}")
    named, count = overrides.pop("seeds", None), overrides.pop("population", None)
    if named is None and count is None:
        return []
    if named is not None and (count is not None or "seed" in overrides):
        raise ConfigError("--seeds names all seeds: leave out --seed and --population")
    if named is None:
        first = tools.coerce("seed", overrides.pop("seed", 0), 0, "At least 0.")
        count = tools.coerce("population", count, 1, "At least 1. At most 1000.")
        named = range(first, first + count)
    try:
        named = [
            tools.coerce("seeds", x, 0, "At least 0.")
            for x in ([named] if isinstance(named, str | bool) else named)
        ]
    except ConfigError as error:
        raise ConfigError(f"{error}: {HINT}") from None
    if len(set(named)) < len(named):
        raise ConfigError(f"--seeds names a seed twice: {' '.join(map(str, named))}")
    return named


def member_args(args: Args, seeds: Sequence[int]) -> list[Args]:
    """The command line of the run of each seed: its folder is LOGDIR/SEED, and what it resumes is
    the run of its seed in --resume, where that is the folder of several. Raises ConfigError.
    """
    source, logdir = args.resume, args.overrides.get("logdir")
    found = members_in(tools.user_path(source)) if source else []
    if missing := [seed for seed in seeds if found and seed not in found]:
        raise ConfigError(f"--resume {source}: {several(found)}, and none of seed {missing[0]}")
    if source and not found and logdir is None:
        raise ConfigError(
            "--resume of one run for several seeds needs a --logdir for their folders"
        )
    if logdir is not None and os.path.lexists(tools.user_path(str(logdir)) / "checkpoints"):
        raise ConfigError(
            f"{logdir} is the folder of one run, and those of several seeds are to be in it: choose"
            " another --logdir"
        )
    out = []
    for seed in seeds:
        values = args.overrides | {"seed": seed}
        if logdir is not None:
            values["logdir"] = str(Path(str(logdir)) / str(seed))
        resume = str(Path(source) / str(seed)) if found else source
        out.append(args._replace(overrides=values, resume=resume))
    return out


def members_in(folder: Path) -> list[int]:
    """The seeds of the runs that ``member_args`` puts into a folder."""
    try:
        if (folder / "checkpoints").exists():
            return []  # of a run itself
        names = {path.parent.parent.name for path in folder.glob("*/checkpoints/latest.pt")}
    except OSError:  # of a name that no folder can have, which whoever makes it will say
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def several(seeds: Sequence[int]) -> str:
    """What a folder with the runs of these seeds is, in words."""
    shown = [str(seed) for seed in seeds[:10]] + ["..."] * (len(seeds) > 10)
    return f"it holds runs of the seeds {' '.join(shown)}"
