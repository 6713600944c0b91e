"""Files of a run: checkpoints that are replaced in one step, and a folder that one process uses at
a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import pickle
import shutil
import socket
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from hidreamer.replay import Rows

FORMAT = 1  # of checkpoints; a reader refuses those with a higher number
# of a damaged .npz
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
# of a file system without hard links: exFAT, many network shares
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# of a file that may be whole: what this process lacks to read it
LACKING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class FolderError(Exception):
    """One line: why a folder cannot be used for a run, and what to do."""


class CheckpointError(FolderError):
    """One line: which checkpoint cannot be read, and why."""


class UnreadError(CheckpointError):
    """The same of one that may be whole: no other is to be taken for it, nor is it to be moved."""


# ---------------------------------------------------------------- plain values


def plain(value: Any) -> Any:
    """``value`` with arrays as tensors and containers plain, so that it loads with
    ``weights_only=True``; of a tensor that is a part of a larger one (as a population's member
    has), that part alone, for torch saves all that a tensor lies in.
    """
    if isinstance(value, torch.Tensor):
        whole = value.untyped_storage().nbytes() <= value.nbytes
        return value if whole else value.clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value).copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value


def arrays(value: Any) -> Any:
    """The inverse of ``plain`` for consumers that want arrays."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: arrays(x) for key, x in value.items()}
    return [arrays(x) for x in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- writing


def writable_folder(folder: Path) -> None:
    """Make ``folder``, and a file in it that is gone at once: before work that would be lost.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def replace_file(path: Path, write: Callable[[Path], Any], keep: Path | None = None) -> None:
    """``write(temporary path)``, then put it in place of ``path`` in one step; what was there
    becomes ``keep``.

    A crash at any moment leaves ``path`` whole, old or new. Raises OSError, with the temporary
    file removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            link = keep.with_name(keep.name + ".tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                shutil.copyfile(path, link)
            os.replace(link, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """As ``replace_file``, in UTF-8 whatever the locale is."""
    replace_file(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def replace_array(path: Path, x: np.ndarray) -> None:
    """As ``replace_file``, a .npy file."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # np.save would add .npy to a name without
            np.save(file, x)

    replace_file(path, write)


def save_checkpoint(path: Path, state: Mapping) -> None:
    """Write ``state`` in one step; the checkpoint before it stays as ``previous.pt`` beside it.
    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write = functools.partial(write_tensors, state=plain({"format": FORMAT, **state}))
    replace_file(path, write, path.with_name("previous.pt"))


def write_tensors(path: Path, state: Any) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        # torch's complaint about the archive hides the disk's error
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_npz(path: Path, rows: Mapping[str, np.ndarray], compressed: bool = True) -> None:
    with open(path, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **rows)


# ---------------------------------------------------------------- reading


def load_checkpoint(
    path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None
) -> dict[str, Any]:
    """The state in ``path``, tensors and plain values only: reading it never executes code.

    Raises CheckpointError, one line, for whatever is no whole checkpoint that has all of
    ``fields`` {name: type}.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file")  # opening a pipe would wait for ever
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch itself does not check the sums of what it maps
                raise CheckpointError(f"{path} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        kind = UnreadError if error.errno in LACKING else CheckpointError
        raise kind(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        reason = "holds more than tensors and plain values, so that reading it could run code"
        raise CheckpointError(f"{path} is no checkpoint of this program: it {reason}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError):
        raise CheckpointError(
            f"{path} is damaged, copied in part, or no checkpoint at all"
        ) from None
    except Exception as error:  # whatever else a damaged file makes zipfile and torch raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UnreadError(f"cannot read the checkpoint {path}: the memory is full") from None
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is no checkpoint of this program: it holds a {type(state).__name__}"
        )
    written_by = state.get("format", 0)
    if not isinstance(written_by, int):
        raise CheckpointError(
            f"{path} is no checkpoint of this program: its format is {written_by!r}"
        )
    if written_by > FORMAT:
        message = (
            f"{path} was written by a newer version of this program (format {written_by}, "
            f"not {FORMAT})"
        )
        raise CheckpointError(f"{message}: update it to continue this run")
    for name, kind in (fields or {}).items():
        if name not in state:
            raise CheckpointError(f"{path} is no checkpoint of such a run: it has no {name!r}")
        if not isinstance(state[name], kind):
            found = type(state[name]).__name__
            raise CheckpointError(f"{path} is no checkpoint of such a run: {name!r} is a {found}")
    return state


def find_checkpoint(
    folder: Path, fields: Mapping[str, type | tuple[type, ...]]
) -> tuple[dict[str, Any] | None, Rows, list[str]]:
    """The newest whole checkpoint in a ``checkpoints/``, the rows of the episodes that were running
    (of ``fields`` with "running_file"), lines about others.

    None where there is no checkpoint. Raises CheckpointError where there are some, and none of
    them is whole, or the newest may be and cannot be read.
    """
    problems = []
    for path in (folder / "latest.pt", folder / "previous.pt"):
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder where a checkpoint belongs: move it away")
        try:
            state = load_checkpoint(path, fields)
            running = "running_file" in fields
            rows = read_rows(folder / state["running_file"], path) if running else {}
        except UnreadError:
            raise
        except CheckpointError as error:
            problems.append((path, str(error)))
            continue
        at = f" at step {state['step']}" if "step" in state else ""
        return state, rows, [f"{problem}; continuing from {path}{at}" for _, problem in problems]
    if there := [problem for path, problem in problems if os.path.lexists(path)]:
        what = f"put whole ones back, or move {folder.parent} away to start anew"
        raise CheckpointError(f"{'; '.join(there)}; {what}")
    return None, {}, []


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that saving does not put it in the place of the one that is
    whole.
    """
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_suffix(".damaged"))


def read_rows(path: Path, owner: Path) -> Rows:
    """Arrays of an .npz file, a part of the checkpoint ``owner``. Raises CheckpointError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (*READ_ERRORS, MemoryError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) in LACKING:
            reason = getattr(error, "strerror", None) or "the memory is full"
            raise UnreadError(f"cannot read {path}, a part of {owner}: {reason}") from None
        how = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise CheckpointError(f"{owner} cannot be used: its part {path.name} is {how}") from None


def size_of_log(path: Path, size: int) -> tuple[int, int]:
    """-> how much of a .jsonl file can be kept, ``size`` or the whole lines of a shorter one; and
    the bytes lost.
    """
    if not path.exists():
        return 0, size
    there = path.read_bytes()[:size]
    return (size, 0) if len(there) == size else (there.rfind(b"\n") + 1, size - len(there))


# ---------------------------------------------------------------- the folder


def refuse_used_folder(logdir: Path) -> None:
    """Raises FolderError where ``logdir`` has no checkpoint but something that a new run would
    replace.
    """
    episodes = len(list((logdir / "train_eps").glob("*.npz")))
    found = [f"{episodes} episode{'s' * (episodes != 1)} in train_eps"] if episodes else []
    log = logdir / "metrics.jsonl"
    if log.exists() and log.stat().st_size:
        found.append("a metrics.jsonl")
    if found:
        raise FolderError(
            f"{logdir} holds {' and '.join(found)} but no checkpoint to continue from, and a new"
            " run would replace them: choose another --logdir, move them away, or put"
            " checkpoints/ back"
        )


@contextlib.contextmanager
def locked(logdir: Path) -> Iterator[None]:
    """Make ``logdir`` and keep other processes out of it; the kernel ends that, whatever ends this
    process.

    Over NFS this is as good as its locks are. A folder that was made here and stays empty is
    removed again. Raises FolderError where the folder cannot be used, or another process, which it
    names, holds it.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (logdir, *logdir.parents) if not path.exists()]
            logdir.mkdir(parents=True, exist_ok=True)
            lock = lock_file(logdir / "lock")
        except OSError as error:
            message = (
                f"{logdir} cannot be the folder of a run ({error.strerror}: "
                f"{error.filename or logdir})"
            )
            room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise FolderError(f"{message}: {room}choose another --logdir") from None
        try:
            yield
        finally:
            (logdir / "lock").unlink(missing_ok=True)
            lock.close()
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def lock_file(path: Path) -> TextIO:
    """``path``, locked until it is closed, saying who holds it. Raises OSError, and FolderError if
    another does.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            message = f"{path.parent} is in use by {holder}"
            raise FolderError(
                f"{message}: wait for it, stop it, or choose another --logdir"
            ) from None
        except OSError as error:
            message = (
                f"{path.parent} is on a disk without locks ({error.strerror}): "
                "start no second run in it"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        # A holder that ended removes the file: what was locked may no longer be what the next
        # process opens.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()
