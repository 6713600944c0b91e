"""Lambda-returns and their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lambda_return(rew: Tensor, value: Tensor, disc: Tensor, lam: float) -> Tensor:
    """Lambda-returns (Hafner et al. 2023, eq. 7), a backward recursion over H steps.

    rew, value, disc: (N, H+1); entry t belongs to state t: the reward for arriving there, its
    value, and gamma times the probability that the episode continues from there. -> (N, H), the
    returns of states 0..H-1.

        R_t = rew_{t+1} + disc_{t+1} ((1 - lam) value_{t+1} + lam R_{t+1}),    R_H = value_H
    """
    inputs = torch.addcmul(rew[:, 1:], disc[:, 1:], value[:, 1:], value=1.0 - lam)  # (N, H)
    decay = lam * disc[:, 1:]  # (N, H)
    last, returns = value[:, -1], []
    for t in reversed(range(inputs.shape[1])):
        last = torch.addcmul(inputs[:, t], decay[:, t], last)
        returns.append(last)
    return torch.stack(returns[::-1], 1)


class ReturnNorm(nn.Module):
    """Running 5th and 95th percentile of returns (eq. 11-12).

    Their distance, at least 1, is what advantages are divided by.
    """

    def __init__(self, rate: float = 0.01, low: float = 0.05, high: float = 0.95):
        super().__init__()
        self.rate, self.quantiles = rate, (low, high)
        self.register_buffer("range", torch.zeros(2))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move the percentiles towards those of ``returns`` (any shape); no host read."""
        ordered = returns.detach().float().flatten().sort().values
        now = []
        for q in self.quantiles:
            position = q * (len(ordered) - 1)
            below = min(int(position), len(ordered) - 2)
            now.append(torch.lerp(ordered[below], ordered[below + 1], position - below))
        self.range.lerp_(torch.stack(now), self.rate)

    def forward(self, returns: Tensor) -> Tensor:
        """Take ``returns`` (any shape) into account. -> what to divide by now, ()."""
        self.update(returns)
        return self.scale()

    def scale(self) -> Tensor:
        """What to divide by, ()."""
        return (self.range[1] - self.range[0]).clamp(min=1.0)
