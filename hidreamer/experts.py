"""Sparse feed-forward parts of the transformer: experts by level, or chosen by a router.

Both take the place of ``transformer.Dense``: x (B,n,Q,W) and the positions' levels (Q,) -> what is
added to x, and auxiliary losses. Experts' products are grouped: rows are sorted by expert and
multiplied in one call, without a loop over tokens or experts and without a read on the host.

Shapes: R = B * n * Q rows, W width, hidden H, M experts, k experts a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer.nets import init_trunc, linear, make_activation
from hidreamer.transformer import Dense, Transformer

USE_RATE = 0.01  # of the running share of rows that an expert gets
ALIGNED = 8  # numbers that rows of grouped products must be a multiple of
GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that grouped products take


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (R, inp), sorted by expert; weight (M, inp, out); ends (M,) int32: rows up to and with each
    expert's. -> (R, out).
    """
    aligned = weight.shape[1] % ALIGNED == 0 == weight.shape[2] % ALIGNED
    if x.is_cpu and x.dtype in GROUPED and aligned:
        return F.grouped_mm(x, weight.to(x.dtype), offs=ends)
    # CUDA's grouped product reads ``ends`` on the host, but for bfloat16 on Hopper (torch 2.11), so
    # that no graph can be recorded: there, as for odd widths and float64, one product of M times
    # the work
    rows = torch.arange(len(x), device=x.device)
    expert = torch.searchsorted(ends, rows, right=True)  # (R,)
    own = expert.unsqueeze(1) == torch.arange(len(weight), device=x.device)  # (R, M)
    placed = (x.unsqueeze(1) * own.unsqueeze(2)).flatten(1)  # (R, M * inp), zero but for one inp
    return placed @ weight.flatten(0, 1).to(x.dtype)


class Experts(nn.Module):
    """``count`` networks of two layers, of which every row passes one."""

    def __init__(self, count: int, width: int, hidden: int, *, act: str = "silu"):
        super().__init__()
        self.count, self.act = count, make_activation(act)
        self.up = nn.Parameter(torch.empty(count, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(count, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, width))
        self.down_bias = nn.Parameter(torch.zeros(count, width))
        for weight in (*self.up, *self.down):
            init_trunc(weight.data, *weight.shape)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x (R, W), the expert (R,) of each row -> (R, W)."""
        order = torch.argsort(expert, stable=True)
        ordered = expert[order]
        one = torch.arange(self.count, device=expert.device)
        ends = torch.searchsorted(ordered, one, right=True, out_int32=True)  # (M,)
        hidden = grouped_product(x[order], self.up, ends) + self.up_bias.to(x.dtype)[ordered]
        out = grouped_product(self.act(hidden), self.down, ends)
        out = out + self.down_bias.to(x.dtype)[ordered]
        return torch.empty_like(out).index_copy(0, order, out)  # each row back in its place


class ByLevel(nn.Module):
    """An expert for every level, and one for actions: a position's level says which."""

    def __init__(self, width: int, hidden: int, *, levels: int, act: str = "silu"):
        super().__init__()
        self.experts = Experts(levels + 1, width, hidden, act=act)

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        expert = level.expand(x.shape[:-1]).flatten()
        return self.experts(x.flatten(0, -2), expert).view_as(x), {}


class Routed(nn.Module):
    """``count`` experts, of which a router chooses ``top`` for every row (Shazeer et al. 2017).

    The weights of those that are chosen are their softmax, renormalised. The auxiliary loss
    "balance" is that of the Switch Transformer (Fedus et al. 2022, eq. 4) times ``balance``: 1
    times it where all experts are used alike. ``use`` (M,) is the running share of choices in
    passes that record a gradient.
    """

    def __init__(
        self, width: int, hidden: int, *, count: int, top: int, balance: float, act: str = "silu"
    ):
        super().__init__()
        if not 1 <= top <= count:
            raise ValueError(f"moe_top is {top}, and a layer has {count} experts")
        self.top, self.balance = top, balance
        self.router = linear(width, count, bias=False)
        self.experts = Experts(count, width, hidden, act=act)
        self.register_buffer("use", torch.full((count,), 1.0 / count))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = x.flatten(0, -2)  # (R, W)
        with torch.autocast(x.device.type, enabled=False):  # choices must not depend on rounding
            wide = rows if rows.dtype == torch.float64 else rows.float()
            probs = torch.softmax(F.linear(wide, self.router.weight.to(wide.dtype)), -1)  # (R, M)
        weight, chosen = probs.topk(self.top, -1)  # (R, k)
        weight = weight / weight.sum(-1, keepdim=True)
        every = rows.repeat_interleave(self.top, 0)  # (R * k, W)
        out = self.experts(every, chosen.flatten()).unflatten(0, (-1, self.top))  # (R, k, W)
        out = (out * weight.unsqueeze(-1).to(out.dtype)).sum(1).view_as(x)
        onehot = (chosen.unsqueeze(-1) == torch.arange(self.experts.count, device=x.device)).sum(1)
        share = onehot.to(probs.dtype) / self.top  # (R, M)
        if self.training and torch.is_grad_enabled():
            self._count(share)
        # by sequence: the share of its rows that each expert gets, times the router's mean belief
        by = (*x.shape[:2], -1, self.experts.count)
        loss = (share.view(by).mean(2) * probs.view(by).mean(2)).sum(-1)  # (B, n)
        return out, {"balance": self.balance * self.experts.count * loss}

    @torch.no_grad()
    def _count(self, share: Tensor) -> None:
        self.use.lerp_(share.mean(0).to(self.use.dtype), USE_RATE)


def make_ffns(
    kind: str,
    width: int,
    hidden: int,
    layers: int,
    *,
    levels: int,
    experts: list[int],
    top: int,
    balance: float,
    act: str = "silu",
) -> list[nn.Module]:
    """The feed-forward part of every layer: "level" or "moe".

    experts: of each layer, or one number for all; layers with one expert have no router and are
    dense. Raises ValueError where the numbers do not fit.
    """
    if kind == "level":
        return [ByLevel(width, hidden, levels=levels, act=act) for _ in range(layers)]
    counts = experts * layers if len(experts) == 1 else experts
    if len(counts) != layers:
        raise ValueError(
            f"dynamics.hrvq.moe_experts has {len(counts)} values for {layers} layers; give one, or"
            " one for each"
        )
    found: list[nn.Module] = []
    for count in counts:
        if count == 1:
            found.append(Dense(width, hidden, act=act))
            continue
        chosen = min(top, count)
        found.append(Routed(width, hidden, count=count, top=chosen, balance=balance, act=act))
    return found


def make_transformer(
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    levels: int,
    *,
    ffn: str = "dense",
    moe_experts: Sequence[int] = (1,),
    moe_top: int = 1,
    moe_balance: float = 0.01,
    **names: str,
) -> Transformer:
    """A transformer whose feed-forward parts are of the kind ``ffn``: a name of
    ``transformer.FFNS``, or "level" or "moe". names: ``norm`` and ``act``. Raises ValueError.
    """
    if ffn not in ("level", "moe"):
        return Transformer(width, layers, heads, hidden, ffn=ffn, **names)
    net = Transformer(width, layers, heads, hidden, **names)
    moe = {"experts": list(moe_experts), "top": moe_top, "balance": moe_balance}
    act = names.get("act", "silu")
    parts = make_ffns(ffn, width, hidden, layers, levels=levels, act=act, **moe)
    for layer, part in zip(net.layers, parts, strict=True):
        layer.ffn = part
    return net


def expert_use(net: Transformer) -> dict[str, Tensor]:
    """The running share of choices of every routed expert, () each, by layer and expert."""
    found = {}
    for i, layer in enumerate(net.layers):
        if isinstance(layer.ffn, Routed):
            found |= {f"expert_{i}_{j}": share.clone() for j, share in enumerate(layer.ffn.use)}
    return found
