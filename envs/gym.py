"""Any environment that is registered with Gymnasium; `MODULE:ID` imports MODULE first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
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
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

from envs.base import EnvError, Suite, resize, unknown

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures only: pygame need not look for a display

STATES = {  # what these classes keep between two steps, beside their generator and the time limit
    AcrobotEnv: ("state",),
    CartPoleEnv: ("state", "steps_beyond_terminated"),
    Continuous_MountainCarEnv: ("state",),
    MountainCarEnv: ("state",),
    PendulumEnv: ("state", "last_u"),
}


class Gym(Suite):
    """One Gymnasium id. Observations: the keys of a Dict space, else one key, `image`, `grid` or `vector`.

    uint8 Box of rank 2 or 3: resized image. bool Box of rank 3: grid. float Box, Discrete (one-hot), MultiBinary:
    flat vector. Other spaces raise EnvError. States are exact for classic control.
    """

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        self._repeat = repeat
        self._env = _make(name)
        space = self._env.observation_space
        self._nested = isinstance(space, Dict)
        leaves = space.spaces if self._nested else {_kind(space): space}
        readers = {key: _reader(leaf, size) for key, leaf in leaves.items()}
        self.observation_space = Dict({key: reader[0] for key, reader in readers.items()})
        self._read = {key: reader[1] for key, reader in readers.items()}
        self.action_space = self._env.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        obs, _ = self._env.reset(seed=seed)
        return self._observe(obs), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, _ = self._env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self._observe(obs), total, terminated, truncated, {}

    def render(self) -> np.ndarray:
        """uint8 (H, W, 3), as the environment draws itself."""
        try:
            image = self._env.render()
        except Exception as error:  # pygame, OpenGL, ...: whatever the environment draws with
            hint = " (without a display, set MUJOCO_GL=egl)" if "mujoco" in type(self._env.unwrapped).__module__ else ""
            raise EnvError(
                f"{self._env.spec.id} cannot be drawn: {type(error).__name__} {_one_line(error)}{hint}"
            ) from error
        if image is None:
            raise EnvError(f"{self._env.spec.id} has no rgb_array rendering")
        return image

    def close(self) -> None:
        self._env.close()

    def get_state(self) -> dict[str, Any] | None:
        inner = self._env.unwrapped
        if type(inner) not in STATES:
            return None
        return {
            "attributes": {key: getattr(inner, key) for key in STATES[type(inner)]},
            "elapsed": self._env.get_wrapper_attr("_elapsed_steps"),
            "random": inner.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        inner = self._env.unwrapped
        self._env.reset()  # Gymnasium refuses to step what it has not seen reset
        for key, value in state["attributes"].items():
            setattr(inner, key, value)
        self._env.set_wrapper_attr("_elapsed_steps", state["elapsed"])
        inner.np_random.bit_generator.state = state["random"]

    def _observe(self, obs: Any) -> dict[str, np.ndarray]:
        return {key: read(obs[key] if self._nested else obs) for key, read in self._read.items()}


def _make(name: str) -> gymnasium.Env:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*with render_mode")  # `Gym.render` tells those who want pictures
            try:
                return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
            except TypeError:  # a constructor that knows no render_mode
                return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        raise unknown("Gymnasium id", name, gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError) as error:
        raise EnvError(f"gym_{name}: {_one_line(error)}") from error


def _kind(space: gymnasium.Space) -> str:
    return {"uint8": "image", "bool": "grid"}.get(space.dtype.name, "vector") if isinstance(space, Box) else "vector"


def _reader(space: gymnasium.Space, size: tuple[int, int]) -> tuple[Box, Callable[[Any], np.ndarray]]:
    """-> the agent's space of one leaf, and the function from the environment's value to the agent's."""
    box = isinstance(space, Box)
    channels = (*space.shape, 1)[2] if box and len(space.shape) in (2, 3) else 0
    if box and space.dtype == np.uint8 and channels in (1, 2, 3, 4):  # OpenCV resizes no more than four
        return Box(0, 255, (*size, channels), np.uint8), lambda image: resize(image, size)
    if box and space.dtype == np.bool_ and len(space.shape) == 3:
        return space, lambda grid: grid
    if isinstance(space, Discrete | MultiBinary) or (box and np.issubdtype(space.dtype, np.floating)):
        width = gymnasium.spaces.flatdim(space)
        return Box(-np.inf, np.inf, (width,)), lambda value: gymnasium.spaces.flatten(space, value)
    raise EnvError(f"observation space {space} is no image, bool grid, float Box, Discrete or MultiBinary")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
