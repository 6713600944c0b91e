"""Environments behind one interface: `make_env("atari_pong", config, seed)` gives an `Env` (see
envs/base.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from envs.base import Env, EnvError, unknown
from envs.errors import ActionError, install_line, one_line

__all__ = ["Env", "EnvError", "crashes", "env_for_spaces", "make_env", "open_env"]

SUITES = {
    "atari": "Atari",
    "crafter": "Crafter",
    "dmc": "DMC",
    "dummy": "Dummy",
    "gym": "Gym",
    "minatar": "MinAtar",
    "minigrid": "MiniGrid",
    "pinpad": "PinPad",
    "popgym": "POPGym",
    "vizdoom": "ViZDoom",
}
EXTRAS = (
    "crafter",
    "dmc",
    "minigrid",
    "popgym",
    "vizdoom",
)  # suites whose library is not in the base install


def make_env(
    task: str,
    env: Mapping[str, Any],
    seed: int,
    *,
    index: int | None = None,
    evaluation: bool = False,
) -> Env:
    """Builds the environment of `task` = SUITE_NAME, for example `atari_pong` or `gym_CartPole-v1`.

    `env` holds `size` [H, W] in pixels, `action_repeat` in frames per agent step, `time_limit` in
    frames (0: none), `invalid` (see `Env`; without it `stop`) and, under the suite's own name, the
    keyword options of its class. Only the suite that is asked for is imported. index: its number
    among the environments of a run, for messages.
    evaluation: options that are meant for learning only are replaced, as the suite's `evaluation`
    says.
    Raises EnvError, in one line, for an unknown suite or name, a bad option value and a missing
    package.
    """
    suite, _, name = task.partition("_")
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    repeat = env["action_repeat"]
    if repeat < 1:
        raise EnvError(f"action_repeat must be at least 1, not {repeat}")
    size = tuple(env["size"])
    if len(size) != 2 or min(size) < 1:
        raise EnvError(
            f"env.size is height and width in pixels, as 64 64, not {' '.join(map(str, size))}"
        )
    try:
        module = importlib.import_module(f".{suite}", __package__)
    except ModuleNotFoundError as error:
        line = install_line(suite if suite in EXTRAS else "")
        raise EnvError(f"{task} needs the package {error.name!r}: {line}") from error
    kind = getattr(module, SUITES[suite])
    options = env.get(suite, {}) | (getattr(kind, "evaluation", {}) if evaluation else {})
    built = kind(name, size, repeat, **options)
    return Env(built, repeat, env["time_limit"], seed, env.get("invalid", "stop"), task, index)


def env_for_spaces(task: str, env: Mapping[str, Any], seed: int = 0) -> Env:
    """An environment as `open_env` builds it, closed at once: for what it observes and how it is
    acted on. Raises EnvError.
    """
    built = open_env(task, env, seed)
    with crashes(f"{task} cannot be closed"):
        built.close()
    return built


def open_env(task: str, env: Mapping[str, Any], seed: int, evaluation: bool = False) -> Env:
    """An environment as `make_env` builds it. Raises EnvError, in one line, for whatever its
    constructor raises: in a run that is a crash (`envs.vector`), elsewhere there is nothing to go
    on with.
    """
    with crashes(f"{task} cannot be built"):
        return make_env(task, env, seed, evaluation=evaluation)


@contextlib.contextmanager
def crashes(what: str) -> Iterator[None]:
    """Raises EnvError, `what` and the cause in one line, for whatever an environment raises inside;
    a wrong action stays the caller's fault.
    """
    try:
        yield
    except (EnvError, ActionError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        cause = one_line(f"{type(error).__name__} {error}")
        raise EnvError(f"{what}: {cause} ({where})") from error
