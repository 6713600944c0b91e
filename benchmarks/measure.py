"""Seconds and memory of functions measured in turn in one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# ends with its parent, however that ends
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
sys.path.insert(0, str(ROOT))

from hidreamer import checkpoint  # noqa: E402


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def interleaved(
    fns: Mapping[str, Callable[[], object]], repeats: int, cuda: bool
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each function, called in turn, so that a drifting machine drifts for
    all of them.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            fn()
            if cuda:
                torch.cuda.synchronize()
            times[name].append((cpu_seconds() - cpu, time.perf_counter() - wall))
    return times


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, beside what is measured."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def page_faults(fn: Callable[[], object]) -> int:
    """Pages that the system gave to this process, cleared, during one call of ``fn``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fn()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def replay_bytes(replay: Any) -> int:
    """Of the rows in a ``Replay``."""
    return len(replay) * replay.streams[0].record.itemsize


def median(values: list[float]) -> float:
    """To four decimals; below 1 to four digits: some seconds are less than a thousandth."""
    value = statistics.median(values)
    return round(value, 4) if abs(value) >= 1.0 else float(f"{value:.4g}")


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Whose --help is a benchmark's docstring as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def save(report: Mapping, out: Path | None) -> None:
    """Keep a benchmark's report in a file, if there is to be one."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_text(out, json.dumps(report, indent=1) + "\n")


def write(report: Mapping, out: Path | None) -> None:
    """Print a benchmark's report as JSON, and ``save`` it."""
    print(json.dumps(report, indent=1))
    save(report, out)


def write_table(report: Mapping, table: str, out: Path | None, note: str = "") -> None:
    """Print a benchmark's table; ``save`` its report, and the table beside it with its origin."""
    print(table)
    save(report, out)
    if out:
        origin = f"`{report['command']}`, {report['commit']}{note}"
        checkpoint.replace_text(out.with_suffix(".md"), f"{origin}\n\n{table}")
