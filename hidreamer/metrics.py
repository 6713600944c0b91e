"""Sums that become records: of the update's metrics between two records, of rewards between two
ends of episodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Means:
    """Means of vectors of metrics. Adding reads nothing on the host."""

    def __init__(self, device: torch.device):
        self.sums, self.count = torch.zeros(0, device=device), 0
        # of the first vector that was not finite
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, metrics: Tensor) -> None:
        """metrics: (M,)."""
        self.sums = self.sums + metrics if self.count else metrics.clone()
        self.count += 1
        self.nonfinite = torch.where(self.nonfinite.any(), self.nonfinite, ~metrics.isfinite())

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """{name: mean} of what was added; {} where that is nothing."""
        return (
            dict(zip(names, (self.sums / self.count).tolist(), strict=True)) if self.count else {}
        )

    def first_nonfinite(self, means: Mapping[str, float]) -> str:
        """The metric that was the first to be not finite, "" if all of ``means`` are finite.

        One NaN makes all metrics NaN an update later, so that the means alone do not name it.
        """
        wrong = [name for name, value in means.items() if not np.isfinite(value)]
        if not wrong:
            return ""
        flags = self.nonfinite.expand(len(means)).tolist()
        return [*(name for name, bad in zip(means, flags, strict=True) if bad), *wrong][0]

    def reset(self) -> None:
        self.sums, self.count = torch.zeros_like(self.sums[:0]), 0


class EpisodeScores:
    """Return, length and what else an environment logs, summed over the running episode of each
    environment.
    """

    def __init__(self, count: int, log_keys: Iterable[str]):
        self.sums = {key: np.zeros(count) for key in ("return", "length", *log_keys)}

    def add(self, obs: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
        """One step of every environment, {key: (count, ...)}. -> the finite scores of each episode
        that ended.
        """
        first = obs["is_first"]
        for key, score in self.sums.items():
            added = {"return": obs["reward"], "length": ~first}.get(key, obs.get(key))
            # not a product: 0 times NaN is NaN
            self.sums[key] = np.where(first, 0.0, score) + added
        ended = []
        for i in np.flatnonzero(obs["is_last"]):
            scores = {
                f"train_{key.removeprefix('log_')}": float(score[i])
                for key, score in self.sums.items()
            }
            ended.append({name: value for name, value in scores.items() if np.isfinite(value)})
        return ended


def prefixed(prefix: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in metrics.items()}
