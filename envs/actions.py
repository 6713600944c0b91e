"""Gymnasium's action spaces, and the one vector of numbers that the agent acts with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from envs.errors import ActionError, EnvError, one_line

TOLERANCE = 1e-3  # how far a "one-hot" may be from one: straight-through samples are not exact
MOST_ACTIONS = 2**14  # numbers of an action vector


def action_codec(
    space: gymnasium.Space,
) -> tuple[gymnasium.Space, int, Callable[[np.ndarray], Any]]:
    """-> the agent's space, the width A of its vector, and the function from a vector (A,) to the
    suite's action.

    Several choices (MultiDiscrete, MultiBinary, integer Box, and Dict or Tuple of them and of
    Discrete) are one MultiDiscrete for the agent; a Dict or Tuple of float Boxes is one Box.
    Raises EnvError for all others.
    """
    shown = one_line(space)
    if isinstance(space, Dict | gymnasium.spaces.Tuple):
        agent, decode = _composed(space, shown)
    elif isinstance(space, Discrete):
        agent, decode = Discrete(space.n), lambda vector: int(space.start) + _index(vector)
    elif isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        agent, decode = _scaled(space)
    elif choices := _choices(space, shown):
        agent, decode = choices
    else:
        raise EnvError(
            f"action space {shown} is not supported: only Discrete, MultiDiscrete, MultiBinary and"
            " Box are, and Dict and Tuple of them; translate it in a wrapper"
            " (docs/own_environment.md)"
        )
    width = agent.shape[0] if isinstance(agent, Box) else int(_sizes(agent).sum())
    if not 0 < width <= MOST_ACTIONS:
        raise EnvError(
            f"action space {shown} is {width} numbers for the agent, which can have 1 to"
            f" {MOST_ACTIONS}: choose fewer in a wrapper (docs/own_environment.md)"
        )
    return agent, width, decode


def _sizes(agent: Discrete | MultiDiscrete) -> np.ndarray:
    """How many values each choice has, (choices,)."""
    return np.atleast_1d(agent.n if isinstance(agent, Discrete) else agent.nvec)


def _composed(
    space: gymnasium.Space, shown: str
) -> tuple[gymnasium.Space, Callable[[np.ndarray], Any]]:
    """Of a Dict or Tuple: the vectors of its parts side by side."""
    named = isinstance(space, Dict)
    parts = [action_codec(part) for part in (space.spaces.values() if named else space.spaces)]
    agents = [agent for agent, _, _ in parts]
    boxes = sum(isinstance(agent, Box) for agent in agents)
    if not parts or 0 < boxes < len(parts):
        raise EnvError(
            f"action space {shown} is not supported: its parts must be all choices or all numbers;"
            " translate it in a wrapper (docs/own_environment.md)"
        )
    if boxes:
        low = np.concatenate([box.low for box in agents])
        agent = Box(low, np.concatenate([box.high for box in agents]))
    else:
        agent = MultiDiscrete(np.concatenate([_sizes(agent) for agent in agents]))
    ends = np.cumsum([width for _, width, _ in parts])[:-1]

    def split(vector: np.ndarray) -> dict | tuple:
        pieces = np.split(vector, ends)
        values = tuple(decode(piece) for (_, _, decode), piece in zip(parts, pieces, strict=True))
        return dict(zip(space.spaces, values, strict=True)) if named else values

    return agent, split


def _choices(
    space: gymnasium.Space, shown: str
) -> tuple[MultiDiscrete, Callable[[np.ndarray], np.ndarray]] | None:
    """Of a MultiDiscrete, a MultiBinary or an integer Box: an array of choices, each from a first
    value on.
    """
    if isinstance(space, MultiDiscrete):
        start, sizes = space.start, space.nvec
    elif isinstance(space, MultiBinary):
        start, sizes = np.zeros(space.shape, int), np.full(space.shape, 2)
    elif isinstance(space, Box) and space.dtype.kind in "biu":
        # without overflow
        start, sizes = space.low, space.high.astype(object) - space.low.astype(object) + 1
    else:
        return None
    sizes = np.ravel(sizes)
    if not len(sizes) or sizes.sum() > MOST_ACTIONS:
        raise EnvError(
            f"action space {shown} has {sizes.sum()} values, of which there can be 1 to"
            f" {MOST_ACTIONS}: choose fewer in a wrapper (docs/own_environment.md)"
        )
    sizes = sizes.astype(np.int64)
    ends = np.cumsum(sizes)[:-1]

    def choose(vector: np.ndarray) -> np.ndarray:
        indices = [_index(part) for part in np.split(vector, ends)]
        return (start + np.reshape(indices, space.shape)).astype(space.dtype)

    return MultiDiscrete(sizes), choose


def _scaled(space: Box) -> tuple[Box, Callable[[np.ndarray], np.ndarray]]:
    """Of a float Box: the agent's -1 and 1 are the bounds.

    A policy's actions lie in [-1, 1]. So where one bound is infinite the other is -1 or 1 and the
    unit stays, [5, inf] being [5, 7]; without this its actions would all be 5. Where both are, the
    agent's numbers are the environment's.
    """
    low, high = space.low.ravel(), space.high.ravel()
    below, above = np.isfinite(low), np.isfinite(high)
    agent = Box(
        np.where(below, -1, -np.inf).astype(np.float32),
        np.where(above, 1, np.inf).astype(np.float32),
    )
    wide_low, wide_high = low.astype(float), high.astype(float)
    bottom = np.where(below, wide_low, np.where(above, wide_high - 2, -1))
    top = np.where(above, wide_high, np.where(below, wide_low + 2, 1))
    centre, half = (top + bottom) / 2, (top - bottom) / 2

    def scale(vector: np.ndarray) -> np.ndarray:
        return np.clip(centre + half * vector, low, high).astype(space.dtype).reshape(space.shape)

    return agent, scale


def _index(part: np.ndarray) -> int:
    index = int(part.argmax())
    if abs(part[index] - 1) > TOLERANCE or abs(np.abs(part).sum() - 1) > TOLERANCE:
        raise ActionError(f"not one-hot: {part}")
    return index
