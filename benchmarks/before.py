"""An update of this commit's code against the same of an older commit.

    python benchmarks/before.py COMMIT [--rounds 3] [--out F] -- --configs PRESET ... [--key value]

``benchmarks/update.py`` of both, with what follows "--", which both must understand, takes turns in
processes of their own; CPU seconds, page faults and memory are medians over the rounds, and what an
older one did not count is left out. The older code is checked out into a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

from hidreamer.provenance import provenance

KEYS = ("cpu_s", "wall_s", "kernels", "page_faults", "peak_mb")


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the code of a commit. Raises CalledProcessError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "archive", "--format=tar", commit]
        tar = subprocess.run(archive, cwd=measure.ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=tar, check=True)
        yield Path(folder)


def one(root: Path, words: list[str]) -> dict[str, Any]:
    """What the ``benchmarks/update.py`` of a checkout says. Raises CalledProcessError."""
    command = [sys.executable, str(root / "benchmarks" / "update.py"), *words, "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="+", metavar="-- WORDS")
    args = parser.parse_args(argv)
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    try:
        with checkout(args.commit) as folder:
            order = [("before", folder), ("now", measure.ROOT)]
            for _ in range(args.rounds):
                order.reverse()  # a machine that slows down or speeds up is neither's
                for name, root in order:
                    runs[name].append(one(root, args.words))
    except subprocess.CalledProcessError as error:  # it has said why
        print(f"error: {' '.join(map(str, error.cmd[:3]))} fails", file=sys.stderr)
        return 1
    report: dict[str, Any] = provenance() | {"before_commit": args.commit, "words": args.words}
    report |= {"rounds": args.rounds, "load": [round(x, 1) for x in os.getloadavg()]}
    for name, found in runs.items():
        keys = [key for key in KEYS if key in found[0]]
        report[name] = {key: measure.median([run[key] for run in found]) for key in keys}
    report["cpu_ratio"] = round(report["now"]["cpu_s"] / report["before"]["cpu_s"], 3)
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
