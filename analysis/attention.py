"""Where hrvq's transformer looks: by the levels of both positions, and by distance.

Beside each number stands what equal weights over everything visible would give: attention falls on
past steps for no other reason than that there are many of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis import latents
from hidreamer.mask import attn_mask
from hidreamer.rollout import Layout
from hidreamer.transformer import KV
from models import WorldModel

STEPS = 64  # of an episode that are looked at


class Attention(NamedTuple):
    """Means over heads, and over the rows that look back ``window`` steps in full."""

    names: list[str]  # of the levels of positions: L0 .., A
    by_level: np.ndarray  # (layers, rows, columns), each row's weights sum to 1
    by_level_equal: np.ndarray  # (rows, columns) if all that is visible weighed the same
    by_distance: np.ndarray  # (layers, rows, window) weight on positions so many steps back
    by_distance_equal: np.ndarray  # (rows, window)


@torch.no_grad()
def look(model: WorldModel, obs: Mapping[str, Tensor]) -> Attention | None:
    """Weights on one preprocessed episode (1, T, ...); None for a model without a transformer."""
    dynamics = model.dynamics
    if not hasattr(dynamics, "transformer"):
        return None
    obs = {key: x[:, :STEPS] for key, x in obs.items()}
    layers = dynamics.transformer.layers
    caught: list[tuple[Tensor, Tensor]] = []
    wrapped = [catching(layer, caught) for layer in layers]
    try:
        for layer, project in zip(layers, wrapped, strict=True):
            layer.project = project
        model.observe(obs, generator=latents.generator(obs, 0))
    finally:
        for layer in layers:
            del layer.project  # the class's own again
    length, levels, window = obs["reward"].shape[1], dynamics.positions, dynamics.window
    place = Layout.of(length, levels, 1, caught[0][0].device)
    rows = place.time, place.level
    mask = attn_mask(dynamics.level_mask, rows, rows, window)  # (Q, Q)
    weights = []
    for q, k in caught[: len(layers)]:  # (1, h, 1, Q, d)
        score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weight = torch.softmax(torch.where(mask, score, -1e9), -1)
        weights.append(weight.mean((0, 1, 2)).cpu().numpy())  # (Q, Q)
    equal = (mask / mask.sum(-1, keepdim=True)).cpu().numpy()
    time, level = place.time.cpu().numpy(), place.level.cpu().numpy()
    full = time >= min(window, length // 2)
    summed = [summarise(w, time, level, full, levels, window) for w in (*weights, equal)]
    by_level, by_distance = (np.stack(x) for x in zip(*summed, strict=True))
    names = [*(f"L{i}" for i in range(levels)), "A"]
    return Attention(names, by_level[:-1], by_level[-1], by_distance[:-1], by_distance[-1])


def catching(layer: Any, caught: list[tuple[Tensor, Tensor]]) -> Any:
    """``layer.project``, which also keeps the queries and keys."""
    project = layer.project

    def keep(x: Tensor, rope: Tensor, *room: Any) -> tuple[Tensor, KV]:
        q, kv = project(x, rope, *room)
        caught.append((q, kv.keys))
        return q, kv

    return keep


def summarise(
    weight: np.ndarray,
    time: np.ndarray,
    level: np.ndarray,
    full: np.ndarray,
    levels: int,
    window: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (Q, Q) -> by level (levels + 1, levels + 1), by distance (levels + 1, window)."""
    kinds = levels + 1
    by_level, by_distance = np.zeros((kinds, kinds)), np.zeros((kinds, window))
    ago = np.clip(time[:, None] - time[None], 0, window - 1)
    for row in range(kinds):
        rows = np.flatnonzero((level == row) & full)
        for column in range(kinds):
            by_level[row, column] = weight[rows][:, level == column].sum(1).mean()
        for back in range(window):
            by_distance[row, back] = (weight[rows] * (ago[rows] == back)).sum(1).mean()
    return by_level, by_distance
