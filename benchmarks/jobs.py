"""How much sooner is a comparison done with several runs at a time?

    python benchmarks/jobs.py [--jobs 2] [--steps 3000] [--rounds 2] [--out F] [--key value]

Trains the flat state on MinAtar Breakout with as many seeds as there are jobs, one run at a time
and --jobs at a time, in turn: seconds by the clock of the whole command, start, evaluation and
report included, and the ratio of the two. Wants a machine with nothing else to do; ``load`` is what
it did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, argument_parser, median, write

from hidreamer.provenance import provenance


def seconds(jobs: int, seeds: int, steps: int, more: list[str]) -> float:
    """By the clock, of one comparison in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_comparison.py"), "--models", "tiny_dreamerv3"]
        command += ["--seeds", str(seeds), "--jobs", str(jobs), "--steps", str(steps)]
        start = time.perf_counter()
        subprocess.run([*command, "--logdir", folder, *more], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args, more = parser.parse_known_args()
    report = provenance() | {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    found: dict[int, list[float]] = {1: [], args.jobs: []}
    for _ in range(args.rounds):
        for jobs, times in found.items():
            times.append(round(seconds(jobs, args.jobs, args.steps, more), 1))
            print(f"{jobs} at a time: {times[-1]} s", file=sys.stderr, flush=True)
    report["seconds"] = {str(jobs): times for jobs, times in found.items()}
    report["speedup"] = round(median(found[1]) / median(found[args.jobs]), 2)
    write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
