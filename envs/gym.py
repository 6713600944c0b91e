"""Any environment that is registered with Gymnasium; `MODULE:ID` imports MODULE first.
See docs/own_environment.md.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import traceback
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from envs import pickled
from envs.base import Suite
from envs.errors import BadValue, EnvError, one_line, unknown
from envs.spaces import Leaf, Reader, at, count, is_text, leaves, readable, reader

# pictures only: pygame need not look for a display
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

STATES = {  # what these classes keep between two steps, beside their generator and the time limit
    AcrobotEnv: ("state",),
    CartPoleEnv: ("state", "steps_beyond_terminated"),
    Continuous_MountainCarEnv: ("state",),
    MountainCarEnv: ("state",),
    PendulumEnv: ("state", "last_u"),
}
# What `gymnasium.make` puts around an environment; other wrappers may keep something from step to
# step, and nothing says what.
KNOWN_WRAPPERS = (TimeLimit, OrderEnforcing, PassiveEnvChecker)

PAGE = "see docs/own_environment.md"
STEP = "step must return (observation, reward, terminated, truncated, info)"


class Gym(Suite):
    """One Gymnasium id. Observations: the leaves of a Dict or Tuple space, by name (`a`, `0`, or
    `a/b` where they are nested), else one, `image`, `grid` or `vector`.

    A leaf is a picture, resized to `size`, if its bounds are [0, 255] (or [0, 1], of floats) and
    its shape is (H, W), (H, W, C), (C, H, W) or a stack of those (see `spaces.layout`); a grid if
    it is a bool Box of rank 2 or 3. All other Boxes, of any number type and rank, MultiBinary, and
    Discrete and MultiDiscrete (one-hot) are flat vectors. Text is left out, with a warning. Values
    that are not of their space, other spaces and an old API raise EnvError, in one line. States
    are exact for classic control without wrappers of its own.

    kwargs: arguments for the constructor, YAML or JSON text of a mapping. keys: a regular
    expression; observations whose whole name does not match are left out.
    """

    suite = "gym"
    pickled = False  # whether all of its states are attributes that can be pickled

    def __init__(
        self, name: str, size: tuple[int, int], repeat: int, kwargs: str = "", keys: str = ".*"
    ):
        self._name, self._repeat = f"{self.suite}_{name}", repeat
        self._env = _make(name, _mapping(kwargs, self.suite), self.suite)
        space, self.action_space = self._space("observation_space"), self._space("action_space")
        chosen = self._chosen(self._leaves(space), keys)
        readers = {key: self._reader(key, leaf.space, size) for key, leaf in chosen.items()}
        self.observation_space = Dict({key: box for key, (box, _) in readers.items()})
        self._read = {key: (chosen[key].path, read) for key, (_, read) in readers.items()}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        try:
            result = self._env.reset(seed=seed)
        except TypeError as error:
            if re.search(
                r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error)
            ):
                raise self._mistake(
                    "reset must have the arguments (self, *, seed=None, options=None)"
                ) from error
            raise
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise self._mistake(f"reset must return (observation, info), not {count(result)}")
        return self._observe(result[0]), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated = self._frame(action)
            total += reward
            if terminated or truncated:
                break
        return self._observe(obs), total, terminated, truncated, {}

    def render(self) -> Any:
        """What the environment draws; `Env.render` makes a picture of it."""
        try:
            return self._env.render()
        except Exception as error:
            if "mujoco" not in type(self._env.unwrapped).__module__:
                raise
            cause = f"{type(error).__name__} {one_line(error)}"
            raise EnvError(f"{cause} (without a display, set MUJOCO_GL=egl)") from error

    def close(self) -> None:
        self._env.close()

    def variables(self) -> dict[str, float]:
        """The state of classic control, {"0": ...} in its order; {} of all others."""
        inner = self._env.unwrapped
        if type(inner) not in STATES:
            return {}
        return {str(i): float(x) for i, x in enumerate(inner.state)}

    def get_state(self) -> dict[str, Any] | None:
        inner = self._env.unwrapped
        if not self._saves_all:
            return None
        state = {"elapsed": self._env.get_wrapper_attr("_elapsed_steps")} if self._limited else {}
        if self.pickled:
            frozen = pickled.freeze(inner)
            return None if frozen is None else state | {"pickled": frozen}
        if type(inner) not in STATES:
            return None
        return state | {
            "attributes": {key: getattr(inner, key) for key in STATES[type(inner)]},
            "random": inner.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        inner = self._env.unwrapped
        self._env.reset()  # Gymnasium refuses to step what it has not seen reset
        if self.pickled:
            pickled.thaw(inner, state["pickled"])
        else:
            for key, value in state["attributes"].items():
                setattr(inner, key, value)
            inner.np_random.bit_generator.state = state["random"]
        if self._limited:
            self._env.set_wrapper_attr("_elapsed_steps", state["elapsed"])

    @property
    def _saves_all(self) -> bool:
        """Whether nothing between this and the environment keeps a state of its own, but one clock
        (a stack of frames does, which would go on with those of another episode).
        """
        found, env = [], self._env
        while isinstance(env, gymnasium.Wrapper):
            found.append(type(env))
            env = env.env
        return set(found) <= set(KNOWN_WRAPPERS) and found.count(TimeLimit) < 2

    @property
    def _limited(self) -> bool:
        """Whether a wrapper of Gymnasium's counts steps."""
        return self._env.has_wrapper_attr("_elapsed_steps")

    def _leaves(self, space: gymnasium.Space) -> dict[str, Leaf]:
        """What there is to observe, by the agent's names."""
        return leaves(space)

    def _reader(
        self, key: str, space: gymnasium.Space, size: tuple[int, int]
    ) -> tuple[Box, Reader]:
        """The agent's space of a leaf, and the function that reads its values."""
        return reader(key, space, size)

    def _frame(self, action: Any) -> tuple[Any, float, bool, bool]:
        """One step of the environment. -> observation, reward, terminated,
        truncated. Raises EnvError.
        """
        try:
            result = self._env.step(action)
        except (TypeError, ValueError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1].filename
            if "unpack" in str(error) and place.startswith(os.path.dirname(gymnasium.__file__)):
                # a wrapper of Gymnasium's met it first
                raise self._mistake(f"{STEP} ({one_line(error)})") from error
            raise
        if not (isinstance(result, tuple) and len(result) == 5):
            raise self._mistake(f"{STEP}, not {count(result)}")
        obs, *scalars, _ = result
        for i, (name, value) in enumerate(
            zip(("reward", "terminated", "truncated"), scalars, strict=True)
        ):
            if type(value) in (bool, float):
                continue
            array = np.asarray(value)
            if array.size != 1 or array.dtype.kind not in "biuf":
                raise self._mistake(f"{name} must be one number, not {one_line(repr(value), 80)}")
            scalars[i] = array.item()
        reward, terminated, truncated = scalars
        return obs, float(reward), bool(terminated), bool(truncated)

    def _observe(self, obs: Any) -> dict[str, np.ndarray]:
        """The agent's observation. Raises EnvError, BadValue for one that is not of its space."""
        try:
            return {key: read(at(path, obs)) for key, (path, read) in self._read.items()}
        except BadValue:
            raise  # `Env` knows what to do
        except EnvError as error:
            raise self._mistake(str(error)) from error

    def _space(self, name: str) -> gymnasium.Space:
        space = getattr(self._env, name, None)
        if not isinstance(space, gymnasium.Space):
            raise self._mistake(
                f"{name} must be a space of gymnasium.spaces, not {one_line(repr(space), 80)}"
            )
        return space

    def _chosen(self, found: dict[str, Leaf], pattern: str) -> dict[str, Leaf]:
        """Those whose name matches, without text. Raises EnvError for none, or one that cannot be
        read.
        """
        option = f"env.{self.suite}.keys"
        try:
            chosen = {key: leaf for key, leaf in found.items() if re.fullmatch(pattern, key)}
        except re.error as error:
            raise EnvError(
                f"{option} is {pattern!r}, which is no regular expression: {error}"
            ) from error
        if not chosen:
            raise EnvError(
                f"no observation matches {option} {pattern!r}; {self._name} has {', '.join(found)}"
            )
        good = {key: leaf for key, leaf in chosen.items() if self._readable(key, leaf.space)}
        remedy = f"--{option} '{'|'.join(map(re.escape, good))}'"
        for key, leaf in chosen.items():
            if key in good:
                continue
            if good and is_text(leaf.space):
                warnings.warn(
                    f"{self._name}: observation {key!r} is text, which is left out"
                    f" ({remedy} does so without this line)",
                    RuntimeWarning,
                    stacklevel=3,
                )
                continue
            advice = f"leave it out by {remedy}, or translate" if good else "translate"
            raise EnvError(
                f"{self._name}: observation {key!r} is {one_line(leaf.space)}, which cannot be"
                f" read: {advice} it in a wrapper (docs/own_environment.md)"
            )
        return good

    def _readable(self, key: str, space: gymnasium.Space) -> bool:
        return readable(space)

    def _mistake(self, line: str) -> EnvError:
        """Of the environment's author: no restart would help."""
        return EnvError(f"{self._name}: {line} ({PAGE})")


def _mapping(text: str, suite: str) -> dict[str, Any]:
    """The constructor's arguments. Raises EnvError."""
    try:
        mapping = YAML(typ="safe").load(text) if text.strip() else {}
    except YAMLError as error:
        raise EnvError(
            f"env.{suite}.kwargs is {text!r}, which is no YAML: {one_line(error)}"
        ) from error
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise EnvError(
            f"env.{suite}.kwargs is {text!r}; it must be names and values, as '{{size: 5, "
            "slippery: false}'"
        )
    return mapping


def _import(module: str, suite: str) -> None:
    """Imports the module that registers an id. Raises EnvError."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise EnvError(
                f"module {module!r} needs the package {missing!r}: install it"
            ) from error
        raise EnvError(
            f"there is no module {module!r} for the task {suite}_{module}:ID: install it, or put"
            " the folder that it lies in on PYTHONPATH, as in"
            " PYTHONPATH=FOLDER python dreamer.py ..."
        ) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            ""
            if isinstance(error, SyntaxError)
            else f" ({os.path.basename(place.filename)}:{place.lineno})"
        )
        # a SyntaxError says itself where it is
        cause = f"{type(error).__name__} {one_line(error)}{where}"
        raise EnvError(f"module {module!r} cannot be imported: {cause}") from error


def _whence(module: str) -> str:
    """A module by name and file: it may be another than was meant."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{module!r} ({file or 'a folder without __init__.py'})"


def _make(name: str, kwargs: dict[str, Any], suite: str) -> gymnasium.Env:
    module, _, short = name.rpartition(":")
    if module:
        _import(module, suite)
    make = functools.partial(gymnasium.make, disable_env_checker=True)
    try:
        with warnings.catch_warnings():
            # `Gym.render` tells those who want pictures
            warnings.filterwarnings("ignore", "(?s).*with render_mode")
            try:
                return make(name, **{"render_mode": "rgb_array"} | kwargs)
            except TypeError:  # a constructor that knows no render_mode
                return make(name, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        hint = f"; {_whence(module)} was imported but did not register it" if module else ""
        raise EnvError(f"{unknown('Gymnasium id', short, gymnasium.registry)}{hint}") from error
    except TypeError as error:
        given = f" with env.{suite}.kwargs {one_line(kwargs)}" if kwargs else ""
        cause = one_line(str(error).split(" was raised from the environment creator")[0])
        raise EnvError(f"{suite}_{name} cannot be built{given}: {cause}") from error
    except (gymnasium.error.Error, ImportError, FileNotFoundError) as error:
        raise EnvError(f"{suite}_{name}: {one_line(error)}") from error
