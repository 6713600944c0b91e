"""Building blocks: initialised linear layers, blocks, perceptrons, the normalised GRU cell.

Norms, activations and cells are chosen by name: ``NORMS``, ``ACTIVATIONS``, ``CELLS``. Shapes and
initialisation follow dreamerv3-torch (NM512, 2023), so that its checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hidreamer.distributions import Bernoulli, at_least_float32
from hidreamer.precision import side_by_side

EPS = 1e-3  # of every LayerNorm, as upstream
T = TypeVar("T")


def by_name(registry: Mapping[str, T], name: str, what: str) -> T:
    """The entry ``name`` of a registry of ``what``. Raises ValueError that lists the names."""
    if name not in registry:
        raise ValueError(f"{what} is {name!r}; it can be {', '.join(registry)}")
    return registry[name]


def layer_norm(size: int) -> nn.Module:
    """Over the last axis, (..., size)."""
    return nn.LayerNorm(size, eps=EPS)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-4) times a weight (Zhang and Sennrich 2019; DreamerV3 of 2024), over
    the last axis (..., size), in float32 at least.
    """

    def __init__(self, size: int):
        super().__init__(size, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least_float32(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, (B, C, H, W).

    In channels-last memory both permutes are free.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelRMSNorm(RMSNorm):
    """``RMSNorm`` over the channels of each pixel, (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# each: channels -> module over (B, C, H, W)
CHANNEL_NORMS = {"layer": ChannelNorm, "rms": ChannelRMSNorm}


NORMS = {"layer": layer_norm, "rms": RMSNorm}  # each: size -> module over the last axis
ACTIVATIONS = {"silu": nn.SiLU}  # each: () -> module


def make_norm(name: str, size: int) -> nn.Module:
    """The norm ``name`` of ``NORMS`` over a last axis of ``size`` numbers."""
    return by_name(NORMS, name, "norm")(size)


def has_bias(norm: nn.Module) -> bool:
    """Whether a norm adds a bias of its own. If not, the layer before it has one."""
    return getattr(norm, "bias", None) is not None


def make_activation(name: str) -> nn.Module:
    """The activation ``name`` of ``ACTIVATIONS``."""
    return by_name(ACTIVATIONS, name, "act")()


def init_trunc(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Truncated normal with variance 1 / mean fan.

    0.8796 is the deviation of a unit normal that is cut at two deviations.
    """
    std = math.sqrt(2.0 / (fan_in + fan_out)) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)


def init_uniform(weight: Tensor, fan_in: int, fan_out: int, scale: float) -> None:
    """Uniform with variance ``scale`` / mean fan.

    Scale 0 gives zeros: reward head and critic start at exactly 0.
    """
    limit = math.sqrt(3.0 * scale * 2.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


def linear(inp: int, out: int, scale: float | None = None, bias: bool = True) -> nn.Linear:
    """A linear layer (..., inp) -> (..., out), its bias zero.

    Its weights are truncated-normal, or uniform where an output ``scale`` is given.
    """
    layer = nn.Linear(inp, out, bias=bias)
    if scale is None:
        init_trunc(layer.weight, inp, out)
    else:
        init_uniform(layer.weight, inp, out, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Linear, norm, activation: (..., inp) -> (..., out).

    Without a bias the norm makes a block blind to the length of its input. One-hots have one
    length, so upstream has no biases; for raw vectors the length matters: there take a ``bias``,
    which starts like the weight of a constant 1. Before a norm that adds no bias itself there
    always is one, which otherwise starts at 0 (DreamerV3 of 2024).

    norm, act: names of ``NORMS`` and ``ACTIVATIONS``.
    """

    def __init__(
        self, inp: int, out: int, *, bias: bool = False, norm: str = "layer", act: str = "silu"
    ):
        super().__init__()
        normalise = make_norm(norm, out)
        self.linear = linear(inp, out, bias=bias or not has_bias(normalise))
        if bias:
            init_trunc(self.linear.bias, inp, out)
        self.norm = normalise
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_act(self.linear(x))

    def norm_act(self, x: Tensor) -> Tensor:
        """The block after its linear layer, (..., out) -> (..., out)."""
        return self.act(self.norm(x))

    def last_weights(self, size: int) -> Tensor:
        """(out, size), a view: what the last ``size`` inputs are multiplied with."""
        return self.linear.weight[:, -size:]

    def split(self, sizes: Sequence[int]) -> SplitBlock:
        """The block as one of several inputs side by side, of ``sizes`` numbers each."""
        return SplitBlock(self, sizes)


class SplitBlock:
    """A block with several inputs, whose products with the weight are taken one by one.

    In a recurrence only one input waits for the step before. ``project`` multiplies the others for
    all steps at once, before the loop; a call adds the last one. Make one for each loop: it splits
    the weight once, so that the weight's gradient is put together once.
    """

    def __init__(self, block: Block, sizes: Sequence[int]):
        self.block = block
        self.weights = block.linear.weight.split(list(sizes), 1)  # (out, size) each

    def project(self, i: int, x: Tensor) -> Tensor:
        """What input ``i`` (..., size_i) adds to the linear layer's output, (..., out); the bias
        belongs to none of them.
        """
        return x @ self.weights[i].t()

    def __call__(self, i: int, x: Tensor, others: Tensor) -> Tensor:
        """The block's output (B, out).

        ``x`` (B, size_i) is input ``i``; ``others`` (B, out) is the sum of all other inputs'
        ``project``.
        """
        bias = self.block.linear.bias
        others = others if bias is None else others + bias
        return self.block.norm_act(torch.addmm(others, x, self.weights[i].t()))


class MLP(nn.Module):
    """``layers`` blocks and (if ``out``) a linear layer: (..., inp) -> (..., out or units).

    first_bias: whether the first block has a bias; names: ``norm`` and ``act`` of all blocks.
    """

    def __init__(
        self,
        inp: int,
        layers: int,
        units: int,
        out: int = 0,
        outscale: float = 1.0,
        first_bias: bool = False,
        **names: str,
    ):
        super().__init__()
        blocks = []
        for i in range(layers):
            blocks.append(Block(units if i else inp, units, bias=first_bias and not i, **names))
        self.blocks = nn.Sequential(*blocks)
        self.out = linear(units, out, outscale) if out else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.out is None else self.out(x)


class NeverEnds(nn.Module):
    """In the place of a continue head that nothing trains: all states (..., F) go on."""

    def forward(self, x: Tensor) -> Bernoulli:
        return Bernoulli(torch.full_like(x[..., 0], 20.0))  # a probability of 1 in float32


def gated(deter: Tensor, reset: Tensor, cand: Tensor, update: Tensor) -> Tensor:
    """The end of a GRU: old memory and gates (B,D) -> new memory (B,D)."""
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    return torch.lerp(deter, cand, torch.sigmoid(update - 1.0))


class GRUCell(nn.Module):
    """GRU with one norm over all gates and an update bias of -1 (Hafner et al. 2020, DreamerV2).

    (B, inp), (B, deter) -> (B, deter).
    """

    def __init__(self, inp: int, deter: int, *, norm: str = "layer"):
        super().__init__()
        normalise = make_norm(norm, 3 * deter)
        self.linear = linear(inp + deter, 3 * deter, bias=not has_bias(normalise))
        self.norm = normalise

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        # The memory stays in its own precision: bfloat16 would round away small updates.
        gates = self.norm(self.linear(side_by_side(x, deter))).to(deter.dtype)  # (B, 3D)
        return gated(deter, *gates.chunk(3, -1))

    def scan_bias(self) -> Tensor:
        """(3D,): the norm's bias with the update bias of ``gated``, for a scan's gates."""
        offset = torch.zeros_like(self.norm.bias)
        offset[2 * len(offset) // 3 :] = 1.0
        return self.norm.bias - offset


class BlockLinear(nn.Module):
    """``blocks`` linear layers side by side: (..., g, inp) -> (..., g, out)."""

    def __init__(self, blocks: int, inp: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inp, out))
        self.bias = nn.Parameter(torch.zeros(blocks, out))
        init_trunc(self.weight, inp, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,gio->...go", x, self.weight) + self.bias


class BlockGRUCell(nn.Module):
    """The GRU of DreamerV3 of 2024 (arXiv 2301.04104v2, appendix), whose memory is in blocks.

    Each block reads itself, a hidden layer of the whole memory, and the input; a layer of deter
    numbers, then the gates, with an update bias of -1. (B, inp), (B, deter) -> (B, deter). Raises
    ValueError where ``blocks`` do not divide deter.
    """

    def __init__(
        self, inp: int, deter: int, hidden: int, blocks: int, *, norm: str, act: str = "silu"
    ):
        super().__init__()
        if deter % blocks:
            raise ValueError(f"dynamics.deter {deter} is no multiple of the {blocks} blocks")
        self.blocks, size = blocks, deter // blocks
        self.whole = Block(deter, hidden, norm=norm, act=act)
        self.hidden = BlockLinear(blocks, size + hidden + inp, size)
        self.norm, self.act = make_norm(norm, deter), make_activation(act)
        self.gates = BlockLinear(blocks, size, 3 * size)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        own = deter.unflatten(-1, (self.blocks, -1))  # (B, g, D / g)
        x = torch.cat([self.whole(deter), x.to(deter.dtype)], -1)  # (B, hidden + inp)
        x = torch.cat([own, x.unsqueeze(-2).expand(*own.shape[:-1], -1)], -1)
        x = self.act(self.norm(self.hidden(x).flatten(-2)))  # (B, D)
        gates = self.gates(x.unflatten(-1, (self.blocks, -1))).to(deter.dtype)  # (B, g, 3 D / g)
        return gated(deter, *(gate.flatten(-2) for gate in gates.chunk(3, -1)))


class SideBySide(nn.Module):
    """A block for each of two inputs side by side: (..., inp1 + inp2) -> (..., 2 out).

    The second, an action, has a bias, whatever the norm: its length matters. It is split as
    ``Block`` is: the second input's block does not wait for the first's.
    """

    def __init__(self, sizes: tuple[int, int], out: int, *, norm: str, act: str):
        super().__init__()
        self.sizes = sizes
        parts = (Block(size, out, bias=i == 1, norm=norm, act=act) for i, size in enumerate(sizes))
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.split(self.sizes, -1)
        return torch.cat([self.parts[0](one), self.parts[1](two)], -1)

    def last_weights(self, size: int) -> Tensor:
        return self.parts[1].last_weights(size)

    def split(self, sizes: Sequence[int]) -> SideBySide:
        assert tuple(sizes) == self.sizes, (sizes, self.sizes)
        return self

    def project(self, i: int, x: Tensor) -> Tensor:
        """The block of the second input (..., inp2) -> (..., out)."""
        assert i == 1
        return self.parts[1](x)

    def __call__(self, *args: Any) -> Tensor:
        """Of both inputs side by side, or of (0, the first, ``project`` of the second)."""
        if len(args) == 1:
            return super().__call__(*args)
        _, x, others = args
        return torch.cat([self.parts[0](x), others], -1)


def make_core(
    name: str,
    stoch: int,
    act_dim: int,
    hidden: int,
    deter: int,
    *,
    blocks: int,
    norm: str,
    act: str,
) -> tuple[nn.Module, nn.Module]:
    """The layer of state and action (..., stoch + act_dim), and the cell that reads it: "block_gru"
    or one of ``CELLS``.
    """
    names = {"norm": norm, "act": act}
    if name == "block_gru":
        cell = BlockGRUCell(2 * hidden, deter, hidden, blocks, **names)
        return SideBySide((stoch, act_dim), hidden, **names), cell
    by_name({**CELLS, "block_gru": BlockGRUCell}, name, "cell")  # names both where it is neither
    return Block(stoch + act_dim, hidden, **names), CELLS[name](hidden, deter, norm=norm)


# Each: (inp, deter, norm=name) -> module (B, inp), (B, deter) -> (B, deter).
CELLS = {"gru": GRUCell}
