"""Pin Pad: coloured pads that must be visited in one order, after the description in the appendix
of Hafner et al. (2022), "Deep Hierarchical Planning from Pixels", arXiv 2206.04114.

The places of the pads are ours, so returns are no figures of that paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from envs.base import Suite, unknown
from envs.palette import PALETTE

WIDTH, HEIGHT = 16, 14  # cells of the board, its walls among them
BELOW = 2  # rows under the board, which show the pads visited last
SIDE = 3  # cells of a pad's side
LENGTH = 2000  # frames of an episode
REWARD = 10.0  # for all pads in their order
PIXELS = 10  # of a rendered cell
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # stay, up, down, left, right
TOP, MIDDLE, BOTTOM = 1, 5, HEIGHT - 1 - SIDE
LEFT, CENTRE, RIGHT = 1, 6, WIDTH - 1 - SIDE
# The upper left cells of the pads, by task, in the order in which they are to be visited: each far
# from the one before.
PADS = {
    "three": ((TOP, LEFT), (TOP, RIGHT), (BOTTOM, CENTRE)),
    "four": ((TOP, LEFT), (BOTTOM, RIGHT), (TOP, RIGHT), (BOTTOM, LEFT)),
}
PADS["five"] = (*PADS["four"], (TOP, CENTRE))
PADS["six"] = (*PADS["five"], (BOTTOM, CENTRE))
PADS["seven"] = (*PADS["six"], (MIDDLE, LEFT))
PADS["eight"] = (*PADS["seven"], (MIDDLE, RIGHT))
WALL, AGENT, FIRST = 0, 1, 2  # planes; from FIRST on one for each pad


class PinPad(Suite):
    """`three` to `eight` pads. Observation: `grid` bool (16, 16, 2 + pads): walls, the agent, and
    a plane for each pad. `size` means nothing here.

    Stepping on a pad other than the last one notes it; the two lowest rows show as many notes as
    there are pads, the oldest on the left. When they are all pads in the one right order the
    reward is 10, the notes are wiped and the agent starts again from a random free cell. Nothing
    else is rewarded. An episode ends by its clock, after 2,000 frames: a truncation.
    """

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        if name not in PADS:
            raise unknown("Pin Pad task", name, PADS)
        self._repeat = repeat
        self.pads = len(PADS[name])
        self._board = np.zeros((HEIGHT + BELOW, WIDTH, FIRST + self.pads), np.bool_)
        walls = self._board[:HEIGHT, :, WALL]
        walls[[0, -1]] = walls[:, [0, -1]] = True
        for pad, (row, column) in enumerate(PADS[name]):
            self._board[row : row + SIDE, column : column + SIDE, FIRST + pad] = True
        self.floor = self._board[:HEIGHT, :, FIRST:]  # (14, 16, pads)
        self._free = np.argwhere(~self._board[:HEIGHT].any(-1))
        self.action_space = Discrete(len(MOVES))
        self.observation_space = Dict(grid=Box(0, 1, self._board.shape, np.bool_))
        self._at, self._visited, self._frames = (0, 0), [], 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._frames = 0
        self._start()
        return self._show(), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            total += self._move(*MOVES[action])
            self._frames += 1
            if self._frames == LENGTH:
                break
        return self._show(), total, False, self._frames == LENGTH, {}

    def render(self) -> np.ndarray:
        """uint8 (160, 160, 3): each cell in the colour of its plane, the agent above a pad."""
        grid = self._show()["grid"]
        planes = (grid * np.arange(1, grid.shape[2] + 1)).max(axis=2)
        planes[grid[..., AGENT]] = 1 + AGENT
        return PALETTE[planes].repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)

    def variables(self) -> dict[str, float]:
        """Where the agent is, and how many of the last notes begin the right order."""
        row, column = self._at
        return {"row": float(row), "column": float(column), "progress": float(self._progress())}

    def get_state(self) -> dict[str, Any]:
        return {
            "at": list(self._at),
            "visited": self._visited,
            "frames": self._frames,
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._at, self._visited = tuple(state["at"]), list(state["visited"])
        self._frames = state["frames"]
        self.np_random.bit_generator.state = state["random"]

    def _start(self) -> None:
        self._at = tuple(map(int, self.np_random.choice(self._free)))
        self._visited = []

    def _move(self, down: int, right: int) -> float:
        """One frame. -> its reward"""
        row, column = self._at[0] + down, self._at[1] + right
        if self._board[row, column, WALL]:
            return 0.0
        self._at = row, column
        for pad in map(int, np.flatnonzero(self.floor[row, column])):
            if self._visited[-1:] != [pad]:
                self._visited = [*self._visited, pad][-self.pads :]
        if self._visited != list(range(self.pads)):
            return 0.0
        self._start()
        return REWARD

    def _progress(self) -> int:
        """The length of the longest beginning of the right order that the notes end with."""
        for length in range(len(self._visited), 0, -1):
            if self._visited[-length:] == list(range(length)):
                return length
        return 0

    def _show(self) -> dict[str, np.ndarray]:
        grid = self._board.copy()
        grid[(*self._at, AGENT)] = True
        for slot, pad in enumerate(self._visited):
            grid[HEIGHT:, 2 * slot : 2 * slot + 2, FIRST + pad] = True
        return {"grid": grid}
