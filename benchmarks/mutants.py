"""Mutation tests: one-line faults in the core,
each put into a copy of the tree and run against tests.

    python benchmarks/mutants.py [NAME ...] [--out FILE.json]  # all, or those with NAME in theirs

Prints a line per mutant and a JSON line at the end. Exit status 1 if one survives, 2 if the tests
fail without any.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEEDED = (
    "analysis",
    "benchmarks",
    "comparison",
    "envs",
    "hidreamer",
    "legacy",
    "tests",
    "*.py",
    "configs.yaml",
    "pyproject.toml",
)
LIST = Path(__file__).with_suffix(".yaml")
TIMEOUT = 600  # seconds; a mutant that hangs the tests is noticed, too

# Test files in the order in which they are tried, the quick ones first.
FAST = (
    "numerics",
    "parts",
    "golden",
    "wiring",
    "mask",
    "quantizer",
    "replay",
    "write_back",
    "updates",
    "dynamics",
    "legacy",
    "hrssm",
)
FAST += ("scan", "hrvq", "hrvq_losses", "agent", "losses", "random", "episodes", "spaces", "run")
# Those that most likely notice a fault in a file go before the others.
LIKELY = {
    "training.py": ("updates", "run", "random"),
    "envs/actions.py": ("spaces",),
    "envs/base.py": ("updates",),
    "hidreamer/behavior.py": ("golden", "wiring", "losses"),
    "hidreamer/dynamics/base.py": ("golden", "wiring", "dynamics", "legacy"),
    "hidreamer/dynamics/hrssm.py": ("wiring", "dynamics", "hrssm"),
    "hidreamer/dynamics/hrvq.py": ("wiring", "golden", "dynamics", "hrvq"),
    "hidreamer/dynamics/sequences.py": ("hrvq", "dynamics"),
    "hidreamer/dynamics/tokens.py": ("hrvq", "hrvq_losses", "dynamics", "wiring"),
    "hidreamer/dynamics/hrvq_gru.py": ("hrvq", "scan", "dynamics"),
    "hidreamer/dynamics/cell_scan.py": ("scan",),
    "hidreamer/dynamics/residual_scan.py": ("scan",),
    "hidreamer/dynamics/recurrent.py": ("golden", "wiring", "dynamics", "legacy"),
    "hidreamer/dynamics/scan.py": ("scan", "dynamics"),
    "hidreamer/dynamics/scan_steps.py": ("scan", "dynamics"),
    "hidreamer/gradients.py": ("scan",),
    "hidreamer/dynamics/rssm.py": ("wiring", "dynamics"),
    "hidreamer/explorer.py": ("wiring", "agent"),
    "hidreamer/losses.py": ("golden",),
    "hidreamer/mask.py": ("mask",),
    "hidreamer/objectives.py": ("golden", "wiring", "random"),
    "hidreamer/optim.py": ("numerics", "agent", "losses"),
    "hidreamer/quantizer.py": ("numerics", "quantizer", "random"),
    "hidreamer/episodes.py": ("episodes",),
    "hidreamer/replay.py": ("replay", "write_back"),
    "hidreamer/carries.py": ("write_back",),
    "hidreamer/rollout.py": ("parts", "dynamics", "hrvq"),
    "hidreamer/branches.py": ("hrvq", "dynamics"),
    "hidreamer/parallel.py": ("hrvq", "dynamics"),
    "hidreamer/transformer.py": ("numerics", "parts", "dynamics", "hrvq"),
    "models.py": ("golden", "wiring"),
    "networks.py": ("numerics", "wiring", "legacy"),
}


class Mutant(NamedTuple):
    """``old``, which the file has exactly once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str


def load(path: Path) -> list[Mutant]:
    """Raises ValueError for an entry that is no pair."""
    found = []
    for file, faults in YAML(typ="safe").load(path).items():
        for name, pair in faults.items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{path}: {name!r} must be [old, new], not {pair!r}")
            found.append(Mutant(name, file, *pair))
    return found


def copy_tree(folder: Path) -> None:
    """What the tests need, into ``folder``."""
    for pattern in NEEDED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(
                    path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(path, folder / path.name)


def in_order(names: Sequence[str], mutant: Mutant | None = None) -> list[str]:
    """Paths of the test files ``names``, those first that most likely notice the mutant."""
    likely = [name for name in LIKELY.get(mutant.file, ()) if name in names] if mutant else []
    return [f"tests/test_{name}.py" for name in dict.fromkeys((*likely, *names))]


def run_tests(folder: Path, files: list[str]) -> tuple[bool, str]:
    """-> whether all pass, and the first test that does not ("" where pytest itself broke)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        child = (
            os.fork()
        )  # a child starts with torch imported: that alone takes longer than most of the tests
        if not child:
            run_child(folder, files, log.fileno())
        done, deadline = 0, time.monotonic() + TIMEOUT
        while not done and time.monotonic() < deadline:
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, "time ran out"
        log.seek(0)
        failed = [line.split()[1] for line in log if line.startswith(("FAILED ", "ERROR "))]
    return status == 0, failed[0] if failed else ""


def run_child(folder: Path, files: list[str], log: int) -> NoReturn:
    """pytest in a process group of its own, everything that it says to the file ``log``.

    The project itself must not have been imported: the child would go on with the whole code.
    """
    status = 3
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        # No bytecode: Python compares its time in seconds and its size, and two mutants may share
        # both.
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [
            str(folder),
            *(path for path in sys.path if Path(path).resolve() not in (HERE, ROOT)),
        ]
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        status = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def mutated(mutant: Mutant, text: str) -> str:
    """Raises ValueError where ``old`` does not occur exactly once."""
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: {mutant.file} has {mutant.old!r} {count} times, not once"
        )
    return text.replace(mutant.old, mutant.new)


def trial(mutant: Mutant, folder: Path, files: list[str]) -> tuple[bool, str]:
    """Run tests against a copy of the tree with this fault. -> what ``run_tests`` returns."""
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(mutated(mutant, text))
    try:
        return run_tests(folder, files)
    finally:
        path.write_text(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of mutants' names; all mutants without any")
    parser.add_argument("--list", type=Path, default=LIST, help="another list than mutants.yaml")
    parser.add_argument(
        "--tests",
        nargs="+",
        default=FAST,
        choices=FAST,
        help="other test files than all quick ones",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes, too")
    args = parser.parse_args(argv)
    try:
        listed = load(args.list)
        for mutant in listed:
            mutated(mutant, (ROOT / mutant.file).read_text())
    except (OSError, ValueError, YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    contains_any = lambda mutant: any(part in mutant.name for part in args.names)
    chosen = list(filter(contains_any, listed)) if args.names else listed
    if not chosen:
        print(f"error: no mutant's name contains {' or '.join(args.names)}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    import gymnasium  # noqa: F401  what is imported here, children need not import
    import torch  # noqa: F401

    start, survivors, noticed = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = (
            Path(name) / "tree"
        )  # its parent holds nothing, so that fixtures beside the repository do not help
        folder.mkdir()
        copy_tree(folder)
        whole, failed = run_tests(folder, in_order(args.tests))
        if not whole:
            print(f"error: the tests fail without any mutant: {failed}", file=sys.stderr)
            return 2
        for mutant in chosen:
            passed, by = trial(mutant, folder, in_order(args.tests, mutant))
            survives = passed or not by  # without a test that failed, something else was wrong
            print(f"{'SURVIVED' if survives else 'killed':<9} {mutant.name:<44} {by}", flush=True)
            survivors += [mutant.name] if survives else []
            noticed[mutant.name] = by
    summary = {"tried": len(chosen), "killed": len(chosen) - len(survivors), "survived": survivors}
    summary["seconds"] = round(time.monotonic() - start)
    if args.out:
        args.out.write_text(json.dumps(summary | {"noticed_by": noticed}, indent=1) + "\n")
    print(json.dumps(summary))
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
