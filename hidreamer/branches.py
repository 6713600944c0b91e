"""The positions that a rollout's branches add of their own: where their keys and values lie, and
which of them the rows of a pass look at.

Most rows look at the first few slots of earlier steps alone (``hierarchical``: at A and L0), and
reading keys and values is what their attention costs. So positions lie apart: *near* ones, which
every row may look at, and *far* ones, which only some rows read. A step's own far positions are
written behind the near ones, where the rows of that step read them, and are copied to the far
ones when it is over; the next step overwrites them.

Shapes: l levels that have a position, c near slots of a step and f far ones (c + f = l + 1),
H imagined steps; B, h, n, Q, d as in ``transformer``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hidreamer.mask import attn_mask
from hidreamer.precision import autocast_dtype
from hidreamer.transformer import KV


class Pass(NamedTuple):
    """Rows that are computed at once."""

    order: list[int]  # of these rows, among those that are given in order of level
    rows: slice  # in tables of all rows
    write: slice  # the near positions that they become
    near: slice  # the near positions that they look at
    far: slice  # the far ones
    over: slice | None  # near positions that become ``kept`` far ones afterwards
    kept: slice


class Places:
    """Where positions lie, by host arithmetic: A_t at near position c * t, the near levels of time
    t + 1 behind it, until then the far levels of time t, finest first. Far positions are those of
    time 1, finest first, and so on.

    slots: by level, how many slots of earlier steps a row of that level sees; near: c.
    """

    def __init__(self, slots: list[int], near: int, window: int, horizon: int):
        self.slots, self.near, self.window, self.horizon = slots, near, window, horizon
        self.levels = len(slots) - 1
        self.far = self.levels + 1 - near
        self.near_size = near * horizon + (1 + self.far if self.far else 0)
        self.far_size = self.far * horizon

    def place(self, time: int, level: int) -> int:
        """The near position of a row."""
        if level == self.levels:
            return self.near * time
        if level < self.near - 1:
            return self.near * (time - 1) + 1 + level
        return self.near * time + self.levels - level

    def row(self, time: int, level: int) -> int:
        """In tables of all rows; where there are far levels, A lies before the finest of them."""
        if not time:
            return 0
        if self.far and level >= self.levels - 1:
            level = 2 * self.levels - 1 - level
        return 1 + (time - 1) * (self.levels + 1) + level

    def of(self, time: int, levels: range) -> Pass:
        """Of rows of one time; ``levels`` are consecutive, the action's the last of them."""
        places = [self.place(time, level) for level in levels]
        order = sorted(range(len(places)), key=places.__getitem__)
        write = slice(min(places), max(places) + 1)
        rows = [self.row(time, level) for level in levels]
        assert write.stop - write.start == len(places) == max(rows) + 1 - min(rows)
        first = max(1, time - self.window + 1)  # the earliest time within the window
        # levels lie before the action of their time
        near = slice(self.near * (first - 1) + 1 if first > 1 else 0, write.stop)
        far, over, kept = slice(0, 0), None, slice(0, 0)
        if self.far and time:
            if levels[-1] >= self.near - 1:  # rows that see far levels of their own step
                near = slice(near.start, self.near * time + 1 + self.far)
            if max(self.slots[level] for level in levels) > self.near and first < time:
                far = slice(self.far * (first - 1), self.far * (time - 1))
            if self.levels - 1 in levels:
                over = slice(self.near * time + 1, self.near * time + 1 + self.far)
                kept = slice(self.far * (time - 1), self.far * time)
        rows = slice(min(rows), max(rows) + 1)
        return Pass(order, rows, write, near, far, over, kept)

    def tables(self, level_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By row (R): time, level, and who may look at near (R,C) and far positions (R,F)."""
        device, slots = level_mask.device, self.levels + 1
        order = torch.arange(slots, device=device)
        if self.far:
            order = torch.cat([order[:-2], order[-2:].flip(0)])
        one = torch.arange(1 + self.horizon * slots, device=device) - 1
        time = one.div(slots, rounding_mode="floor") + 1
        level = torch.cat([order.new_full((1,), self.levels), order.repeat(self.horizon)])
        place = torch.arange(self.near_size, device=device) - 1
        near_time = place.div(self.near, rounding_mode="floor") + 1  # (C,)
        near_level = place.remainder(self.near)
        near_level = torch.where(near_level == self.near - 1, self.levels, near_level)
        behind = place + 1 - self.near * time.unsqueeze(1)  # (R, C): from 1 on those of far levels
        near_time = torch.where(behind > 0, time.unsqueeze(1), near_time)
        near_level = torch.where(behind > 0, (self.levels - behind).clamp(min=0), near_level)
        near = attn_mask(level_mask, (time, level), (near_time, near_level), self.window)
        if not self.far:
            return time, level, near, near[:, :0]
        place = torch.arange(self.far_size, device=device)
        far_time = place.div(self.far, rounding_mode="floor") + 1
        far_level = self.levels - 1 - place.remainder(self.far)
        far = attn_mask(level_mask, (time, level), (far_time, far_level), self.window)
        return time, level, near, far


class Branch:
    """The K/V of one layer's own positions.

    Where no gradient is recorded they are written in place; appending by ``cat``, which needs
    ``places`` without far ones, would copy all of them every time. shape: (B, h, n).
    """

    def __init__(self, places: Places, like: Tensor, shape: tuple[int, int, int], dim: int):
        self.places = places
        self.grown: KV | None = None  # with a gradient: all so far
        self.near: Tensor | None = None  # without: (2, B, h, n, C, d)
        if not torch.is_grad_enabled():
            dtype = autocast_dtype(like.device) or like.dtype
            # zeros: some that are not written yet lie between those that are looked at
            make = like.new_zeros if places.far else like.new_empty
            self.near = make((2, *shape, places.near_size, dim), dtype=dtype)
            self.far = like.new_empty((2, *shape, places.far_size, dim), dtype=dtype)

    def room(self, now: Pass) -> Tensor | None:
        """Where the keys and values (2,B,h,n,Q,d) of new rows go; with a gradient None."""
        return None if torch.is_grad_enabled() else self.near[..., now.write, :]

    def add(self, new: KV) -> None:
        """Add (B,h,n,Q,d), for which there was no room."""
        if self.grown is not None:
            new = KV(*(torch.cat(pair, -2) for pair in zip(self.grown, new, strict=True)))
        self.grown = new

    def read(self, now: Pass) -> list[KV]:
        """What rows look at, (B,h,n,O,d): near positions, and far ones if any."""
        if self.grown is not None:
            return [KV(*(x[..., now.near.start :, :] for x in self.grown))]
        found = [KV(*self.near[..., now.near, :].unbind())]
        if now.far.stop > now.far.start:
            found.append(KV(*self.far[..., now.far, :].unbind()))
        return found

    def close(self, now: Pass) -> None:
        """After a pass: copy far positions to where they stay."""
        if now.over is not None:
            self.far[..., now.kept, :] = self.near[..., now.over, :]

    def steps(self) -> Tensor:
        """All of H steps in the order of ``Layout``, (2, B, h, n, H * (l + 1), d)."""
        places = self.places
        if self.grown is not None:
            return torch.stack(self.grown)
        if not places.far:
            return self.near
        near = self.near[..., : places.near * places.horizon, :].unflatten(-2, (-1, places.near))
        far = self.far.unflatten(-2, (-1, places.far)).flip(-2)
        return torch.cat([near, far], -2).flatten(-3, -2)
