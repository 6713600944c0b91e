"""Toy tasks for tests: the observation shows a cue, and the next action earns reward by answering
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from envs.base import Suite, unknown

LENGTH = 20  # agent steps of an episode
CRASH = 50  # age, in agent steps, at which `crash` breaks
CHOICES = 4
KINDS = ("continuous", "crash", "grid", "image", "multi", "vector")


class Dummy(Suite):
    """Each step shows a random cue; the reward of the next step, 0 to 1 a frame, tells how well
    the action met it.

    image: a bright bar, its position is the action to take. grid: the same bar in one of four
    planes.
    vector: the action itself, one-hot. multi: a bar for one action and a one-hot for the other,
    half the reward each.
    continuous: two numbers to copy; the environment's own bounds are [-1, 1] and [0, 4]. crash:
    vector that breaks.
    After 20 steps `image`, `grid` and `crash` terminate (bars shrink with the time left), the
    others are truncated.
    """

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        if name not in KINDS:
            raise unknown("dummy task", name, KINDS)
        self._name, self._repeat = name, repeat
        self._steps = self._age = 0
        self._cue = np.zeros(2)
        image, vector = Box(0, 255, (*size, 3), np.uint8), Box(-np.inf, np.inf, (CHOICES,))
        spaces = {
            "continuous": {"vector": Box(-1, 1, (2,))},
            "crash": {"vector": vector},
            "grid": {"grid": Box(0, 1, (10, 10, CHOICES), np.bool_)},
            "image": {"image": image},
            "multi": {"image": image, "vector": vector},
            "vector": {"vector": vector},
        }
        self.observation_space = Dict(spaces[name])
        self.action_space = Discrete(CHOICES)
        if name == "multi":
            self.action_space = MultiDiscrete([3, CHOICES])
        elif name == "continuous":
            self.action_space = Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self._age += 1
        if self._name == "crash" and self._age == CRASH:
            raise RuntimeError(f"dummy_crash broke at the age of {CRASH} steps")
        space = self.action_space
        if isinstance(space, Box):
            met = 1 - np.abs(action - self._cue) / (space.high - space.low)
        else:
            met = np.atleast_1d(action) == self._cue
        self._steps += 1
        over, terminal = self._steps == LENGTH, self._name in ("image", "grid", "crash")
        return (
            self._show(),
            self._repeat * np.mean(met),
            over and terminal,
            over and not terminal,
            {},
        )

    def render(self) -> np.ndarray:
        """uint8 (64, 64, 3): the cue as a bar, in shades for numbers."""
        if self._name == "continuous":
            shade = (
                (self._cue - self.action_space.low)
                / (self.action_space.high - self.action_space.low)
                * 255
            )
            return np.tile(shade.astype(np.uint8).repeat(32)[None, :, None], (64, 1, 3))
        return self._bar(Box(0, 255, (64, 64, 3), np.uint8))

    def get_state(self) -> dict[str, Any]:
        random = self.np_random.bit_generator.state
        return {"steps": self._steps, "age": self._age, "cue": self._cue, "random": random}

    def set_state(self, state: dict[str, Any]) -> None:
        self._steps, self._age, self._cue = state["steps"], state["age"], state["cue"]
        self.np_random.bit_generator.state = state["random"]

    def _show(self) -> dict[str, np.ndarray]:
        """Draws the next cue and pictures it."""
        space = self.action_space
        if isinstance(space, Box):
            self._cue = self.np_random.uniform(space.low, space.high)
            return {"vector": (self._cue - space.low) / (space.high - space.low) * 2 - 1}
        sizes = space.nvec if isinstance(space, MultiDiscrete) else [space.n]
        self._cue = self.np_random.integers(sizes)
        obs = {}
        for key, shown in self.observation_space.items():
            obs[key] = np.eye(CHOICES)[self._cue[-1]] if key == "vector" else self._bar(shown)
        return obs

    def _bar(self, space: Box) -> np.ndarray:
        """The first cue as a column (image) or a plane (grid), from the ground up as high as there
        is time left.
        """
        canvas = np.zeros(space.shape, space.dtype)
        height, width, _ = space.shape
        gone, place = height * self._steps // LENGTH, int(self._cue[0])
        if space.dtype == np.bool_:
            canvas[gone:, :, place] = True
        else:
            canvas[gone:, width * place // CHOICES : width * (place + 1) // CHOICES] = 255
        return canvas
