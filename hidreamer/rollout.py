"""Token sequences of ``hrvq``: layout of positions, K/V cache, and rollouts that share it.

Shapes: B sequences of S cached steps, n branches of each (N = B * n), T or H new steps, L levels,
D deter, Z stoch, P = S * (L + 1) cached positions, O = H * (L + 1) imagined ones, Q new ones of
one pass, h heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hidreamer.branches import Branch, Places
from hidreamer.mask import attn_mask
from hidreamer.precision import autocast_dtype
from hidreamer.transformer import KV, Bias, Transformer, as_bias, attend_shared, rotary, rotate


class Layout(NamedTuple):
    """Positions of successive steps: ``[A_{t-1}, L0_t .. L_{L-1,t}]``, known once t has codes.

    The positions of one step are its L + 1 slots.
    """

    step: Tensor  # (P,) index of the step, from 0
    level: Tensor  # (P,) 0 .. L - 1, and L for the action
    time: Tensor  # (P,) of rotary positions and the window: an action's is that of the step before

    @classmethod
    def of(cls, steps: int, levels: int, first: int, device: torch.device) -> Layout:
        """``steps`` steps, the first of them at time ``first``."""
        slots = levels + 1
        step = torch.arange(steps, device=device).repeat_interleave(slots)
        level = (torch.arange(slots, device=device) - 1).remainder(slots).repeat(steps)
        return cls(step, level, step + first - (level == levels).long())


def first_slots(x: Tensor, slots: int, count: int, dim: int = -1) -> Tensor:
    """The first ``count`` of every step's ``slots`` positions, along ``dim`` (negative)."""
    return x.unflatten(dim, (-1, slots)).narrow(dim, 0, count).flatten(dim - 1, dim)


class Carry(NamedTuple):
    """B sequences with S cached steps, and N = B * n branches that are at one of these steps each.

    Time counts from the last cached step, which is 0; keys are rotated to that time.
    """

    deter: Tensor  # (N, D) memory at the branch's step
    stoch: Tensor  # (N, Z) its codes
    keys: Tensor  # (B, layers, h, P, d)
    values: Tensor  # the same
    segment: Tensor  # (B, S) the episode of a step: 0 is the last step's, others are negative
    step: Tensor  # (N,) the branch's step, 0 .. S - 1

    def prefix(self) -> list[KV] | None:
        """Each layer's K/V, (B, h, P, d); None where no step is cached."""
        if not self.segment.shape[1]:
            return None
        return [KV(*kv) for kv in zip(self.keys.unbind(1), self.values.unbind(1), strict=True)]

    def extend(
        self, keys: Tensor, values: Tensor, segment: Tensor, deter: Tensor, stoch: Tensor
    ) -> Carry:
        """The sequences with T more steps, at whose last one they now are.

        keys, values: (B, layers, h, T * (L + 1), d), rotated to this carry's time; segment: (B,
        T), the episodes counted on from 0; deter (B, D) and stoch (B, Z) are those of the last
        step.
        """
        steps = torch.cat([self.segment, segment], 1)  # (B, S + T)
        keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        back = rotary(torch.full_like(steps[0, 0], -segment.shape[1]), keys.shape[-1], keys.dtype)
        where = steps.new_full((len(steps),), steps.shape[1] - 1)
        return Carry(deter, stoch, rotate(keys, back), values, steps - segment[:, -1:], where)

    def last_steps(self, count: int) -> Carry:
        """Only the last ``count`` steps; for sequences (N = B) that are at their last step."""
        steps = self.segment.shape[1]
        count = min(count, steps)
        first = (steps - count) * (self.keys.shape[-2] // steps)
        return self._replace(
            keys=self.keys[..., first:, :],
            values=self.values[..., first:, :],
            segment=self.segment[:, steps - count :],
            step=torch.full_like(self.step, count - 1),
        )

    def padded(self, count: int, slots: int) -> Carry:
        """At least ``count`` steps of ``slots`` positions: those before the first are of another
        episode, and so never seen.
        """
        steps = self.segment.shape[-1]
        missing = count - steps
        if missing <= 0:
            return self
        before = (0, 0, missing * slots, 0)
        return self._replace(
            keys=F.pad(self.keys, before),
            values=F.pad(self.values, before),
            segment=F.pad(self.segment, (missing, 0), value=-1 - steps),  # of no step's episode
            step=self.step + missing,
        )

    def cut(self, lasts: range, length: int) -> Carry:
        """The same branches, in shorter sequences that hold what these can see.

        Every sequence becomes one for each of ``lasts``: the ``length`` steps up to that one. The
        branches of a sequence are in the order of its steps, the same number in each piece.
        """
        (batch, steps), count = self.segment.shape, len(lasts)
        slots = self.keys.shape[-2] // steps
        missing = max(0, length - 1 - lasts[0])
        whole = self.padded(steps + missing, slots)
        first = lasts[0] + missing - length + 1

        def pieces(x: Tensor, dim: int) -> Tensor:
            """Along ``dim``, of all steps: (B, pieces, .., length) where dim was (B, .., S)."""
            end = first + (count - 1) * lasts.step + length
            return x.narrow(dim, first, end - first).unfold(dim, length, lasts.step)

        def cached(x: Tensor) -> Tensor:
            x = pieces(x.unflatten(-2, (-1, slots)), 3)  # (B, layers, h, pieces, slots, d, length)
            return x.permute(0, 3, 1, 2, 6, 4, 5).flatten(4, 5)  # (B, pieces, layers, h, P, d)

        last = torch.arange(lasts.start, lasts.stop, lasts.step, device=self.step.device)
        rope = rotary((steps - 1 - last).view(-1, 1, 1), self.keys.shape[-1], self.keys.dtype)
        segment = pieces(whole.segment, 1)  # (B, pieces, length)
        step = self.step.view(batch, count, -1) - (last - length + 1).unsqueeze(1)
        return self._replace(
            keys=rotate(cached(whole.keys), rope).flatten(0, 1),
            values=cached(whole.values).flatten(0, 1),
            segment=(segment - segment[..., -1:]).flatten(0, 1),
            step=step.flatten(),
        )

    def select(self, index: Tensor, window: int) -> Carry:
        """The branches ``index`` (M,), with a sequence of at most ``window`` steps each; several
        of a single sequence go on sharing it.
        """
        batch = len(self.segment)
        here = self._replace(
            deter=self.deter[index], stoch=self.stoch[index], step=self.step[index]
        )
        if batch == 1 and len(index) > 1:
            return here
        rows = index // (len(self.step) // batch)  # (M,) whose sequence
        here = here._replace(
            keys=self.keys[rows], values=self.values[rows], segment=self.segment[rows]
        )
        return here.unshared(window)

    @classmethod
    def join(cls, carries: Sequence[Carry]) -> Carry:
        """Of carries with a sequence for each branch, of at least one step, padded to the same
        number of steps.
        """
        steps = max(carry.segment.shape[1] for carry in carries)
        slots = carries[0].keys.shape[-2] // carries[0].segment.shape[1]
        padded = [carry.padded(steps, slots) for carry in carries]
        return cls(*(torch.cat(x) for x in zip(*padded, strict=True)))

    def unshared(self, count: int) -> Carry:
        """A sequence for each branch, (N, ..): copies of at most ``count`` steps up to its own.

        What would lie before the first cached step, or is of another episode than the branch,
        counts as an earlier one.
        """
        batch, steps = self.segment.shape
        if not steps:
            return self
        count = min(count, steps)
        back = torch.arange(1 - count, 1, device=self.step.device)
        index = self.step.unsqueeze(1) + back  # (N, count)
        cached, index = index >= 0, index.clamp(min=0)
        rows = torch.arange(batch, device=index.device)
        rows = rows.repeat_interleave(len(self.step) // batch).unsqueeze(1)  # (N, 1)

        def copies(x: Tensor) -> Tensor:
            x = x.unflatten(-2, (steps, -1))[rows, :, :, index]  # (N, count, layers, h, L + 1, d)
            return x.movedim(1, 3).flatten(3, 4)  # (N, layers, h, count * (L + 1), d)

        time = self.step - (steps - 1)  # (N,) of the branch's step
        rope = rotary(-time.view(-1, 1, 1), self.keys.shape[-1], self.keys.dtype)
        keys, values = rotate(copies(self.keys), rope), copies(self.values)
        own = self.segment[rows[:, 0], self.step].unsqueeze(1)  # (N, 1)
        segment = torch.where(cached, self.segment[rows, index] - own, -1)
        step = torch.full_like(self.step, count - 1)
        return Carry(self.deter, self.stoch, keys, values, segment, step)


Given = tuple[Tensor, ...]  # what one token is made of


class Prefix(NamedTuple):
    """What some rows of a rollout are multiplied with of the cached steps."""

    kv: list[KV]  # of each layer, (B, h, P', d)
    bias: Tensor  # (times, B, 1, n, Q, P') of the scores, from the first time of such rows on


class Rollout:
    """The tokens that N branches imagine after a carry's steps, which a sequence's branches share.

    Rows of imagined positions are computed pass by pass: A_0, then L0_1 .. A_1, and so on. The K/V
    of imagined positions are each branch's own.

    enter: makes tokens of what is queued and projects them in the first layer, as
    ``dynamics.sequences`` has it; level_mask: of ``mask.make_level_mask``; slots: by level, how
    many slots of earlier steps a row of that level sees; chain: whether the rows of a step's levels
    are computed one after the other.
    """

    def __init__(
        self,
        transformer: Transformer,
        enter: Callable[..., tuple[Tensor, tuple[Tensor, KV | None]]],
        level_mask: Tensor,
        slots: list[int],
        window: int,
        carry: Carry,
        horizon: int,
        chain: bool,
    ):
        self.transformer, self.enter = transformer, enter
        self.level_mask, self.slots = level_mask, slots
        self.window, self.origin, self.horizon = window, carry, horizon
        self.levels, self.graph = len(slots) - 1, torch.is_grad_enabled()
        batch, steps = carry.segment.shape
        self.shape = batch, len(carry.step) // batch  # (B, n)
        step = carry.step.view(self.shape)
        self.start = step.unsqueeze(2) - (steps - 1)  # (B, n, 1) time of a branch's step 0
        self.cached = Layout.of(steps, self.levels, 1 - steps, step.device)
        # With a gradient, and where all rows of a step are computed at once, all are near.
        near = min(slots) if chain and not self.graph else len(slots)
        self.places = Places(slots, near, window, horizon)
        row_time, self.row_level, *masks = self.places.tables(level_mask)  # (R,)
        self.dtype = autocast_dtype(step.device) or carry.deter.dtype  # of scores
        self.biases = [as_bias(mask, self.dtype) for mask in masks]  # (R, C), (R, F)
        self.row_time = self.start + row_time  # (B, n, R)
        self.rope = rotary(self.row_time, transformer.head_dim, carry.deter.dtype)
        shape = batch, transformer.heads, self.shape[1]
        self.own = []  # of each layer
        for _ in transformer.layers:
            self.own.append(Branch(self.places, carry.deter, shape, transformer.head_dim))
        self.time, self.level = 0, self.levels  # of the next row, which is A_0
        self.queue: list[Given] = []  # of the next rows
        self.logits: list[Tensor] = []  # of the last step's codes, by level (N, G, K)
        self.prefixes: dict[tuple[range, bool], Prefix] = {}
        self.cached_kv: dict[int, list[KV]] = {}
        if steps:
            segment = carry.segment.repeat_interleave(self.levels + 1, 1)  # (B, P)
            same = segment.unsqueeze(1) == carry.segment.gather(1, step).unsqueeze(2)  # (B, n, P)
            # Not visible: what follows the branch's step in its sequence, beginning with the
            # step's own action.
            self.visible = same & (self.cached.step <= step.unsqueeze(2))

    def append(self, *given: Tensor) -> None:
        """Queue codes (N, G * d), or an action (N, A) and the state (N, Z) that it was taken in,
        for the next pass.
        """
        self.queue.append(given)

    def advance(self, *given: Tensor) -> Tensor:
        """Compute the rows of what is queued, and of this. -> the output (N, W) at it."""
        self.append(*given)
        return self._run()

    def _run(self) -> Tensor:
        """Compute the rows of all that is queued, of one time. -> the output (N, W) at the last."""
        levels = range(self.level, self.level + len(self.queue))
        now = self.now = self.places.of(self.time, levels)
        self.kv = bias = None
        if self.origin.segment.shape[1] and self.time < self.window:
            self.kv, table = self._prefix(levels, now.rows)
            bias = table[max(self.time - 1, 0)]
        near, far = (x[now.rows] for x in self.biases)
        own = [near[:, now.near], far[:, now.far]]
        self.bias = Bias(bias, own if now.far.stop > now.far.start else own[:1])
        rope, level = self.rope[:, :, now.rows], self.row_level[now.rows]
        given = [(levels[i], *self.queue[i]) for i in now.order]
        x, projected = self.enter(given, rope, self.room(0))
        out = now.order.index(len(self.queue) - 1)
        last = slice(out, out + 1)
        out, _ = self.transformer.attend(x, projected, rope, level, self, last)
        for own in self.own:
            own.close(now)
        self.queue, self.level = [], levels.stop
        if self.level > self.levels:  # that was an action, the last row of its time
            self.time, self.level = self.time + 1, 0
        return out.flatten(0, 2)

    def room(self, layer: int) -> Tensor | None:
        """As of ``Branch``."""
        return self.own[layer].room(self.now)

    def attend(self, layer: int, q: Tensor, new: KV | None, rows: slice) -> Tensor:
        """q (B,h,n,R,d) of the ``rows`` of this pass, K/V of all of these for which there was no
        room -> (B,n,R,W).
        """
        own = self.own[layer]
        if new is not None:
            own.add(new)
        prefix = self.kv[layer] if self.kv else None
        return attend_shared(q, own.read(self.now), prefix, self.bias.rows(rows))

    def _prefix(self, levels: range, rows: slice) -> Prefix:
        """What ``rows`` see of the cached steps, of which only A_0 belongs to one.

        A_0 sees all of that; later rows only the slots that the mask gives them, and are multiplied
        with no others.
        """
        key = levels, self.time > 0
        if key in self.prefixes:
            return self.prefixes[key]
        all_slots = self.levels + 1
        slots = max(self.slots[level] for level in levels) if self.time else all_slots
        time = first_slots(self.cached.time, all_slots, slots)  # (P',)
        level = first_slots(self.cached.level, all_slots, slots)
        visible = first_slots(self.visible, all_slots, slots).unsqueeze(2)  # (B, n, 1, P')
        row = self.row_time[:, :, rows], self.row_level[rows]
        mask = attn_mask(self.level_mask, row, (time, level)) & visible  # (B, n, Q, P')
        age = torch.where(mask, (self.start - time).unsqueeze(2), self.window).unsqueeze(1)
        times = (1, min(self.window, self.horizon + 1)) if self.time else (0, 1)
        limit = self.window - torch.arange(*times, device=age.device)
        bias = as_bias(age < limit.view(-1, 1, 1, 1, 1, 1), self.dtype)
        self.prefixes[key] = Prefix(self._cached_kv(slots), bias)
        return self.prefixes[key]

    def _cached_kv(self, slots: int) -> list[KV]:
        """The first slots of the cached K/V, contiguous and in the products' precision: else every
        product would copy them.
        """
        if slots not in self.cached_kv:
            layers, dtype = [], autocast_dtype(self.origin.keys.device)
            for x in (self.origin.keys, self.origin.values):
                x = first_slots(x, self.levels + 1, slots, -2)  # (B, layers, h, P', d)
                x = x.transpose(0, 1).contiguous()
                layers.append((x if dtype is None else x.to(dtype)).unbind())
            self.cached_kv[slots] = [KV(*kv) for kv in zip(*layers, strict=True)]
        return self.cached_kv[slots]

    def carry(self, deter: Tensor, stoch: Tensor) -> Carry:
        """A sequence for each branch, at its last step, of state deter (N,D), stoch (N,Z)."""
        if self.queue:
            with torch.set_grad_enabled(self.graph):  # as for all rows before
                self._run()
        layers = torch.stack([own.steps() for own in self.own], 2)  # (2, B, layers, h, n, O, d)
        keys, values = layers.movedim(4, 2).flatten(1, 2)  # (N, layers, h, O, d) each
        past = self.origin.unshared(max(self.window - self.horizon, 0))
        rope = rotary(-self.start.view(-1, 1, 1), keys.shape[-1], keys.dtype)
        keys = rotate(keys, rope)
        segment = past.segment.new_zeros(len(keys), self.horizon)
        whole = past.extend(keys, values, segment, deter, stoch)
        return whole.last_steps(self.window)


class RolloutCarry(NamedTuple):
    """The carry after a rollout; branches become sequences when a call continues from it."""

    deter: Tensor  # (N, D)
    stoch: Tensor  # (N, Z)
    rollout: Rollout

    def sequences(self) -> Carry:
        return self.rollout.carry(self.deter, self.stoch)

    def select(self, index: Tensor, window: int) -> Carry:
        return self.sequences().select(index, window)
