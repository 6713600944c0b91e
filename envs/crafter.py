"""Crafter: open-world survival with 22 achievements."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import crafter
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from envs.base import Suite, unknown

RENDER = (288, 288)  # pixels; a multiple of the 9 x 9 view
ACHIEVEMENTS = tuple(crafter.constants.achievements)


class Crafter(Suite):
    """`reward` or `noreward` (always 0). Observation: `image`.

    `log_achievement_*` counts what was achieved during the step, so that its sum over an episode
    is the number of times (Crafter itself reports the running total). `log_success_*` is 1 at the
    first time in the episode, so that its mean over episodes is the success rate. Its 10,000 steps
    end by truncation, death is a real end.
    """

    log_keys = (
        *(f"log_achievement_{name}" for name in ACHIEVEMENTS),
        *(f"log_success_{name}" for name in ACHIEVEMENTS),
    )

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        if name not in ("reward", "noreward"):
            raise unknown("Crafter task", name, ("reward", "noreward"))
        self._size, self._repeat, self._rewarded = size, repeat, name == "reward"
        self.action_space = Discrete(len(crafter.constants.actions))
        self.observation_space = Dict(image=Box(0, 255, (*size, 3), np.uint8))
        self._env: crafter.Env | None = None
        self._counts: dict[str, int] = {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is not None or self._env is None:
            seed = int(self.np_random.integers(2**31))
            self._env = crafter.Env(size=self._size[::-1], reward=self._rewarded, seed=seed)
            self._env._world.__class__ = _OrderedWorld
        self._counts = dict.fromkeys(ACHIEVEMENTS, 0)
        return {"image": self._env.reset()}, {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            image, reward, done, info = self._env.step(action)
            total += reward
            if done:
                break
        counts = info["achievements"]
        logs = {}
        for name, count in counts.items():
            logs[f"log_achievement_{name}"] = count - self._counts[name]
            logs[f"log_success_{name}"] = self._counts[name] == 0 < count
        self._counts = counts
        dead = info["discount"] == 0
        return {"image": image}, total, dead, done and not dead, logs

    def render(self) -> np.ndarray:
        """uint8 (288, 288, 3)"""
        random = self._env._world.random
        # Crafter draws the noise of the night from the generator that moves the zombies
        before = random.get_state()
        image = self._env.render(RENDER)
        random.set_state(before)
        return image

    @staticmethod
    def summary(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """-> `score` (see `crafter_score`) of at least one episode, each given by its sums of
        `log_keys`.
        """
        rates = []
        for name in ACHIEVEMENTS:
            rates.append(np.mean([episode[f"log_success_{name}"] for episode in episodes]))
        return {"score": crafter_score(rates)}


def crafter_score(success_rates: Iterable[float]) -> float:
    """The score of Hafner (2021), "Benchmarking the Spectrum of Agent Capabilities", in percent.

    exp(mean(log(1 + s))) - 1 over all achievements, s being the share of episodes, in percent, in
    which the agent achieves it at least once. success_rates: these shares as numbers from 0 to 1.
    """
    percent = 100.0 * np.asarray(list(success_rates), float)
    return float(np.expm1(np.log1p(percent).mean()))


class _OrderedSet(dict):
    """As much of a set as Crafter uses, iterating in the order of insertion."""

    def add(self, item: object) -> None:
        self[item] = None

    def remove(self, item: object) -> None:
        del self[item]


class _OrderedWorld(crafter.engine.World):
    """Crafter removes the n-th creature of a set, which is ordered by memory address: a seed would
    not fix the game.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks = collections.defaultdict(_OrderedSet)
