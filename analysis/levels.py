"""Which level holds which group of factors: contrast of the top and the bottom level, MIG and DCI.

Shapes: N steps of all episodes, L levels, Y factors, E episodes, P permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis import information, readout

PENALTY = 10.0  # of the ridge regressions here, on standardised features
RESAMPLES = 2000
SHUFFLES = 40


# ---------------------------------------------------------------- contrast


class Contrast(NamedTuple):
    """mean over group A of (top - bottom) minus the same of group B; R2 below 0 count as 0."""

    top: np.ndarray  # (Y,) R2
    bottom: np.ndarray  # (Y,)
    difference: np.ndarray  # (Y, 3) top - bottom, its 95% interval over episodes
    value: float | None  # None where a group has no factor
    low: float
    high: float
    control: tuple[float, float]  # 95% of contrasts with factors of other episodes
    groups: np.ndarray  # (2, 3) mean top - bottom of A and of B, their 95% intervals

    @property
    def supported(self) -> bool:
        """The whole interval lies beyond 0 and beyond the shuffled controls, on one side."""
        if self.value is None:
            return False
        return bool(self.low > max(0.0, self.control[1]) or self.high < min(0.0, self.control[0]))

    @property
    def divided(self) -> bool:
        """Supported, and each level holds more than the other of one of the groups."""
        (_, low_a, high_a), (_, low_b, high_b) = self.groups
        return self.supported and bool((low_a > 0 > high_b) or (high_a < 0 < low_b))


def contrast(
    top: np.ndarray,
    bottom: np.ndarray,
    y: np.ndarray,
    first: Sequence[bool],
    episode: np.ndarray,
    shuffles: int = SHUFFLES,
    pairs: int = 1,
) -> Contrast:
    """Features of the top and bottom level (N, F), factors (N, Y), whether each is of group A (Y,).

    Every episode is predicted from the others; intervals resample episodes. The control repeats
    everything with every episode's factors replaced by another episode's; NaN without ``shuffles``.
    pairs: how many pairs of levels are looked at, for all of which intervals of the contrast and of
    the groups hold jointly (Bonferroni).
    """
    tails = 2.5 / pairs, 100.0 - 2.5 / pairs
    first = np.asarray(first, bool)
    fits = [readout.cross_fitted(x, y, episode, PENALTY) for x in (top, bottom)]
    scored = np.isfinite(y).sum(0) >= readout.LEAST
    scored &= fits[0][1].sum(0) > 1e-9
    groups = first & scored, ~first & scored
    seen = [shares(*fit, None) for fit in fits]
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(fits[0][0]), (RESAMPLES, len(fits[0][0])))
    drawn = np.stack([shares(*fits[0], pick) - shares(*fits[1], pick) for pick in picks])
    bounds = np.percentile(drawn, (2.5, 97.5), axis=0).T  # (Y, 2)
    gap = seen[0] - seen[1]
    difference = np.column_stack([gap, bounds])
    difference[~scored] = np.nan
    if not all(group.any() for group in groups):
        nothing = np.full((2, 3), np.nan)
        return Contrast(*seen, difference, None, np.nan, np.nan, (np.nan, np.nan), nothing)
    between = lambda d: d[..., groups[0]].mean(-1) - d[..., groups[1]].mean(-1)
    low, high = np.percentile(between(drawn), tails)
    lengths = np.bincount(episode)
    chance = []
    for _ in range(shuffles):
        other = y[information.other_episodes(lengths, rng)]
        fits = [readout.cross_fitted(x, other, episode, PENALTY) for x in (top, bottom)]
        chance.append(between(shares(*fits[0], None) - shares(*fits[1], None)))
    control = tuple(map(float, np.percentile(chance or [np.nan], tails)))
    sides = []
    for group in groups:
        interval = np.percentile(drawn[:, group].mean(1), tails)
        sides.append([gap[group].mean(), *interval])
    value = float(between(gap))
    return Contrast(*seen, difference, value, float(low), float(high), control, np.array(sides))


def shares(error: np.ndarray, total: np.ndarray, pick: np.ndarray | None) -> np.ndarray:
    """R2 (Y,) of sums by episode (E, Y), of the episodes ``pick``; below 0 counts as 0."""
    if pick is not None:
        error, total = error[pick], total[pick]
    total = total.sum(0)
    return np.where(total > 0, np.maximum(1.0 - error.sum(0) / np.maximum(total, 1e-12), 0.0), 0.0)


# ---------------------------------------------------------------- MIG and DCI


class Disentanglement(NamedTuple):
    """Of levels as the units that factors are spread over."""

    mig: np.ndarray  # (Y,) gap of bits between the best level and the next, of the factor's bits
    mig_p: np.ndarray  # (Y,)
    top: np.ndarray  # (Y,) the best level
    importance: np.ndarray  # (L, Y) R2 of a level alone
    importance_p: np.ndarray  # (L, Y)
    disentanglement: np.ndarray  # (L,) 1: a level holds one factor alone
    completeness: np.ndarray  # (Y,) 1: one level alone holds the factor
    informativeness: np.ndarray  # (Y,) R2 of all levels together
    informative_p: np.ndarray  # (Y,)


def mig(bits: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Mutual information gap (Chen et al. 2018) with levels for latents: (L, Y), (Y,) -> (Y,)."""
    ranked = np.sort(bits, 0)
    second = ranked[-2] if len(ranked) > 1 else 0.0 * ranked[-1]
    return np.maximum(ranked[-1], 0.0) / np.maximum(entropy, 1e-9) - np.maximum(
        second, 0.0
    ) / np.maximum(entropy, 1e-9)


def dci(importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disentanglement (L,) and completeness (Y,) of importances (L, Y) (Eastwood, Williams 2018).

    NaN for a level or factor without any importance: nothing is shared out.
    """
    return focus(importance), focus(importance.T)


def focus(weight: np.ndarray) -> np.ndarray:
    """1 - entropy of each row (n, m) as shares, in units of log m; NaN for rows of zeros."""
    weight = np.maximum(weight, 0.0)
    total = weight.sum(1, keepdims=True)
    share = weight / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    ways = max(weight.shape[1], 2)
    return np.where(total[:, 0] > 1e-9, 1.0 - entropy / np.log(ways), np.nan)


def disentangle(
    codes: Mapping[str, np.ndarray],
    kinds: Sequence[int],
    factors: Mapping[str, np.ndarray],
    episode: np.ndarray,
    permutations: int = 100,
) -> Disentanglement:
    """MIG and DCI by level, and p of each against factors of other episodes.

    codes: {level: (N, V)}; kinds: classes of each level's variables; factors: {name: (N,)} of few
    values. p is adjusted for the number of cells of its own table.
    """
    lengths = np.bincount(episode)
    classes = {name: information.discretise(x) for name, x in factors.items()}
    level = np.concatenate(
        [
            np.full(x.shape[1] * k, i)
            for i, (x, k) in enumerate(zip(codes.values(), kinds, strict=True))
        ]
    )
    onehot = np.concatenate(
        [np.eye(k)[x].reshape(len(x), -1) for x, k in zip(codes.values(), kinds, strict=True)], 1
    )
    classify = Classify(onehot, level, episode)
    rng = np.random.default_rng(0)
    seen, bits, informative = measure(codes, classes, classify, slice(None))
    null = [
        measure(codes, classes, classify, information.other_episodes(lengths, rng))
        for _ in range(permutations)
    ]
    entropy = np.array([information.entropy(np.bincount(y[y >= 0])) for y in classes.values()])
    gap = mig(bits, entropy)
    chance = np.stack([mig(b, entropy) for _, b, _ in null])
    apart, complete = dci(seen)
    return Disentanglement(
        mig=gap,
        mig_p=information.family_p(gap, chance),
        top=bits.argmax(0),
        importance=seen,
        disentanglement=apart,
        completeness=complete,
        informativeness=informative,
        informative_p=information.family_p(informative, np.stack([r for _, _, r in null])),
        importance_p=information.family_p(seen, np.stack([i for i, _, _ in null])),
    )


def measure(
    codes: Mapping[str, np.ndarray],
    classes: Mapping[str, np.ndarray],
    classify: Classify,
    steps: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R2 (L, Y) and bits (L, Y) of levels alone, R2 (Y,) of all, with the classes of ``steps``."""
    bits, alone, whole = [], [], []
    for y in classes.values():
        y = y[steps]
        bits.append([information.mutual_information(x, y).max() for x in codes.values()])
        together, by_level = classify(y)
        whole.append(together)
        alone.append(by_level)
    return np.array(alone).T, np.array(bits).T, np.array(whole)


class Classify:
    """Ridge classifiers from the codes of all levels together and of each alone, on held-out
    episodes.
    """

    def __init__(self, onehot: np.ndarray, level: np.ndarray, episode: np.ndarray):
        by = readout.split(episode)
        self.fit, self.test = ~by.test, by.test
        x = onehot - onehot[self.fit].mean(0)
        self.sides, self.solvers = [], []
        for columns in [level >= 0, *(level == i for i in range(int(level.max()) + 1))]:
            fit = x[self.fit][:, columns]
            gram = fit.T @ fit + PENALTY * np.eye(fit.shape[1])
            self.solvers.append(np.linalg.solve(gram, fit.T))  # (F, fit)
            self.sides.append(x[self.test][:, columns])

    def __call__(self, y: np.ndarray) -> tuple[float, np.ndarray]:
        """Classes (N,) -> R2 of their one-hots from all levels, and from each alone (L,).

        Steps with a negative class count as a class of their own. Below 0 where nothing is held.
        """
        target = np.eye(int(y.max()) + 2)[y + 1]
        mean = target[self.fit].mean(0)
        fit, test = target[self.fit] - mean, target[self.test] - mean
        total = max(float(np.square(test).sum()), 1e-9)
        scores = []
        for solver, side in zip(self.solvers, self.sides, strict=True):
            scores.append(1.0 - float(np.square(side @ (solver @ fit) - test).sum()) / total)
        return scores[0], np.array(scores[1:])
