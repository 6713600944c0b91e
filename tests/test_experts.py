"""Experts in place of the transformer's feed-forward layers: by level, and routed."""

import sys

import pytest
import torch

import tools
from conftest import ROOT
from hidreamer import cost, experts
from hidreamer.dynamics import make_dynamics
from hidreamer.transformer import Dense

sys.path.insert(0, str(ROOT / "benchmarks"))
import experts as benchmark


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 6, dtype=dtype), torch.tensor([2, 0, 1, 2, 0, 1, 2, 0])


def one_by_one(part, x, expert):
    """The same experts as a loop over rows."""
    rows = []
    for row, i in zip(x.flatten(0, -2), expert.flatten().tolist(), strict=True):
        hidden = part.act(row @ part.up[i] + part.up_bias[i])
        rows.append(hidden @ part.down[i] + part.down_bias[i])
    return torch.stack(rows).view_as(x)


def filled(part):
    """With biases that are not zero."""
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return part


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.float32, 6), (torch.float64, 8)]
)
def test_grouped_products_are_those_of_a_loop_with_their_gradients(dtype, width):
    part = filled(experts.Experts(4, width, 16)).to(dtype)
    x = torch.randn(2, 3, 8, width, dtype=dtype)
    expert = torch.randint(4, x.shape[:-1])
    expert[expert == 2] = 3  # one expert gets no row
    found, grads = [], []
    for compute in (
        lambda x: part(x.flatten(0, -2), expert.flatten()).view_as(x),
        lambda x: one_by_one(part, x, expert),
    ):
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        found.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), [leaf, *part.parameters()]))
    assert torch.allclose(*found, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_no_host_reads_and_as_many_operators_for_any_number_of_rows():
    part = experts.Routed(8, 16, count=4, top=2, balance=0.1).eval()
    counts = []
    for rows in (4, 400):
        x, level = torch.randn(1, 1, rows, 8), torch.zeros(rows, dtype=torch.long)
        with torch.no_grad():
            counts.append(cost.operators(lambda x=x, level=level: part(x, level)))
    assert counts[0] == counts[1] and counts[0]["host_reads"] == 0


def test_a_position_passes_the_expert_of_its_level():
    part = filled(experts.ByLevel(6, 10, levels=2)).double()
    x, level = inputs()
    out, losses = part(x, level)
    assert not losses
    assert torch.allclose(out, one_by_one(part.experts, x, level.expand(x.shape[:-1])))
    with torch.no_grad():
        part.experts.up[1] += 1.0
    changed = (part(x, level)[0] != out).any(-1)
    assert torch.equal(changed, (level == 1).expand_as(changed))


def test_the_router_weighs_the_experts_that_it_chooses():
    part = filled(experts.Routed(6, 10, count=4, top=2, balance=0.1)).double()
    x, level = inputs()
    probs = torch.softmax(x @ part.router.weight.t(), -1)
    weight, chosen = probs.topk(2, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = sum(
        weight[..., k, None] * one_by_one(part.experts, x, chosen[..., k]) for k in range(2)
    )
    assert torch.allclose(part(x, level)[0], expected)
    grad = torch.autograd.grad(part(x, level)[0].square().sum(), part.router.weight)[0]
    assert grad.norm() > 0, "the router learns from what its experts do"


def test_the_balance_loss_by_hand_and_at_its_floor():
    part = experts.Routed(4, 8, count=4, top=1, balance=0.5)
    level = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        part.router.weight.copy_(100.0 * torch.eye(4))
    each = torch.eye(4).view(1, 1, 4, 4)  # every expert gets one row, with certainty
    assert part(each, level)[1]["balance"].shape == (1, 1)
    assert part(each, level)[1]["balance"].item() == pytest.approx(0.5, rel=1e-4)
    alone = torch.eye(4)[:1].expand(4, 4).view(1, 1, 4, 4)  # one gets all
    assert part(alone, level)[1]["balance"].item() == pytest.approx(0.5 * 4, rel=1e-4)


def test_balance_spreads_a_collapsed_router():
    used = {}
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        part = experts.Routed(6, 10, count=4, top=1, balance=balance)
        with torch.no_grad():
            part.router.weight[0] += 1.0
        optimizer = torch.optim.Adam(part.parameters(), 1e-2)
        for _ in range(200):
            x = torch.randn(4, 1, 32, 6) + 1.0
            out, losses = part(x, torch.zeros(32, dtype=torch.long))
            loss = (out - x).square().mean() + losses["balance"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        used[balance] = part.use.max().item()
    assert used[1.0] < 0.45 < used[0.0]


def test_use_is_counted_while_learning_alone():
    part = experts.Routed(6, 10, count=4, top=1, balance=0.1)
    before, (x, level) = part.use.clone(), inputs(torch.float32)
    with torch.no_grad():
        part(x, level)
    assert torch.equal(part.use, before)
    part(x, level)
    assert not torch.equal(part.use, before) and part.use.sum().item() == pytest.approx(1.0)


def test_active_parameters_by_hand():
    part = experts.Routed(6, 10, count=4, top=2, balance=0.1)
    one = 6 * 10 + 10 + 10 * 6 + 6
    assert sum(p.numel() for p in part.parameters()) == 4 * one + 4 * 6
    assert benchmark.active_parameters(part) == 2 * one + 4 * 6
    assert benchmark.active_parameters(Dense(6, 10)) == one
    assert benchmark.active_parameters(experts.ByLevel(6, 10, levels=3)) == one


# ---------------------------------------------------------------- in the latent state


def state(**overrides):
    keys = {"dynamics.type": "hrvq", "dynamics.hrvq.layers": 2} | overrides
    config = tools.load_config(["debug"], keys)
    torch.manual_seed(0)
    return make_dynamics(config.dynamics, 12, 3)


KINDS = {
    "level": {"dynamics.hrvq.ffn": "level"},
    "moe": {"dynamics.hrvq.ffn": "moe", "dynamics.hrvq.moe_top": 2},
    "moe by layer": {"dynamics.hrvq.ffn": "moe", "dynamics.hrvq.moe_experts": [1, 3]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_all_at_once(kind):
    """Rows pass the same experts alone and in a sequence."""
    dynamics = state(**KINDS[kind]).double().eval()
    embed, action = torch.randn(2, 6, 12).double(), torch.randn(2, 6, 3).double()
    first = torch.tensor([[True] + [False] * 5] * 2)
    parts, carry = [], dynamics.initial(2)
    torch.manual_seed(0)
    codes = dynamics.encode(embed)
    whole = dynamics.follow(dynamics.initial(2), codes, action, first)[1].feat.deter
    for t in range(6):
        part = type(codes)(
            codes.code[:, t : t + 1],
            codes.index[:, t : t + 1],
            tuple(x[:, t : t + 1] for x in codes.logit),
            codes.residual[:, t : t + 1],
        )
        carry, post = dynamics.follow(carry, part, action[:, t : t + 1], first[:, t : t + 1])
        parts.append(post.feat.deter)
    assert torch.allclose(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_use_are_reported_and_everything_learns(kind):
    dynamics = state(**KINDS[kind])
    embed, action = torch.randn(2, 6, 12), torch.randn(2, 6, 3)
    first = torch.tensor([[True] + [False] * 5] * 2)
    _, post = dynamics.observe(dynamics.initial(2), embed, action, first)
    losses, metrics = dynamics.loss(post)
    assert ("balance" in losses) == kind.startswith("moe")
    used = {name for name in metrics if name.startswith("expert_")}
    layers = {"level": 0, "moe": 2 * 4, "moe by layer": 3}
    assert len(used) == layers[kind]
    total = sum(loss.mean() for loss in losses.values()) + post.feat.deter.square().mean()
    total.backward()
    assert all(p.grad is not None for p in dynamics.transformer.parameters())


def test_numbers_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="moe_experts has 3 values for 2 layers"):
        state(**{"dynamics.hrvq.ffn": "moe", "dynamics.hrvq.moe_experts": [1, 2, 2]})
    with pytest.raises(tools.ConfigError, match="dense, level, moe"):
        state(**{"dynamics.hrvq.ffn": "sparse"})
    with pytest.raises(ValueError, match="moe_top is 3"):
        experts.Routed(6, 10, count=2, top=3, balance=0.1)


def test_as_many_experts_are_chosen_as_asked_and_use_is_of_learning():
    sizes = {"levels": 2, "experts": [2, 3], "top": 2, "balance": 0.1}
    parts = experts.make_ffns("moe", 6, 10, 2, **sizes)
    assert [part.top for part in parts] == [2, 2]
    part = parts[1].eval()
    before = part.use.clone()
    part(torch.randn(1, 1, 4, 6), torch.zeros(4, dtype=torch.long))
    assert torch.equal(part.use, before)
