"""Building blocks: initialised linear layers, norm-and-activate blocks, perceptrons, the normalised GRU cell.

Shapes and initialisation follow dreamerv3-torch (NM512, 2023), so that its checkpoints load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-3  # of every LayerNorm, as upstream


def init_trunc(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Truncated normal with variance 1 / mean fan; 0.8796 is the deviation of a unit normal cut at two deviations."""
    std = math.sqrt(2.0 / (fan_in + fan_out)) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)


def init_uniform(weight: Tensor, fan_in: int, fan_out: int, scale: float) -> None:
    """Uniform with variance ``scale`` / mean fan; scale 0 gives zeros (reward head and critic start at exactly 0)."""
    limit = math.sqrt(3.0 * scale * 2.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


def linear(inp: int, out: int, scale: float | None = None, bias: bool = True) -> nn.Linear:
    """A linear layer: truncated-normal weights, or uniform ones of the given output ``scale``; bias zero."""
    layer = nn.Linear(inp, out, bias=bias)
    if scale is None:
        init_trunc(layer.weight, inp, out)
    else:
        init_uniform(layer.weight, inp, out, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Linear, LayerNorm, SiLU: (..., inp) -> (..., out).

    Without a bias the norm makes a block blind to the length of its input. One-hots have one length, so upstream has
    no biases; for raw vectors (``sized``) the length matters, and the bias starts like the weight of a constant 1.
    """

    def __init__(self, inp: int, out: int, sized: bool = False):
        super().__init__()
        self.linear = linear(inp, out, bias=sized)
        if sized:
            init_trunc(self.linear.bias, inp, out)
        self.norm = nn.LayerNorm(out, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))

    def finish(self, x: Tensor) -> Tensor:
        """The block after its linear part, for callers that computed that part in pieces."""
        return F.silu(self.norm(x))


class MLP(nn.Module):
    """``layers`` blocks of ``units``, then (if ``out``) a linear layer: (..., inp) -> (..., out or units)."""

    def __init__(self, inp: int, layers: int, units: int, out: int = 0, outscale: float = 1.0, sized: bool = False):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(units if i else inp, units, sized and not i) for i in range(layers)))
        self.out = linear(units, out, outscale) if out else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.out is None else self.out(x)


class GRUCell(nn.Module):
    """GRU with one LayerNorm over all gates and an update bias of -1 (Hafner et al. 2020, DreamerV2).

    (B, inp), (B, deter) -> (B, deter).
    """

    def __init__(self, inp: int, deter: int):
        super().__init__()
        self.linear = linear(inp + deter, 3 * deter, bias=False)
        self.norm = nn.LayerNorm(3 * deter, eps=EPS)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        # The memory stays in its own precision: bfloat16 would round away small updates.
        parts = self.norm(self.linear(torch.cat([x, deter], -1))).to(deter.dtype)  # (B, 3D)
        reset, cand, update = parts.chunk(3, -1)  # (B, D) each
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter, cand, torch.sigmoid(update - 1.0))
