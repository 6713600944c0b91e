"""The recurrent scan's own gradient: against finite differences, and against autograd's."""

import pytest
import torch
from test_agent import EVERYTHING, make
from torch import nn

import networks
import tools
from hidreamer import cost, distributions, nets
from hidreamer.dynamics import MEMORIES, TYPES
from hidreamer.dynamics.base import KLConfig
from hidreamer.dynamics.hrssm import HRSSM
from hidreamer.dynamics.hrvq_gru import RecurrentHRVQ
from hidreamer.dynamics.rssm import RSSM

KL = KLConfig(0.5, 0.1, 1.0, 0.1)
KINDS = ("rssm", "hrssm")
TOKENS = ("gru", "gru expected", "gru innovation", "gru frame")


def small(kind, **names):
    sizes = {"deter": 4, "hidden": 5}
    if kind.startswith("gru"):
        codes = {"levels": 2, "groups": 2, "codes": 3, "code_dim": 2, "depth_units": 4}
        which = kind.removeprefix("gru ") if kind.endswith(("ed", "on")) else "drawn"
        sees = "frame" if kind == "gru frame" else "memory"
        block = tools.load_config([], {"dynamics.type": "hrvq"}).dynamics.hrvq.tree() | codes
        block |= {"memory": "gru", "posterior_sees": sees, "residual": which}
        return RecurrentHRVQ(3, 2, KL, **sizes, **block, **names)
    if kind == "rssm":
        return RSSM(3, 2, KL, stoch=2, classes=3, **sizes, **names)
    return HRSSM(3, 2, KL, stoch=[1, 2], classes=[3, 2], **sizes, **names)


def inputs(dynamics, batch=2, length=4):
    """-> carry, embed (B,T,E), action (B,T,A), is_first (B,T) with a start inside."""
    make = lambda *shape: torch.randn(batch, *shape, dtype=torch.float64)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[0, 0] = first[1, 2] = True
    carry = dynamics.initial(batch)
    carry = carry._replace(deter=make(dynamics.deter_dim), stoch=make(dynamics.stoch_dim))
    return carry, make(length, dynamics.embed_dim), make(length, dynamics.act_dim), first


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_against_finite_differences(kind, monkeypatch):
    """Of every input and parameter. A sample has no derivative: here states are probabilities."""
    monkeypatch.setattr(distributions, "invert_cdf", lambda probs, noise: probs)
    dynamics = small(kind).double()
    for p in dynamics.parameters():
        nn.init.normal_(p, std=0.7)
    # What gets no gradient is constant here: the prior below hrssm's posterior, an episode's start.
    nn.init.zeros_(dynamics.img_out.linear.weight)
    if kind == "hrssm":
        nn.init.zeros_(dynamics.prior_bottom.weight)
    carry, embed, action, first = inputs(dynamics)
    given = [x.requires_grad_() for x in (*carry, embed, action)]
    params = [
        p for name, p in dynamics.named_parameters() if not name.startswith(("prior", "img_o"))
    ]

    def run(*_):
        last, post = dynamics.observe(carry, embed, action, first)
        return *post.feat, *last, *(level.post for level in post.levels)

    assert torch.autograd.gradcheck(run, (*given, *params), fast_mode=False)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *TOKENS])
def test_the_gradient_is_autograds(kind, sample):
    """With samples, straight-through, of the losses and of what an episode leaves behind."""
    dynamics, found = small(kind).double(), []
    for p in dynamics.parameters():
        nn.init.normal_(p, std=0.7)
    carry, embed, action, first = inputs(dynamics, 3, 9)
    embed.requires_grad_()
    assert dynamics.has_scan
    for dynamics.has_scan in (True, False):
        torch.manual_seed(2)
        last, post = dynamics.observe(carry, embed, action, first, sample)
        losses, _ = dynamics.loss(post)
        ends = sum((x * torch.arange(x.shape[-1])).sum() for x in (*last, *post.feat))
        loss = sum(losses.values()).sum() + ends
        params = [embed, *dynamics.parameters()]
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        found.append([loss, *post.feat, *last, *grads])
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in zip(*found, strict=True))
    if sample and kind in KINDS:  # one drawn state more or less would show
        assert found[0][2].unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_updates_are_the_same(kind):
    found = []
    for has_scan in (True, False):
        torch.manual_seed(0)
        agent, batch = make(EVERYTHING, **{"dynamics.type": kind})
        agent.world_model.dynamics.has_scan = has_scan
        grads, step = [], agent.optimizers["model"].optim.step
        params = agent.optimizers["model"].params

        def look(step=step, params=params, grads=grads):
            grads.append(torch.cat([p.grad.flatten() for p in params.values()]))
            return step()

        agent.optimizers["model"].optim.step = look
        torch.manual_seed(1)
        found.append((agent.update(batch), *grads))
    (metrics, grad), (other, truth) = found
    assert torch.allclose(metrics, other, rtol=1e-5, atol=1e-6)
    assert (grad - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_other_parts_have_autograds_gradient(kind, monkeypatch):
    monkeypatch.setitem(nets.ACTIVATIONS, "tanh", nn.Tanh)
    dynamics = small(kind, act="tanh").double()
    assert not dynamics.has_scan
    _, post = dynamics.observe(*inputs(dynamics))
    assert post.feat.deter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(kind):
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agent, batch = make(EVERYTHING, **{"dynamics.type": kind, "precision": precision})
        obs = networks.preprocess(batch)
        with agent.autocast():
            _, post, _ = agent.world_model.observe(obs, sample=False)
        assert post.feat.deter.dtype == torch.float32
        loss = sum(x.square().sum() for x in (post.feat.deter, *(x.post for x in post.levels)))
        names = dict(agent.world_model.dynamics.named_parameters())
        names = {key: p for key, p in names.items() if "prior" not in key and "img_out" not in key}
        grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
        assert all(g.dtype == torch.float32 for g in grads if g is not None)
    cosine = torch.cosine_similarity(*found, dim=0)
    assert cosine > 0.9


def test_innovation_in_bfloat16_is_near():
    """What the priors expect is computed inside the scan, by layers whose weights were cast for
    autocast, which is off there.
    """
    over = {"memory": "gru", "posterior_sees": "memory", "residual": "innovation"}
    over = {f"dynamics.hrvq.{key}": x for key, x in over.items()}
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agent, batch = make(**{"dynamics.type": "hrvq", "precision": precision} | over)
        obs = networks.preprocess(batch)
        with torch.no_grad(), agent.autocast():
            _, post, _ = agent.world_model.observe(obs, sample=False)
        metrics = agent.update(batch)
        loss = metrics[agent.metric_names.index("model_loss")]
        found.append(torch.stack([*post.feat.deter.mean((0, 1)), loss]))
    assert torch.allclose(*found, rtol=0.01, atol=0.01) and not torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "forward", "both"),
    [("rssm", 23, 36), ("hrssm", 34, 51), ("gru", 44, 63), ("gru frame", 7, 11)],
)
def test_kernels_of_a_step(kind, forward, both):
    """What 32 more steps cost, without and with the gradient. Autograd's of rssm and hrssm: 27 and
    72, 44 and 100.
    """
    dynamics, counts = small(kind), []

    def run(length, grad):
        _, *rest = (
            x.float() if torch.is_tensor(x) and x.is_floating_point() else x
            for x in inputs(dynamics, 2, length)
        )
        with torch.set_grad_enabled(grad):
            _, post = dynamics.observe(dynamics.initial(2), *rest)
            if grad:
                loss = post.feat.deter.sum() + post.feat.stoch.sum() + post.levels[0].post.sum()
                torch.autograd.grad(loss, list(dynamics.parameters()), allow_unused=True)

    for grad in (False, True):
        few, many = (
            cost.operators(lambda n=n, grad=grad: run(n, grad))["kernels"] for n in (8, 40)
        )
        counts.append((many - few) / 32)
    assert counts[0] <= forward and counts[1] <= both, counts


def test_all_states_with_a_scan_are_tested():
    assert {kind for kind in TYPES if hasattr(TYPES[kind], "post_forward")} == set(KINDS)
    assert [kind for kind in MEMORIES if hasattr(MEMORIES[kind], "post_forward")] == ["gru"]
