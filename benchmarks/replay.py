"""Replay in memory and on a disk: CPU time, page faults and peak memory of adding, sampling and
resuming.

    python benchmarks/replay.py [--store memory disk] [--steps 100000] [--folder FOLDER]
        [--out FILE]

Each store has a process of its own. Rows are Atari Pong's, 64 x 64 x 3; a batch is 16 x 64.
Sampling from a disk is measured twice: as it is in a run, where the system keeps what was read
lately, and after it has been made to forget.
"""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

import tools
from envs import make_env
from hidreamer import cost
from hidreamer.episodes import Episodes
from hidreamer.provenance import provenance
from hidreamer.replay import Replay, Rows, Spec, row_spec
from hidreamer.spaces import random_action

EPISODE = 1000  # steps
UNITS = ("cpu_ms", "wall_ms", "page_faults")


def frames(count: int) -> tuple[Spec, Rows]:
    """``count`` rows of Pong, played at random."""
    env = make_env("atari_pong", tools.load_config(["atari100k"], {}).env.tree(), 0)
    spec, rng = row_spec(env.obs_space, env.act_dim), np.random.default_rng(0)
    out, rows = env.reset(), []
    for _ in range(count):
        action = random_action(env.act_space, 1, rng)[0]
        out = env.reset() if out["is_last"] else env.step(action)
        rows.append({key: (out | {"prev_action": action})[key] for key in spec})
    columns = {}
    for key in spec:
        columns[key] = np.stack([row[key] for row in rows])
    return spec, columns


def figures(store: str, steps: int, folder: Path) -> dict[str, float]:
    spec, rows = frames(EPISODE)
    disk, found = folder if store == "disk" else None, {}

    def make() -> Replay:
        rng = np.random.default_rng(0)
        return Replay(
            spec, capacity=1_000_000, batch=16, length=64, streams=1, rng=rng, folder=disk
        )

    def fill(replay: Replay, episodes: Episodes) -> None:
        last = np.zeros(1, bool)
        for i in range(EPISODE):
            replay.add({key: x[i : i + 1] for key, x in rows.items()})
            episodes.add(replay, last)

    replay, episodes, before = make(), Episodes(folder / "train_eps", 1), peak_mb()
    fill_episode = functools.partial(fill, replay, episodes)
    found["add_1000"] = [spent(fill_episode) for _ in range(steps // EPISODE)]
    memory = {"data_mb": measure.replay_bytes(replay) / 2**20, "peak_mb": peak_mb() - before}
    found["sample"] = [spent(replay.sample) for _ in range(50)]
    if disk:
        forget(replay)
        found["sample_forgotten"] = [spent(replay.sample) for _ in range(50)]
    state = recorded(replay, episodes)
    replay.streams.clear()  # this memory goes before as much is taken again

    def resume() -> None:
        Episodes(episodes.folder, 1).restore(make(), state, {})

    found["resume"] = [spent(resume)]
    out: dict[str, Any] = {key: round(x) for key, x in memory.items()}
    for name, times in found.items():
        # Means of all: a fault or a write-back that a few pay for belongs to the rest.
        out[name] = dict(zip(UNITS, np.mean(times, 0).round(2).tolist(), strict=True))
    return out


def peak_mb() -> float:
    return cost.peak_mb(torch.device("cpu"))


def spent(fn: Callable[[], object]) -> tuple[float, float, int]:
    """Of one call, in the order of UNITS."""
    before = measure.cpu_seconds(), time.perf_counter(), page_faults()
    fn()
    cpu, wall = measure.cpu_seconds() - before[0], time.perf_counter() - before[1]
    return 1e3 * cpu, 1e3 * wall, page_faults() - before[2]


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def recorded(replay: Replay, episodes: Episodes) -> dict:
    """The state of a run whose episodes of EPISODE steps fill this replay: one file, and links to
    it.
    """
    steps, episodes.running[0] = len(replay), EPISODE
    episodes.cut(replay, 0)
    name, count = episodes.files[0][0]
    files = [(f"{i:07d}-00-{count}.npz", count) for i in range(steps // count)]
    for link, _ in files:
        if link != name:
            os.link(episodes.folder / name, episodes.folder / link)
    return {"running": [0], "count": len(files), "run": episodes.run, "files": [files]}


def forget(replay: Replay) -> None:
    """Write the rows out and let the system drop them from its cache, so that they come from the
    disk again.
    """
    for stream in replay.streams:
        os.fsync(stream.file.fileno())
        stream.buffer.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(stream.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument(
        "--store", nargs="+", choices=("memory", "disk"), default=["memory", "disk"]
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = provenance() | {"steps": args.steps}
    for store in args.store:
        # A fresh process, so that its peak is that of this store alone.
        fresh = multiprocessing.get_context("spawn").Pool(1)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, fresh as pool:
            report[store] = pool.apply(figures, (store, args.steps, Path(folder)))
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
