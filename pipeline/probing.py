"""What embeddings hold of the console's memory, and the metrics that the lineage judged them by.

Shapes: N frames, D numbers each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis import probes
from pipeline.data import Recording

Features = Callable[[np.ndarray], np.ndarray]  # rows (M,) of a recording -> (M, D)
PAIRS = 2000  # random pairs of a distance
FEWEST = 8  # values that a byte without a name must take to be a variable


def variables(recording: Recording) -> dict[str, int]:
    """{name: byte}: those with names, or, in a game without, all bytes that take many values."""
    task = f"atari_{recording.game}"
    if task in probes.BYTES:
        return probes.BYTES[task]
    ram = recording.ram[recording.rows(False)]
    many = [i for i in range(ram.shape[1]) if len(np.unique(ram[:, i])) >= FEWEST]
    return {f"byte {i}": i for i in many}


def r2(
    features: Mapping[str, Features],
    recording: Recording,
    steps: int,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """{who: {variable: R2}} of linear probes, fitted on ``steps`` training rows at random, on the
    held-out episodes. NaN where a variable never changes, or a ball is never in play.

    poll: called for every episode; it may raise.
    """
    chunk = lambda rows: {"row": rows, "ram": recording.ram[rows][None]}
    train = [chunk(rows) for rows in training_rows(recording, steps)]
    held = [chunk(np.arange(x.start, x.stop)) for x in recording.episodes(True)]
    encoders = {}
    for who, encode in features.items():
        encoders[who] = polled(lambda rows, encode=encode: encode(rows["row"]), poll)
    return scores(probes.squares(encoders, train, held, variables(recording), steps))


def polled(encode: Callable, poll: Callable[[], None]) -> Callable:
    """``encode``, before which ``poll`` is called every time."""

    def found(x: Any) -> Any:
        poll()
        return encode(x)

    return found


def training_rows(recording: Recording, steps: int) -> list[np.ndarray]:
    """``steps`` training rows at random, by episode and in order."""
    rows = np.random.default_rng(0).permutation(recording.rows(False))[:steps]
    rows = np.sort(rows)
    return np.split(rows, np.flatnonzero(np.diff(recording.episode[rows])) + 1)


def scores(found: Mapping[str, Mapping[str, probes.Squares]]) -> dict[str, dict[str, float]]:
    """R2 of what ``probes.squares`` found."""
    return {who: {name: x.r2 for name, x in by.items()} for who, by in found.items()}


def mean(x: np.ndarray) -> float:
    """Of what is finite; NaN where nothing is."""
    x = x[np.isfinite(x)]
    return float(x.mean()) if len(x) else float("nan")


def pixels(recording: Recording) -> Features:
    """Raw pixels of the newest image."""
    return lambda rows: recording.image[rows].reshape(len(rows), -1) / np.float32(255.0)


# ---------------------------------------------------------------- the lineage's metrics


def temporal_ratio(encode: Features, successors: np.ndarray, others: np.ndarray) -> float:
    """Mean distance of successive frames over that of random pairs of frames; lower is smoother.

    successors (M,): rows whose episode goes on; others (K, 2): random pairs of rows.
    """
    near = distances(encode, np.stack([successors, successors + 1], -1)).mean()
    far = distances(encode, others).mean()
    return float(near / far) if far else float("nan")


def distances(encode: Features, pairs: np.ndarray) -> np.ndarray:
    """(M,) between the features of two rows each, (M, 2); pixels of all at once are gigabytes."""
    pieces = np.array_split(pairs, -(-len(pairs) // PAIRS))
    return np.concatenate(
        [np.linalg.norm(encode(x[:, 1]) - encode(x[:, 0]), axis=-1) for x in pieces]
    )


def random_pairs(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(PAIRS, 2) of rows (M,), never one with itself where there are two."""
    first = rng.integers(len(rows), size=PAIRS)
    shift = rng.integers(1, max(len(rows), 2), size=PAIRS)
    return np.stack([rows[first], rows[(first + shift) % len(rows)]], -1)


def state_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """The lineage's: the largest |Pearson correlation| of any of D numbers with a variable.

    x (N, D), y (N,). It is the maximum of D draws, in sample, and says nothing of what a reader of
    all numbers together can find. NaN where y is constant.
    """
    x, y = x - x.mean(0), y - y.mean()
    norms = np.sqrt(np.square(x).sum(0) * np.square(y).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.abs(y @ x) / norms
    return float(np.nanmax(found)) if np.isfinite(found).any() else float("nan")
