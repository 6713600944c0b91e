"""Building blocks: initialised linear layers, blocks, perceptrons, the normalised GRU cell.

Norms, activations and cells are chosen by name: ``NORMS``, ``ACTIVATIONS``, ``CELLS``. Shapes and
initialisation follow dreamerv3-torch (NM512, 2023), so that its checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

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


NORMS = {"layer": layer_norm}  # each: size -> module over the last axis
ACTIVATIONS = {"silu": nn.SiLU}  # each: () -> module


def make_norm(name: str, size: int) -> nn.Module:
    """The norm ``name`` of ``NORMS`` over a last axis of ``size`` numbers."""
    return by_name(NORMS, name, "norm")(size)


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
    which starts like the weight of a constant 1.

    norm, act: names of ``NORMS`` and ``ACTIVATIONS``.
    """

    def __init__(
        self, inp: int, out: int, *, bias: bool = False, norm: str = "layer", act: str = "silu"
    ):
        super().__init__()
        self.linear = linear(inp, out, bias=bias)
        if bias:
            init_trunc(self.linear.bias, inp, out)
        self.norm = make_norm(norm, out)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_act(self.linear(x))

    def norm_act(self, x: Tensor) -> Tensor:
        """The block after its linear layer, (..., out) -> (..., out)."""
        return self.act(self.norm(x))

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
        assert block.linear.bias is None, "a bias belongs to no single input"
        self.block = block
        self.weights = block.linear.weight.split(list(sizes), 1)  # (out, size) each

    def project(self, i: int, x: Tensor) -> Tensor:
        """What input ``i`` (..., size_i) adds to the linear layer's output, (..., out)."""
        return x @ self.weights[i].t()

    def __call__(self, i: int, x: Tensor, others: Tensor) -> Tensor:
        """The block's output (B, out).

        ``x`` (B, size_i) is input ``i``; ``others`` (B, out) is the sum of all other inputs'
        ``project``.
        """
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


class GRUCell(nn.Module):
    """GRU with one norm over all gates and an update bias of -1 (Hafner et al. 2020, DreamerV2).

    (B, inp), (B, deter) -> (B, deter).
    """

    def __init__(self, inp: int, deter: int, *, norm: str = "layer"):
        super().__init__()
        self.linear = linear(inp + deter, 3 * deter, bias=False)
        self.norm = make_norm(norm, 3 * deter)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        # The memory stays in its own precision: bfloat16 would round away small updates.
        gates = self.norm(self.linear(torch.cat([x, deter], -1))).to(deter.dtype)  # (B, 3D)
        reset, cand, update = gates.chunk(3, -1)  # (B, D) each
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter, cand, torch.sigmoid(update - 1.0))


# Each: (inp, deter, norm=name) -> module (B, inp), (B, deter) -> (B, deter).
CELLS = {"gru": GRUCell}


def make_cell(name: str, inp: int, deter: int, *, norm: str = "layer") -> nn.Module:
    """The recurrent cell ``name`` of ``CELLS``."""
    return by_name(CELLS, name, "cell")(inp, deter, norm=norm)
