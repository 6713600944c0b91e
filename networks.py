"""What touches observations and actions: encoder, decoder, heads, actor.

An observation is a dict of images (uint8 (H,W,C)), grids (bool (H,W,C)) and vectors (float32 (N,)),
distinguished by their spaces. Inside the networks images are floats in [-0.5, 0.5] (see
``preprocess``). Keys go in alphabetical order. The layers' shapes are those of dreamerv3-torch.

``norm`` and ``act`` are names, of ``nets.NORMS`` (for convolutions ``CHANNEL_NORMS``) and
``nets.ACTIVATIONS``; ``HEADS`` are the heads by the name of what they put out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.nets import (
    CHANNEL_NORMS,
    MLP,
    Block,
    NeverEnds,
    by_name,
    has_bias,
    init_trunc,
    init_uniform,
    linear,
    make_activation,
)

Shape = tuple[int, ...]
KINDS = {(np.uint8, 3): "image", (np.bool_, 3): "grid"}  # by dtype and axes; all others are vectors


def keys_by_kind(
    obs_space: Mapping[str, spaces.Space], pattern: str, name: str
) -> dict[str, dict[str, Shape]]:
    """Observation keys that match ``pattern``, sorted, by kind.

    ``name`` is the pattern's key in the config. -> {"image" | "grid" | "vector": {key: shape}}.
    Raises ValueError where ``pattern`` is no regular expression or nothing matches, or images or
    grids differ in height or width.
    """
    found: dict[str, dict[str, Shape]] = {"image": {}, "grid": {}, "vector": {}}
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} is {pattern!r}, which is no regular expression: {error}"
        ) from error
    for key in sorted(obs_space):
        if expression.fullmatch(key):
            space = obs_space[key]
            kind = KINDS.get((space.dtype.type, len(space.shape)), "vector")
            found[kind][key] = space.shape
    if not any(found.values()):
        keys = ", ".join(sorted(obs_space))
        raise ValueError(f"no observation matches {name} {pattern!r}; the task has {keys}")
    for kind in ("image", "grid"):
        sizes = {shape[:2] for shape in found[kind].values()}
        if len(sizes) > 1:
            raise ValueError(
                f"{kind}s of one task must have one height and width, not {found[kind]}"
            )
    return found


def preprocess(obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw observations to floats: images to [-0.5, 0.5], grids to {0, 1}; vectors as they are."""
    out = {}
    for key, x in obs.items():
        out[key] = x.float() / 255.0 - 0.5 if x.dtype == torch.uint8 else x.float()
    return out


def conv(layer: nn.Conv2d | nn.ConvTranspose2d, scale: float | None = None) -> nn.Module:
    """Initialise a convolution as ``nets.linear`` does, fans counted over its kernel."""
    space = math.prod(layer.kernel_size)
    fans = space * layer.in_channels, space * layer.out_channels
    if scale is None:
        init_trunc(layer.weight, *fans)
    else:
        init_uniform(layer.weight, *fans, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv_norm_act(
    layer: nn.Conv2d | nn.ConvTranspose2d, norm: str = "layer", act: str = "silu"
) -> list[nn.Module]:
    """A convolution without bias, and the norm and activation that follow it. It is given a bias
    where the norm has none.
    """
    normalise = by_name(CHANNEL_NORMS, norm, "norm")(layer.out_channels)
    if not has_bias(normalise):
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
    return [conv(layer), normalise, make_activation(act)]


def stages(size: tuple[int, int], minres: int) -> int:
    """How many halvings lead from an image's side to ``minres``. Raises ValueError if none do."""
    n = round(math.log2(size[0] / minres))
    if size[0] != size[1] or n < 1 or minres * 2**n != size[0]:
        raise ValueError(
            f"images must be square with side {minres} x 2^n (n at least 1), "
            f"not {size[0]}x{size[1]}: set env.size, or both encoder.minres and decoder.minres"
        )
    return n


class ConvEncoder(nn.Module):
    """Strided convolutions down to ``minres``: (N, H, W, C) -> (N, dim), channels first."""

    def __init__(self, shape: tuple[int, int, int], depth: int, minres: int, **names: str):
        super().__init__()
        layers, inp = [], shape[-1]
        for i in range(stages(shape[:2], minres)):
            out = depth * 2**i
            layers += conv_norm_act(nn.Conv2d(inp, out, 4, 2, padding=1, bias=False), **names)
            inp = out
        self.layers = nn.Sequential(*layers)
        self.dim = inp * minres**2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 3, 1, 2)).flatten(1)


class ConvDecoder(nn.Module):
    """The way back up: (N, feat) -> (N, H, W, C)."""

    def __init__(
        self, feat_dim: int, shape: tuple[int, int, int], depth: int, minres: int, **names: str
    ):
        super().__init__()
        n = stages(shape[:2], minres)
        inp = depth * 2 ** (n - 1)
        self.inp = linear(feat_dim, inp * minres**2, scale=1.0)
        self.grid = (minres, minres, inp)
        layers = []
        for i in reversed(range(1, n)):
            out = depth * 2 ** (i - 1)
            up = nn.ConvTranspose2d(inp, out, 4, 2, padding=1, bias=False)
            layers += conv_norm_act(up, **names)
            inp = out
        layers.append(conv(nn.ConvTranspose2d(inp, shape[-1], 4, 2, padding=1), scale=1.0))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).unflatten(-1, self.grid).permute(0, 3, 1, 2)  # (N, C, minres, minres)
        return self.layers(x).permute(0, 2, 3, 1)


class GridEncoder(nn.Module):
    """For small boards of binary planes: a 3x3 convolution, a block. (N, H, W, C) -> (N, units)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        depth: int,
        units: int,
        *,
        norm: str = "layer",
        act: str = "silu",
    ):
        super().__init__()
        self.conv = conv(nn.Conv2d(shape[-1], depth, 3, padding=1))
        self.act = make_activation(act)
        self.block = Block(depth * shape[0] * shape[1], units, norm=norm, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act(self.conv(x.permute(0, 3, 1, 2))).flatten(1))


def stacked_shape(shapes: Mapping[str, Shape]) -> Shape:
    """The shape of several images or grids, stacked by channel."""
    first, *_ = shapes.values()
    return (*first[:2], sum(shape[-1] for shape in shapes.values()))


class Encoder(nn.Module):
    """Preprocessed observations (B, T, ...) -> embed (B, T, dim): images, grids, symlog of vectors.

    keys: a regular expression of observations; depth, minres: of convolutions; layers, units: of
    the vectors' perceptron; names: ``norm`` and ``act``.
    """

    def __init__(
        self,
        obs_space: Mapping[str, spaces.Space],
        *,
        keys: str,
        depth: int,
        minres: int,
        layers: int,
        units: int,
        **names: str,
    ):
        super().__init__()
        self.kinds = keys_by_kind(obs_space, keys, "encoder.keys")
        self.dim = 0  # numbers of embed
        self.map_positions = 0  # of the images' last feature map, where there is one
        if image := self.kinds["image"]:
            self.image = ConvEncoder(stacked_shape(image), depth, minres, **names)
            self.map_positions = minres**2
            self.dim += self.image.dim
        if grid := self.kinds["grid"]:
            self.grid = GridEncoder(stacked_shape(grid), depth, units, **names)
            self.dim += units
        if vector := self.kinds["vector"]:
            size = sum(math.prod(shape) for shape in vector.values())
            self.vector = MLP(size, layers, units, first_bias=True, **names)
            self.dim += units

    @property
    def observed(self) -> list[str]:
        """The observations that it reads."""
        return [key for shapes in self.kinds.values() for key in shapes]

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Preprocessed observations {key: (B, T, ...)} -> embed (B, T, ``dim``)."""
        embeds = []
        for kind, shapes in self.kinds.items():
            if not shapes:
                continue
            x = [obs[key] for key in shapes]  # (B, T, ...) each
            if kind == "vector":
                vector = torch.cat([v.flatten(2) for v in x], -1)  # (B, T, size)
                embeds.append(self.vector(dists.symlog(vector)))
            else:
                x = torch.cat(x, -1) if len(x) > 1 else x[0]  # (B, T, H, W, C)
                embed = getattr(self, kind)(x.flatten(0, 1))  # (B * T, .)
                embeds.append(embed.unflatten(0, x.shape[:2]))  # (B, T, .)
        return torch.cat(embeds, -1) if len(embeds) > 1 else embeds[0]


class Decoder(nn.Module):
    """Features (B, T, F) -> {key: distribution of the preprocessed observation (B, T, ...)}.

    Arguments as of ``Encoder``; the perceptron decodes grids as well.
    """

    def __init__(
        self,
        feat_dim: int,
        obs_space: Mapping[str, spaces.Space],
        *,
        keys: str,
        depth: int,
        minres: int,
        layers: int,
        units: int,
        **names: str,
    ):
        super().__init__()
        self.kinds = keys_by_kind(obs_space, keys, "decoder.keys")
        if image := self.kinds["image"]:
            self.image = ConvDecoder(feat_dim, stacked_shape(image), depth, minres, **names)
        flat = self.kinds["grid"] | self.kinds["vector"]
        self.sizes = {key: math.prod(shape) for key, shape in flat.items()}
        if self.sizes:
            self.vector = MLP(feat_dim, layers, units, sum(self.sizes.values()), **names)

    def forward(self, x: Tensor) -> dict[str, dists.MSE | dists.Bernoulli]:
        out = {}
        if shapes := self.kinds["image"]:
            images = self.image(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, T, H, W, C)
            channels = images.split([shape[-1] for shape in shapes.values()], -1)
            for key, image in zip(shapes, channels, strict=True):
                out[key] = dists.MSE(image, event=3)
        if self.sizes:
            flat = self.vector(x).split(list(self.sizes.values()), -1)  # (B, T, size) each
            for key, x in zip(self.sizes, flat, strict=True):
                if shape := self.kinds["grid"].get(key):
                    out[key] = dists.Bernoulli(x.unflatten(-1, shape), event=3)
                else:
                    shape = self.kinds["vector"][key]
                    x = x.unflatten(-1, shape)
                    out[key] = dists.MSE(x, event=len(shape), in_symlog=True)
        return out


class NoDecoder(nn.Module):
    """In the place of a ``Decoder``, whose arguments it takes, for a model that decodes nothing."""

    def __init__(self, *args: object, **sizes: object):
        super().__init__()
        self.kinds: dict[str, dict[str, Shape]] = {"image": {}, "grid": {}, "vector": {}}
        self.sizes: dict[str, int] = {}

    def forward(self, x: Tensor) -> dict[str, dists.MSE | dists.Bernoulli]:
        return {}


class TwoHotHead(MLP):
    """Reward or value, (..., F) -> TwoHot (...). Its last layer starts at zero: it predicts 0.

    bins: a name of ``distributions.TWO_HOTS``.
    """

    def __init__(
        self, feat_dim: int, *, layers: int, units: int, bins: str = "symlog", **names: str
    ):
        super().__init__(feat_dim, layers, units, dists.BINS, outscale=0.0, **names)
        self.dist = by_name(dists.TWO_HOTS, bins, "bins")

    def forward(self, x: Tensor) -> dists.TwoHot:
        return self.dist(super().forward(x))


class BinaryHead(MLP):
    """A probability, such as that the episode continues: (..., F) -> Bernoulli (...).

    discount: what its ones are taught as.
    """

    def __init__(
        self, feat_dim: int, *, layers: int, units: int, discount: float = 1.0, **names: str
    ):
        super().__init__(feat_dim, layers, units, 1, **names)
        self.discount = discount

    def forward(self, x: Tensor) -> dists.Bernoulli:
        logit = super().forward(x).squeeze(-1)
        if self.discount == 1.0:
            return dists.Bernoulli(logit)
        return dists.DiscountedBernoulli(logit, self.discount)


HEADS = {"twohot": TwoHotHead, "binary": BinaryHead}


def make_head(output: str, feat_dim: int, *, layers: int, units: int, **names: Any) -> MLP:
    """The head ``output`` of ``HEADS``: features (..., F) -> a distribution (...)."""
    return by_name(HEADS, output, "output")(feat_dim, layers=layers, units=units, **names)


def make_continue_head(feat_dim: int, config: Any) -> nn.Module:
    """The continue head, which ``imag.contdisc`` has learn the discount. config: of all keys."""
    if not config.model.losses.cont:
        return NeverEnds()
    discount = config.imag.discount if config.imag.contdisc else 1.0
    return make_head("binary", feat_dim, discount=discount, **config.cont)


class Actor(MLP):
    """The policy, (..., F) -> distribution of actions (..., A), ClippedNormal for a Box.

    Raises ValueError where a Box has no deviation between ``min_std`` and ``max_std``.
    """

    def __init__(
        self,
        feat_dim: int,
        space: spaces.Space,
        *,
        layers: int,
        units: int,
        unimix: float,
        min_std: float,
        max_std: float,
        **names: str,
    ):
        if isinstance(space, spaces.Box):
            sizes = None
            if not 0 < max_std >= min_std:
                raise ValueError(
                    f"actor.net.max_std is {max_std}: it must be above 0, and not below min_std"
                    f" {min_std}"
                )
        elif isinstance(space, spaces.Discrete):
            sizes = (int(space.n),)
        else:
            sizes = tuple(map(int, space.nvec))
        out = sum(sizes) if sizes else 2 * space.shape[0]
        super().__init__(feat_dim, layers, units, out, **names)
        self.sizes, self.unimix, self.std = sizes, unimix, (min_std, max_std)

    def noise(self) -> tuple[tuple[tuple[int, ...], ...], bool]:
        """Shapes of what one action is sampled from; whether that is normal, otherwise uniform."""
        if self.sizes is None:
            return ((self.out.out_features // 2,),), True
        return ((1,),) * len(self.sizes), False

    def forward(self, x: Tensor) -> dists.OneHotCategorical | dists.ClippedNormal:
        x = super().forward(x)
        if self.sizes is None:
            return dists.ClippedNormal(*x.chunk(2, -1), *self.std)
        return dists.OneHotCategorical(x, self.sizes, self.unimix)
