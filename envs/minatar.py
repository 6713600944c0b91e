"""The five MinAtar games: Atari's ideas on a 10 x 10 grid of boolean planes."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from envs.base import Suite, unknown
from envs.imports import without
from envs.palette import PALETTE

with without("matplotlib", "seaborn"):  # for its own windows: a second and 120 MB a process
    import minatar

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
# attributes of a game that are no part of its state
CONSTANT = ("random", "channels", "action_map")
PIXELS = 16  # of a rendered cell


class MinAtar(Suite):
    """One game. Observation: `grid` bool (10, 10, C). `size` means nothing here.

    sticky: chance that a frame repeats the action of the frame before. actions: the `minimal` set
    of this game or `all` six. Difficulty ramps up as MinAtar has it. Freeway never ends but by its
    clock: that is a truncation.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        repeat: int,
        sticky: float = 0.1,
        actions: str = "minimal",
    ):
        if name not in GAMES:
            raise unknown("MinAtar game", name, GAMES)
        if actions not in ("minimal", "all"):
            raise unknown("minatar.actions", actions, ("minimal", "all"))
        self._repeat = repeat
        self.game = minatar.Environment(name, sticky_action_prob=sticky)
        self.actions = (
            self.game.minimal_action_set()
            if actions == "minimal"
            else list(range(self.game.num_actions()))
        )
        self.action_space = Discrete(len(self.actions))
        self.observation_space = Dict(grid=Box(0, 1, tuple(self.game.state_shape()), np.bool_))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.game.seed(int(self.np_random.integers(2**31)))
            self.game.last_action = 0
        self.game.reset()
        return {"grid": self.game.state()}, {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            reward, done = self.game.act(self.actions[action])
            total += reward
            if done:
                break
        late = getattr(self.game.env, "terminate_timer", 0) < 0
        return {"grid": self.game.state()}, total, done and not late, done and late, {}

    def render(self) -> np.ndarray:
        """uint8 (160, 160, 3): each cell in the colour of its last plane."""
        grid = self.game.state()
        planes = (grid * np.arange(1, grid.shape[2] + 1)).max(axis=2)
        return PALETTE[planes].repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)

    def get_state(self) -> dict[str, Any]:
        return {
            "game": {
                key: value for key, value in vars(self.game.env).items() if key not in CONSTANT
            },
            "last_action": self.game.last_action,
            "random": self.game.random.get_state(legacy=False),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self.game.env).update(state["game"])
        self.game.last_action = state["last_action"]
        self.game.seed(0)  # gives game and wrapper one generator to share, as after any seed
        self.game.random.set_state(state["random"])
