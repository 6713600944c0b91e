"""Episodes on disk: which ones a replay holds, how they are read back, and what is wrong with
those that are not.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hidreamer import memory
from hidreamer.checkpoint import LACKING
from hidreamer.replay import Replay, Rows, Spec, Stream, record, rows_to_come

OURS = re.compile(r"(\d{7,})-\d{2,}-(\d+)\.npz")  # COUNT-STREAM-ROWS
UPSTREAM = re.compile(r"\d{8}T\d{6}-.+-(\d+)\.npz")  # TIME-NAME-ROWS
MANY = 3  # episodes with the same fault that get a line each
FORMAT = ("discount", "logprob")  # in episodes, but no part of a row


class EpisodeError(ValueError):
    """What is wrong with an episode, in one line. ``kind``: the same for all with that fault."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message


class Episodes:
    """The files ``COUNT-STREAM-ROWS.npz`` of a run, in dreamerv3-torch's format, and which ones
    its replay holds.

    A file has ``action`` (the one that led to each row), the flags, the reward, ``FORMAT`` and
    the observations.
    An episode longer than its stream's capacity loses its oldest rows. The archive's comment names
    the run, so that only its own files are ever deleted: those written after the checkpoint that
    it continues from and, without ``keep``, those whose rows have left the replay.
    """

    def __init__(self, folder: Path, streams: int, keep: bool = True):
        self.folder, self.keep = folder, keep
        # (name, rows), oldest first
        self.files: list[list[tuple[str, int]]] = [[] for _ in range(streams)]
        self.held = [0] * streams  # rows in these files
        self.running = [0] * streams  # rows of the episode that each stream is in
        self.count = 0
        self.run = uuid.uuid4().hex
        self.needed: list[set[str]] = []  # files that the last two checkpoints name
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, replay: Replay, is_last: np.ndarray) -> None:
        """Account for the row that every stream just got; write the episodes that it ended. Raises
        OSError.
        """
        for i, stream in enumerate(replay.streams):
            self.running[i] += 1
            if is_last[i]:
                self._write(i, self._tail(stream, i))
                self.running[i] = 0
                self._forget(i, len(stream))

    def load(self, replay: Replay, paths: Sequence[Path]) -> list[str]:
        """Take copies of finished episodes, ours or upstream's, in turn into every stream. ->
        lines about the others.

        Raises OSError.
        """
        problems = []
        for n, path in enumerate(paths):
            i = n % len(self.files)
            try:
                rows = load_episode(path, replay.spec, named_rows(path))
            except EpisodeError as error:
                problems.append((path, error))
                continue
            replay.streams[i].extend(rows)
            self._write(i, rows)
            self._forget(i, len(replay.streams[i]))
        return summary(problems, len(paths))

    def cut(self, replay: Replay, i: int) -> None:
        """End the running episode of stream i where it stands."""
        if self.running[i]:
            self._write(i, self._tail(replay.streams[i], i))
            self.running[i] = 0

    def state(self) -> dict[str, Any]:
        files = [list(files) for files in self.files]
        return {"files": files, "running": list(self.running), "count": self.count, "run": self.run}

    def running_rows(self, replay: Replay) -> dict[str, np.ndarray]:
        """Rows of the unfinished episodes, {"STREAM.key": (rows, ...)}."""
        out = {}
        for i, stream in enumerate(replay.streams):
            if self.running[i]:
                out |= {f"{i}.{key}": x for key, x in self._tail(stream, i).items()}
        return out

    def restore(
        self, replay: Replay, state: Mapping[str, Any], running: Mapping[str, np.ndarray]
    ) -> list[str]:
        """Fill an empty replay as it was; this run's episodes written after ``state`` are removed.

        -> lines about the episodes that are lost or damaged, which are left out. Raises
        EpisodeError, with nothing removed, where ``running`` does not fit.
        """
        tails = [
            self._running_rows(replay.spec, running, i, n) for i, n in enumerate(state["running"])
        ]
        self.count, self.running = state["count"], list(state["running"])
        self.run = state.get("run", "")
        for path in self.folder.iterdir():
            match = OURS.fullmatch(path.name.removesuffix(".tmp"))
            if (
                match
                and int(match[1]) >= self.count
                and (path.suffix == ".tmp" or self._is_own(path))
            ):
                path.unlink()
        problems = []
        for i, stream in enumerate(replay.streams):
            for name, count in state["files"][i]:
                path = self.folder / name
                try:
                    stream.extend(load_episode(path, replay.spec, count, as_saved=True))
                except EpisodeError as error:
                    problems.append((path, error))
                    continue
                self.files[i].append((name, count))
                self.held[i] += count
            if self.running[i]:
                stream.extend(tails[i])
        self.needed = [names(state)]
        return summary(problems, sum(map(len, state["files"])))

    def checkpointed(self, state: Mapping[str, Any]) -> None:
        """A checkpoint with ``state`` has been written, and the one before it is still there to
        fall back on.

        Without ``keep`` this deletes the files that neither names: a run that is killed here or at
        any other moment finds all that it continues from.
        """
        self.needed = [*self.needed[-1:], names(state)]
        if not self.keep:
            needed = set().union(*self.needed)
            for path in self.folder.iterdir():
                match = OURS.fullmatch(path.name)
                left = match and int(match[1]) < state["count"] and path.name not in needed
                if left and self._is_own(path):
                    path.unlink(missing_ok=True)

    def _is_own(self, path: Path) -> bool:
        """Whether this run wrote it. A run that began before files named their run has no name,
        nor have its files.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.comment == self.run.encode()
        except (OSError, zipfile.BadZipFile):
            return False

    def _running_rows(
        self, spec: Spec, running: Mapping[str, np.ndarray], i: int, count: int
    ) -> Rows:
        rows = {key.split(".", 1)[1]: x for key, x in running.items() if key.startswith(f"{i}.")}
        return fit(rows, spec, count) if count else {}

    def _tail(self, stream: Stream, i: int) -> Rows:
        self.running[i] = min(self.running[i], len(stream))
        return stream.slice(len(stream) - self.running[i], self.running[i])

    def _write(self, i: int, rows: Rows) -> None:
        count = len(rows["reward"])
        name = f"{self.count:07d}-{i:02d}-{count}.npz"
        path = self.folder / name
        if path.exists() and not self._is_own(path):
            raise FileExistsError(
                errno.EEXIST, "an episode of another run would be overwritten", str(path)
            )
        save_episode(path, rows, self.run)
        self.files[i].append((name, count))
        self.held[i] += count
        self.count += 1

    def _forget(self, i: int, held: int) -> None:
        """Drop the names of files whose rows have all left the ring of ``held`` rows."""
        while self.held[i] - self.files[i][0][1] >= held:
            self.held[i] -= self.files[i].pop(0)[1]


def names(state: Mapping[str, Any]) -> set[str]:
    """Of the files that a checkpoint's ``Episodes.state()`` needs."""
    found = set()
    for files in state["files"]:
        found |= {name for name, _ in files}
    return found


def rows_held(state: Mapping[str, Any]) -> list[int]:
    """By stream: rows of a checkpoint's ``Episodes.state()``, at least those in its replay."""
    held = []
    for running, files in zip(state["running"], state["files"], strict=True):
        held.append(running + sum(rows for _, rows in files))
    return held


def named_rows(path: Path) -> int | None:
    """How many rows a file's name says that it has; None for a name that is neither ours nor
    upstream's.
    """
    match = OURS.fullmatch(path.name) or UPSTREAM.fullmatch(path.name)
    return int(match[match.lastindex]) if match else None


def summary(problems: list[tuple[Path, EpisodeError]], total: int) -> list[str]:
    """One line for each of a few damaged files, one for all with the same fault where they are
    many.
    """
    kinds: dict[str, list[tuple[Path, EpisodeError]]] = {}
    for path, error in problems:
        kinds.setdefault(error.kind, []).append((path, error))
    lines = []
    for found in kinds.values():
        path, error = found[0]
        if len(found) > MANY:
            lines.append(
                f"skipped {len(found)} of {total} episodes of {path.parent}, e.g. {path.name}: "
                f"{error}"
            )
        else:
            lines += [f"skipped episode {path}: {error}" for path, error in found]
    return lines


def stack_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Equal trees of arrays or numbers [{key: (...)}] -> {key: (len(rows), ...)}."""
    return {key: np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}


def make_replay(
    spec: Spec,
    block: Any,
    streams: int,
    rng: np.random.Generator,
    *,
    steps: int,
    state: Mapping[str, Any] | None = None,
    copies: Sequence[Path] = (),
    folder: Path,
    report: Callable[[str], None],
    extra: Spec | None = None,
) -> Replay:
    """An empty replay, no larger than a run can come to need, after a line about the memory that
    this will be.

    block: the config's ``replay``. steps: agent steps that are still to come. state: what the
    episodes are restored from. copies: episodes that will be loaded. folder: where the rows lie if
    not in memory. extra: as of ``Replay``. Raises MemoryError where there is no room for them.
    """
    where = folder if block.store == "disk" else None
    held = rows_held(state) if state else [0] * streams
    copied = sum(named_rows(path) or 0 for path in copies)
    rows = min(block.capacity, sum(held) + copied + steps)
    report(memory.check(rows, record(spec | (extra or {})).itemsize, where))
    if extra:
        report(memory.check(rows, record(extra).itemsize, None, states=True))
    capacity = block.capacity  # a name may be wrong about the rows of what is copied
    if not copies:
        capacity = min(capacity, rows_to_come(max(held), steps, streams))
    sizes = {"capacity": capacity, "batch": block.batch, "length": block.length, "streams": streams}
    return Replay(spec, **sizes, rng=rng, folder=where, extra=extra, online=block.online)


# ---------------------------------------------------------------- files


def recorded(checkpoint: Path) -> list[Path]:
    """The episodes beside a checkpoint of ours or dreamerv3-torch's, oldest first."""
    home = checkpoint.parent
    home = home.parent if home.name == "checkpoints" else home
    return sorted((home / "train_eps").glob("*.npz"))


def save_episode(path: Path, rows: Rows, run: str = "") -> None:
    """Write atomically; ``run`` becomes the archive's comment. Raises OSError and leaves nothing
    behind.
    """
    out = {key: x for key, x in rows.items() if key not in ("prev_action", "is_last")}
    ended = rows["is_terminal"].astype(np.float32)
    # upstream's own have a logprob, which it never uses: it cannot mix them with others
    out |= {"action": rows["prev_action"], "discount": 1.0 - ended, "logprob": 0.0 * ended}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **out)
        if run:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = run.encode()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_episode(
    path: Path, spec: Spec | None = None, count: int | None = None, as_saved: bool = False
) -> Rows:
    """Rows {key: (T, ...)} of an episode of ours or dreamerv3-torch's; the last row is ``is_last``,
    the first ``is_first``, also of a part of an episode (but where it was not, ``as_saved``).

    With ``spec`` they are those of a replay, see ``fit``; without, all that the file has. Raises
    EpisodeError, and OSError for a file that may be whole (``checkpoint.LACKING``).
    """
    if path.exists() and not path.is_file():
        raise EpisodeError("it cannot be read (no file)")  # opening a pipe would wait for ever
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = [key for key in file.files if not key.startswith("log_") and key not in FORMAT]
            if spec is not None:
                keys = [key for key in keys if key in spec or key == "action"]
            rows = {key: file[key] for key in keys}
    except FileNotFoundError:
        raise EpisodeError("there is no such file") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in LACKING:
            raise
        reason = error.strerror or "no whole npz archive"
        raise EpisodeError(f"it cannot be read ({reason})") from None
    except Exception:  # whatever a damaged or foreign file makes numpy and zipfile raise
        raise EpisodeError("it is damaged: no whole npz archive of arrays") from None
    for key in ("action", "reward"):
        if key not in rows or not rows[key].ndim:
            raise EpisodeError(f"it has no {key}, one for each row")
    rows["prev_action"] = rows.pop("action")
    rows["is_last"] = np.arange(len(rows["reward"])) == len(rows["reward"]) - 1
    kinds = {"prev_action": np.float32, "reward": np.float32, "is_first": bool}
    for key, kind in (kinds | {"is_terminal": bool}).items():
        if key in rows:
            rows[key] = cast(key, rows[key], np.dtype(kind))
    if "is_first" in rows and rows["is_first"].ndim and not as_saved:
        rows["is_first"][:1] = True
    return rows if spec is None else fit(rows, spec, count)


def fit(rows: Rows, spec: Spec, count: int | None) -> Rows:
    """The rows {key: (T, ...)} that a replay of ``spec`` can take, T = ``count`` if that is known.

    Raises EpisodeError where keys are missing, shapes, types or lengths are others, or a number is
    not finite.
    """
    if missing := spec.keys() - rows.keys():
        raise EpisodeError(f"it has no {', '.join(sorted(missing))}")
    total = len(np.atleast_1d(rows["reward"]))
    out = {}
    for key, (shape, dtype) in spec.items():
        x = rows[key]
        if x.shape[1:] != shape or not x.ndim:
            raise EpisodeError(f"{key} has shape {x.shape[1:]}, not {shape}")
        if len(x) != total:
            raise EpisodeError(
                f"it has {total} rewards and {len(x)} rows of {key}", f"lengths of {key}"
            )
        x = out[key] = cast(key, x, dtype)
        if dtype.kind == "f" and not (finite := np.isfinite(x)).all():
            row = int(np.argwhere(~finite)[0][0])
            raise EpisodeError(
                f"{key} is {x[row][~finite[row]].flat[0]} in row {row}", f"{key} is not finite"
            )
    if not total or (count is not None and total != count):
        raise EpisodeError(
            f"it has {total} rows, not {count or 'at least one'}", "another number of rows"
        )
    return out


def cast(key: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``x`` as ``dtype`` where it means the same: any real numbers as floats, zeros and ones as
    flags.
    """
    number = x.dtype.kind in "biuf"
    flags = dtype.kind == "b" and number and x.ndim == 1 and ((x == 0) | (x == 1)).all()
    if x.dtype != dtype and not flags and not (dtype.kind == "f" and number):
        raise EpisodeError(f"{key} is {x.dtype}, not {dtype}")
    # too large a number becomes inf, which is no number of a replay
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)
