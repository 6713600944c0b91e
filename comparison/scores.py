"""Raw scores in one small file: what `--export` writes, and what `--from` reads, of other people
as well.

    {"format": "hidreamer-scores-1",
     "runs": [{"task": "atari_pong", "model": "tiny_hdreamer", "seed": 0,
               "frames": 400000,               length that was asked for
               "reached": 400000, "complete": true,
               "returns": [[frame, return], ...],      of every training episode, at its end
               "evaluations": [[frame, return], ...],
               "seconds": [[frame, seconds], ...],     used up to a frame, of ...
               "clock": "CPU",                         ... this: CPU, GPU or wall-clock
               "config": "0f3a...", "commit": "...", "hardware": "..."}],
     "configs": {"0f3a...": {"replay.ratio": 32, ...}}}

A run needs task, model, seed, frames and either `returns` or `score`, one number for its end. From
these every aggregate of a report can be computed again; what belongs to no score (levels, rates,
memory) is left out. Files of other repositories that hold {game: [score of each seed]} for Atari
100k are read as well; so is {"games": {game: {method: score}}}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comparison import seconds
from comparison.runs import Run, config_hash, refuse_duplicates
from comparison.runs import find as find_runs
from hidreamer import checkpoint
from tools import ConfigError

FORMAT = "hidreamer-scores-1"
ATARI_FRAMES = 400_000  # of Atari 100k
STARTED = ("commit", "hardware", "varied", "arm", "clock")  # of a run's start, that are kept
NO_METHODS = ("random", "human")  # columns of tables that are references, not agents
UNKNOWN = {"replay.prefill": 0, "env.action_repeat": 1, "dynamics.type": "unknown"}


def write(runs: Iterable[Run], path: Path) -> None:
    """Raises OSError."""
    rows, configs = [], {}
    for run in runs:
        name = config_hash(run.config)
        if run.known:
            configs[name] = {k: v for k, v in run.config.items() if k not in ("seed", "logdir")}
        clock, used = seconds.axis(run)
        row = {
            "task": run.task,
            "model": run.model,
            "seed": run.seed,
            "frames": run.config["steps"],
            "reached": run.step,
            "complete": run.complete,
            "returns": pairs(run.get("train_return")),
            "evaluations": pairs(run.get("eval_return")),
            "seconds": pairs(used),
            "clock": clock,
            "config": name if run.known else None,
            "commit": run.start.get("commit", "unknown"),
            "hardware": run.start.get("hardware", "unknown"),
        }
        row |= {key: run.start[key] for key in ("varied", "arm") if key in run.start}
        if run.published:
            row["score"] = float(run.get("score")[-1, 1])
        rows.append(row)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    text = f'{{"format": "{FORMAT}",\n"configs": {json.dumps(configs)},\n"runs": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def pairs(series: np.ndarray) -> list[list[float]]:
    """(n, 2) -> [[frame, value], ...], whole numbers without a point."""
    return [[int(step), int(x) if float(x).is_integer() else float(x)] for step, x in series]


def find(paths: Iterable[Path]) -> list[Run]:
    """Every run in folders and in files of scores. Raises ConfigError as `runs.find` does, and for
    a file that holds no scores.
    """
    paths = list(paths)
    folders = [path for path in paths if not path.is_file()]
    found = find_runs(folders) if folders else []
    for path in paths:
        if path.is_file():
            found += read(path)
    refuse_duplicates(found)
    return found


def read(path: Path) -> list[Run]:
    """The runs of a file of scores, ours or a published one. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no scores: {error}") from error
    try:
        if isinstance(content, dict) and "format" in content:
            if content["format"] != FORMAT:
                raise ConfigError(f"{path} has the format {content['format']!r}, not {FORMAT!r}")
            rows, configs = content["runs"], content.get("configs", {})
            return [restored(row, configs.get(row.get("config")), path) for row in rows]
        return [restored(row, None, path) for row in published(content, path.stem)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{path} holds no scores as docs/comparing.md describes them: "
            f"{type(error).__name__} {error}"
        ) from error


def restored(row: Mapping[str, Any], config: Mapping[str, Any] | None, path: Path) -> Run:
    """The Run of ``row``, an entry of the file ``path`` (docs/comparing.md has its format), and the
    flat config that it names, if any. Raises KeyError, TypeError or ValueError for what is no
    entry.
    """
    frames = int(row["frames"])
    known = {"task": str(row["task"]), "seed": int(row["seed"]), "steps": frames}
    series = {}
    for key, name in (("returns", "train_return"), ("evaluations", "eval_return")):
        if row.get(key):
            series[name] = np.array(row[key], float).reshape(len(row[key]), 2)
    if row.get("seconds"):
        series["seconds"] = np.array(row["seconds"], float).reshape(len(row["seconds"]), 2)
    if "score" in row:
        series["score"] = np.array([[frames, float(row["score"])]])
    elif "train_return" not in series and row.get("complete", True):
        raise ValueError(f"the run {row['task']}/{row['model']}/{row['seed']} has no returns")
    if not all(np.isfinite(x).all() for x in series.values()):
        raise ValueError("a score is no finite number")
    start = {
        key: row[key] for key in ("commit", "hardware", "varied", "arm", "clock") if key in row
    }
    return Run(
        path,
        str(row["model"]),
        {**UNKNOWN, **(config or {}), **known},
        start,
        int(row.get("reached", frames)),
        bool(row.get("complete", True)),
        series,
    )


# ---------------------------------------------------------------- other people's


def published(content: Any, name: str) -> list[dict[str, Any]]:
    """Entries of {game: [score of each seed]}, where the file's name is the method's, or of a
    table {"games": {game: {method: score}}}. Raises TypeError, ValueError for others.
    """
    games = content.get("games", content)
    rows = []
    for game, scores in games.items():
        by_method = scores if isinstance(scores, dict) else {name: scores}
        for method, values in by_method.items():
            if method.lower() in NO_METHODS:
                continue
            values = values if isinstance(values, list) else [values]
            for seed, score in enumerate(values):
                if isinstance(score, bool) or not math.isfinite(float(score)):
                    raise ValueError(f"{game} of {method} has the score {score!r}")
                row = {"task": task(game), "model": method, "seed": seed, "score": float(score)}
                rows.append(row | {"frames": ATARI_FRAMES})
    if not rows:
        raise ValueError("it is empty")
    return rows


def task(game: str) -> str:
    """`atari_bank_heist` of BankHeist; a name with an underscore or in small letters stays."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=Up)(?=N)|(?<=N)(?=Down)", "_", game).lower()
    return words if words.startswith("atari_") else f"atari_{words}"
