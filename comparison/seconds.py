"""Returns by the seconds that they took, beside those by frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from comparison import runs, stats
from comparison.runs import Run

CLOCKS = CPU, GPU, WALL = "CPU", "GPU", "wall-clock"
# Settings that teach nothing and take seconds, or that move work to where it is not counted.
TIMED = ("compile", "threads", "env.parallel", "replay.store", "log_every", "checkpoint_every")
TIMED += ("eval_every", "eval_episodes", "video", "decode_levels")
TAIL = 0.05  # share of a run, at its end, that may lack seconds


def axis(run: Run) -> tuple[str, np.ndarray]:
    """-> which seconds, and (n, 2): frame, seconds used until then; (0, 2) where none were logged.

    On a GPU seconds are those during which the run held it. On CPUs they are those of the
    process, all its threads together: waiting for a core does not count, though sharing its caches
    does. Of runs from before they were logged, or that went on from one kind to the other,
    wall-clock time. Members of a population share their process's seconds equally. Work that a kill
    undid does not count.
    """
    if "seconds" in run.series:
        return run.start.get("clock", WALL), run.series["seconds"]
    frames, cpu = run.get("perf/frames_per_s"), run.get("perf/cpu_s")
    moving = frames[frames[:, 1] > 0]
    members = dict(run.get("perf/members").tolist())
    share = lambda steps: np.array([1.0 / members.get(step, 1.0) for step in steps.tolist()])
    wall = np.diff(moving[:, 0], prepend=0.0) / moving[:, 1]
    wall = (wall * share(moving[:, 0])).cumsum()
    # "MODEL, N threads, NAME OF THE GPU", of each machine: see provenance
    machines = run.start.get("hardware", "").split("; ")
    on_gpu = {run.config.get("device") != "cpu" and "threads, " in x for x in machines}
    if on_gpu == {True}:
        return GPU, np.stack([moving[:, 0], wall], 1)
    if on_gpu == {False} and len(cpu) and len(cpu) == len(frames):
        return CPU, np.stack([cpu[:, 0], (cpu[:, 1] * share(cpu[:, 0])).cumsum()], 1)
    return WALL, np.stack([moving[:, 0], wall], 1)


def unlike(found: Sequence[Run]) -> list[str]:
    """The keys of TIMED in which runs of a task differ."""
    values = {key: {str(run.config[key]) for run in found if key in run.config} for key in TIMED}
    return [key for key, several in values.items() if len(several) > 1]


def cut(run: Run, frames: int) -> Run:
    """``runs.cut``, with the seconds until the frame where it is cut, between two records."""
    short, (clock, used) = runs.cut(run, frames), axis(run)
    if short is run or not len(used) or used[-1, 0] < frames:
        return short
    at_end = np.interp(frames, [0.0, *used[:, 0]], [0.0, *used[:, 1]])
    kept = np.concatenate([used[used[:, 0] < frames], [[frames, at_end]]])
    return replace(
        short, start=short.start | {"clock": clock}, series=short.series | {"seconds": kept}
    )


def add(rows: Sequence[dict], found: Sequence[Run], scale: dict[str, Any]) -> None:
    """Add to the rows of one task what their runs returned by seconds, and to its scale the clock
    and the budget: the seconds of the run that used the fewest. Nothing where a run has none to its
    end, or where runs were on different machines, or on machines that are not known, whose seconds
    buy different work, or with different ``TIMED`` settings.

    rows and found go in pairs; incomplete runs take no part.
    """
    scale |= {"clock": None, "budget": None}
    pairs = [pair for pair in zip(rows, found, strict=True) if pair[0]["status"] == "complete"]
    axes = [axis(run) for _, run in pairs]
    machines = {run.start.get("hardware", "unknown") for _, run in pairs}
    if len(machines) != 1 or machines & {"", "unknown"} or unlike([run for _, run in pairs]):
        return
    if len({clock for clock, _ in axes}) > 1:
        return
    if not all(len(x) and x[-1, 0] >= (1.0 - TAIL) * scale["steps"] for _, x in axes):
        return
    scale |= {"clock": axes[0][0], "budget": float(min(x[-1, 1] for _, x in axes))}
    for (row, run), (_, used) in zip(pairs, axes, strict=True):
        episodes = run.get("train_return")
        episodes = episodes[episodes[:, 0] <= used[-1, 0]]  # later ones have no second
        episodes[:, 0] = np.interp(episodes[:, 0], [0.0, *used[:, 0]], [0.0, *used[:, 1]])
        row["seconds"] = float(used[-1, 1])
        row["curve_s"] = stats.curve(episodes, scale["budget"]).tolist()
        row["final_s"] = stats.final_return(episodes, scale["budget"])
        row["area_s"] = float(np.mean(row["curve_s"]))


def known(scales: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all tasks have a budget by one clock."""
    clocks = {scale["clock"] for scale in scales.values()}
    return len(clocks) == 1 and None not in clocks
