"""The kernel of dreams' attention on CUDA with other tiles: an item of ``gpu_check.py``."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import measure
import torch
from equality import dream_inputs

from hidreamer.transformer import attend_shared

TRIED = list(itertools.product((16, 32), (8, 16, 32), (32, 64, 128), (2, 4, 8)))


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    call()  # compiles
    times = measure.interleaved({"call": call}, 30, device.type == "cuda")["call"]
    return round(1000 * measure.median([wall for _, wall in times]), 4)


@torch.no_grad()
def tiles(device: torch.device, dry: bool) -> dict[str, Any]:
    """ms of a call of dreams' attention in the middle of a tiny dream, by the kernel's tiles: rows,
    own positions, prefix, warps. The fastest ones, and those that are set.
    """
    batch, count = (2, 2) if dry else (64, 16)
    draw = functools.partial(torch.randn, device=device)
    q, seen = draw(batch, 4, count, 1, 64), draw(batch, 1, count, 1, 124) < 0
    keys, values = draw(2, batch, 4, count, 32, 64)
    mine = torch.ones(1, 32, dtype=torch.bool, device=device)
    given = dream_inputs([q, keys, values, *draw(2, batch, 4, 124, 64)], seen, mine)
    call = lambda: attend_shared(*given)
    if dry:
        return {"ms": median_ms(call, device)}
    from hidreamer.fused_attention import TILES

    kept, found = dict(TILES), {}
    try:
        for sizes in [tuple(kept.values()), *TRIED]:
            TILES.update(zip(kept, sizes, strict=True))
            with contextlib.suppress(Exception):  # some take more memory than there is on a chip
                found[" ".join(map(str, sizes))] = median_ms(call, device)
    finally:
        TILES.update(kept)
    fastest = sorted(found, key=found.__getitem__)[:5]
    return {"set": next(iter(found.values()))} | {name: found[name] for name in fastest}
