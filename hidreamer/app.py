"""Where the files beside this package are, in a checkout and in a wheel, and what starts them.

In a checkout ``dreamer.py``, ``models.py``, ``envs/`` and the others stand beside ``hidreamer/``;
a wheel holds them in ``hidreamer/_app``, because names as general as ``models`` do not belong at
the top of site-packages (docs/decisions/014-installed.md).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

INSTALLED = Path(__file__).parent / "_app"  # exists in a wheel only
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent
HUB = "hf:"  # what the name of an agent on a model hub begins with
by_command = ROOT == INSTALLED  # whether messages name "hidreamer train"; set by hidreamer.__main__

# {command: (module in ROOT that is run as a script, its sentence)}
COMMANDS = {
    "demo": ("demo", "Minutes: an agent that beats random play, with videos of both."),
    "train": ("dreamer", "Train an agent, or continue a run."),
    "compare": ("run_comparison", "Train every model on every task with every seed, and report."),
    "evaluate": (
        "analysis.evaluate",
        "Play episodes with a trained agent, and write their returns.",
    ),
    "overestimation": (
        "analysis.overestimation",
        "Do an agent's dreams and values promise more than the task gives?",
    ),
    "play": ("play", "Look inside a trained agent and play in its dream, on a local page."),
    "analyse": ("analysis", "Look inside trained agents: what do their levels hold?"),
    "pipeline": ("pipeline", "Train in stages: frames, encoder, tokens, world model, policy."),
    "doctor": ("doctor", "What is installed, which device and threads, which suites work."),
}


class ForeignModule(ImportError):
    """One line: a module of another project has a name that ours needs."""


class UsageError(Exception):
    """One line: what is wrong with the arguments of a command."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def missing(folder: str | os.PathLike, of: str = "a run or of an export") -> str:
    """One line where a folder that is to be read is none, else "". of: what it is to be of."""
    path = os.path.expanduser(folder)  # a home that is not known is no folder
    if not os.path.exists(path):
        return f"there is no folder {path}: name that of {of}"
    return "" if os.path.isdir(path) else f"{path} is a file: name the folder of {of}"


def missing_agent(where: str) -> str:
    """``missing`` of all that ``hidreamer.load`` takes, a checkpoint or a hub's name too."""
    return "" if where.startswith(HUB) or os.path.isfile(where) else missing(where)


def modules() -> dict[str, Path]:
    """{name: file} of the modules and packages in ROOT."""
    found = {}
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")]):
        found[file.parent.name if file.name == "__init__.py" else file.stem] = file
    return found


def foreign() -> tuple[str, str | None] | None:
    """The first of ``modules`` whose name means another file, or none, to Python as it is now:
    the name and that file. None where all mean ours.
    """
    for name, file in modules().items():
        found = origin(name)
        if found is None or not os.path.exists(found) or not os.path.samefile(found, file):
            return name, found
    return None


def enter() -> None:
    """Put ROOT first on the import path, so that ``import models`` finds ours.

    For a process of our own; ``hidreamer.root`` is for others. Raises ForeignModule where it would
    not all the same: another one is loaded already, or an import hook goes before the path.
    """
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
    if other := foreign():
        raise ForeignModule(
            f"hidreamer needs its own module {other[0]!r}, and Python has another one"
            f" ({other[1]}): use a process in which that is not imported"
        )


def origin(name: str) -> str | None:
    """The file of a module that is loaded, or that would be."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def command(module: str) -> list[str]:
    """The words that start a script or a package of ROOT: "python dreamer.py", "python -m
    analysis" or, by the command, "hidreamer train".
    """
    for name, (known, _) in COMMANDS.items():
        if known == module and by_command:
            return ["hidreamer", name]
    if (ROOT / f"{module}.py").exists():
        return ["python", f"{module}.py"]
    return ["python", "-m", module]


def install_line(extra: str = "") -> str:
    """The command that installs this project with an extra, as it was installed itself: from a
    wheel by its name, from a checkout by its folder. ``envs.errors.install_line`` is the same.
    """
    extras = f"[{extra}]" if extra else ""
    if ROOT == INSTALLED:
        return f"pip install {shlex.quote(f'hidreamer{extras}')}"
    folder = "." if os.path.samefile(".", ROOT) else ROOT
    return f"pip install -e {shlex.quote(f'{folder}{extras}')}"


def activation() -> str:
    """The command after which "python" means the interpreter of this process, as with ``make
    demo``; "" where it does already, or where there is no virtual environment.
    """
    script, found = Path(sys.prefix) / "bin" / "activate", shutil.which("python")
    if not script.exists() or (found and Path(found).parent == script.parent):
        return ""
    near = script.is_relative_to(Path.cwd())
    return f". {shlex.quote(str(script.relative_to(Path.cwd()) if near else script))}"


def plain_warnings() -> None:
    """Warnings of this process are one line each, and none where nobody reads them."""

    def show(message: Warning | str, *_: object) -> None:
        with contextlib.suppress(OSError):  # a reader that left, a full disk: no reason to stop
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def plain_interrupts() -> None:
    """Ctrl-C where nothing waits for it, as while modules are loaded, is one line."""

    def show(kind: type[BaseException], *rest: object) -> None:
        if kind is KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, *rest)

    sys.excepthook = show


def safe_streams() -> None:
    """Have standard streams that take all text and that no other file stands in for."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file would have its number, and what is printed in it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":  # an encoding may lack what a path has
            stream.reconfigure(errors="backslashreplace")


def python_path() -> str:
    """PYTHONPATH of a process, in any folder, that is to import what stands in ROOT and what this
    process can.
    """
    given = os.environ.get("PYTHONPATH")
    folders = map(os.path.abspath, given.split(os.pathsep)) if given else []
    return os.pathsep.join([str(ROOT), *folders])


def run(main: Callable[[list[str]], int]) -> int:
    """-> exit status of ``main``, given the arguments; 1 if its reader left, as with ``--help |
    head``; 130 after Ctrl-C.
    """
    safe_streams()
    plain_interrupts()
    try:
        status = main(sys.argv[1:])
        if sys.stdout is not None:  # started with it closed
            sys.stdout.flush()
    except BrokenPipeError:
        hide_stdout()
        return 1
    except OSError as error:
        print(f"error: the output cannot be written ({error})", file=sys.stderr)
        hide_stdout()
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return status


def hide_stdout() -> None:
    """Drop what is still buffered for a reader that left, and all that follows."""
    if sys.stdout is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
