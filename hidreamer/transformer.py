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

from hidreamer.distributions import wide
from hidreamer.nets import EPS, linear


class KV(NamedTuple):
    """Rotated keys and values of one layer."""

    keys: Tensor
    values: Tensor


class Branch:
    """The K/V that one layer's branches add of their own, (B,h,n,O,d): at most ``room`` positions.

    Where no gradient is recorded they are written in place; appending by ``cat`` would copy all of them every time.
    """

    def __init__(self, room: int):
        self.room, self.length = room, 0
        self.kv: KV | None = None

    def add(self, keys: Tensor, values: Tensor) -> KV:
        """Add (B,h,n,Q,d). -> all so far."""
        start, self.length = self.length, self.length + keys.shape[-2]
        if self.kv is None and (torch.is_grad_enabled() or self.length == self.room):
            self.kv = KV(keys, values)
        elif torch.is_grad_enabled():
            self.kv = KV(torch.cat([self.kv.keys, keys], -2), torch.cat([self.kv.values, values], -2))
        else:
            if self.kv is None:
                shape = (*keys.shape[:-2], self.room, keys.shape[-1])
                self.kv = KV(keys.new_empty(shape), values.new_empty(shape))
            for kept, new in zip(self.kv, (keys, values), strict=True):
                kept[..., start : self.length, :] = new
        return KV(*(x[..., : self.length, :] for x in self.kv))


def rotary(times: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(..., 2, dim / 2): cosines and sines of rotary positions (Su et al. 2021) for integer times (...).

    Angles are computed in at least float32, whatever the network runs in: bfloat16 cannot tell step 256 from 257.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rate = 10_000.0 ** (-torch.arange(dim // 2, device=times.device, dtype=dtype) / (dim // 2))
    angle = times.unsqueeze(-1).to(dtype) * rate  # (..., dim / 2)
    return torch.stack([angle.cos(), angle.sin()], -2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the halves of x (..., h, d) by the angles in ``rope`` (..., 2, d / 2), in the precision of these."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)  # (..., 1, d / 2) each
    a, b = x.to(rope.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)
        self.up, self.down = linear(width, hidden), linear(hidden, width)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,n,Q,W) -> queries and keys, rotated, and values: (B,h,n,Q,d) each."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1))  # (B, n, Q, 3h, d)
        qk, v = qkv.split([2 * self.heads, self.heads], -2)
        q, k = rotate(qk, rope).chunk(2, -2)  # (B, n, Q, h, d)
        return tuple(part.permute(0, 3, 1, 2, 4) for part in (q, k, v))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual branches, from what attention gathered (B,h,n,Q,d)."""
        x = x + self.out(attended.permute(0, 2, 3, 1, 4).flatten(-2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


HIDDEN = -1e9  # score of what a row may not see: finite, so that no row ever becomes NaN


def attend(q: Tensor, own: KV, own_mask: Tensor, prefix: KV | None, prefix_mask: Tensor | None) -> Tensor:
    """(B,h,n,Q,d): softmax attention over a shared prefix (B,h,P,d) and a branch's own positions (B,h,n,O,d).

    prefix_mask (B,n,Q,P) and own_mask (.., Q, O) are True where a row may look; every row sees at least itself.
    The prefix is multiplied with all branches' queries at once and never copied for them.
    """
    if prefix is None:
        mask = own_mask.flatten(0, 1).unsqueeze(1) if own_mask.ndim == 4 else own_mask  # (B * n, 1, Q, O)
        each = (x.transpose(1, 2).flatten(0, 1) for x in (q, *own))  # (B * n, h, .., d)
        return F.scaled_dot_product_attention(*each, mask).unflatten(0, (len(q), -1)).transpose(1, 2)
    q, shape = q * q.shape[-1] ** -0.5, q.shape[2:4]  # (n, Q)
    own_mask = own_mask.unsqueeze(1) if own_mask.ndim == 4 else own_mask
    scores = torch.where(own_mask, q @ own.keys.transpose(-1, -2), HIDDEN)  # (B, h, n, Q, O)
    shared = (q.flatten(2, 3) @ prefix.keys.transpose(-1, -2)).unflatten(2, shape)  # (B, h, n, Q, P)
    scores = torch.cat([torch.where(prefix_mask.unsqueeze(1), shared, HIDDEN), scores], -1)
    weight = torch.softmax(wide(scores), -1).to(q.dtype)
    shared, rest = weight.split([prefix.keys.shape[-2], own.keys.shape[-2]], -1)
    return (shared.flatten(2, 3) @ prefix.values).unflatten(2, shape) + rest @ own.values


class Transformer(nn.Module):
    """``layers`` blocks and a final norm. Raises ValueError for widths that the heads do not divide evenly."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must be heads ({heads}) times an even number, for rotary positions")
        self.heads, self.head_dim = heads, width // heads
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        own: list[Branch],
        own_mask: Tensor,
        prefix: list[KV] | None = None,
        prefix_mask: Tensor | None = None,
        out_index: slice = slice(None),
    ) -> Tensor:
        """x (B,n,Q,W), its rotations ``rope`` (..,Q,2,d/2) -> outputs (B,n,R,W) of the R positions ``out_index``.

        own_mask (..,Q,O) is about the branches' positions, the new ones last, prefix_mask (B,n,Q,P) about the prefix.
        ``own`` grows by all Q.
        """
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, rope)
            kv = own[i].add(k, v)
            if layer is self.layers[-1]:  # of the others, all that anybody reads is their keys and values
                x, q, own_mask = x[:, :, out_index], q[:, :, :, out_index], own_mask[..., out_index, :]
                prefix_mask = prefix_mask[:, :, out_index] if prefix else None
            x = layer.finish(x, attend(q, kv, own_mask, prefix[i] if prefix else None, prefix_mask))
        return self.norm(x)

    def branches(self, room: int) -> list[Branch]:
        return [Branch(room) for _ in self.layers]
