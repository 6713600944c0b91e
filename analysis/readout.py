"""Probes: how well named factors can be read from features, on episodes that were held out.

Linear: ridge regression. MLP: one hidden layer. Both are fitted on training episodes; how much they
are held back is chosen on validation episodes; scores are of test episodes. Steps of one episode
never stand on two sides. Score: R2, the share of the variance about the training mean that is
explained; 0 is what the mean does, below 0 is worse.

Shapes: N steps of all episodes, F features, Y factors (NaN where a factor has no value).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

PENALTIES = np.logspace(-2.0, 5.0, 15)  # of ridge regression, on standardised features
FIT = 3000  # steps that are fitted on, at most
LEAST = 30  # steps with a value that are needed, to fit and to score
UNITS, EPOCHS, BATCH, RATE, PATIENCE = 64, 60, 256, 2e-3, 10  # of the MLP
FOLD = 5  # of every five episodes one is for testing, one for validation


class Split(NamedTuple):
    """Steps (N,) bool."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split(episode: np.ndarray) -> Split:
    """Of steps by the number of their episode (N,)."""
    place = episode % FOLD
    test, valid = place == FOLD - 1, place == FOLD - 2
    return Split(~(test | valid), valid, test)


class Basis(NamedTuple):
    """Features turned so that a ridge regression is a division: exact, and done once."""

    train: np.ndarray  # (n, R)
    valid: np.ndarray
    test: np.ndarray
    rows: np.ndarray  # (n,) which steps were fitted on
    scale: np.ndarray  # (R,) squared singular values


def basis(x: np.ndarray, by: Split, usable: np.ndarray) -> Basis:
    """Standardise by the training steps and turn to their principal axes.

    usable: (N,) steps at which there are features.
    """
    rows = np.flatnonzero(by.train & usable)
    if len(rows) > FIT:
        rows = np.sort(np.random.default_rng(0).choice(rows, FIT, replace=False))
    train = x[rows].astype(np.float64).round(4)
    mean, spread = train.mean(0), train.std(0)
    keep = spread > 1e-4  # what never changes in training must not become a feature
    place = lambda z: (z[:, keep].astype(np.float64).round(4) - mean[keep]) / spread[keep]
    train = place(x[rows])
    if train.shape[1] > len(train):  # more features than steps: the axes span the steps
        scale, axes = np.linalg.eigh(train @ train.T)
        good = scale > 1e-8 * scale[-1]
        axes = train.T @ axes[:, good] / np.sqrt(scale[good])
        scale = scale[good]
    else:
        scale, axes = np.linalg.eigh(train.T @ train)
    turn = lambda which: place(x[which]) @ axes
    parts = [turn(side & usable) for side in (by.valid, by.test)]
    return Basis(train @ axes, *parts, rows, np.maximum(scale, 0.0))


def r2(error: np.ndarray, truth: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(Y,) of errors and truths (n, Y) with NaN, and training means (Y,)."""
    there = np.isfinite(truth)
    rest = np.where(there, error, 0.0) ** 2
    total = np.where(there, truth - mean, 0.0) ** 2
    enough = (there.sum(0) >= LEAST) & (total.sum(0) > 1e-9)
    return np.where(enough, 1.0 - rest.sum(0) / np.where(enough, total.sum(0), 1.0), math.nan)


def scores(
    x: np.ndarray, y: np.ndarray, episode: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """{"linear", "mlp": (Y,) R2} of features (N, F), factors (N, Y) and episode numbers (N,).

    Steps whose features are NaN are left out. NaN for a factor that hardly ever has a value, or
    only one.
    """
    by, usable = split(episode), np.isfinite(x).all(1)
    nothing = np.full(y.shape[1], math.nan)
    if min((side & usable).sum() for side in by) < LEAST:
        return {"linear": nothing, "mlp": nothing}
    b = basis(x, by, usable)
    if not b.train.shape[1]:  # features that never change explain nothing
        zero = np.where(np.isfinite(y).sum(0) >= LEAST, 0.0, math.nan)
        return {"linear": zero, "mlp": zero}
    train, valid, test = y[b.rows], y[by.valid & usable], y[by.test & usable]
    there = np.isfinite(train).sum(0) >= LEAST
    mean = np.where(there, np.nanmean(np.where(there, train, 0.0), 0), math.nan)
    spread = np.nanstd(np.where(there, train, 0.0), 0)
    spread = np.where(spread > 1e-9, spread, math.nan)
    norm = lambda z: (z - mean) / spread
    sides = norm(train), norm(valid), norm(test)
    on_valid, line = ridge(b, *sides[:2])
    found = {"linear": line, "mlp": mlp(b, *sides[:2], on_valid, line, seed)}
    return {name: r2(out - sides[2], sides[2], 0.0 * mean) for name, out in found.items()}


def ridge(b: Basis, train: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of standardised factors on both sides, (n valid, Y), (n test, Y); each factor
    with a penalty of its own.
    """
    out = [np.full((len(x), train.shape[1]), math.nan) for x in (b.valid, b.test)]
    for k in range(train.shape[1]):
        there = np.isfinite(train[:, k])
        if there.sum() < LEAST:
            continue
        target, centre = train[there, k], 0.0
        if there.all():
            scale, turn = b.scale, None
            product = b.train.T @ target
        else:  # a regression on some of the steps has a mean and axes of its own
            centre = b.train[there].mean(0)
            x = b.train[there] - centre
            scale, turn = np.linalg.eigh(x.T @ x)
            product = turn.T @ (x.T @ target)
        known = np.isfinite(valid[:, k])
        best = None
        for penalty in PENALTIES:
            weight = product / (np.maximum(scale, 0.0) + penalty)
            weight = weight if turn is None else turn @ weight
            error = np.square((b.valid[known] - centre) @ weight - valid[known, k]).sum()
            if best is None or error < best[0]:
                best = error, weight
        for x, found in zip((b.valid, b.test), out, strict=True):
            found[:, k] = (x - centre) @ best[1]
    return out[0], out[1]


def mlp(
    b: Basis,
    train: np.ndarray,
    valid: np.ndarray,
    on_valid: np.ndarray,
    line: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Predictions (n test, Y) of one network for all factors; for each factor that of the epoch
    which does best on validation, of the mean, or of the ``line`` (``ridge``'s, with ``on_valid``),
    so that a network that learned less than these is no worse.
    """
    tensor = lambda z: torch.from_numpy(np.nan_to_num(z)).float()
    # To about unit variance of all features together, keeping what is large large.
    unit = float(np.sqrt(max(b.train.var(0).mean(), 1e-12)))
    inputs = [tensor(z / unit) for z in (b.train, b.valid, b.test)]
    masks = [torch.from_numpy(np.isfinite(z)).float() for z in (train, valid)]
    targets = [tensor(z) for z in (train, valid)]
    error = lambda out: ((out - targets[1]).square() * masks[1]).sum(0) / masks[1].sum(0).clamp(1.0)
    kept = np.zeros(line.shape)  # the mean
    best = error(torch.zeros_like(targets[1]))
    straight = error(tensor(on_valid))
    better = (straight < best).numpy() & np.isfinite(line).all(0)
    kept[:, better], best = line[:, better], torch.where(torch.from_numpy(better), straight, best)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(b.train.shape[1], UNITS), nn.SiLU(), nn.Linear(UNITS, train.shape[1])
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
        since = 0
        for _ in range(EPOCHS):
            for pick in torch.randperm(len(inputs[0])).split(BATCH):
                rest = (net(inputs[0][pick]) - targets[0][pick]).square() * masks[0][pick]
                optimizer.zero_grad()
                (rest.sum() / masks[0][pick].sum().clamp(min=1.0)).backward()
                optimizer.step()
            with torch.no_grad():
                now, since = error(net(inputs[1])), since + 1
                if (now < best).any():
                    better = (now < best).numpy()
                    kept[:, better] = net(inputs[2]).double().numpy()[:, better]
                    best, since = torch.minimum(best, now), 0
            if since >= PATIENCE:
                break
    return np.where(np.isfinite(train).sum(0) >= LEAST, kept, math.nan)


def cross_fitted(
    x: np.ndarray, y: np.ndarray, episode: np.ndarray, penalty: float, folds: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of a ridge regression and of the mean, (episodes, Y) sums over each episode.

    Every episode is predicted by a regression that was fitted on the other folds.
    """
    count = int(episode.max()) + 1
    error, total = np.zeros((count, y.shape[1])), np.zeros((count, y.shape[1]))
    x = np.where(np.isfinite(x), x, 0.0).astype(np.float64)
    for fold in range(folds):
        test = episode % folds == fold
        mean, spread = x[~test].mean(0), x[~test].std(0)
        z = (x - mean) / np.where(spread > 1e-4, spread, np.inf)
        for columns, there in groups(np.isfinite(y)):
            fit, out = ~test & there, test & there
            if fit.sum() < LEAST or not out.any():
                continue
            known, level = z[fit] - z[fit].mean(0), y[fit][:, columns].mean(0)
            gram = known.T @ known + penalty * np.eye(z.shape[1])
            weight = np.linalg.solve(gram, known.T @ (y[fit][:, columns] - level))
            found = (z[out] - z[fit].mean(0)) @ weight + level
            rest = np.square(found - y[out][:, columns])
            around = np.square(y[out][:, columns] - level)
            for i, column in enumerate(columns):
                error[:, column] += np.bincount(episode[out], rest[:, i], count)
                total[:, column] += np.bincount(episode[out], around[:, i], count)
    return error, total


def groups(there: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """Columns of ``there`` (N, Y) that have their values at the same steps: (columns, (N,))."""
    found: dict[bytes, tuple[list[int], np.ndarray]] = {}
    for k in range(there.shape[1]):
        found.setdefault(there[:, k].tobytes(), ([], there[:, k]))[0].append(k)
    return list(found.values())
