"""What an update costs: dispatched operators, FLOPs, CPU and wall seconds, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

# Operators that launch no kernel: they make another view of a tensor, or memory.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "squeeze_", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal"}  # the device must wait for the host


class Operators(TorchDispatchMode):
    """Counts what is dispatched below autograd: kernels, views (and allocations), host reads."""

    def __init__(self):
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def counts(self) -> dict[str, int]:
        views = sum(n for name, n in self.names.items() if name in VIEWS)
        reads = sum(n for name, n in self.names.items() if name in HOST_READS)
        return {"kernels": sum(self.names.values()) - views - reads, "views": views, "host_reads": reads}


def operators(fn: Callable[[], object]) -> dict[str, int]:
    with Operators() as mode:
        fn()
    return mode.counts()


def flops(fn: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def interleaved(
    fns: Mapping[str, Callable[[], object]], repeats: int, cuda: bool
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each function, called in turn, so that a drifting machine drifts for all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            fn()
            if cuda:
                torch.cuda.synchronize()
            times[name].append((cpu_seconds() - cpu, time.perf_counter() - wall))
    return times


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def peak_mb(cuda: bool) -> float:
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def random_rows(
    obs_space: Mapping[str, spaces.Space], act_space: spaces.Space, batch: int, length: int
) -> dict[str, np.ndarray]:
    """A batch of the right shapes and types, (B, T, ...), from a fixed seed."""
    rng = np.random.default_rng(0)
    rows = {}
    for key, space in obs_space.items():
        shape = (batch, length, *space.shape)
        kind = space.dtype
        rows[key] = (
            rng.standard_normal(shape, np.float32)
            if kind == np.float32
            else rng.integers(0, 256 if kind == np.uint8 else 2, shape, np.uint8).astype(kind)
        )
    if isinstance(act_space, spaces.Box):
        rows["prev_action"] = rng.uniform(-1, 1, (batch, length, *act_space.shape)).astype(np.float32)
    else:
        sizes = [act_space.n] if isinstance(act_space, spaces.Discrete) else act_space.nvec
        parts = [np.eye(n, dtype=np.float32)[rng.integers(0, n, (batch, length))] for n in sizes]
        rows["prev_action"] = np.concatenate(parts, -1)
    rows["reward"] = rng.standard_normal((batch, length), np.float32)
    rows["is_first"] = np.zeros((batch, length), bool)
    rows["is_first"][:, 0] = True
    rows["is_terminal"] = np.zeros((batch, length), bool)
    return rows
