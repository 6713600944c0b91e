"""A pre-norm transformer over B sequences, each of which n branches continue and share.

Observing is the case of one branch that is the sequence itself; imagination has a branch for every
start. Both run through the same ``forward``, so they cannot drift apart.

Shapes: B sequences, n branches of each, Q new positions, P prefix positions, O positions of a
branch's own, W width, h heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer.distributions import at_least_float32
from hidreamer.nets import by_name, linear, make_activation, make_norm
from hidreamer.precision import autocast_dtype, is_mapped, masked_attention


class KV(NamedTuple):
    """Rotated keys and values of one layer."""

    keys: Tensor
    values: Tensor


class Branch:
    """The K/V that one layer's branches add of their own, (B,h,n,O,d).

    There are at most ``capacity`` positions. Where no gradient is recorded they are written in
    place; appending by ``cat`` would copy all of them every time.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.kv: KV | None = None

    def add(self, keys: Tensor, values: Tensor) -> KV:
        """Add (B,h,n,Q,d). -> all so far."""
        start, self.length = self.length, self.length + keys.shape[-2]
        if self.kv is None and (torch.is_grad_enabled() or self.length == self.capacity):
            self.kv = KV(keys, values)
        elif torch.is_grad_enabled():
            both = zip(self.kv, (keys, values), strict=True)
            self.kv = KV(*(torch.cat(pair, -2) for pair in both))
        else:
            if self.kv is None:
                shape = (*keys.shape[:-2], self.capacity, keys.shape[-1])
                self.kv = KV(keys.new_empty(shape), values.new_empty(shape))
            for kept, new in zip(self.kv, (keys, values), strict=True):
                kept[..., start : self.length, :] = new
        return KV(*(x[..., : self.length, :] for x in self.kv))


def rotary(times: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rotary positions (Su et al. 2021) of times (...), int: (..., 2, dim), what ``rotate`` takes.

    These are each pair's cosine for both its numbers, and its sine, negative for the first.
    Angles are computed in at least float32, whatever the network runs in: in bfloat16 steps 256 and
    257 are the same.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rate = 10_000.0 ** (-torch.arange(dim // 2, device=times.device, dtype=dtype) / (dim // 2))
    angle = times.unsqueeze(-1).to(dtype) * rate  # (..., dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], -2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the halves of x (..., h, d) by the angles ``rope`` (..., 2, d), in its dtype."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)  # (..., 1, d) each
    wide = x.to(rope.dtype)
    swapped = torch.cat(wide.chunk(2, -1)[::-1], -1)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


FFNLosses = dict[str, Tensor]  # auxiliary losses of feed-forward parts, (B, n) each, as by sequence


class Dense(nn.Module):
    """Two linear layers, the same for all positions.

    Any feed-forward part takes x (B,n,Q,W) and the positions' levels (Q,) and returns what is
    added to x, (B,n,Q,W), and auxiliary losses; this one has none and makes no use of the levels.
    """

    def __init__(self, width: int, hidden: int, *, act: str = "silu"):
        super().__init__()
        self.up, self.down = linear(width, hidden), linear(hidden, width)
        self.act = make_activation(act)

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, FFNLosses]:
        return self.down(self.act(self.up(x))), {}


FFNS = {"dense": Dense}  # each: (width, hidden, act=name) -> module


class Layer(nn.Module):
    """Attention and a feed-forward part (``ffn``, of ``FFNS``), each with a residual connection."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: str = "layer",
        act: str = "silu",
        ffn: str = "dense",
    ):
        super().__init__()
        self.heads = heads
        self.dropout = 0.0  # of what both parts add, while something learns; the agent has none
        self.norm1, self.norm2 = make_norm(norm, width), make_norm(norm, width)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)
        self.ffn = by_name(FFNS, ffn, "ffn")(width, hidden, act=act)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,n,Q,W) -> queries and keys, rotated, and values: (B,h,n,Q,d) each."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1))  # (B, n, Q, 3h, d)
        qk, v = qkv.split([2 * self.heads, self.heads], -2)
        q, k = rotate(qk, rope).chunk(2, -2)  # (B, n, Q, h, d)
        return tuple(part.permute(0, 3, 1, 2, 4) for part in (q, k, v))

    def add_residuals(self, x: Tensor, attended: Tensor, level: Tensor) -> tuple[Tensor, FFNLosses]:
        """x (B,n,Q,W), what attention gave (B,n,Q,W), levels (Q,) -> (B,n,Q,W), losses."""
        x = x + self._drop(self.out(attended))
        added, losses = self.ffn(self.norm2(x), level)
        return x + self._drop(added), losses

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout where something learns; acting and dreams without a gradient are whole."""
        if not self.dropout:
            return x
        return F.dropout(x, self.dropout, self.training and torch.is_grad_enabled())


MASKED = -1e9  # score of what a row may not see: finite, so that no row ever becomes NaN


def attend(
    q: Tensor, own: KV, own_mask: Tensor, prefix: KV | None, prefix_mask: Tensor | None
) -> Tensor:
    """Softmax attention of q (B,h,n,Q,d) over a shared prefix and a branch's own positions.

    -> (B,h,n,Q,d). prefix (B,h,P,d), own (B,h,n,O,d); prefix_mask (B,n,Q,P) and own_mask (..,Q,O)
    are True where a row may look; every row sees at least itself. The prefix is multiplied with
    all branches' queries at once and never copied for them.
    """
    if prefix is None:
        if own_mask.ndim == 4:
            own_mask = own_mask.flatten(0, 1).unsqueeze(1)  # (B * n, 1, Q, O)
        each = (x.transpose(1, 2).flatten(0, 1) for x in (q, *own))  # (B * n, h, .., d)
        with masked_attention(q):
            out = F.scaled_dot_product_attention(*each, own_mask)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)
    q, shape = q * q.shape[-1] ** -0.5, q.shape[2:4]  # (n, Q)
    own_mask = own_mask.unsqueeze(1) if own_mask.ndim == 4 else own_mask
    scores = torch.where(own_mask, q @ own.keys.transpose(-1, -2), MASKED)  # (B, h, n, Q, O)
    shared = (q.flatten(2, 3) @ prefix.keys.transpose(-1, -2)).unflatten(2, shape)
    shared = torch.where(prefix_mask.unsqueeze(1), shared, MASKED)  # (B, h, n, Q, P)
    weight = torch.softmax(at_least_float32(torch.cat([shared, scores], -1)), -1).to(q.dtype)
    shared, rest = weight.split([prefix.keys.shape[-2], own.keys.shape[-2]], -1)
    return (shared.flatten(2, 3) @ prefix.values).unflatten(2, shape) + rest @ own.values


def score_bias(own_mask: Tensor, prefix_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Masks as of ``attend`` -> what is added to the scores, (B,1,n,Q,P+O): 0 or MASKED."""
    own_mask = own_mask.expand(*prefix_mask.shape[:3], -1)
    seen = torch.cat([prefix_mask, own_mask], -1).unsqueeze(1)
    return torch.where(seen, 0.0, MASKED).to(dtype)


def fused_attention(q: Tensor, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """One kernel for ``attend_in_place`` of queries (..,d) in ``dtype``, where there is one.

    That is on CUDA with Triton, which comes with torch there.
    """
    if not q.is_cuda or dtype == torch.float64:
        return None
    try:
        from hidreamer import fused_attention as fused
    except ImportError:
        return None
    return fused.shared_attention if fused.works(q.device, dtype, q.shape[-1]) else None


def attend_in_place(q: Tensor, own: KV, prefix: KV, bias: Tensor) -> Tensor:
    """As ``attend``, where no gradient is recorded: products are added to the masks' scores.

    bias: of ``score_bias``, (B,1,n,Q,P+O).
    """
    (batch, heads, count, rows, _), size = q.shape, prefix.keys.shape[-2]
    dtype = autocast_dtype(q.device) or q.dtype
    own = KV(*(x.to(dtype) for x in own))
    prefix = KV(*(x.to(dtype) for x in prefix))
    if fused := fused_attention(q, dtype):
        return fused(q.to(dtype), *prefix, *own, bias)
    q, bias = q.contiguous().to(dtype), bias.to(dtype)
    scale = q.shape[-1] ** -0.5
    by_sequence = lambda x: x.reshape(batch * heads, -1, x.shape[-1])
    by_branch = lambda x: x.flatten(0, 2)
    scores = bias.expand(-1, heads, -1, -1, -1).clone(memory_format=torch.contiguous_format)
    flat = scores.view(batch * heads, count * rows, -1)
    flat[..., :size].baddbmm_(by_sequence(q), by_sequence(prefix.keys).mT, alpha=scale)
    by_branch(scores)[..., size:].baddbmm_(by_branch(q), by_branch(own.keys).mT, alpha=scale)
    weight = torch.softmax(at_least_float32(scores), -1).to(q.dtype)  # (B, h, n, Q, P + O)
    out = by_sequence(weight.flatten(2, 3))[..., :size] @ by_sequence(prefix.values)
    out = out.view(-1, rows, out.shape[-1])  # (B * h * n, Q, d)
    out.baddbmm_(by_branch(weight)[..., size:], by_branch(own.values))
    return out.view(batch, heads, count, rows, -1)


def may_attend_in_place(q: Tensor) -> bool:
    """Whether ``attend_in_place`` is right and fast: without a gradient, and no ``vmap`` that
    would do its products one member after the other.
    """
    if torch.is_grad_enabled():
        return False
    return not is_mapped(q) or fused_attention(q, autocast_dtype(q.device) or q.dtype) is not None


class Transformer(nn.Module):
    """``layers`` blocks and a final norm; ``norm``, ``act`` and ``ffn`` are names, as of ``Layer``.

    Raises ValueError for widths that the heads do not divide evenly, and for unknown names.
    """

    score_bias = staticmethod(score_bias)  # compiled or not

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        *,
        norm: str = "layer",
        act: str = "silu",
        ffn: str = "dense",
    ):
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(
                f"width {width} must be heads ({heads}) times an even number, for rotary positions"
            )
        self.heads, self.head_dim = heads, width // heads
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(Layer(width, heads, hidden, norm=norm, act=act, ffn=ffn))
        self.norm = make_norm(norm, width)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        level: Tensor,
        own: list[Branch],
        own_mask: Tensor,
        prefix: list[KV] | None = None,
        prefix_mask: Tensor | None = None,
        out_index: slice = slice(None),
    ) -> tuple[Tensor, FFNLosses]:
        """x (B,n,Q,W) -> outputs (B,n,R,W) of the R positions ``out_index``, sum of layers' losses.

        rope (..,Q,2,d) and level (Q,) are the new positions' rotations and levels. own_mask
        (..,Q,O) is about the branches' last O positions, the new ones among them: no row sees those
        before, and they are not multiplied. prefix_mask (B,n,Q,P) is about the prefix. ``own``
        grows by all Q.
        """
        losses: FFNLosses = {}
        in_place = bias = None
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, rope)
            if in_place is None:
                in_place = prefix is not None and may_attend_in_place(q)
                bias = self.score_bias(own_mask, prefix_mask, q.dtype) if in_place else None
            kv = own[i].add(k, v)
            kv = KV(*(part[..., -own_mask.shape[-1] :, :] for part in kv))
            if layer is self.layers[-1]:  # of the other positions only keys and values are needed
                # contiguous: what is compiled is compiled anew for every other order in memory
                x, level = x[:, :, out_index].contiguous(), level[out_index].contiguous()
                q = q[:, :, :, out_index]
                own_mask = own_mask[..., out_index, :]
                prefix_mask = prefix_mask[:, :, out_index] if prefix else None
                bias = bias[:, :, :, out_index] if in_place else None
            if in_place:
                attended = attend_in_place(q, kv, prefix[i], bias)
            else:
                attended = attend(q, kv, own_mask, prefix[i] if prefix else None, prefix_mask)
            attended = attended.permute(0, 2, 3, 1, 4).flatten(-2)  # (B, n, Q, W)
            x, layer_losses = layer.add_residuals(x, attended, level)
            for name, loss in layer_losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        return self.norm(x), losses

    def branches(self, capacity: int) -> list[Branch]:
        """Empty K/V of every layer, for at most ``capacity`` positions of a branch's own."""
        return [Branch(capacity) for _ in self.layers]
