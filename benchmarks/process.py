"""What keeping freed memory, and threads, do to an update.

    python benchmarks/process.py [--configs PRESET ...] [--updates 5] [--rounds 2] [--limit 120]
        [--out F] [--key value]

Every row is a process of its own: memory that is kept or given back ("system"), one thread or all
cores, on the machine as it is or beside a busy process on every core. The rows take turns; CPU and
wall seconds and page faults are of one update, medians over all rounds. The presets are those of
MinAtar by default, whose small networks threads hurt most. A process that takes longer than
--limit seconds, start included, is stopped, and its row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import measure

import tools
from hidreamer.provenance import provenance

CORES = len(os.sched_getaffinity(0))
KEYS = ("cpu_s", "wall_s", "page_faults", "peak_mb")


class Row(NamedTuple):
    """How a process runs."""

    memory: str  # "kept" or "system": of HIDREAMER_MALLOC
    threads: int
    busy: int  # processes beside it

    def __str__(self) -> str:
        beside = f", beside {self.busy} busy" if self.busy else ""
        return f"{self.memory}, {self.threads} threads{beside}"


def rows(cores: int) -> list[Row]:
    found = [Row("kept", 1, 0), Row("system", 1, 0)]
    if cores > 1:
        found += [Row("kept", cores, 0), Row("kept", 1, cores), Row("kept", cores, cores)]
    return found


def one(words: list[str], row: Row, limit: float) -> dict[str, Any] | None:
    """What ``benchmarks/update.py`` measures in a new process, None where that takes longer than
    ``limit`` seconds. Raises CalledProcessError.
    """
    script = str(measure.ROOT / "benchmarks" / "update.py")
    env = os.environ | {"HIDREAMER_MALLOC": row.memory, "OMP_NUM_THREADS": str(row.threads)}
    command = [sys.executable, script, *words, "--threads", str(row.threads), "--device", "cpu"]
    settings = {"stdout": subprocess.PIPE, "text": True, "check": True, "timeout": limit}
    with measure.busy_processes(row.busy):
        try:
            done = subprocess.run(command, env=env, **settings)
        except subprocess.TimeoutExpired:
            return None
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any] | None], limit: float) -> dict[str, Any]:
    """Medians over the runs of a row."""
    ended = [run for run in runs if run is not None]
    found = {key: measure.median([run[key] for run in ended]) for key in KEYS} if ended else {}
    stopped = {"stopped": f"{len(runs) - len(ended)} of {len(runs)}, after {limit:g} s"}
    return found | (stopped if len(ended) < len(runs) else {})


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    defaults = {"updates": 5, "rounds": 2, "limit": 120}
    try:
        args = tools.parse(argv)
        updates, rounds, limit = (
            int(args.overrides.pop(key, value)) for key, value in defaults.items()
        )
        out = args.overrides.pop("out", None)
        presets = args.presets or ["minatar"]
        tools.load_config(presets, args.overrides)
    except (tools.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = ["--configs", *presets, "--repeats", str(updates)]
    for key, value in args.overrides.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    found: dict[Row, list[dict[str, Any] | None]] = {row: [] for row in rows(CORES)}
    for _ in range(rounds):
        for row, runs in found.items():
            try:
                runs.append(one(words, row, limit))
            except subprocess.CalledProcessError as error:  # it has said why
                print(f"error: an update fails with {row}", file=sys.stderr)
                return error.returncode
            print(row, summary(runs, limit), file=sys.stderr, flush=True)
    report: dict[str, Any] = provenance() | {"configs": presets, "cores": CORES}
    report |= {"updates": updates, "rounds": rounds}
    report |= {"load": [round(x, 1) for x in os.getloadavg()]}  # of the machine, at the end
    report["rows"] = {str(row): summary(runs, limit) for row, runs in found.items()}
    measure.write(report, Path(out) if out else None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
