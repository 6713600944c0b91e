"""A pre-norm transformer whose sequences share a prefix: the K/V of B sequences, continued by n branches each.

Observing is the case of one branch that is the sequence itself; imagination has a branch for every start. Both run
through the same ``forward``, so they cannot drift apart.

Shapes: B sequences, n branches of each, Q new positions, P prefix positions, O positions of a branch's own, W width,
h heads of d numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer.nets import EPS, linear


class KV(NamedTuple):
    """Keys (rotated) and values of every layer."""

    keys: Tensor
    values: Tensor


def rotary(times: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(..., 2, dim / 2): cosines and sines of rotary positions (Su et al. 2021) for integer times (...).

    Angles are computed in at least float32, whatever the network runs in: bfloat16 cannot tell step 256 from 257.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    rate = 10_000.0 ** (-torch.arange(dim // 2, device=times.device, dtype=dtype) / (dim // 2))
    angle = times.unsqueeze(-1).to(dtype) * rate  # (..., dim / 2)
    return torch.stack([angle.cos(), angle.sin()], -2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the halves of x (..., h, d) by the angles in ``turn`` (..., 2, d / 2)."""
    cos, sin = turn.unsqueeze(-3).to(x.dtype).unbind(-2)  # (..., 1, d / 2) each
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, torch.addcmul(b * cos, a, sin)], -1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)
        self.up, self.down = linear(width, hidden), linear(hidden, width)

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,n,Q,W) -> queries and keys, rotated, and values: (B,n,h,Q,d) each."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1))  # (B, n, Q, 3h, d)
        qk, v = qkv.split([2 * self.heads, self.heads], -2)
        q, k = rotate(qk, turn).chunk(2, -2)  # (B, n, Q, h, d)
        return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual branches, from what attention gathered (B,n,h,Q,d)."""
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


def attend(q: Tensor, own: KV, seen_own: Tensor, prefix: KV | None, seen_prefix: Tensor | None) -> Tensor:
    """(B,n,h,Q,d): softmax attention over a shared prefix (B,h,P,d) and a branch's own positions (B,n,h,O,d).

    seen_prefix (B,n,Q,P) and seen_own (.., Q, O) are True where a row may look; every row sees at least itself.
    The prefix is multiplied with all branches' queries at once and never copied for them.
    """
    size = q.shape[-1] ** -0.5
    scores = (q @ own.keys.transpose(-1, -2)).masked_fill(~seen_own.unsqueeze(-3), -1e9)  # (B, n, h, Q, O)
    if prefix is None:
        return torch.softmax(size * scores.float(), -1).to(q.dtype) @ own.values
    b, n, h, rows, _ = q.shape
    shared = q.transpose(1, 2).flatten(2, 3) @ prefix.keys.transpose(-1, -2)  # (B, h, n Q, P)
    shared = shared.unflatten(2, (n, rows)).transpose(1, 2)  # (B, n, h, Q, P)
    scores = torch.cat([shared.masked_fill(~seen_prefix.unsqueeze(-3), -1e9), scores], -1)
    weight = torch.softmax(size * scores.float(), -1).to(q.dtype)
    shared, rest = weight.split([shared.shape[-1], own.keys.shape[-2]], -1)
    shared = shared.transpose(1, 2).reshape(b, h, n * rows, -1) @ prefix.values  # (B, h, n Q, d)
    return shared.unflatten(2, (n, rows)).transpose(1, 2) + rest @ own.values


class Transformer(nn.Module):
    """``layers`` blocks and a final norm. Raises ValueError for widths that the heads do not divide evenly."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must be heads ({heads}) times an even number, for rotary positions")
        self.head_dim = width // heads
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x, turn, seen_own, own: list[KV] | None = None, prefix: list[KV] | None = None, seen_prefix=None):
        """x (B,n,Q,W), its rotations ``turn`` (..,Q,2,d/2). -> outputs (B,n,Q,W), every layer's ``own`` with Q added.

        ``own`` are the branches' earlier positions; seen_own (..,Q,O) is about them and the new ones, in this order.
        """
        grown = []
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, turn)
            kv = KV(k, v) if own is None else KV(*(torch.cat(pair, -2) for pair in zip(own[i], (k, v), strict=True)))
            x = layer.finish(x, attend(q, kv, seen_own, prefix[i] if prefix else None, seen_prefix))
            grown.append(kv)
        return self.norm(x), grown
