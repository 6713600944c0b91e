"""Does training starve beside other busy processes? Updates a second by threads and neighbours.

    python benchmarks/busy.py [--configs demo] [--seconds 30] [--rounds 2] [--out FILE]

Runs dreamer.py with the threads that it picks itself, with one a core, and with one a core that
spins while it waits (OMP_WAIT_POLICY=ACTIVE), each alone and beside one process that computes all
the time. The cells take turns, ``rounds`` times, so that a drifting machine drifts for all of them.
``load`` is what else ran on the machine, before the first cell.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, argument_parser, busy_processes, write

from hidreamer.provenance import provenance

CORES = len(os.sched_getaffinity(0))
# {name: (arguments of dreamer.py, variables of its environment)}
SETTINGS = {
    "default": ([], {}),
    "a thread a core": (["--threads", str(CORES)], {}),
    "a thread a core, spinning": (["--threads", str(CORES)], {"OMP_WAIT_POLICY": "ACTIVE"}),
}
NEIGHBOURS = (0, 1)
TIMEOUT = 300  # seconds until the first update


def updating(log: Path) -> list[dict]:
    """The lines of metrics.jsonl with rates, from the first with updates on."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in found if line.get("updates") and "perf/cpu_s" in line]


def run(configs: list[str], more: list[str], variables: dict[str, str], seconds: float) -> dict:
    """Train for ``seconds`` from the first update on. -> updates, wall and CPU seconds of that."""
    env = {key: x for key, x in os.environ.items() if not key.startswith("OMP_")} | variables
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dreamer.py"), "--configs", *configs, *more]
        command += ["--logdir", folder, "--steps", "100000000", "--log_every", "24"]
        log = Path(folder) / "metrics.jsonl"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=env, **quiet)
        try:
            start = time.monotonic()
            while not updating(log):
                if process.poll() is not None or time.monotonic() - start > TIMEOUT:
                    raise RuntimeError(f"no update: {' '.join(command)}")
                time.sleep(0.2)
            time.sleep(seconds)
            lines = updating(log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if len(lines) < 2:  # it starved
        return {"updates": 0, "wall_s": seconds, "cpu_s": None}
    wall = cpu = 0.0
    for before, line in itertools.pairwise(lines):
        wall += (line["step"] - before["step"]) / line["perf/frames_per_s"]
        cpu += line["perf/cpu_s"]  # since the line before
    updates = lines[-1]["updates"] - lines[0]["updates"]
    return {"updates": updates, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def rates(found: list[dict]) -> dict:
    """Of the rounds of one cell; no CPU time for updates that were never made."""
    wall = sum(one["wall_s"] for one in found)
    updates = sum(one["updates"] for one in found)
    cpu = sum(one["cpu_s"] or 0.0 for one in found)
    per_update = round(1000.0 * cpu / updates, 1) if updates else None
    rate = round(updates / wall, 2)
    return {"updates_per_s": rate, "cpu_ms_per_update": per_update, "rounds": found}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--configs", nargs="+", default=["demo"])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    report = provenance() | {"configs": args.configs, "seconds": args.seconds, "cores": CORES}
    report["load"] = os.getloadavg()[0]
    found: dict[tuple[str, int], list[dict]] = {}
    for _ in range(args.rounds):
        for name, (more, variables) in SETTINGS.items():
            for count in NEIGHBOURS:
                with busy_processes(count):
                    one = run(args.configs, more, variables, args.seconds)
                found.setdefault((name, count), []).append(one)
                print(f"{name}, {count} busy: {one}", file=sys.stderr, flush=True)
    cells: dict[str, dict[str, dict]] = {}
    for (name, count), rounds in found.items():
        cells.setdefault(name, {})[str(count)] = rates(rounds)
    report["busy"] = cells
    write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
