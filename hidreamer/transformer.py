"""A pre-norm transformer over B sequences, each of which n branches continue and share.

Observing is the case of one branch that is the sequence itself; imagination has a branch for every
start. Both run through the same ``forward``, so they cannot drift apart.

Shapes: B sequences, n branches of each, Q new positions, P prefix positions, O positions of a
branch's own, W width, h heads of d numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer.distributions import at_least_float32
from hidreamer.nets import by_name, linear, make_activation, make_norm
from hidreamer.precision import autocast_dtype, masked_attention


class KV(NamedTuple):
    """Rotated keys and values of one layer."""

    keys: Tensor
    values: Tensor


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
    swapped = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
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

    def project(
        self, x: Tensor, rope: Tensor, room: Tensor | None = None
    ) -> tuple[Tensor, KV | None]:
        """x (B,n,Q,W) -> queries and keys, rotated, and values: (B,h,n,Q,d) each.

        room (2,B,h,n,Q,d): where keys and values are written, instead of being returned.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, n, Q, 3, h, d)
        if room is not None and torch.compiler.is_compiling():  # one kernel for keys and values
            q, kv = qkv.split([1, 2], -3)  # (B, n, Q, 1 and 2, h, d)
            is_key = (torch.arange(2, device=x.device) == 0).view(2, 1, 1)
            kv = torch.where(is_key, rotate(kv, rope.unsqueeze(-3)), kv)
            room.copy_(kv.permute(3, 0, 4, 1, 2, 5))  # (2, B, h, n, Q, d)
            q = rotate(q.squeeze(-3), rope)  # (B, n, Q, h, d)
            return q.permute(0, 3, 1, 2, 4).contiguous(), None
        qk, v = qkv.flatten(-3, -2).split([2 * self.heads, self.heads], -2)
        q, k = rotate(qk, rope).chunk(2, -2)  # (B, n, Q, h, d)
        q, k, v = (part.permute(0, 3, 1, 2, 4) for part in (q, k, v))  # (B, h, n, Q, d)
        if room is None:  # with a gradient, or of whole sequences
            return q, KV(k, v)
        for kept, new in zip(room, (k, v), strict=True):
            kept.copy_(new)
        return q.contiguous(), None

    def add_residuals(self, x: Tensor, attended: Tensor, level: Tensor) -> tuple[Tensor, FFNLosses]:
        """x (B,n,Q,W), what attention gave (B,n,Q,W), levels (Q,) -> (B,n,Q,W), losses."""
        x = x + self._drop(self.out(attended))
        added, losses = self.ffn(self.norm2(x), level)
        return x + self._drop(added), losses

    def to_next(
        self,
        x: Tensor,
        attended: Tensor,
        level: Tensor,
        rope: Tensor,
        after: Layer,
        room: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, KV | None], FFNLosses]:
        """``add_residuals``, and ``project`` of the layer ``after`` this one."""
        x, losses = self.add_residuals(x, attended, level)
        return x, after.project(x, rope, room), losses

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout where something learns; acting and dreams without a gradient are whole."""
        if not self.dropout:
            return x
        return F.dropout(x, self.dropout, self.training and torch.is_grad_enabled())


MASKED = -1e9  # score of what a row may not see: finite, so that no row ever becomes NaN


def attend(q: Tensor, kv: KV, mask: Tensor) -> Tensor:
    """Softmax attention of q (B,h,1,Q,d) over kv (B,h,1,O,d) -> (B,1,Q,W).

    mask (B,1,Q,O) or (Q,O): True where a row may look, or added to scores; every row sees at least
    itself.
    """
    with masked_attention(q):
        out = F.scaled_dot_product_attention(*(x.squeeze(2) for x in (q, *kv)), mask)
    return out.transpose(1, 2).flatten(2).unsqueeze(1)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that rows look only where ``mask`` is True: 0 or MASKED."""
    return torch.where(mask, 0.0, MASKED).to(dtype)


class Bias(NamedTuple):
    """What is added to scores, as ``as_bias`` makes it, in their dtype."""

    prefix: Tensor | None  # (B, 1, n, Q, P)
    own: list[Tensor]  # (Q, O) of each part

    def rows(self, index: slice) -> Bias:
        prefix = None if self.prefix is None else self.prefix[:, :, :, index]
        return Bias(prefix, [x[index] for x in self.own])


def fused_attention(q: Tensor) -> Callable[..., Tensor] | None:
    """One kernel for ``attend_shared`` of queries (..,d), where there is one and no gradient is
    recorded.

    That is on CUDA with Triton, which comes with torch there.
    """
    dtype = autocast_dtype(q.device) or q.dtype
    if torch.is_grad_enabled() or not q.is_cuda or dtype == torch.float64:
        return None
    try:
        from hidreamer import fused_attention as fused
    except ImportError:
        return None
    return fused.shared_attention if fused.works(q.device, dtype, q.shape[-1]) else None


def attend_shared(q: Tensor, own: list[KV], prefix: KV | None, bias: Bias) -> Tensor:
    """Softmax attention of q (B,h,n,Q,d) over a shared prefix and a branch's own positions.

    -> (B,n,Q,W). prefix (B,h,P,d); own (B,h,n,O,d), in one or two parts. The prefix is multiplied
    with all branches' queries at once and never copied for them.
    """
    if fused := fused_attention(q):
        return call_fused(fused, q, own, prefix, bias)
    batch, heads, count, rows, dim = q.shape
    if (
        prefix is None and len(own) == 1 and torch.is_grad_enabled()
    ):  # fewer kernels, above all backward
        q, *kv = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (q, *own[0]))
        return attend(q, KV(*kv), bias.own[0]).view(batch, count, rows, -1)
    q, scale = q.contiguous(), dim**-0.5
    of_branch = q.flatten(0, 2)  # (B * h * n, Q, d)
    of_sequence = lambda x: x.unflatten(0, (batch * heads, count)).flatten(1, 2)
    # results side by side in memory: batches of small products are fast only if these are
    scores, parts = [], [KV(*(x.flatten(0, 2) for x in kv)) for kv in own]
    if prefix is not None:
        keys, values = (x.flatten(0, 1) for x in prefix)
        shared = torch.bmm(of_sequence(of_branch), keys.mT).view(*q.shape[:4], -1)
        scores.append(torch.add(bias.prefix, shared, alpha=scale).flatten(0, 2))
    for part, mask in zip(parts, bias.own, strict=True):
        scores.append(torch.baddbmm(mask, of_branch, part.keys.mT, alpha=scale))
    scores = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    weight = torch.softmax(at_least_float32(scores), -1).to(q.dtype)  # (B * h * n, Q, P + O)
    out, at = None, 0
    if prefix is not None:
        at = keys.shape[-2]
        out = torch.bmm(of_sequence(weight[..., :at]), values).view(-1, rows, dim)
    for part in parts:
        of_part = weight[..., at : at + part.keys.shape[-2]]
        if out is None:
            out = torch.bmm(of_part, part.values)
        else:
            out = torch.baddbmm(out, of_part, part.values)
        at += part.keys.shape[-2]
    return out.view(q.shape).permute(0, 2, 3, 1, 4).flatten(-2)


def call_fused(
    fused: Callable[..., Tensor], q: Tensor, own: list[KV], prefix: KV | None, bias: Bias
) -> Tensor:
    """``attend_shared`` as one kernel: what is missing has no positions."""
    dtype, shape = autocast_dtype(q.device) or q.dtype, (len(q), 1, *q.shape[2:4], -1)
    biases = [bias.own[0][:, :0] if prefix is None else bias.prefix, *bias.own]
    if prefix is None:
        prefix = KV(*(x[:, :, 0, :0] for x in own[0]))
    if len(own) == 1:
        own = [*own, KV(*(x[..., :0, :] for x in own[0]))]
        biases.append(biases[1][:, :0])
    kv = [x.to(dtype) for pair in (prefix, *own) for x in pair]
    return fused(q.to(dtype), *kv, *(x.expand(shape) for x in biases))


def add_losses(total: FFNLosses, losses: FFNLosses) -> None:
    for name, loss in losses.items():
        total[name] = total[name] + loss if name in total else loss


class Transformer(nn.Module):
    """``layers`` blocks and a final norm; ``norm``, ``act`` and ``ffn`` are names, as of ``Layer``.

    Raises ValueError for widths that the heads do not divide evenly, and for unknown names.
    """

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
        memory: Any,
        out_index: slice = slice(None),
    ) -> tuple[Tensor, FFNLosses]:
        """x (B,n,Q,W) -> outputs (B,n,R,W) of the R positions ``out_index``, sum of layers' losses.

        rope (..,Q,2,d) and level (Q,) are the new positions' rotations and levels. memory: a
        ``Whole`` or what has the same methods.
        """
        projected = self.layers[0].project(x, rope, memory.room(0))
        return self.attend(x, projected, rope, level, memory, out_index)

    def attend(
        self,
        x: Tensor,
        projected: tuple[Tensor, KV | None],
        rope: Tensor,
        level: Tensor,
        memory: Any,
        out_index: slice,
    ) -> tuple[Tensor, FFNLosses]:
        """``forward`` after the first layer's ``project``."""
        total: FFNLosses = {}
        for i, (layer, after) in enumerate(itertools.pairwise(self.layers)):
            attended = memory.attend(i, *projected, slice(None))
            given = x, attended, level, rope, after, memory.room(i + 1)
            x, projected, losses = layer.to_next(*given)
            add_losses(total, losses)
        # Of the other positions only keys and values are needed. Contiguous: what is compiled is
        # compiled anew for every other order in memory.
        (q, kv), x = projected, x[:, :, out_index].contiguous()
        level = level[out_index].contiguous()
        attended = memory.attend(len(self.layers) - 1, q[:, :, :, out_index], kv, out_index)
        out, losses = self.finish(x, attended, level)
        add_losses(total, losses)
        return out, total

    def finish(self, x: Tensor, attended: Tensor, level: Tensor) -> tuple[Tensor, FFNLosses]:
        """The last layer's ``add_residuals``, and the final norm."""
        x, losses = self.layers[-1].add_residuals(x, attended, level)
        return self.norm(x), losses
