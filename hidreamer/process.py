"""How a training process uses its machine: memory that it keeps, threads, what ran out."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Any

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)
GROWTH = 2**28  # bytes by which the heap grows at least
SMALL = 10_000_000  # parameters of an agent that one thread is enough for
AVAILABLE = torch.get_num_threads()  # before any run of this process chose
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOVE = "move it away, or choose another --logdir"
REMEDIES = dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more with ulimit -n")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "allow that, or choose another --logdir")


def keep_freed_memory() -> None:
    """Let this process keep the memory of large tensors that it frees, for the next ones.

    glibc returns each of them to the system, which clears every page of the next one again. To be
    called before the first tensor. Nothing happens without glibc, or where HIDREAMER_MALLOC is
    "system".
    """
    if os.environ.get("HIDREAMER_MALLOC") == "system" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # no tensor has pages of its own, which freeing would unmap
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink
    libc.mallopt(M_TOP_PAD, GROWTH)


def pick_threads(agent: Any, threads: int) -> int:
    """How many threads torch is to use on a CPU; ``threads``, if that is not 0.

    Kernels of small networks on vectors and grids are too short to be shared, and on a busy machine
    a second thread is waited for.
    """
    if threads:
        return threads
    images = agent.world_model.encoder.kinds["image"]
    small = sum(x.numel() for x in agent.parameters()) < SMALL
    return 1 if small and not images else AVAILABLE


# batch, length, starts and capacity decide what a run is: a folder holds one value of each.
ELSEWHERE = "in another --logdir, with --resume to start from these weights"


def resource(error: Exception, also: str = "") -> str:
    """What ran out, and which keys ask for less of it, ``also`` what else would; "" where that was
    no disk and no memory.
    """
    cause = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        what = (
            f"the GPU's memory is full ({cause}): ask for less with replay.batch, "
            f"replay.length or imag.starts{also}, {ELSEWHERE}"
        )
    elif (
        isinstance(error, MemoryError)
        or getattr(error, "errno", 0) == errno.ENOMEM
        or "allocate memory" in cause
    ):
        less = f"replay.store disk; replay.capacity, replay.batch or env.count{also}, {ELSEWHERE}"
        what = f"the memory is full ({cause}): ask for less with {less}"
    elif isinstance(error, OSError) and error.errno in FULL:
        what = f"the disk is full, or what the output goes to, or a limit is reached ({error})"
    elif isinstance(error, OSError):
        return f"a file cannot be used ({error}): {REMEDIES.get(error.errno, MOVE)}"
    else:
        return ""
    return f"{what}; the last checkpoint is whole, and the same command continues from it"
