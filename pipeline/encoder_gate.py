"""The encoder's gate: linear probes of the console's memory, and the lineage's metrics beside them.

Shapes: N frames, E numbers of an embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from pipeline import probing
from pipeline.data import Recording
from pipeline.gate import HIGHER, LOWER, Row, Table

GEOMETRY_NOTE = (
    "The lineage judged its encoder by these. Temporal ratio: mean distance of successive frames"
    " over that of random pairs, held-out episodes, no pair across an end. Diversity: mean distance"
    " of random pairs; 1.414 says that they are orthogonal, no more. Norm: 1 by construction. Of"
    " these two no value is better."
)
PROBE_NOTE = (
    "Held-out episodes. R²: a linear probe of all numbers, fitted on training episodes, with the"
    " penalty that does best on those of them that are left out; about their mean, so that a"
    " constant gets 0. Best r: the lineage's state correlation, the best single number in sample,"
    " for the record: an untrained network passes it as well."
)


def tables(
    embeddings: list[dict[str, np.ndarray]],
    recordings: list[Recording],
    steps: int,
    poll: Callable[[], None],
) -> list[Table]:
    """Of every game's embeddings (N, E) by who made them, "here" first.

    steps: of the probes. poll: called time and again; it may raise.
    """
    geometry, out = [], []
    for found, recording in zip(embeddings, recordings, strict=True):
        poll()
        geometry += geometry_rows(found, recording)
        out.append(probe_table(found, recording, steps, poll))
    return [Table("Geometry", geometry, GEOMETRY_NOTE), *out]


def geometry_rows(embeddings: Mapping[str, np.ndarray], recording: Recording) -> list[Row]:
    """The lineage's metrics on held-out episodes, of embeddings (N, E) by who made them."""
    successors, rows = recording.pairs(1, held=True), recording.rows(held=True)
    pairs = probing.random_pairs(rows, np.random.default_rng(0))
    features: dict[str, probing.Features] = {who: x.__getitem__ for who, x in embeddings.items()}
    spread = {who: float(probing.distances(x, pairs).mean()) for who, x in features.items()}
    features["pixels"] = probing.pixels(recording)
    ratio = {who: probing.temporal_ratio(x, successors, pairs) for who, x in features.items()}
    norm = {who: float(np.linalg.norm(x[rows], axis=-1).mean()) for who, x in embeddings.items()}
    game, out = recording.game, []
    for name, by, better in (
        ("temporal ratio", ratio, LOWER),
        ("diversity", spread, ""),
        ("norm", norm, ""),
    ):
        own = by.pop("here")
        out.append(Row(f"{game}: {name}", own, by, better))
    return out


def probe_table(
    embeddings: Mapping[str, np.ndarray],
    recording: Recording,
    steps: int,
    poll: Callable[[], None],
) -> Table:
    """R2 of every variable of the console's memory, and below it the lineage's state correlation.

    embeddings: {encoder: (N, E)} of all rows of ``recording``, "here" that of the stage. steps:
    how many training rows the probes are fitted on. poll: as of ``tables``.
    """
    features: dict[str, probing.Features] = {}
    for who, x in embeddings.items():
        features[who] = functools.partial(scaled_rows, x)
    features["pixels"] = probing.pixels(recording)
    found = probing.r2(features, recording, steps, poll)
    sample = np.random.default_rng(1).permutation(recording.rows(held=True))[:1000]
    rows = []
    for name, byte in probing.variables(recording).items():
        by = {who: shares.get(name, float("nan")) for who, shares in found.items()}
        own = by.pop("here")
        rows.append(Row(f"{name}: R²", own, by, HIGHER if np.isfinite(own) else ""))
        y = recording.ram[sample, byte].astype(float)
        lineage = {
            who: probing.state_correlation(encode(sample).astype(float), y)
            for who, encode in features.items()
        }
        own = lineage.pop("here")
        rows.append(Row(f"{name}: best r (lineage)", own, lineage))
    return Table(f"{recording.game}: what a linear probe finds", rows, PROBE_NOTE)


def scaled_rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of unit vectors (N, E), with numbers of about 1."""
    return x[rows] * np.float32(np.sqrt(x.shape[1]))
