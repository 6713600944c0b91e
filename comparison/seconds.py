"""Returns by the seconds that they took, beside those by frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comparison import stats
from comparison.runs import Run

CLOCKS = CPU, GPU, WALL = "CPU", "GPU", "wall-clock"


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


def add(rows: Sequence[dict], runs: Sequence[Run], scale: dict[str, Any]) -> None:
    """Add to the rows of one task what their runs returned by seconds, and to its scale the clock
    and the budget: the seconds of the run that used the fewest. Nothing where a run has none, or
    where runs were on different machines, whose seconds buy different work.

    rows and runs go in pairs; incomplete runs take no part.
    """
    scale |= {"clock": None, "budget": None}
    pairs = [pair for pair in zip(rows, runs, strict=True) if pair[0]["status"] == "complete"]
    axes = [axis(run) for _, run in pairs]
    if len({run.start.get("hardware", "") for _, run in pairs}) > 1:
        return
    if not axes or len({clock for clock, _ in axes}) > 1 or not all(len(x) for _, x in axes):
        return
    scale |= {"clock": axes[0][0], "budget": float(min(x[-1, 1] for _, x in axes))}
    for (row, run), (_, used) in zip(pairs, axes, strict=True):
        episodes = run.get("train_return").copy()
        episodes[:, 0] = np.interp(episodes[:, 0], [0.0, *used[:, 0]], [0.0, *used[:, 1]])
        row["seconds"] = float(used[-1, 1])
        row["curve_s"] = stats.curve(episodes, scale["budget"]).tolist()
        row["final_s"] = stats.final_return(episodes, scale["budget"])
        row["area_s"] = float(np.mean(row["curve_s"]))


def known(scales: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all tasks have a budget by one clock."""
    clocks = {scale["clock"] for scale in scales.values()}
    return len(clocks) == 1 and None not in clocks
