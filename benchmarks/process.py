"""What keeping freed memory, and threads, do to an update.

    python benchmarks/process.py [--configs PRESET ...] [--updates 5] [--rounds 3] [--out F]
        [--key value]

Every row is a process of its own: memory that is kept or given back ("system"), one thread or all
cores, on the machine as it is or beside a busy process on every core. The rows take turns; CPU and
wall seconds and page faults are of one update, medians over all rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

import tools
from hidreamer.provenance import provenance

CORES = len(os.sched_getaffinity(0))
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
KEYS = ("cpu_s", "wall_s", "page_faults", "peak_mb")


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def one(words: list[str], malloc: str, threads: int) -> dict[str, Any]:
    """What ``benchmarks/update.py`` measures in a new process. Raises CalledProcessError."""
    script = str(measure.ROOT / "benchmarks" / "update.py")
    env = os.environ | {"HIDREAMER_MALLOC": malloc, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, *words, "--threads", str(threads), "--device", "cpu"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    try:
        args = tools.parse(argv)
        updates, rounds = (
            int(args.overrides.pop(key, value)) for key, value in (("updates", 5), ("rounds", 3))
        )
        out = args.overrides.pop("out", "")
        tools.load_config(args.presets, args.overrides)
    except (tools.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = ["--configs", *(args.presets or ["demo"]), "--repeats", str(updates)]
    for key, value in args.overrides.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    rows = [("kept", 1, 0), ("system", 1, 0)]
    rows += itertools.product(["kept"], [1, CORES], [CORES]) if CORES > 1 else []
    rows += [("kept", CORES, 0)] if CORES > 1 else []
    found: dict[tuple, list[dict[str, Any]]] = {row: [] for row in rows}
    for _, row in itertools.product(range(rounds), rows):
        malloc, threads, busy = row
        with others(busy):
            found[row].append(one(words, malloc, threads))
    report: dict[str, Any] = provenance() | {"cores": CORES, "rows": []}
    for (malloc, threads, busy), runs in found.items():
        line = {"memory": malloc, "threads": threads, "busy_processes": busy}
        for key in KEYS:
            line[key] = round(statistics.median(run[key] for run in runs), 4)
        report["rows"].append(line)
    text = json.dumps(report, indent=1)
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
