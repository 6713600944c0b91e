"""Memory for replay: what it will need, what there is, and buffers that cost only what has been
written to them.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TIGHT = 0.8  # share of the available memory beyond which the rest of the process may find none

# Python knows the flag from 3.13 on; its value is another one on rarer machines.
COMMON = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if COMMON else 0)


class Capacity(NamedTuple):
    """Bytes of memory or of a disk: all that can ever be had, and what is free now."""

    total: int
    free: int


def anonymous(size: int) -> Any:
    """A writable buffer of ``size`` zero bytes whose pages are taken when they are first written.

    Raises MemoryError.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return np.zeros(size, np.uint8)
    try:
        # Private pages that nothing is reserved for: else 12 GB of zeros would not pass on a
        # machine with 8.
        return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        raise MemoryError(
            f"the system refuses {gigabytes(size)} of memory ({error.strerror})"
        ) from None


def gigabytes(size: float) -> str:
    """1500 -> "1.5 kB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB"}[unit]
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"


# ---------------------------------------------------------------- what there is


def available_memory(root: Path = Path("/")) -> Capacity | None:
    """Memory and swap for this process, as its control groups allow; None where the system does
    not say (not Linux).

    root: where ``proc`` and ``sys`` lie.
    """
    info = read_or_empty(root / "proc/meminfo")
    known = {
        key: 1024 * int(value)
        for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", info, re.MULTILINE)
    }
    if not {"MemTotal", "MemAvailable"} <= known.keys():
        return None
    total = known["MemTotal"] + known.get("SwapTotal", 0)
    limits = [Capacity(total, known["MemAvailable"] + known.get("SwapFree", 0))]
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            names = ("memory.max", "memory.current", r"^inactive_file (\d+)$")
            limits += groups(root / "sys/fs/cgroup", path, names)
        elif "memory" in kinds.split(","):
            version1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            names = (*version1, r"^total_inactive_file (\d+)$")
            limits += groups(root / "sys/fs/cgroup/memory", path, names)
    return Capacity(*map(min, zip(*limits, strict=True)))


def groups(mount: Path, path: str, names: tuple[str, str, str]) -> list[Capacity]:
    """The limited ones among a control group and those above it. Version 1 writes "no limit" as a
    huge number.
    """
    limit_name, usage_name, cache_pattern = names
    here, found = mount / path.strip("/"), []
    # a container sees its own group as the root, under the name that it has outside
    if not here.is_dir():
        here = mount
    while True:
        limit = read_or_empty(here / limit_name).strip()
        usage = read_or_empty(here / usage_name).strip()
        if limit.isdigit() and usage.isdigit():
            cache = re.search(cache_pattern, read_or_empty(here / "memory.stat"), re.MULTILINE)
            # the kernel drops that before it refuses memory
            spent = int(usage) - (int(cache[1]) if cache else 0)
            found.append(Capacity(int(limit), max(0, int(limit) - spent)))
        if here == mount:
            return found
        here = here.parent


def read_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# ---------------------------------------------------------------- what is needed


def check(steps: int, size: int, folder: Path | None, states: bool = False) -> str:
    """One line: what ``steps`` rows of ``size`` bytes will need, in memory or on the disk of
    ``folder``; or, of stored ``states``, in memory for a checkpoint.

    It names the keys to turn where the replay needs more than TIGHT of what is free now. Raises
    MemoryError, also in one line, where it needs more than there is in all: pages are taken as
    steps come, so that would not fail before hours of training are lost. Anything below may yet
    fit (a run may end early, others may end before), so it is only reported.
    """
    need = steps * size
    name = "stored states" if states else "replay"
    text = f"{name}: up to {steps:,} steps of {gigabytes(size)}, {gigabytes(need)} "
    if folder is None:
        capacity, what = available_memory(), "memory"
    else:
        free = shutil.disk_usage(folder).free
        capacity, what = Capacity(free, free), "disk"
    text += "of memory" if folder is None else f"on the disk of {os.fspath(folder)}"
    remedy = "lower --replay.capacity, the size of images (--env.size) or --steps"
    if states:
        text += " more while a checkpoint is written or read"
        remedy = "lower --replay.capacity or --steps, or set --replay.write_back false"
    elif folder is None:
        remedy += ", or set --replay.store disk"
    if capacity is not None and need > capacity.total:
        raise MemoryError(
            f"{text}, but there are only {gigabytes(capacity.total)} of {what} in all: {remedy}"
        )
    if capacity is not None and need > TIGHT * capacity.free:
        text += f", of which {gigabytes(capacity.free)} are free now: if it does not fit, {remedy}"
    return text
