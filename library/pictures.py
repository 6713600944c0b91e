"""Observations as pictures: images and grids as they are, vectors as bars."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from envs.palette import PALETTE
from hidreamer import evaluation
from hidreamer.distributions import symlog

SIDE = 128  # pixels of a picture, about
BACK, AXIS, UP, DOWN = (24, 26, 32), (90, 94, 104), (88, 166, 255), (255, 140, 90)


def picture(obs: Mapping[str, Tensor]) -> np.ndarray:
    """Of one observation {key: (...)}, images and grids in [0, 1], as ``decode`` has them.

    -> uint8 (H, W, 3): all keys side by side, or an empty picture where there are none.
    """
    shown = [] if obs else [np.full((SIDE, SIDE, 3), BACK, np.uint8)]
    for x in obs.values():
        if x.ndim == 3 and x.shape[-1] in range(4, len(PALETTE)):
            shown.append(board(x))
        elif x.ndim == 3:
            shown.append(evaluation.board([{"x": x[None, None]}])[0])
        else:
            shown.append(bars(x))
    height = max(frame.shape[0] for frame in shown)
    padded = [np.pad(x, ((0, height - x.shape[0]), (0, 0), (0, 0))) for x in shown]
    return np.concatenate(padded, 1)


def board(x: Tensor) -> np.ndarray:
    """(H,W,C) planes in [0, 1]: each in its colour, later ones over earlier ones."""
    out = np.zeros((*x.shape[:2], 3))
    planes = x.float().cpu().clamp(0.0, 1.0).numpy()
    for i, colour in enumerate(PALETTE[1 : x.shape[-1] + 1]):
        share = planes[..., i, None]
        out = (1.0 - share) * out + share * colour
    scale = max(1, SIDE // x.shape[1])
    return out.round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)


def raw_picture(obs: Mapping[str, np.ndarray], keys: Mapping) -> np.ndarray:
    """Of a raw observation: uint8 images, bool grids, vectors; of ``keys`` alone."""
    tensors = {}
    for key in keys:
        x = torch.as_tensor(np.asarray(obs[key]))
        tensors[key] = x.float() / 255.0 if x.dtype == torch.uint8 else x.float()
    return picture(tensors)


def bars(x: Tensor) -> np.ndarray:
    """(n,) numbers, the first 256 of them, as bars of their symlog from a line of 0; SIDE pixels
    high, and a bar is whole at 6.4.
    """
    values = symlog(x.float().cpu()[:256]).clamp(-2.0, 2.0).numpy() / 2.0  # symlog(6.4) is 2
    wide = max(2, SIDE // len(values))
    out = np.full((SIDE, wide * len(values), 3), BACK, np.uint8)
    middle, half = SIDE // 2, SIDE // 2 - 4
    for i, value in enumerate(values):
        if not np.isfinite(value):
            continue
        end = middle - round(half * float(value))
        left, right = i * wide + wide // 8, (i + 1) * wide - max(1, wide // 8)
        out[min(middle, end) : max(middle, end), left:right] = UP if value > 0 else DOWN
    out[middle] = AXIS
    return out
