"""Where a number comes from: commit, command and hardware, without which it cannot be checked."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hidreamer import __version__
from hidreamer.app import INSTALLED, ROOT, command

# in a run's folder: what starts it, and dreamer.py itself, say of each start
STARTS = "starts.jsonl"


def git(*args: str) -> str:
    """Git's facts about this checkout; nothing where there is no git or no checkout."""
    if ROOT == INSTALLED:  # a repository around an installed package is another project's
        return ""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


def script() -> list[str]:
    """The words that started this process, without the machine's folders."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py" and path.parent.parent == ROOT:
        return command(path.parent.name)
    if path.parent == ROOT:
        return command(path.stem)
    if not path.is_absolute():
        return ["python", str(path)]
    if not path.is_relative_to(ROOT):
        return ["python", path.name]
    inside = path.relative_to(ROOT)
    if (path.parent / "__init__.py").exists():  # a module of a package, which is no script
        return command(".".join(inside.with_suffix("").parts))
    return ["python", str(inside)]


def provenance() -> dict[str, str]:
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        "unknown CPU",
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "commit": (git("rev-parse", "--short=12", "HEAD") or f"version {__version__}") + changed,
        "command": shlex.join([*script(), *sys.argv[1:]]),
        "hardware": f"{model}, {torch.get_num_threads()} threads{gpu}",
        "torch": torch.__version__,
    }


def note_start(folder: Path, facts: dict[str, Any]) -> None:
    """Add a line to the starts of the run in ``folder``, also below half a line of a process that
    was killed.
    """
    with open(folder / STARTS, "ab+") as file:
        file.seek(max(0, file.seek(0, 2) - 1))
        broken = file.read() not in (b"", b"\n")
        file.write(b"\n" * broken + json.dumps(facts).encode() + b"\n")
