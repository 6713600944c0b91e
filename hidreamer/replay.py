"""Replay: one ring of steps per environment, from which any run of consecutive steps can be drawn.

Row t of a stream holds an observation, the reward for arriving there, its flags, and ``prev_action``, the action that
led to it: nothing ever shifts a sequence. Episodes lie behind each other, so short ones stay in the data.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Rows = dict[str, np.ndarray]


class Stream:
    """A ring of at most ``capacity`` rows that grows by doubling. Row 0 is the oldest that is kept."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows: Rows = {}
        self.added = 0  # rows ever added; the newest lies at (added - 1) % allocated

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def allocated(self) -> int:
        return len(next(iter(self.rows.values()))) if self.rows else 0

    def add(self, row: Mapping[str, np.ndarray]) -> None:
        """Append one row {key: (...)}. Raises ValueError where keys, shapes or types differ from the rows before."""
        if not self.rows:
            self.rows = {k: np.zeros((0, *np.shape(x)), np.asarray(x).dtype) for k, x in row.items()}
        if self.added == self.allocated < self.capacity:
            size = min(max(1024, 2 * self.allocated), self.capacity)
            for key, old in self.rows.items():
                # Untouched pages of zeros cost nothing, so doubling never holds much more than the data.
                self.rows[key] = np.zeros((size, *old.shape[1:]), old.dtype)
                self.rows[key][: len(old)] = old
        if row.keys() != self.rows.keys():
            raise ValueError(f"replay rows have keys {sorted(self.rows)}, not {sorted(row)}")
        place = self.added % self.allocated
        for key, x in row.items():
            ring, x = self.rows[key], np.asarray(x)
            if x.shape != ring.shape[1:] or x.dtype != ring.dtype:
                raise ValueError(f"replay key {key} is {ring.dtype}{ring.shape[1:]}, not {x.dtype}{x.shape}")
            ring[place] = x
        self.added += 1

    def slice(self, start: int, length: int) -> Rows:
        """Copies of rows start .. start + length - 1, counted from the oldest."""
        first = (self.added - len(self) + start) % max(self.allocated, 1)
        if first + length <= self.allocated:
            return {key: ring[first : first + length].copy() for key, ring in self.rows.items()}
        place = (first + np.arange(length)) % self.allocated
        return {key: ring[place] for key, ring in self.rows.items()}


class Replay:
    """Streams, and uniform sampling over every run of ``length`` consecutive rows in them.

    rng is this replay's own; its state and the rows are all that the samples depend on.
    """

    def __init__(self, *, capacity: int, batch: int, length: int, streams: int, rng: np.random.Generator):
        self.batch, self.length, self.rng = batch, length, rng
        self.streams = [Stream(max(capacity // streams, length)) for _ in range(streams)]

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    @property
    def nbytes(self) -> int:
        return sum(ring[: len(s)].nbytes for s in self.streams for ring in s.rows.values())

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """One row for every stream, {key: (streams, ...)}."""
        for i, stream in enumerate(self.streams):
            stream.add({key: x[i] for key, x in rows.items()})

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
        parts = [
            self.streams[i].slice(pick - (ends[i] - counts[i]), self.length)
            for i, pick in zip(owners, picks, strict=True)
        ]
        batch = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        batch["is_first"][:, 0] = True
        return batch


class Episodes:
    """Episodes on disk in dreamerv3-torch's format, ``COUNT-STREAM-ROWS.npz``, and which ones the replay holds.

    A file has ``action`` (the one that led to each row), ``discount``, the flags, the reward and the observations.
    An episode longer than its stream's capacity loses its oldest rows.
    """

    def __init__(self, folder: Path, streams: int):
        self.folder = folder
        self.files: list[list[tuple[str, int]]] = [[] for _ in range(streams)]  # (name, rows), oldest first
        self.running = [0] * streams  # rows of the episode that each stream is in
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, replay: Replay, is_last: np.ndarray) -> None:
        """Account for the row that every stream just got; write the episodes that it ended. Raises OSError."""
        for i, stream in enumerate(replay.streams):
            self.running[i] += 1
            if is_last[i]:
                self._write(i, self._tail(stream, i))
                self.running[i] = 0
                self._forget(i, len(stream))

    def load(self, replay: Replay, paths: list[Path], keys: set[str]) -> list[str]:
        """Take copies of finished episodes, ours or upstream's, in turn into every stream. -> a line per damaged file.

        Of their rows ``keys`` are kept.
        """
        problems = []
        for n, path in enumerate(paths):
            i = n % len(self.files)
            try:
                rows = load_episode(path)
                rows = {key: rows[key] for key in sorted(keys)}
                for t in range(len(rows["reward"])):
                    replay.streams[i].add({key: x[t] for key, x in rows.items()})
            except DAMAGED as error:
                problems.append(f"skipped episode {path}: {first_line(error)}")
                continue
            self._write(i, rows)
            self._forget(i, len(replay.streams[i]))
        return problems

    def cut(self, replay: Replay, i: int) -> None:
        """End the running episode of stream i where it stands."""
        if self.running[i]:
            self._write(i, self._tail(replay.streams[i], i))
            self.running[i] = 0

    def state(self) -> dict[str, Any]:
        return {"files": self.files, "running": self.running, "count": self.count}

    def running_rows(self, replay: Replay) -> dict[str, np.ndarray]:
        """Rows of the unfinished episodes, {"STREAM.key": (rows, ...)}."""
        tails = {i: self._tail(stream, i) for i, stream in enumerate(replay.streams) if self.running[i]}
        return {f"{i}.{key}": x for i, rows in tails.items() for key, x in rows.items()}

    def restore(self, replay: Replay, state: Mapping[str, Any], running: Mapping[str, np.ndarray]) -> list[str]:
        """Fill an empty replay as it was; episodes written after ``state`` are removed. -> a line per damaged file."""
        problems = []
        self.count, self.running = state["count"], list(state["running"])
        for path in self.folder.glob("*.npz"):
            if (match := re.fullmatch(r"(\d{7,})-\d{2,}-\d+", path.stem)) and int(match[1]) >= self.count:
                path.unlink()
        for i, stream in enumerate(replay.streams):
            for name, count in state["files"][i]:
                try:
                    rows = load_episode(self.folder / name)
                    for t in range(count):
                        stream.add({key: x[t] for key, x in rows.items()})
                    self.files[i].append((name, count))
                except DAMAGED as error:
                    problems.append(f"skipped episode {self.folder / name}: {first_line(error)}")
            rows = {key.split(".", 1)[1]: x for key, x in running.items() if key.startswith(f"{i}.")}
            for t in range(self.running[i]):
                stream.add({key: x[t] for key, x in rows.items()})
        return problems

    def _tail(self, stream: Stream, i: int) -> Rows:
        self.running[i] = min(self.running[i], len(stream))
        return stream.slice(len(stream) - self.running[i], self.running[i])

    def _write(self, i: int, rows: Rows) -> None:
        count = len(rows["reward"])
        name = f"{self.count:07d}-{i:02d}-{count}.npz"
        save_episode(self.folder / name, rows)
        self.files[i].append((name, count))
        self.count += 1

    def _forget(self, i: int, held: int) -> None:
        """Drop the names of files whose rows have all left the ring; the files stay."""
        while sum(count for _, count in self.files[i][1:]) >= held:
            del self.files[i][0]


DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def save_episode(path: Path, rows: Rows) -> None:
    """Write atomically. Raises OSError and leaves nothing behind."""
    out = {key: x for key, x in rows.items() if key not in ("prev_action", "is_last")}
    out["action"] = rows["prev_action"]
    out["discount"] = 1.0 - rows["is_terminal"].astype(np.float32)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **out)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_episode(path: Path) -> Rows:
    """Rows {key: (T, ...)} of an episode of ours or dreamerv3-torch's; its last row is ``is_last``. Raises DAMAGED."""
    with np.load(path, allow_pickle=False) as file:
        rows = {
            key: file[key] for key in file.files if not key.startswith("log_") and key not in ("discount", "logprob")
        }
    rows["prev_action"] = rows.pop("action").astype(np.float32)
    rows["reward"] = rows["reward"].astype(np.float32)
    for key in ("is_first", "is_terminal"):
        rows[key] = rows[key].astype(bool)
    rows["is_last"] = np.arange(len(rows["reward"])) == len(rows["reward"]) - 1
    return rows
