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

A run needs task, model, seed, frames and either `returns` (an empty list where no episode ended) or
`score`, one number for its end. From these every aggregate of a report can be computed again; what
belongs to no score (levels, rates, memory) is left out. Files of other repositories that hold
{game: [score of each seed]} for Atari 100k are read as well; so is
{"games": {game: {method: score}}}.
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
from comparison.runs import (
    UNKNOWN,
    Run,
    check_types,
    config_hash,
    refuse_duplicates,
    single_lives,
    with_defaults,
)
from comparison.runs import find as find_runs
from comparison.summary import HUMAN
from hidreamer import checkpoint
from tools import ConfigError

FORMAT = "hidreamer-scores-1"
ATARI_FRAMES = 400_000  # of Atari 100k
# {what is kept of a run's start: its type}
STARTED = {"commit": str, "hardware": str, "varied": str, "arm": int, "clock": str}
SERIES = {"returns": "train_return", "evaluations": "eval_return", "seconds": "seconds"}
NO_METHODS = ("random", "human")  # columns of tables that are references, not agents
GAMES = {name.replace("_", ""): name for name in HUMAN}


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
    checkpoint.replace_text(path, text)


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
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} holds no scores: {error}") from error
    try:
        if isinstance(content, dict) and "format" in content:
            if content["format"] != FORMAT:
                raise ConfigError(f"{path} has the format {content['format']!r}, not {FORMAT!r}")
            rows, configs = content["runs"], content.get("configs", {})
            if not rows:
                raise ValueError("it has no runs")
            return [restored(row, configs.get(row.get("config")), path) for row in rows]
        return [restored(row, None, path) for row in published(content, path.stem)]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path} holds no scores as docs/comparing.md describes them: {reason}"
        ) from error


def restored(row: Mapping[str, Any], config: Mapping[str, Any] | None, path: Path) -> Run:
    """The Run of ``row``, an entry of the file ``path`` (docs/comparing.md has its format), and the
    flat config that it names, if any. Raises KeyError, TypeError or ValueError for what is no
    entry.
    """
    frames, seed = int(row["frames"]), int(row["seed"])
    if frames < 1:
        raise ValueError(f"a run has {frames} frames")
    for key in ("task", "model"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"a run has the {key} {row[key]!r}")
    known = {"task": row["task"], "seed": seed, "steps": frames}
    reached = int(row.get("reached", frames))
    whole = bool(row.get("complete", reached >= frames))
    series = {}
    for key, name in SERIES.items():
        if row.get(key):
            x = np.array(row[key], float).reshape(len(row[key]), 2)
            series[name] = x[np.argsort(x[:, 0], kind="stable")]
    if "score" in row:
        series["score"] = np.array([[frames, float(row["score"])]])
    elif "returns" not in row and whole:
        raise ValueError(f"the run {row['task']}/{row['model']}/{row['seed']} has no returns")
    if not all(np.isfinite(x).all() for x in series.values()):
        raise ValueError("a score is no finite number")
    if (np.diff(series.get("seconds", np.zeros((0, 2)))[:, 1]) < 0).any():
        raise ValueError("the seconds of a run fall")
    if row.get("clock", seconds.WALL) not in seconds.CLOCKS:
        raise ValueError(f"the clock is {row['clock']!r}, not {', '.join(seconds.CLOCKS)}")
    check_types(config or {}, path)
    start = {key: row[key] for key in STARTED if row.get(key) is not None}
    for key, value in start.items():
        if type(value) is not STARTED[key]:
            raise ValueError(f"{key} is {value!r}")
    given = with_defaults(config or {})
    whole_config = {**UNKNOWN, **given, **known}
    return Run(path, row["model"], whole_config, start, reached, whole, series, given)


# ---------------------------------------------------------------- other people's


def published(content: Any, name: str) -> list[dict[str, Any]]:
    """Entries of {game: [score of each seed]}, where the file's name is the method's, or of a
    table {"games": {game: {method: score}}}. Raises TypeError, ValueError for others.
    """
    games = content.get("games", content) if isinstance(content, dict) else content
    if not isinstance(games, dict):
        raise TypeError(f"it is a {type(games).__name__}, not {{game: scores}}")
    rows = []
    for game, scores in games.items():
        if task(game).removeprefix("atari_") not in HUMAN:
            raise ValueError(f"{game!r} is none of the {len(HUMAN)} games of Atari 100k")
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
        raise ValueError("there is no score of an agent in it")
    return rows


def beside(runs: list[Run]) -> list[Run]:
    """``runs`` without what cannot be compared: published scores on games of which there are no
    own runs; where all are published, on games that not all methods have.

    Raises ConfigError where own runs of a game are shorter than those behind a published score,
    and where a method is left with none.
    """
    own = [run for run in runs if not run.published]
    models = {run.model for run in runs}
    games: dict[str, set[str]] = {}  # {task: models}
    for run in own or runs:
        games.setdefault(run.task, set()).add(run.model)
    kept = [run for run in runs if run.task in games and (own or games[run.task] == models)]
    if lost := sorted(models - {run.model for run in kept}):
        others = "no game of the own runs" if own else "no game that the others have"
        raise ConfigError(f"{lost[0]} has a score on {others}: leave it out (--models, --from)")
    if lived := single_lives(own) & {run.task for run in kept if run.published}:
        raise ConfigError(
            f"returns on {min(lived)} are of single lives (env.atari.lives reset), the published"
            " scores of whole games: leave one of them out (--models, --from)"
        )
    for run in own:
        frames = run.config["steps"]
        for other in kept:
            if other.published and other.task == run.task and other.config["steps"] > frames:
                raise ConfigError(
                    f"{run.name} has {frames:,} frames, and the score of {other.model} is that of"
                    f" {other.config['steps']:,}: continue it to as many (--steps), or leave"
                    f" {other.model} out"
                )
    return kept


def task(game: str) -> str:
    """`atari_bank_heist` of BankHeist, Bank Heist or bank_heist."""
    letters = re.sub(r"[^a-z0-9]", "", game.lower().removeprefix("atari_"))
    return f"atari_{GAMES.get(letters, letters)}"
