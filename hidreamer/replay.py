"""Replay: one ring of steps per environment, from which any run of consecutive steps can be drawn.

Row t of a stream holds an observation, the reward for arriving there, its flags, and ``prev_action``, the action that
led to it: nothing ever shifts a sequence. Episodes lie behind each other, so short ones stay in the data.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hidreamer import memory

Rows = dict[str, np.ndarray]
PIECE = 2**18  # bytes that are put together at a time for a file: what stays in a core's cache
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]  # {key: (shape, dtype)} of one row


def row_spec(obs_space: Mapping[str, Any], act_dim: int) -> Spec:
    """What a row of replay holds, from observation spaces and the width of the action vector."""
    spec = {key: (tuple(space.shape), np.dtype(space.dtype)) for key, space in obs_space.items()}
    spec |= {"prev_action": ((act_dim,), np.dtype(np.float32)), "reward": ((), np.dtype(np.float32))}
    return spec | {key: ((), np.dtype(bool)) for key in ("is_first", "is_last", "is_terminal")}


def record(spec: Spec) -> np.dtype:
    """A row as it lies in memory: a sequence is one piece of it, and one read where it is on a disk."""
    formats = [(dtype, shape) for shape, dtype in spec.values()]
    return np.dtype({"names": list(spec), "formats": formats}, align=True)


def rows_to_come(held: int, steps: int, streams: int) -> int:
    """More rows than ``streams`` with ``held`` each at most can have after ``steps`` further agent steps.

    Episodes of one step have two rows: the streams together take at least one step each in two rows.
    """
    return streams * (held + 2 * (-(-steps // streams) + 2))


class Stream:
    """A ring of at most ``capacity`` rows. Row 0 is the oldest that is kept.

    Memory is that of the rows added so far. With ``folder`` they lie in a file there, which has no name: it goes with
    the process, whatever ends that. It is written by calls, for a write to a mapped page that finds the disk full would
    kill the process, and read as memory. Raises MemoryError, OSError.
    """

    def __init__(self, capacity: int, spec: Spec, folder: Path | None = None):
        self.capacity, self.spec = capacity, spec
        self.added = 0  # rows ever added; the newest lies at (added - 1) % capacity
        self.record = record(spec)
        size = capacity * self.record.itemsize
        if folder is None:
            self.file, self.buffer = None, memory.anonymous(size)
        else:
            self.file = tempfile.TemporaryFile(dir=folder, prefix="replay-", buffering=0)  # noqa: SIM115 open as long as the stream
            self.file.truncate(size)  # a hole: what was not written takes no space
            self.buffer = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_READ)
        ring = np.frombuffer(self.buffer, self.record, capacity)
        self.rows = {key: ring[key] for key in spec}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def extend(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows {key: (N, ...)}; the newest ``capacity`` are kept.

        Raises ValueError, with nothing added, where keys, shapes or types are not the stream's.
        """
        if rows.keys() != self.spec.keys():
            raise ValueError(f"replay rows have keys {sorted(self.spec)}, not {sorted(rows)}")
        count = len(next(iter(rows.values())))
        for key, (shape, dtype) in self.spec.items():
            x = rows[key]
            if x.shape != (count, *shape) or x.dtype != dtype:
                raise ValueError(f"replay key {key} is {count} x {dtype}{shape}, not {x.dtype}{x.shape}")
        done = max(0, count - self.capacity)
        while done < count:
            start = (self.added + done) % self.capacity
            size = min(count - done, self.capacity - start)
            self._write(start, size, {key: x[done : done + size] for key, x in rows.items()})
            done += size
        self.added += count

    def _write(self, start: int, size: int, rows: Rows) -> None:
        if self.file is None:
            for key, x in rows.items():
                self.rows[key][start : start + size] = x
            return
        self.file.seek(start * self.record.itemsize)
        step = max(1, PIECE // self.record.itemsize)
        block = np.zeros(min(step, size), self.record)
        for done in range(0, size, step):
            part = block[: size - done]
            for key, x in rows.items():
                part[key] = x[done : done + step]
            left = memoryview(part).cast("B")
            while left:  # a call may write a part
                left = left[self.file.write(left) :]

    def read(self, start: int, out: Rows) -> None:
        """Copy rows start, start + 1, ..., counted from the oldest, into ``out`` {key: (N, ...)}."""
        place = (self.added - len(self) + start) % self.capacity
        for key, x in out.items():
            ring, size = self.rows[key], self.capacity - place
            x[:size] = ring[place : place + len(x)]
            if len(x) > size:
                x[size:] = ring[: len(x) - size]

    def prefetch(self, start: int, length: int) -> None:
        """Say that these rows will be read, so that a disk can fetch many sequences at once."""
        if self.file is not None and hasattr(mmap, "MADV_WILLNEED"):
            place = (self.added - len(self) + start) % self.capacity
            first = place * self.record.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            size = min((place + length) * self.record.itemsize, len(self.buffer)) - first
            self.buffer.madvise(mmap.MADV_WILLNEED, first, size)

    def slice(self, start: int, length: int) -> Rows:
        """Copies of rows start .. start + length - 1, counted from the oldest."""
        out = {key: np.empty((length, *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        self.read(start, out)
        return out


class Replay:
    """Streams, and uniform sampling over every run of ``length`` consecutive rows in them.

    rng is this replay's own; its state and the rows are all that the samples depend on. capacity is of all streams
    together, each has an equal share. With ``folder`` the rows lie in files there. Raises MemoryError, OSError.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        capacity: int,
        batch: int,
        length: int,
        streams: int,
        rng: np.random.Generator,
        folder: Path | None = None,
    ):
        self.spec, self.batch, self.length, self.rng = spec, batch, length, rng
        share = max(capacity // streams, length)
        self.streams = [Stream(share, spec, folder) for _ in range(streams)]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def capacity(self) -> int:
        """Rows that fit; not what was asked for where the streams do not divide that."""
        return sum(stream.capacity for stream in self.streams)

    @property
    def nbytes(self) -> int:
        return len(self) * record(self.spec).itemsize

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """One row for every stream, {key: (streams, ...)}."""
        for i, stream in enumerate(self.streams):
            stream.extend({key: x[i : i + 1] for key, x in rows.items()})

    def ready(self) -> bool:
        """Whether any stream is long enough to draw from."""
        return any(len(stream) >= self.length for stream in self.streams)

    def sample(self, rng: np.random.Generator | None = None) -> Rows:
        """{key: (B, T, ...)}; the first step of each sequence is marked ``is_first``, as upstream does."""
        rng = self.rng if rng is None else rng
        counts = np.array([max(0, len(stream) - self.length + 1) for stream in self.streams])
        ends = counts.cumsum()
        if not ends[-1]:
            raise ValueError(f"replay holds no {self.length} consecutive steps yet")
        picks = rng.integers(0, ends[-1], self.batch)
        owners = np.searchsorted(ends, picks, side="right")
        places = [(self.streams[i], int(pick - (ends[i] - counts[i]))) for i, pick in zip(owners, picks, strict=True)]
        for stream, start in places:
            stream.prefetch(start, self.length)
        shape = (self.batch, self.length)
        batch = {key: np.empty((*shape, *rest), dtype) for key, (rest, dtype) in self.spec.items()}
        for b, (stream, start) in enumerate(places):
            stream.read(start, {key: x[b] for key, x in batch.items()})
        batch["is_first"][:, 0] = True
        return batch
