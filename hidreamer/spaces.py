"""Random members of observation and action spaces, in the form that replay holds them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from gymnasium import spaces


def random_rows(
    obs_space: Mapping[str, spaces.Space], act_space: spaces.Space, batch: int, length: int
) -> dict[str, np.ndarray]:
    """A batch of the right shapes and types, (B, T, ...), from a fixed seed.

    Args: ``obs_space`` {name: space}; ``batch`` B; ``length`` T.
    Returns {name: (B, T, ...)} with ``prev_action`` (B, T, A), and ``reward``, ``is_first`` (true
    at the first step of each sequence) and ``is_terminal`` (B, T).
    """
    rng, rows = np.random.default_rng(0), {}
    for key, space in obs_space.items():
        shape, kind = (batch, length, *space.shape), space.dtype
        if kind == np.float32:
            rows[key] = rng.standard_normal(shape, kind)
        else:
            rows[key] = rng.integers(0, 256 if kind == np.uint8 else 2, shape, np.uint8).astype(
                kind
            )
    rows["prev_action"] = random_action(act_space, batch * length, rng).reshape(batch, length, -1)
    rows["reward"] = rng.standard_normal((batch, length), np.float32)
    rows["is_first"] = np.zeros((batch, length), bool)
    rows["is_first"][:, 0] = True
    rows["is_terminal"] = np.zeros((batch, length), bool)
    return rows


def random_action(space: spaces.Space, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, A) uniform actions, float32: one-hot, concatenated one-hots, or in [-1, 1]."""
    if isinstance(space, spaces.Box):
        return rng.uniform(-1.0, 1.0, (count, *space.shape)).astype(np.float32)
    widths = [int(space.n)] if isinstance(space, spaces.Discrete) else list(map(int, space.nvec))
    return np.concatenate(
        [np.eye(n, dtype=np.float32)[rng.integers(0, n, count)] for n in widths], -1
    )
