"""Does ``make demo`` end better than random play, on every run, and how long does it take?

    python benchmarks/demo_seeds.py [--seeds 1 2 3 4 5] [--out results/demo/demo.json]

Runs demo.py once for each seed, each in a process of its own under runs/demo_seeds; finished ones
are kept. wall_s depends on who else computes on the machine (``load``), cpu_s hardly does.
Exit status 1 if a seed is not clearly better than random play.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measure import ROOT, argument_parser, save

import demo
from hidreamer.provenance import provenance


def run(seed: int, folder: Path) -> dict:
    """-> what one demo found, and what it took."""
    took = folder / "took.json"
    if not took.exists():
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, str(ROOT / "demo.py"), "--seed", str(seed)]
        subprocess.run([*command, "--logdir", str(folder)], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wall = time.monotonic() - start
        facts = {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1), "load": os.getloadavg()[1]}
        took.write_text(json.dumps(facts))
    found = json.loads((folder / "demo.json").read_text())
    del found["made_by"]  # the report has it, and no machine's paths
    found |= {"now": float(np.mean(found["returns"]))}
    found |= {"random": float(np.mean(found["random_returns"]))}
    verdict = demo.verdict(found["returns"], found["random_returns"])[-1]
    return found | {"verdict": verdict} | json.loads(took.read_text())


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    runs = {}
    for seed in args.seeds:
        runs[seed] = found = run(seed, ROOT / "runs" / "demo_seeds" / str(seed))
        print(
            f"seed {seed}: {found['now']:.2f} against {found['random']:.2f} at random; "
            f"{found['cpu_s']:.0f} CPU seconds, {found['wall_s']:.0f} s",
            flush=True,
        )
        save(provenance() | {"runs": runs}, args.out)
    return int(any("not better" in found["verdict"] for found in runs.values()))


if __name__ == "__main__":
    sys.exit(main())
