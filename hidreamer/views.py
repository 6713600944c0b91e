"""Augmented views of preprocessed image observations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hidreamer.distributions import uniform
from hidreamer.nets import by_name

Batch = Mapping[str, Tensor]
View = Callable[[Batch, torch.Generator | None], dict[str, Tensor]]
SHIFT = 1.0 / 16.0  # of an image's side, at most: 4 of 64 pixels


def crops(noise: Tensor) -> Tensor:
    """noise (N,4) in [0, 1) -> width, height, x, y (N,4) of crops that are resized to the whole.

    Their area is 1/4 to 1 of the image and their ratio 3/4 to 4/3; sides are shares of the image's,
    x and y are of the crop's middle, where the image spans -1 to 1 (TWISTER's view: torchvision's
    RandomResizedCrop, which draws again where a side would not fit and here is cut).
    """
    area, ratio, *places = noise.unbind(1)
    area = 0.25 + 0.75 * area
    ratio = torch.exp((2.0 * ratio - 1.0) * math.log(4.0 / 3.0))
    sides = [(area * r).sqrt().clamp(max=1.0) for r in (ratio, 1.0 / ratio)]
    middles = [
        (2.0 * place - 1.0) * (1.0 - side) for place, side in zip(places, sides, strict=True)
    ]
    return torch.stack([*sides, *middles], 1)


def shifts(noise: Tensor) -> Tensor:
    """noise (N,4) -> the same of shifts by up to ``SHIFT`` of a side (DrQ, Kostrikov et al. 2020);
    pixels at the border are repeated.
    """
    whole = torch.ones_like(noise[:, :2])
    return torch.cat([whole, (2.0 * noise[:, 2:] - 1.0) * 2.0 * SHIFT], 1)


PLACES = {"crop": crops, "shift": shifts}  # each: noise (N,4) -> width, height, x, y (N,4)


def resample(images: Tensor, place: Tensor) -> Tensor:
    """Images (N,H,W,C), place (N,4) as of ``crops`` -> what lies there, (N,H,W,C)."""
    width, height, x, y = place.to(images.dtype).unbind(1)
    none = torch.zeros_like(x)
    rows = torch.stack([width, none, x], 1), torch.stack([none, height, y], 1)
    theta = torch.stack(rows, 1)  # (N, 2, 3)
    x = images.permute(0, 3, 1, 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x.permute(0, 2, 3, 1)


def view(
    kind: str, keys: tuple[str, ...], obs: Batch, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """obs (B,T,...) with every image of ``keys`` (B,T,H,W,C) moved: those of one step alike."""
    first = obs[keys[0]]
    count = first.shape[0] * first.shape[1]
    place = PLACES[kind](uniform((count, 4), first, generator))
    out = dict(obs)
    for key in keys:
        out[key] = resample(obs[key].flatten(0, 1), place).unflatten(0, first.shape[:2])
    return out


def make_view(kind: str, encoder: Any) -> View | None:
    """The view ``kind``: "none" (None), "crop" or "shift".

    Raises ValueError for another name, and where ``encoder`` sees no image.
    """
    by_name({"none": None, **PLACES}, kind, "model.ac_cpc.augment")
    if kind == "none":
        return None
    keys = tuple(encoder.kinds["image"])
    if not keys:
        raise ValueError(f"model.ac_cpc.augment {kind} is for images, and this task has none")
    return functools.partial(view, kind, keys)
