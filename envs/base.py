"""The environment interface of the project, and what every suite is built from.

A suite is a `gymnasium.Env` (class `Suite`); the agent only ever meets the adapter `Env` around it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

FLAGS = ("reward", "is_first", "is_last", "is_terminal")
TOLERANCE = 1e-3  # how far a "one-hot" may be from one: straight-through samples are not exact


class EnvError(Exception):
    """An environment that cannot be built or drawn. The message is one line and names the remedy."""


class ActionError(ValueError):
    """An action outside `act_space`: the caller's fault, so it is never counted as a crash of the environment."""


class Suite(gymnasium.Env):
    """A `gymnasium.Env` with a flat Dict observation space, and the two things that Gymnasium has no word for.

    A suite repeats actions itself, because only it knows what need not be drawn for a skipped frame: `step` is one
    agent step. `reset(seed=s)` starts all its randomness afresh. The info of a step holds every key of `log_keys`, and
    may hold `is_terminal`: no value after this step although the episode goes on (a lost life). `render()` is RGB.
    """

    log_keys: tuple[str, ...] = ()

    def get_state(self) -> dict[str, Any] | None:
        """All that the future depends on, or None where the library cannot tell."""
        return None

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly from what `get_state` returned, in this object or in another of the same task."""
        raise EnvError(f"{type(self).__name__} cannot restore a state")


class Env:
    """One environment as the agent sees it.

    obs_space: name -> Box of one of three kinds: uint8 (H, W, C) image, bool (H, W, C) grid, float32 (N,) vector.
    act_space: Discrete, MultiDiscrete, or a flat Box, [-1, 1] wherever the environment's own bounds are finite.
    act_dim: width A of the action vector: n, sum(nvec) or the Box's dimension.
    log_keys: names `log_*` of float scalars in the output, to be summed over an episode.
    repeat: frames per agent step. suite: the Suite inside, for what only one suite offers (`ram`, `variables`).

    `step` and `reset` return all keys of obs_space and log_keys and reward (float32), is_first, is_last, is_terminal
    (bool). A real end is is_last and is_terminal; running out of time is is_last alone. After is_last, call `reset`.
    """

    def __init__(self, suite: Suite, repeat: int, time_limit: int, seed: int):
        self.suite = suite
        self.repeat = repeat
        self.log_keys = suite.log_keys
        self.obs_space = _checked(suite.observation_space)
        self.act_space, self.act_dim, self._decode = action_codec(suite.action_space)
        self._time_limit = time_limit
        self._frames = 0  # of this episode
        self._seed: int | None = seed  # until the first reset has used it

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """One agent step. action: float32 (A,): one-hot, one-hots side by side, or numbers (clipped to the bounds).

        Raises ActionError, a ValueError, for a wrong shape, a number that is not finite, and what is not one-hot.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (self.act_dim,) or not np.isfinite(action).all():
            raise ActionError(f"an action is {self.act_dim} finite numbers, not {action}")
        obs, reward, terminated, truncated, info = self.suite.step(self._decode(action))
        self._frames += self.repeat
        truncated = truncated or 0 < self._time_limit <= self._frames
        is_terminal = terminated or info.get("is_terminal", False)
        logs = {key: np.float32(info[key]) for key in self.log_keys}
        return self._output(obs, logs, reward, is_last=terminated or truncated, is_terminal=is_terminal)

    def reset(self) -> dict[str, Any]:
        """Starts the next episode. The first call seeds the suite; the episodes after it follow from that seed."""
        obs, _ = self.suite.reset(seed=self._seed)
        self._seed = None
        self._frames = 0
        return self._output(obs, dict.fromkeys(self.log_keys, np.float32(0)), 0.0, is_first=True)

    def render(self) -> np.ndarray:
        """uint8 (H, W, 3): the present moment, for videos. Raises EnvError where nothing can be drawn."""
        return np.array(self.suite.render(), np.uint8)

    def get_state(self) -> dict[str, Any] | None:
        """Everything that later outputs depend on, as plain values (see `plain`); None where the suite cannot."""
        if self._seed is not None:
            return {"seed": self._seed}  # not started: nothing else to remember
        state = self.suite.get_state()
        return None if state is None else {"seed": None, "frames": self._frames, "suite": plain(state)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues, bit for bit, where `get_state` was called, here or in another object of the same task."""
        self._seed = state["seed"]
        if self._seed is None:
            self._frames = state["frames"]
            self.suite.set_state(plain(state["suite"]))

    def close(self) -> None:
        self.suite.close()

    def _output(self, obs, logs, reward, is_first=False, is_last=False, is_terminal=False) -> dict[str, Any]:
        output = {}
        for key, space in self.obs_space.items():
            output[key] = np.array(obs[key], space.dtype)  # a copy: suites may reuse their buffers
            if output[key].shape != space.shape:
                raise ValueError(f"observation {key!r} has shape {output[key].shape}, its space says {space.shape}")
        flags = {"is_first": is_first, "is_last": bool(is_last), "is_terminal": bool(is_terminal)}
        return {**output, **logs, "reward": np.float32(reward), **flags}


def _checked(space: Dict) -> dict[str, Box]:
    """The suite's observation spaces, once each is known to be an image, a grid or a vector."""
    for key, leaf in space.items():
        kind = (leaf.dtype.name, len(leaf.shape)) if isinstance(leaf, Box) else None
        if kind not in {("uint8", 3), ("bool", 3), ("float32", 1)}:
            raise EnvError(f"observation {key!r} is {leaf}, which is no image, grid or vector")
        if key in FLAGS or key.startswith("log_"):
            raise EnvError(f"observation {key!r} has a reserved name")
    return dict(space.items())


def action_codec(space: gymnasium.Space) -> tuple[gymnasium.Space, int, Callable[[np.ndarray], Any]]:
    """-> the agent's space, the width A of its vector, and the function from a vector (A,) to the suite's action."""
    if isinstance(space, Discrete):
        return Discrete(space.n), int(space.n), lambda vector: int(space.start) + _index(vector)
    if isinstance(space, MultiDiscrete):
        sizes = space.nvec.ravel()

        def choose(vector: np.ndarray) -> np.ndarray:
            parts = np.split(vector, np.cumsum(sizes)[:-1])
            return space.start + np.array([_index(part) for part in parts], space.dtype).reshape(space.shape)

        return MultiDiscrete(sizes), int(sizes.sum()), choose
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = space.low.ravel(), space.high.ravel()
        bounded = np.isfinite(low) & np.isfinite(high)
        agent = Box(np.where(bounded, -1, low).astype(np.float32), np.where(bounded, 1, high).astype(np.float32))
        bottom, top = np.where(bounded, low, -1).astype(float), np.where(bounded, high, 1).astype(float)
        centre, half = (top + bottom) / 2, (top - bottom) / 2  # 0 and 1, which change nothing, where unbounded

        def scale(vector: np.ndarray) -> np.ndarray:
            return np.clip(centre + half * vector, low, high).astype(space.dtype).reshape(space.shape)

        return agent, agent.shape[0], scale
    raise EnvError(f"action space {space} is not supported: only Discrete, MultiDiscrete and float Box are")


def _index(part: np.ndarray) -> int:
    index = int(part.argmax())
    if abs(part[index] - 1) > TOLERANCE or abs(np.abs(part).sum() - 1) > TOLERANCE:
        raise ActionError(f"not one-hot: {part}")
    return index


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) -> (*size, C) by averaging over pixel areas."""
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return image.reshape(*size, -1)


def plain(value: Any) -> Any:
    """A deep copy made of None, bool, int, float, str, list, dict and np.ndarray only, as checkpoints want it."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray():
            return value.copy()
        case np.generic():
            return value.item()
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"no plain value: {value!r}")


def unknown(what: str, name: str, known: Iterable[str]) -> EnvError:
    """The error for a name that does not exist, with the ones that look like it."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:10]
    return EnvError(f"unknown {what} {name!r}; nearest: {', '.join(nearest)}")
