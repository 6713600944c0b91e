"""Latent states beside the steps of replay, for sequences to begin from (``replay.write_back``).

Beside a step lies the carry before it, which acting found when the step was taken and every update
finds anew for the sequences that it learns from: the stored states of R2D2 (Kapturowski et al.
2019), as DreamerV3 of 2024 has them (``replay_context`` there). Half precision: 16 bits a number.

Shapes: B sequences, T steps, N environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hidreamer.dynamics.base import Dynamics, Post
from hidreamer.replay import STORED, Addresses, Replay, Rows, Spec

PREFIX = "carry."  # of the columns, and of the keys of a batch


def check(dynamics: Dynamics, config: Any) -> None:
    """Raises ValueError where carries are to be stored that have no fixed size."""
    if config.replay.write_back and dynamics.carry_type is None:
        raise ValueError(
            "replay.write_back stores a state of fixed size beside every step, and that of a"
            " transformer is keys and values of all steps in its window: set --replay.write_back"
            " false, or choose dynamics.type rssm or hrssm, or hrvq with --dynamics.hrvq.memory gru"
        )


def carry_spec(dynamics: Dynamics) -> Spec:
    """Columns of replay beside each row."""
    spec = {STORED: ((), np.dtype(bool))}
    for name, x in dynamics.initial(1)._asdict().items():
        spec[PREFIX + name] = tuple(x.shape[1:]), np.dtype(np.float16)
    return spec


def given(dynamics: Dynamics, batch: Mapping[str, Tensor]) -> Any:
    """The carry that a preprocessed batch's sequences begin from, (B, .); None where it has none.

    Where nothing was stored the first step is marked ``is_first``, which replaces it.
    """
    kind = dynamics.carry_type
    if kind is None or PREFIX + kind._fields[0] not in batch:
        return None
    return kind(*(batch[PREFIX + name] for name in kind._fields))


def found(dynamics: Dynamics, carry: Any, post: Post) -> dict[str, Tensor]:
    """By column, what ``observe`` came to in all but the last of T steps: (B,T-1,...), which
    belongs beside the steps after them.
    """
    size = post.feat.deter.shape[:2]
    out = {}
    with torch.no_grad():
        for name, x in dynamics.starts(carry, post, 0)._asdict().items():
            out[PREFIX + name] = x.unflatten(0, size)[:, :-1].half()
    return out


def acted(carry: Any) -> dict[str, np.ndarray]:
    """Columns beside the rows that N environments come to from ``carry`` (N, .)."""
    values = {PREFIX + name: x.half().cpu().numpy() for name, x in carry._asdict().items()}
    return values | {STORED: np.ones(len(carry[0]), bool)}


class WriteBack:
    """Samples sequences, and keeps what an update found of them until the replay is next sampled
    or saved. Only then does the host wait for the device; nothing reads the columns before.
    """

    def __init__(self):
        self.sampled: Addresses | None = None
        self.found: dict[str, Tensor] = {}

    def sample(self, replay: Replay, out: Rows | None) -> Rows:
        """The next batch, as ``Replay.sample`` has it. Raises OSError."""
        self.finish(replay)
        self.sampled = replay.sample_addresses()
        return replay.read(self.sampled, out)

    def finish(self, replay: Replay) -> None:
        """Write what was found, if anything was. Raises OSError."""
        if not self.found:
            return
        stream, row = self.sampled
        values = {name: x.cpu().numpy() for name, x in self.found.items()}
        self.found = {}
        shape = next(iter(values.values())).shape[:2]
        replay.write(Addresses(stream, row + 1), values | {STORED: np.ones(shape, bool)})
