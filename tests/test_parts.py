"""Parts by name (norm, activation, cell, head, feed-forward part),
and the shapes that every verb insists on.
"""

from typing import ClassVar

import pytest
import torch
from gymnasium import spaces
from test_agent import EVERYTHING
from test_dynamics import A, B, E, T, build, inputs
from torch import nn

import networks
from hidreamer import nets, transformer
from hidreamer.dynamics import TYPES
from hidreamer.dynamics.base import KLConfig
from hidreamer.dynamics.hrssm import HRSSM
from hidreamer.dynamics.rssm import RSSM

KL = KLConfig(dyn=0.5, rep=0.1, free_nats=1.0, unimix=0.01)


class ScaleOnly(nn.Module):
    """A norm, or with (B, C, H, W) a norm of channels, that is told apart from all others."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x


@pytest.fixture
def others(monkeypatch):
    monkeypatch.setitem(nets.NORMS, "scale", ScaleOnly)
    monkeypatch.setitem(networks.CHANNEL_NORMS, "scale", ScaleOnly)
    monkeypatch.setitem(nets.ACTIVATIONS, "relu", nn.ReLU)
    return {"norm": "scale", "act": "relu"}


def conv_sizes(**sizes):
    return {"keys": ".*", "depth": 2, "minres": 4, "layers": 1, "units": 8} | sizes


HEAD = {"layers": 1, "units": 8}
MAKERS = {
    "encoder": lambda names: networks.Encoder(EVERYTHING, **conv_sizes(), **names),
    "decoder": lambda names: networks.Decoder(6, EVERYTHING, **conv_sizes(), **names),
    "twohot": lambda names: networks.make_head("twohot", 6, **HEAD, **names),
    "binary": lambda names: networks.make_head("binary", 6, **HEAD, **names),
    "actor": lambda names: networks.Actor(
        6, spaces.Discrete(3), **HEAD, unimix=0.01, min_std=0.1, max_std=1.0, **names
    ),
    "rssm": lambda names: RSSM(E, A, KL, deter=8, hidden=8, stoch=2, classes=3, **names),
    "hrssm": lambda names: HRSSM(
        E, A, KL, deter=8, hidden=8, stoch=[2, 2], classes=[3, 3], **names
    ),
    "hrvq": lambda names: build("hrvq", **names),
}


@pytest.mark.parametrize("part", MAKERS)
def test_names_reach_every_layer(part, others):
    """None of the usual norms and activations is left, and there were some."""
    usual = (nn.LayerNorm, nn.SiLU)
    kinds = [[type(x) for x in MAKERS[part](names).modules()] for names in ({}, others)]
    assert any(issubclass(kind, usual) for kind in kinds[0])
    assert not any(issubclass(kind, usual) for kind in kinds[1])
    assert ScaleOnly in kinds[1] and nn.ReLU in kinds[1]
    assert len(kinds[0]) == len(kinds[1])


@pytest.mark.parametrize("part", MAKERS)
def test_unknown_names_are_listed(part):
    with pytest.raises(ValueError, match="norm is 'batch'; it can be layer"):
        MAKERS[part]({"norm": "batch"})
    with pytest.raises(ValueError, match="act is 'tanh'; it can be silu"):
        MAKERS[part]({"act": "tanh"})


def test_other_names_are_listed():
    with pytest.raises(ValueError, match="cell is 'lstm'; it can be gru"):
        MAKERS["rssm"]({"cell": "lstm"})
    with pytest.raises(ValueError, match="ffn is 'experts'; it can be dense"):
        build("hrvq", ffn="experts")
    with pytest.raises(ValueError, match="output is 'normal'; it can be twohot, binary"):
        networks.make_head("normal", 6, **HEAD)


@pytest.mark.parametrize("std", [{"min_std": 1.5}, {"min_std": 0.0, "max_std": 0.0}])
def test_a_continuous_policy_needs_a_deviation(std):
    std = {"min_std": 0.1, "max_std": 1.0} | std
    networks.Actor(6, spaces.Discrete(3), **HEAD, unimix=0.01, **std)  # which has none
    with pytest.raises(ValueError, match=r"actor.net.max_std is .* not below min_std"):
        networks.Actor(6, spaces.Box(-1, 1, (2,)), **HEAD, unimix=0.01, **std)


def test_cells_are_chosen_by_name(monkeypatch):
    """Another cell drives both scans, the observed and the imagined one."""

    class Leaky(nn.Module):
        def __init__(self, inp, deter, *, norm):
            super().__init__()
            self.linear = nn.Linear(inp, deter)

        def forward(self, x, deter):
            return 0.5 * deter + self.linear(x)

    monkeypatch.setitem(nets.CELLS, "leaky", Leaky)
    dynamics = MAKERS["rssm"]({"cell": "leaky"}).double()
    embed, action, is_first = inputs()
    carry, post = dynamics.observe(dynamics.initial(B), embed, action, is_first)
    _, feat, _ = dynamics.imagine(dynamics.initial(B), action[:, :1], 1, sample=False)
    start = dynamics.initial(B)
    x = dynamics.img_in(torch.cat([start.stoch, action[:, 0]], -1))
    assert torch.allclose(feat.deter[:, 1], 0.5 * start.deter + dynamics.cell.linear(x))
    assert type(dynamics.cell) is Leaky and carry.deter.shape == post.feat.deter[:, 0].shape


@pytest.mark.parametrize("names", [{}, {"bias": True}, {"norm": "rms"}])
def test_a_split_block_is_the_block(names):
    """Outputs and gradients are those of the inputs side by side, whichever of them waits; a bias
    counts once.
    """
    block = nets.Block(9, 5, **names).double()
    if block.linear.bias is not None:
        torch.nn.init.normal_(block.linear.bias)
    parts = [torch.randn(4, size, dtype=torch.float64, requires_grad=True) for size in (2, 3, 4)]
    whole = block(torch.cat(parts, -1))
    expected = torch.autograd.grad(whole.square().sum(), [*parts, *block.parameters()])
    for last in range(3):
        split = block.split([2, 3, 4])
        others = sum(split.project(i, parts[i]) for i in range(3) if i != last)
        out = split(last, parts[last], others)
        assert torch.allclose(out, whole)
        found = torch.autograd.grad(out.square().sum(), [*parts, *block.parameters()])
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


class Routed(nn.Module):
    """A feed-forward part that notes the levels of its positions and has a loss."""

    seen: ClassVar = []

    def __init__(self, width, hidden, *, act):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, level):
        Routed.seen.append((x, level))
        return 0.0 * x, {"balance": self.scale * x.new_full(x.shape[:2], 3.0)}


@pytest.fixture
def routed(monkeypatch):
    monkeypatch.setitem(transformer.FFNS, "routed", Routed)
    monkeypatch.setattr(Routed, "seen", [])
    return build("hrvq", ffn="routed", layers=2)


def test_feed_forward_parts_know_the_levels(routed):
    """In training and in imagination: A is level 3;
    the last layer has the rows alone whose outputs are needed.
    """
    carry, post = routed.observe(routed.initial(B), *inputs())
    step = [3, 0, 1, 2]
    levels = [level.tolist() for _, level in Routed.seen]
    assert levels == [step * T, [3] * T, step * T, step * T]  # the memory's pass, the priors' pass
    assert all(x.shape[2] == len(level) for x, level in Routed.seen)
    Routed.seen.clear()
    routed.imagine(routed.starts(carry, post, 0), torch.randn(B * T, 2, A).double(), 2)
    passes = [[3], [0], [1]], [[2, 3], [0], [1]]  # the finest level goes with the next action
    expected = []
    for time in passes:
        for rows in time:
            expected += [rows, rows[-1:]]
    assert [level.tolist() for _, level in Routed.seen] == expected


def test_auxiliary_losses_are_losses_of_the_dynamics(routed):
    """Of all layers, once: two layers of 3 each at every step."""
    _, post = routed.observe(routed.initial(B), *inputs())
    losses, _ = routed.loss(post)
    assert losses["balance"].shape == (B, T) and (losses["balance"] == 6.0).all()
    (grad,) = torch.autograd.grad(losses["balance"].mean(), routed.transformer.layers[0].ffn.scale)
    assert grad == 3.0
    dense = build("hrvq")
    _, post = dense.observe(dense.initial(B), *inputs())
    assert set(dense.loss(post)[0]) == {"dyn"}


@pytest.fixture(params=sorted(TYPES))
def dynamics(request):
    return build(request.param)


def test_verbs_refuse_other_shapes(dynamics):
    embed, action, is_first = inputs()
    carry, post = dynamics.observe(dynamics.initial(B), embed, action, is_first)
    given = torch.randn(B, 4, A).double()
    refused = [
        lambda: dynamics.observe(dynamics.initial(B), embed[..., 1:], action, is_first),
        lambda: dynamics.observe(dynamics.initial(B), embed, action[..., 1:], is_first),
        lambda: dynamics.observe(dynamics.initial(B), embed, action[:, 1:], is_first),
        lambda: dynamics.observe(dynamics.initial(B), embed[:, 1:], action, is_first),
        lambda: dynamics.observe(dynamics.initial(B), embed, action, is_first.double()),
        lambda: dynamics.observe(dynamics.initial(1), embed, action, is_first),
        lambda: dynamics.loss(post._replace(levels=post.levels[:0])),
        lambda: dynamics.loss(
            post._replace(levels=(post.levels[0]._make(x[0] for x in post.levels[0]),))
        ),
        lambda: dynamics.starts(carry, post._replace(feat=post.feat.map(lambda x: x[:, 0])), 0),
        lambda: dynamics.starts(carry, post._replace(feat=post.feat.map(lambda x: x[..., 1:])), 0),
        lambda: dynamics.imagine(carry, given, 5),
        lambda: dynamics.imagine(carry, given[..., 1:], 4),
        lambda: dynamics.imagine(carry, given[:1], 4),
        lambda: dynamics.imagine(carry, given, 0),
    ]
    for i, call in enumerate(refused):
        with pytest.raises(AssertionError):
            call()
            pytest.fail(f"number {i} was accepted")
    dynamics.imagine(carry, given, 4)


def test_codes_of_other_sizes_are_refused():
    dynamics = build("hrvq")
    embed, action, is_first = inputs()
    codes = dynamics.encode(embed)
    with pytest.raises(AssertionError):
        dynamics.follow(
            dynamics.initial(B), codes._replace(code=codes.code[:, :, 1:]), action, is_first
        )
    with pytest.raises(AssertionError):
        dynamics.encode(embed[..., 1:])
