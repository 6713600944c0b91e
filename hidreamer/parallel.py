"""What the rows of whole sequences attend to, all steps at once: each other, and cached steps.

Shapes: B sequences, T new steps of s = L + 1 positions each, Q = T * s; P cached positions, h heads
of d numbers, W width; in chunks of C positions, K of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hidreamer.mask import attn_mask
from hidreamer.rollout import Carry, Layout
from hidreamer.transformer import KV, attend, rotary

CHUNKS = 8  # from so many windows on, a sequence is computed in chunks: sooner these cost more


class Attention(NamedTuple):
    """What the positions of a pass over (B, T) attend to."""

    rope: Tensor  # (Q, 2, d) their rotations
    level: Tensor  # (Q,) their levels, L for the action
    mask: Tensor  # (B, 1, Q, P + Q), or in chunks (B, K, C, 2C): a chunk's own, behind that before
    prefix: list[KV] | None = None  # of each layer, cached steps
    chunk: int = 0  # C


def attention_after(
    carry: Carry, segment: Tensor, level_mask: Tensor, window: int, head_dim: int
) -> Attention:
    """Masks and rotary angles for T steps after the carry's.

    segment (B, T): which episode each is of, 0 being that of the carry's last step.
    """
    (batch, length), slots = segment.shape, level_mask.shape[-1]
    steps, chunk = carry.segment.shape[1], 0
    if not steps and length >= CHUNKS * window:
        # Rows see a window of steps: in chunks of as many, products of rows and positions grow with
        # the length and not with its square.
        chunk, before = window * slots, window
        padded = F.pad(segment, (window, -length % window), value=-1).view(batch, -1, window)
        seen = torch.cat([padded[:, :-1], padded[:, 1:]], 2)  # (B, K, 2 * window) episodes
    else:
        before = steps
        seen = torch.cat([carry.segment, segment], 1).unsqueeze(1)  # (B, 1, S + T)
    place = Layout.of(seen.shape[2], slots - 1, 1 - before, segment.device)
    column, rows = (place.time, place.level), slice(before * slots, None)
    mask = attn_mask(level_mask, tuple(x[rows] for x in column), column, window)
    episode = seen.repeat_interleave(slots, 2)  # (B, K, positions)
    # (B, K, rows, positions)
    mask = mask & (episode[..., rows].unsqueeze(3) == episode.unsqueeze(2))
    new = Layout.of(length, slots - 1, 1, segment.device) if chunk else place
    time, level = (x if chunk else x[rows] for x in (new.time, new.level))
    rope = rotary(time, head_dim, carry.deter.dtype)
    return Attention(rope, level, mask, carry.prefix(), chunk)


class Whole:
    """The memory of a ``Transformer``'s pass over whole sequences.

    mask (Q,Q), or it and the others as of ``Attention``.
    """

    def __init__(self, mask: Tensor, prefix: list[KV] | None = None, chunk: int = 0):
        self.mask, self.prefix, self.chunk = mask, prefix, chunk
        self.kv: list[KV] = []  # of the new rows, by layer

    def room(self, layer: int) -> None:
        """Keys and values become tensors of their own."""

    def attend(self, layer: int, q: Tensor, new: KV, rows: slice) -> Tensor:
        """q (B,h,1,R,d) of ``rows``; keys and values (B,h,1,Q,d) of all rows -> (B,1,R,W)."""
        self.kv.append(new)
        mask = self.mask[..., rows, :]
        if self.chunk:
            return self._in_chunks(q, new, mask)
        if self.prefix is not None:
            both = zip(self.prefix[layer], new, strict=True)
            new = KV(*(torch.cat([x.unsqueeze(2).to(y.dtype), y], -2) for x, y in both))
        return attend(q, new, mask)

    def _in_chunks(self, q: Tensor, new: KV, mask: Tensor) -> Tensor:
        """mask (B, K, rows of a chunk, 2C)."""
        batch, chunks, each, _ = mask.shape
        total = q.shape[3]

        def cut(x: Tensor, size: int, before: int) -> Tensor:
            """(B,h,1,.,d) -> (B,K,h,size,d), with a chunk of zeros before and zeros behind."""
            behind = chunks * size - x.shape[3]
            x = F.pad(x.squeeze(2), (0, 0, before * size, behind))
            return x.unflatten(2, (-1, size)).transpose(1, 2)

        kv = []
        for x in new:
            x = cut(x, self.chunk, 1)
            kv.append(torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1).unsqueeze(2))
        q = cut(q, each, 0).flatten(0, 1).unsqueeze(2)  # (B * K, h, 1, rows of a chunk, d)
        out = attend(q, KV(*kv), mask.flatten(0, 1).unsqueeze(1))
        return out.view(batch, 1, chunks * each, -1)[:, :, :total]
