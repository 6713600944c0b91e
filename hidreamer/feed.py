"""Batches on their way from the replay to the device.

On CUDA a batch is written into pinned memory and copied from there on a stream of its own, while
the device still works on the one before. There are two sets of buffers, used in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hidreamer.replay import Rows


class Buffers:
    """One batch, in pinned memory and on the device."""

    def __init__(self, rows: Mapping[str, np.ndarray], device: torch.device):
        """rows: of the keys, shapes and types of every batch to come."""
        self.pinned, self.moved = {}, {}
        for key, x in rows.items():
            self.pinned[key] = torch.from_numpy(np.empty_like(x)).pin_memory()
            self.moved[key] = torch.empty_like(self.pinned[key], device=device)
        self.rows = {key: x.numpy() for key, x in self.pinned.items()}
        self.copied = torch.cuda.Event()  # into ``moved``: ``pinned`` may be written again
        self.used = torch.cuda.Event()  # by the device: ``moved`` may be written again


class Feed:
    """Moves batches of always the same shapes to ``device``: ``rows``, to be filled, then ``send``.

    What ``send`` returned is overwritten by the call after the next. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sets: tuple[Buffers, ...] = ()  # the next batch's, and the other one's

    def rows(self) -> Rows | None:
        """Where to write the next batch; None for anywhere. Waits until its last is copied."""
        if not self.sets:
            return None
        self.sets[0].copied.synchronize()
        return self.sets[0].rows

    def send(self, rows: Rows) -> dict[str, Tensor]:
        """rows: what ``rows`` gave, filled, or any arrays. -> the same on the device."""
        if self.device.type != "cuda":
            return {key: torch.from_numpy(x).to(self.device) for key, x in rows.items()}
        if not self.sets:
            self.stream = torch.cuda.Stream(self.device)
            self.sets = Buffers(rows, self.device), Buffers(rows, self.device)
        (now, last), main = self.sets, torch.cuda.current_stream(self.device)
        if rows is not now.rows:
            for key, x in rows.items():
                now.rows[key][...] = x
        last.used.record(main)  # all that works on it is under way
        self.stream.wait_event(now.used)
        with torch.cuda.stream(self.stream):
            for key, x in now.pinned.items():
                now.moved[key].copy_(x, non_blocking=True)
            now.copied.record(self.stream)
        main.wait_event(now.copied)
        self.sets = last, now
        return dict(now.moved)
