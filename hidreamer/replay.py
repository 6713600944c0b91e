"""Replay: one ring of steps per environment, any run of consecutive steps of which can be sampled.

Row t of a stream holds an observation, the reward for arriving there, its flags, and
``prev_action``, the action that led to it: nothing ever shifts a sequence. Episodes lie behind each
other, so short ones stay in the data.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hidreamer import memory

Rows = dict[str, np.ndarray]
BLOCK_BYTES = 2**18  # written to a file at a time: what stays in a core's cache
STORED = "stored"  # column: whether a carry lies beside the row (``carries``)
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]  # {key: (shape, dtype)} of one row


def row_spec(obs_space: Mapping[str, Any], act_dim: int) -> Spec:
    """What a row of replay holds, from observation spaces and the width of the action vector."""
    spec = {key: (tuple(space.shape), np.dtype(space.dtype)) for key, space in obs_space.items()}
    spec |= {
        "prev_action": ((act_dim,), np.dtype(np.float32)),
        "reward": ((), np.dtype(np.float32)),
    }
    return spec | {key: ((), np.dtype(bool)) for key in ("is_first", "is_last", "is_terminal")}


def record(spec: Spec) -> np.dtype:
    """A row as it lies in memory: a sequence is one piece of it, and one read from a disk."""
    formats = [(dtype, shape) for shape, dtype in spec.values()]
    return np.dtype({"names": list(spec), "formats": formats}, align=True)


def rows_to_come(held: int, steps: int, streams: int) -> int:
    """A bound on the rows of all streams, ``held`` each at most, after so many more agent steps.

    Episodes of one step have two rows: the streams together take at least one step each in two
    rows.
    """
    return streams * (held + 2 * (-(-steps // streams) + 2))


class Addresses(NamedTuple):
    """Where B sequences lie: good as long as their rows are kept, in this process."""

    stream: np.ndarray  # (B,) int64
    row: np.ndarray  # (B,) int64 of the first step, counted from the first row ever added


class Stream:
    """A ring of at most ``capacity`` rows. Row 0 is the oldest that is kept.

    ``extra`` columns are not added with a row but written later, beside it (``write``); until then
    they are zero.

    Memory is that of the rows added so far. With ``folder`` they lie in a file
    there, which has no name: it goes with the process, whatever ends that. It is written by calls,
    for a write to a mapped page that finds the disk full would kill the process, and read as
    memory. Raises MemoryError, OSError.
    """

    def __init__(
        self, capacity: int, spec: Spec, folder: Path | None = None, extra: Spec | None = None
    ):
        self.capacity, self.spec, self.extra = capacity, spec, extra or {}
        self.added = 0  # rows ever added; the newest lies at (added - 1) % capacity
        self.record = record(spec | self.extra)
        size = capacity * self.record.itemsize
        if folder is None:
            self.file, self.buffer = None, memory.anonymous(size)
        else:
            self.file = tempfile.TemporaryFile(dir=folder, prefix="replay-", buffering=0)  # noqa: SIM115 open as long as the stream
            self.file.truncate(size)  # a hole: what was not written takes no space
            self.buffer = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_READ)
        ring = np.frombuffer(self.buffer, self.record, capacity)
        self.rows = {key: ring[key] for key in self.record.names}

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
                raise ValueError(
                    f"replay key {key} is {count} x {dtype}{shape}, not {x.dtype}{x.shape}"
                )
        done = max(0, count - self.capacity)
        while done < count:
            start = (self.added + done) % self.capacity
            size = min(count - done, self.capacity - start)
            self._write(start, size, {key: x[done : done + size] for key, x in rows.items()})
            done += size
        self.added += count

    def write(self, row: int, values: Mapping[str, np.ndarray]) -> None:
        """Put {key: (N, ...)} of ``extra`` beside rows row, row + 1, ... of all ever added.

        Those that have left the ring are passed over. Raises ValueError for rows that were never
        added, for other keys, shapes or types. Raises OSError.
        """
        count = len(next(iter(values.values())))
        for key, x in values.items():
            shape, dtype = self.extra.get(key, (None, None))
            if shape is None or x.shape != (count, *shape) or x.dtype != dtype:
                what = f"{x.dtype}{x.shape} to {key!r}"
                raise ValueError(f"replay cannot write {what}; extra columns are {self.extra}")
        if not 0 <= row <= self.added - count:
            raise ValueError(
                f"replay cannot write beside rows {row} to {row + count - 1} of {self.added}"
            )
        done = max(0, self.added - len(self) - row)
        while done < count:
            start = (row + done) % self.capacity
            size = min(count - done, self.capacity - start)
            chunk = {key: x[done : done + size] for key, x in values.items()}
            if self.file is None:
                self._set(start, size, chunk)
            else:
                offset = start * self.record.itemsize
                block = np.frombuffer(self.buffer, self.record, size, offset).copy()
                for key, x in chunk.items():
                    block[key] = x
                self.file.seek(offset)
                self._write_block(block)
            done += size

    def _write(self, start: int, size: int, rows: Rows) -> None:
        """Whole rows; what was beside the rows that they replace becomes zero."""
        if self.file is None:
            self._set(start, size, rows)
            for key in self.extra:
                self.rows[key][start : start + size] = 0
            return
        self.file.seek(start * self.record.itemsize)
        step = max(1, BLOCK_BYTES // self.record.itemsize)
        block = np.zeros(min(step, size), self.record)
        for done in range(0, size, step):
            chunk = block[: size - done]
            for key, x in rows.items():
                chunk[key] = x[done : done + step]
            self._write_block(chunk)

    def _set(self, start: int, size: int, rows: Rows) -> None:
        for key, x in rows.items():
            self.rows[key][start : start + size] = x

    def _write_block(self, block: np.ndarray) -> None:
        left = memoryview(block).cast("B")
        while left:  # a call may write less
            left = left[self.file.write(left) :]

    def read(self, start: int, out: Rows) -> None:
        """Copy rows start, start + 1, ..., counted from the oldest, into out {key: (N, ...)}."""
        index = (self.added - len(self) + start) % self.capacity
        for key, x in out.items():
            ring, size = self.rows[key], self.capacity - index
            x[:size] = ring[index : index + len(x)]
            if len(x) > size:
                x[size:] = ring[: len(x) - size]

    def prefetch(self, start: int, length: int) -> None:
        """Announce that these rows will be read: a disk can then fetch many sequences at once."""
        if self.file is not None and hasattr(mmap, "MADV_WILLNEED"):
            index = (self.added - len(self) + start) % self.capacity
            first = index * self.record.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            size = min((index + length) * self.record.itemsize, len(self.buffer)) - first
            self.buffer.madvise(mmap.MADV_WILLNEED, first, size)

    def slice(self, start: int, length: int) -> Rows:
        """Copies of rows start .. start + length - 1, counted from the oldest."""
        out = {key: np.empty((length, *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        self.read(start, out)
        return out


class Replay:
    """Streams, and uniform sampling over every run of ``length`` consecutive rows in them.

    rng is this replay's own; its state and the rows are all that the samples depend on. capacity is
    of all streams together, each has an equal share. With ``folder`` the rows lie in files there.
    ``extra`` columns, of other names than spec's, are written by ``write``; of a sequence they are
    read at its first row. With ``online`` every fresh sequence is sampled once before others are.
    Raises MemoryError, OSError.
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
        extra: Spec | None = None,
        online: bool = False,
    ):
        self.spec, self.batch, self.length, self.rng = spec, batch, length, rng
        self.extra, self.online = extra or {}, online
        # Of ``online``: sequences to come, (stream, row) as in ``Addresses``, oldest first; and by
        # stream how many of its newest rows are in none of them yet.
        self.queue: deque[tuple[int, int]] = deque()
        self.fresh = [0] * streams
        share = max(capacity // streams, length)
        self.streams = [Stream(share, spec, folder, extra) for _ in range(streams)]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def capacity(self) -> int:
        """Rows that fit; not what was asked for where the streams do not divide that."""
        return sum(stream.capacity for stream in self.streams)

    def add(
        self, rows: Mapping[str, np.ndarray], extra: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """One row for every stream, {key: (streams, ...)}, and what is known of ``extra`` columns
        beside it.
        """
        for i, stream in enumerate(self.streams):
            stream.extend({key: x[i : i + 1] for key, x in rows.items()})
            if extra is not None:
                stream.write(stream.added - 1, {key: x[i : i + 1] for key, x in extra.items()})
            self.fresh[i] += 1
            if self.fresh[i] == self.length:
                self.fresh[i] = 0
                if self.online:
                    self.queue.append((i, stream.added - self.length))

    def ready(self) -> bool:
        """Whether any stream is long enough to sample from."""
        return any(len(stream) >= self.length for stream in self.streams)

    def sample(self, out: Rows | None = None) -> Rows:
        """{key: (B, T, ...)}; each sequence's first step is marked ``is_first``, as upstream's.

        out: what an earlier call returned, to be written over.
        """
        return self.read(self.sample_addresses(), out)

    def sample_addresses(self) -> Addresses:
        """Where the next B sequences lie: those of the queue, then ``uniform`` ones."""
        fresh: list[tuple[int, int]] = []
        while self.queue and len(fresh) < self.batch:
            i, row = self.queue.popleft()
            if row >= self.streams[i].added - len(self.streams[i]):  # it has not left since
                fresh.append((i, row))
        others = self.uniform(self.rng, self.batch - len(fresh))
        if not fresh:
            return others
        pairs = zip(zip(*fresh, strict=True), others, strict=True)
        return Addresses(*(np.concatenate([np.array(a), b]) for a, b in pairs))

    def uniform(self, rng: np.random.Generator, count: int) -> Addresses:
        """Where ``count`` sequences lie, each run of T rows as likely as any other.

        Raises ValueError where there is none.
        """
        counts = np.array([max(0, len(stream) - self.length + 1) for stream in self.streams])
        ends = counts.cumsum()
        if not ends[-1]:
            raise ValueError(f"replay holds no {self.length} consecutive steps yet")
        picks = rng.integers(0, ends[-1], count)
        stream = np.searchsorted(ends, picks, side="right")
        oldest = np.array([stream.added - len(stream) for stream in self.streams])
        return Addresses(stream, picks - (ends - counts - oldest)[stream])

    def read(self, addresses: Addresses, out: Rows | None = None) -> Rows:
        """The sequences there, {key: (B, T, ...)}, and ``extra`` columns (B, ...) of their first
        rows. Raises ValueError where they have left.

        First steps are marked ``is_first``, but where a carry is STORED.
        """
        starts = []
        for i, row in zip(*addresses, strict=True):
            stream = self.streams[i]
            start = int(row) - (stream.added - len(stream))
            if not 0 <= start <= len(stream) - self.length:
                raise ValueError(
                    f"rows {row} to {row + self.length - 1} of stream {i} are not in the replay"
                )
            stream.prefetch(start, self.length)
            starts.append((stream, start))
        batch = self._empty(len(starts)) if out is None else out
        for b, (stream, start) in enumerate(starts):
            stream.read(start, {key: batch[key][b] for key in self.spec})
            stream.read(start, {key: batch[key][b : b + 1] for key in self.extra})
        if STORED in self.extra:
            batch["is_first"][~batch[STORED], 0] = True
        else:
            batch["is_first"][:, 0] = True
        return batch

    def _empty(self, count: int) -> Rows:
        """Where ``read`` writes so many sequences."""
        shape, out = (count, self.length), {}
        for key, (rest, dtype) in self.spec.items():
            out[key] = np.empty((*shape, *rest), dtype)
        for key, (rest, dtype) in self.extra.items():
            out[key] = np.empty((count, *rest), dtype)
        return out

    def sample_apart(self, rng: np.random.Generator) -> Rows:
        """Uniform ones without ``extra`` columns: for others than the learner, whose samples it
        leaves as they are.
        """
        batch = self.read(self.uniform(rng, self.batch))
        batch["is_first"][:, :1] = True
        return {key: batch[key] for key in self.spec}

    def write(self, addresses: Addresses, values: Mapping[str, np.ndarray]) -> None:
        """Put {key: (B, T, ...)} of ``extra`` columns beside the rows there, in this order.

        Rows that have left the replay since are passed over. Raises ValueError as ``Stream.write``
        does, OSError.
        """
        for b, (i, row) in enumerate(zip(*addresses, strict=True)):
            self.streams[i].write(int(row), {key: x[b] for key, x in values.items()})

    # ------------------------------------------------------------ what a checkpoint holds of it

    def queue_state(self) -> dict[str, Any]:
        """Of ``online``, with rows counted back from each stream's newest."""
        back = [[i, self.streams[i].added - row] for i, row in self.queue]
        return {"queue": back, "fresh": list(self.fresh)}

    def load_queue(self, state: Mapping[str, Any]) -> None:
        """The inverse, when the rows are back."""
        found = ((i, self.streams[i].added - back) for i, back in state["queue"])
        self.queue = deque(found if self.online else ())
        self.fresh = list(state["fresh"])

    def extra_rows(self) -> Rows:
        """Copies of all ``extra`` columns, {"extra.STREAM.key": (rows, ...)}, oldest row first."""
        out = {}
        for i, stream in enumerate(self.streams):
            for key, (shape, dtype) in self.extra.items():
                out[f"extra.{i}.{key}"] = np.empty((len(stream), *shape), dtype)
            stream.read(0, {key: out[f"extra.{i}.{key}"] for key in self.extra})
        return out

    def load_extra_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        """The inverse, for streams whose newest rows are those of then. Raises ValueError."""
        for i, stream in enumerate(self.streams):
            found = {key: rows.get(f"extra.{i}.{key}") for key in self.extra}
            if found and all(x is not None for x in found.values()):
                count = min(len(stream), *map(len, found.values()))
                last = {key: x[len(x) - count :] for key, x in found.items()}
                stream.write(stream.added - count, last)
