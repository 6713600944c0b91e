"""Run folders of dreamer.py, read back: config.yaml and metrics.jsonl,
wherever they were copied to.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comparison.options import HOUSEKEEPING
from hidreamer.checkpoint import CheckpointError, load_checkpoint
from hidreamer.provenance import STARTS
from run_config import EVALUATION_KEYS, check_same_run, idle, saved_config
from tools import Config, ConfigError, flatten, load_config

WHOLE = "dynamics.hrvq.levels"  # a key of every config that is whole
# What stands for a config that is not known.
UNKNOWN = {"replay.prefill": 0, "env.action_repeat": 1, "dynamics.type": "unknown"}
TYPES = {"task": str, "dynamics.type": str, "seed": int, "steps": int, "log_every": int}
TYPES |= {"replay.prefill": int, "env.action_repeat": int}
SEVERAL = {"commit", "hardware"}  # a run that was continued may have begun elsewhere: name all


@dataclass(frozen=True)
class Run:
    """One run, read from its folder."""

    folder: Path
    model: str  # the preset that it was started with, or the name of its latent state
    config: dict[str, Any]  # flat
    start: dict[str, Any]  # what its last start noted, and every commit and hardware that it saw
    step: int  # environment frames that it reached
    complete: bool
    series: dict[str, np.ndarray]  # name of a scalar -> (n, 2): step, value
    given: Mapping[str, Any] = field(default_factory=dict)  # the part of it that a file has

    @property
    def task(self) -> str:
        return self.config["task"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def name(self) -> str:
        return f"{self.task}/{self.model}/{self.seed}"

    @property
    def published(self) -> bool:
        """Whether all that is known of it is its score at the end."""
        return "score" in self.series

    @property
    def known(self) -> bool:
        """Whether its config is known: not of a file that holds scores alone."""
        return WHOLE in self.config

    @property
    def stated(self) -> dict[str, Any]:
        """What is known of its config for sure."""
        return self.config if self.known else dict(self.given)

    def get(self, name: str) -> np.ndarray:
        """(n, 2): step, value; (0, 2) where the run never logged it."""
        return self.series.get(name, np.zeros((0, 2)))


def config_hash(config: Mapping[str, Any]) -> str:
    """Of a flat config without seed and housekeeping:
    runs with one hash differ in nothing but their seed.
    """
    kept = {key: value for key, value in config.items() if key not in HOUSEKEEPING | {"seed"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _defaults() -> dict[str, Any]:
    return load_config([], {}).flat()


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config, with the defaults of keys that are younger than the run; as it is where it
    is only a part of one.
    """
    return (_defaults() if WHOLE in config else {}) | dict(config)


def records(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, or those in its ``last`` bytes; [] if there is none.

    Half a line, at the cut or where a process was killed while writing, is skipped, and so is a
    line that is no object.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - last) if last else 0)
        lines = file.read().decode(errors="replace").splitlines()
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def metrics(folder: Path, last: int = 0) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl that have a step; ``last`` as in ``records``."""
    found = records(folder / "metrics.jsonl", last)
    return [record for record in found if is_number(record.get("step"))]


def is_number(value: Any) -> bool:
    """Whether what a line of a log holds is a number, and finite: not null, nor NaN as in older
    logs.
    """
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def check_types(config: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError where a flat config, of the file ``where``, has another type for a key
    that reports compute with than this version.
    """
    for key, kind in TYPES.items():
        if key in config and type(config[key]) is not kind:
            name = {int: "a whole number", str: "text"}[kind]
            raise ConfigError(
                f"{where} is no config of a run of this version: {key} is {config[key]!r}; it must"
                f" be {name}"
            )


def finished(folder: Path, steps: int, config: Config | None = None) -> bool:
    """Whether the run's checkpoint, read whole, has ``steps`` frames done and evaluated.

    config: what is asked for, if known, whatever its seed. Then a run that was evaluated in
    another way is not finished, and ConfigError is raised for one of another config, which would
    stand in the report as what it is not.
    """
    try:
        state = load_checkpoint(
            folder / "checkpoints" / "latest.pt", {"config": dict, "counters": dict}
        )
    except CheckpointError:
        return False
    counters, known = state["counters"], True
    if config is not None:
        old = flatten(state["config"])
        remedy = "choose another --logdir, or report on what is there by --from"
        check_same_run(folder, old | {"seed": config.seed}, config, remedy)
        known = all(old.get(key, config[key]) == config[key] for key in EVALUATION_KEYS)
    return known and counters["step"] >= steps and counters["evaluated"] == counters["step"]


def read(folder: Path) -> Run:
    """Raises ConfigError for a config that is none.
    Without its checkpoints a run is complete if its log is.
    """
    config = saved_config(folder)
    for key in ("steps", "log_every", "task", "seed", "dynamics.type"):
        if key not in config:
            raise ConfigError(
                f"{folder / 'config.yaml'} is no config of a run of this version: it has no {key}"
            )
    check_types(config, folder / "config.yaml")
    config = with_defaults(config)
    steps = config["steps"]
    values: dict[str, list[tuple[float, float]]] = {}
    step = 0
    for record in metrics(folder):
        step = record.pop("step")
        for name, value in record.items():
            if is_number(value):
                values.setdefault(name, []).append((step, value))
    whole = step >= steps  # a run ends with a record
    if (folder / "checkpoints").exists():
        whole = finished(folder, steps)
    starts, start = records(folder / STARTS), {}
    for facts in starts:
        start |= facts
    for key in SEVERAL & start.keys():
        between = "; " if key == "hardware" else ", "  # a machine's own words have commas
        start[key] = between.join(dict.fromkeys(str(x[key]) for x in starts if key in x))
    series = {name: np.array(pairs, float) for name, pairs in values.items()}
    return Run(folder, str(start.get("model", "")), config, start, step, whole, series)


def find(folders: Iterable[Path]) -> list[Run]:
    """Every run in or below ``folders``. Raises ConfigError where a folder holds none, or two runs
    are one.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = [path.parent for path in sorted(folder.rglob("metrics.jsonl"))]
        inside = [path for path in inside if (path / "config.yaml").exists()]
        if not inside:
            raise ConfigError(
                f"there is no run in {folder}: a run is a folder with config.yaml and metrics.jsonl"
            )
        runs |= {path.resolve(): read(path) for path in inside}
    named = name_models(list(runs.values()))
    refuse_duplicates(named)
    return named


def single_lives(runs: Iterable[Run]) -> set[str]:
    """The games of Atari whose training episodes are one life each."""
    lost = [run for run in runs if run.known and run.config.get("env.atari.lives") == "reset"]
    return {run.task for run in lost if run.task.startswith("atari_")}


def cut(run: Run, frames: int) -> Run:
    """The first ``frames`` of a run, as if no more had been asked for.

    Incomplete is what did not come so far, also where it was asked for less. Raises ConfigError for
    a run of which only the score at another end is known.
    """
    if run.config["steps"] == frames:
        return run
    if run.published:
        raise ConfigError(f"--until: only the score at the end of {run.name} is known")
    series = {name: values[values[:, 0] <= frames] for name, values in run.series.items()}
    return replace(
        run,
        config=run.config | {"steps": frames},
        step=min(run.step, frames),
        complete=run.step >= frames,
        series={name: values for name, values in series.items() if len(values)},
    )


def refuse_duplicates(runs: Iterable[Run]) -> None:
    """Raises ConfigError where two runs have one name."""
    seen: dict[str, Run] = {}
    for run in runs:
        if run.name in seen:
            raise ConfigError(
                f"{run.folder} and {seen[run.name].folder} are both {run.name}: "
                "leave one of them out"
            )
        seen[run.name] = run


def name_models(runs: list[Run]) -> list[Run]:
    """Runs that no comparison started are named after their latent state,
    and its settings where two share a type.
    """

    def latent_hash(run: Run) -> str:
        own = {k: v for k, v in run.config.items() if not idle(k, run.config)}
        return config_hash({k: v for k, v in own.items() if k.startswith("dynamics.")})

    kinds: dict[str, set[str]] = {}
    for run in runs:
        if not run.model:
            kinds.setdefault(run.config["dynamics.type"], set()).add(latent_hash(run))

    def name(run: Run) -> str:
        kind = run.config["dynamics.type"]
        return run.model or (kind if len(kinds[kind]) == 1 else f"{kind}-{latent_hash(run)[:4]}")

    return [replace(run, model=name(run)) for run in runs]


def levels(run: Run) -> dict[str, np.ndarray]:
    """The per-level curves: {"kl_0": (n, 2), ...}."""
    return {
        key: run.series[key]
        for key in sorted(run.series)
        if re.fullmatch(r"(kl|perplexity)_\d+", key)
    }
