"""Mutual information of discrete codes and factors, and what chance would give.

Estimator: plug-in entropies with the correction of Miller (1955) and Madow: (m - 1) / 2N nats are
added to an entropy of N samples in which m values occur. The plug-in mutual information of
independent variables is above zero by about (a - 1)(b - 1) / 2N; the correction takes that away.

A level has many variables, and their joint values hardly repeat. So a level's information about a
factor is that of its best single variable: a lower bound on what the level holds.

Null: every episode's factors are replaced by those of another episode. Successive steps are alike,
in codes and in factors, so shuffled steps would make two series that only drift look dependent;
whole episodes keep the drift. What both follow in every episode alike (time) stays in the null and
does not count as evidence.

Shapes: N steps of all episodes, V variables of a level, P permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ESTIMATOR = "Miller-Madow"
BINS = 8  # values that a continuous factor is cut into
PERMUTATIONS = 200
LEVEL = 0.05  # probability, over a whole table, that anything is claimed where nothing is


class Information(NamedTuple):
    """Bits of each level about each factor, (levels, factors) each."""

    bits: np.ndarray
    null: np.ndarray  # mean under permuted episodes
    p: np.ndarray  # adjusted for the number of cells (Westfall and Young 1993, maximum)
    entropy: np.ndarray  # (factors,) bits of each factor, the most that can be


def entropy(counts: np.ndarray) -> np.ndarray:
    """Bits of counts (..., m), Miller-Madow, over the last axis."""
    total = counts.sum(-1)
    safe = np.maximum(total, 1)
    share = counts / safe[..., None]
    plugin = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    seen = (counts > 0).sum(-1)
    return np.where(total > 0, plugin + (seen - 1) / (2.0 * safe), 0.0) / np.log(2.0)


def mutual_information(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bits of integers x (N, V), each variable alone, about integers y (N,) -> (V,).

    Steps with a negative y are left out.
    """
    keep = y >= 0
    x, y = x[keep], y[keep]
    if not len(y):
        return np.zeros(x.shape[1])
    kinds, classes = int(x.max()) + 1, int(y.max()) + 1
    variables = x.shape[1]
    cell = (np.arange(variables) * kinds + x) * classes + y[:, None]  # (N, V)
    joint = np.bincount(cell.ravel(), minlength=variables * kinds * classes)
    joint = joint.reshape(variables, kinds, classes)
    together = entropy(joint.reshape(variables, -1))
    return entropy(joint.sum(2)) + entropy(joint.sum(1)) - together


def discretise(x: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Factor (N,) -> classes (N,), -1 where it is NaN: its values, or ``bins`` quantiles."""
    out = np.full(len(x), -1)
    there = np.isfinite(x)
    values, index = np.unique(x[there], return_inverse=True)
    if len(values) > bins:
        edges = np.unique(np.quantile(x[there], np.linspace(0.0, 1.0, bins + 1)[1:-1]))
        index = np.searchsorted(edges, x[there], side="right")
    out[there] = index
    return out


def other_episodes(lengths: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """(N,): for every step the step of another episode that takes its place.

    Episodes are dealt to each other so that none keeps its own; a shorter one begins again.
    Raises ValueError for fewer than two episodes.
    """
    if len(lengths) < 2:
        raise ValueError(f"episodes can be exchanged where there are two, not {len(lengths)}")
    order = rng.permutation(len(lengths))
    to = np.empty(len(lengths), int)
    to[order] = np.roll(order, int(rng.integers(1, len(lengths))))  # no fixed point
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    parts = []
    for i, length in enumerate(lengths):
        j = to[i]
        parts.append(starts[j] + np.arange(length) % lengths[j])
    return np.concatenate(parts)


def table(
    codes: Mapping[str, np.ndarray],
    factors: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Information:
    """Bits that each level's best variable shares with each factor, beside a permutation test.

    codes: {level: (N, V) integers}; factors: {name: (N,), NaN where it has no value}; lengths: of
    the episodes that the N steps are. Factors that hardly vary have zero bits and p 1.
    """
    classes = [discretise(x) for x in factors.values()]
    rng = np.random.default_rng(seed)
    seen = best_bits(codes, classes)
    orders = (other_episodes(lengths, rng) for _ in range(permutations))
    null = np.stack([best_bits(codes, [y[order] for y in classes]) for order in orders])
    whole = [entropy(np.bincount(y[y >= 0], minlength=1)) for y in classes]
    return Information(seen, null.mean(0), family_p(seen, null), np.array(whole))


def best_bits(codes: Mapping[str, np.ndarray], classes: Sequence[np.ndarray]) -> np.ndarray:
    """(levels, factors): bits that each level's best variable shares with each factor.

    codes: {level: (N, V) integers}; classes: of ``discretise``, (N,) each.
    """
    bits = np.empty((len(codes), len(classes)))
    for i, x in enumerate(codes.values()):
        for j, y in enumerate(classes):
            bits[i, j] = mutual_information(x, y).max()
    return bits


def family_p(seen: np.ndarray, null: np.ndarray) -> np.ndarray:
    """p of every cell of ``seen`` (...), given permutations ``null`` (P, ...), that at least one
    cell of the table would be as far out by chance.

    Cells are compared in deviations of their own null; one that never varies has p 1.
    """
    mean, spread = null.mean(0), null.std(0)
    scale = np.where(spread > 1e-12, spread, np.inf)
    extreme = ((null - mean) / scale).reshape(len(null), -1).max(1)  # (P,)
    z = (seen - mean) / scale
    above = (extreme >= z[..., None] - 1e-9).sum(-1)
    p = (1.0 + above) / (1.0 + len(null))
    return np.where(spread > 1e-12, p, 1.0)
