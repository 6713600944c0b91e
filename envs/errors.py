"""What can go wrong between the agent and an environment, and the messages for it."""

from __future__ import annotations

import difflib
import os
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class EnvError(Exception):
    """An environment that cannot be built, used or drawn. The message is one line and names the
    remedy.
    """


class BadValue(EnvError):
    """An environment gave a NaN or an infinity. `Env` stops the run with it, or closes the episode
    (`invalid`).
    """


class ActionError(ValueError):
    """An action outside `act_space`: the caller's fault, so it is never counted as a crash of the
    environment.
    """


def install_line(extra: str) -> str:
    """What ``hidreamer.app.install_line`` says; ``envs`` imports nothing of the project."""
    extras, root = f"[{extra}]" if extra else "", Path(__file__).parent.parent
    if root.name == "_app":  # in a wheel
        return f"pip install {shlex.quote(f'hidreamer{extras}')}"
    folder = "." if os.path.samefile(".", root) else root
    return f"pip install -e {shlex.quote(f'{folder}{extras}')}"


def one_line(text: Any, length: int = 200) -> str:
    """`text` in one line, shortened to `length` characters."""
    return textwrap.shorten(str(text), length, placeholder=" ...")


def unknown(what: str, name: str, known: Iterable[str]) -> EnvError:
    """The error for a name that does not exist, with the ones that look like it."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:10]
    return EnvError(f"unknown {what} {name!r}; nearest: {', '.join(nearest)}")
