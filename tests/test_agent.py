"""The one update: what it changes, what it costs, and upstream's known faults,
each with a test that would catch it.
"""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces

import models
import networks
import tools
from hidreamer import cost
from hidreamer.dynamics import TYPES
from hidreamer.dynamics.sampler import Sampler
from hidreamer.explorer import batched
from hidreamer.optim import Optimizer
from hidreamer.spaces import random_rows

VECTOR = {"vector": spaces.Box(-np.inf, np.inf, (5,), np.float32)}
EVERYTHING = VECTOR | {
    "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "wide": spaces.Box(0, 255, (16, 16, 1), np.uint8),
    "grid": spaces.Box(0, 1, (6, 6, 4), np.bool_),
}
ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi": spaces.MultiDiscrete([2, 3]),
    "continuous": spaces.Box(-1, 1, (2,), np.float32),
}


def make(obs=VECTOR, act="discrete", batch=2, length=8, **overrides):
    config = tools.load_config(
        ["debug"], {"replay.batch": batch, "replay.length": length, **overrides}
    )
    space = ACTIONS[act]
    dim = {"discrete": 3, "multi": 5, "continuous": 2}[act]
    agent = models.Agent(obs, space, dim, config)
    agent.make_optimizers()
    rows = random_rows(obs, space, batch, length)
    return agent, {key: torch.from_numpy(x) for key, x in rows.items()}


def changed(before, after):
    return {key for key, x in after.items() if not torch.equal(x, before[key])}


@pytest.mark.parametrize("act", ACTIONS)
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_update_changes_every_parameter_and_nothing_of_the_batch(kind, act):
    agent, batch = make(EVERYTHING, act, **{"dynamics.type": kind, "dynamics.free": 0})
    kept = {key: x.clone() for key, x in batch.items()}
    before = copy.deepcopy(agent.state_dict())
    for _ in range(3):  # layers behind zero-initialised ones move from the second update on
        metrics = agent.update(batch)
    assert metrics.shape == (len(agent.metric_names),) and metrics.isfinite().all()
    still = set(before) - changed(before, agent.state_dict())
    assert not still, still
    assert not changed(kept, batch)


def test_each_optimiser_changes_its_own_part():
    agent, batch = make()
    steps = {name: opt.step for name, opt in agent.optimizers.items()}
    for only in steps:
        for name, opt in agent.optimizers.items():
            opt.step = steps[name] if name == only else lambda loss: {"grad_norm": loss.detach()}
        before = copy.deepcopy(agent.state_dict())
        agent.update(batch)
        agent.update(batch)
        part = {"model": "world_model.", "actor": "behavior.actor.", "critic": "behavior.critic."}[
            only
        ]
        moved = {
            key
            for key in changed(before, agent.state_dict())
            if not key.startswith(("behavior.slow.", "behavior.norm."))
        }
        assert moved and all(key.startswith(part) for key in moved)


def test_adam_moves_the_weights_that_the_gradient_is_of():
    """A convolution over channels-last memory has a channels-last gradient,
    which fused Adam would misread.
    """
    torch.manual_seed(1)
    ours, plain = (torch.nn.Conv2d(3, 8, 4, bias=False) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer = Optimizer({"conv": ours}, lr=0.1, eps=1e-8, clip=1.0)
    reference = torch.optim.Adam(plain.parameters(), lr=0.1, eps=1e-8, fused=False)
    x = torch.randn(2, 9, 9, 3)
    loss = lambda conv: conv(x.permute(0, 3, 1, 2)).square().sum()
    grad = torch.autograd.grad(loss(ours), ours.weight)[0]
    assert grad.stride() != ours.weight.stride(), (
        "this test needs a gradient that lies otherwise than its weight"
    )
    for _ in range(3):
        optimizer.step(loss(ours))
        reference.zero_grad()
        loss(plain).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    assert torch.allclose(ours.weight, plain.weight, atol=1e-6)


def test_optimiser_states_lie_as_their_weights_do():
    """A CPU's checkpoint continues on CUDA, where weights lie channels-last."""
    agent, batch = make({"image": EVERYTHING["image"]})
    agent.update(batch)
    state, found = copy.deepcopy(agent.save_state()), []
    for order in (torch.contiguous_format, torch.channels_last):
        other, _ = make({"image": EVERYTHING["image"]})
        if order == torch.channels_last:
            other = other.to(memory_format=order)
            other.make_optimizers()
        other.load_state(copy.deepcopy(state))
        torch.manual_seed(1)
        other.update(batch)
        found.append(other.state_dict())
        for name, opt in other.optimizers.items():
            for key, p in opt.params.items():
                moments = opt.optim.state[p]
                assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
                assert not torch.equal(moments["exp_avg"], state["optim"][name][key]["exp_avg"])
    assert all(torch.allclose(x, found[1][key], atol=1e-6) for key, x in found[0].items())


def test_networks_of_the_ensemble_are_computed_as_one():
    agent, _ = make(**{"expl.behavior": "plan2explore", "expl.models": 4})
    nets = agent.explorer.ensemble
    for p in nets.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, found = torch.randn(3, 5, nets[0].blocks[0].linear.in_features, requires_grad=True), []
    for out in (batched(nets, x), torch.stack([net(x) for net in nets])):
        grads = torch.autograd.grad(out.square().sum(), [x, *nets.parameters()])
        found.append((out, *grads))
    assert found[0][0].shape[:3] == (4, 3, 5)
    for one, each in zip(*found, strict=True):
        assert torch.allclose(one, each, rtol=1e-4, atol=1e-5 * each.abs().max().item())
    ten, _ = make(**{"expl.behavior": "plan2explore", "expl.models": 10})
    few, many = (
        cost.operators(lambda a=a: batched(a.explorer.ensemble, x.detach())) for a in (agent, ten)
    )
    assert few["kernels"] == many["kernels"] < 40


@pytest.mark.parametrize("memory", ["rssm", "hrssm", "interleaved", "gru"])
@pytest.mark.parametrize("act", sorted(ACTIONS))
@torch.no_grad()
def test_noise_drawn_before_a_dream_is_what_its_steps_would_draw(act, memory):
    """A policy that is given its noise, and the same one as any function of states."""
    hrvq = {"dynamics.type": "hrvq", "dynamics.hrvq.memory": memory}
    over = {"dynamics.type": memory} if "rssm" in memory else hrvq
    agent, batch = make(act=act, **over)
    dynamics, actor = agent.world_model.dynamics, agent.behavior.actor
    carry, post, _ = agent.world_model.observe(networks.preprocess(batch))
    start = dynamics.starts(carry, post, 0)
    for sample in (True, False):
        found = []
        for way in (lambda policy: policy, lambda policy: policy.__call__):
            generator = torch.Generator().manual_seed(5)
            policy = Sampler(actor, generator, *actor.noise())
            last, feat, action = dynamics.imagine(start, way(policy), 4, sample, generator)
            found.append((*dynamics.feat(last), *feat, action, generator.get_state()))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        assert feat.deter.std(1).mean() > 0 and feat.cat().shape[1] == 5


@pytest.mark.parametrize("scrambled", [False, True])
def test_the_model_learns_to_show_an_image(scrambled):
    """A checkerboard is learned by heart; not by the negative control,
    whose convolutions get gradients out of order.
    """
    agent, batch = make(
        {"image": EVERYTHING["image"]}, **{"model.lr": 3e-3, "encoder.depth": 8, "decoder.depth": 8}
    )
    odd = (torch.arange(16) // 4 + torch.arange(16).unsqueeze(1) // 4).unsqueeze(
        -1
    ) % 2  # (16, 16, 1)
    batch["image"][:] = torch.where(
        odd.bool(), torch.tensor([20, 200, 90]), torch.tensor([230, 30, 60])
    ).byte()
    for p in agent.world_model.parameters():
        if scrambled and p.ndim == 4:
            order = torch.randperm(p.numel())
            p.register_hook(lambda g, order=order: g.flatten()[order].view_as(g))
    errors = []
    for _ in range(100):
        losses = agent.world_model.loss(networks.preprocess(batch))[0]
        errors.append(losses["image"].mean().item())
        agent.optimizers["model"].step(sum(losses.values()).mean())
    left = errors[-1] / errors[0]
    assert left > 0.3 if scrambled else left < 0.03


KERNELS = {"rssm": 3380, "hrssm": 4570, "hrvq": 2315}  # of an update, nothing compiled
ACTING = {"rssm": 73, "hrssm": 98, "hrvq": 160}  # of a policy step in one environment
THROUGH = {"rssm": 4370, "hrssm": 5635, "hrvq": 3875}  # with a gradient through imagination


@pytest.mark.parametrize("act", ["discrete", "continuous"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_no_host_read_and_few_kernels(kind, act):
    """Upstream: 1,041 host reads and 13,981 kernels an update, whatever the widths.

    The bounds are what was counted, and a few more: nothing may creep back.
    """
    over = {"imag.horizon": 15, "dynamics.type": kind}
    agent, batch = make({"image": EVERYTHING["image"]}, act, length=64, **over)
    agent.update(batch)
    counts = cost.operators(lambda: agent.update(batch))
    assert counts["host_reads"] == 0
    bound = KERNELS[kind] if act == "discrete" else THROUGH[kind]
    assert 0.9 * bound < counts["kernels"] <= bound
    state, obs = agent.initial(1), {key: batch[key][:1, 0] for key in ("image", "is_first")}
    acting = cost.operators(lambda: agent.act(state, obs))
    assert acting["host_reads"] == 0
    assert act == "continuous" or acting["kernels"] <= ACTING[kind]


def test_acting_is_the_step_that_observing_takes():
    """It leaves out what only learning reads."""
    for kind in sorted(TYPES):
        agent, batch = make(EVERYTHING, **{"dynamics.type": kind})
        obs, found = {key: batch[key][:, 0] for key in (*EVERYTHING, "is_first")}, []
        for way in (agent.act, agent.follow):
            torch.manual_seed(0)
            found.append(way(agent.initial(2), obs)[0])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_the_counter_sees_host_reads():
    assert cost.operators(lambda: torch.ones(3).sum().item())["host_reads"] == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_inside_fused_attention_count(device):
    """Two forward; backward four, and the scores once more, of which nothing is kept."""
    q, k, v = (torch.randn(2, 4, 8, 16, device=device, requires_grad=True) for _ in range(3))
    seen, product = (
        torch.ones(2, 1, 8, 8, dtype=torch.bool, device=device),
        2 * (2 * 4 * 8 * 8 * 16),
    )
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    assert cost.flops(attend) == 2 * product
    assert cost.flops(lambda: attend().sum().backward()) == 7 * product


def imagine(agent, batch):
    obs = networks.preprocess(batch)
    _, carry, post, _, _ = agent.world_model.loss(obs)
    start = agent.world_model.dynamics.starts(carry, post, 0)
    return agent.behavior.imagine(agent.world_model, start, obs["is_terminal"].flatten())


def actor_gradient(agent, traj, rew):
    loss, _, _ = agent.behavior.losses(traj, rew)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(agent.behavior.actor.parameters()))]
    )


@pytest.mark.parametrize("act", ["discrete", "continuous"])
def test_return_normalisation_is_used(act):
    """Upstream computes the normalised advantage and lets REINFORCE use the raw one."""
    agent, batch = make(act=act, **{"actor.entropy": 0, "actor.gradient": "reinforce"})
    traj = imagine(agent, batch)
    agent.behavior.norm.rate = 1.0
    rew = 10 * torch.randn(traj.disc.shape)
    one, hundred = actor_gradient(agent, traj, rew), actor_gradient(agent, traj, 100 * rew)
    assert one.norm() > 0
    assert torch.allclose(one, hundred, rtol=0.05, atol=0.05 * one.abs().max().item())


def test_small_returns_are_not_magnified():
    agent, batch = make(**{"actor.entropy": 0})
    traj = imagine(agent, batch)
    rew = torch.randn(traj.disc.shape)
    small, smaller = (actor_gradient(agent, traj, scale * rew) for scale in (1e-3, 1e-4))
    assert torch.allclose(small, 10 * smaller, rtol=1e-3, atol=1e-8)


def test_reinforce_records_no_graph_in_the_dream():
    agent, batch = make()
    traj = imagine(agent, batch)
    assert not any(x.requires_grad for x in (traj.x, traj.action, traj.disc))
    agent, batch = make(act="continuous", **{"actor.gradient": "dynamics"})
    assert imagine(agent, batch).x.requires_grad


@pytest.mark.parametrize("act", ["discrete", "continuous"])
def test_backpropagation_through_the_dynamics(act):
    """The policy finds the action that the model rewards; the model itself is not moved by it."""
    agent, batch = make(act=act, **{"actor.gradient": "dynamics"})
    before = copy.deepcopy(agent.state_dict())
    obs = networks.preprocess(batch)
    _, carry, post, _, _ = agent.world_model.loss(obs)
    start = agent.world_model.dynamics.starts(carry, post, 0)
    paid = lambda traj, rew: rew + traj.action.sum(-1)
    agent.update_behavior("", start, obs["is_terminal"].flatten(), paid)
    moved = changed(before, agent.state_dict())
    assert any(key.startswith("behavior.actor") for key in moved)
    assert not any(key.startswith("world_model") for key in moved)


def test_nothing_counts_after_a_terminal_start():
    """Upstream weighs a terminal start like any other and learns
    from continuations that cannot happen.
    """
    agent, batch = make(**{"actor.entropy": 1.0})
    traj = imagine(agent, batch | {"is_terminal": torch.ones_like(batch["is_terminal"])})
    actor_loss, critic_loss, _ = agent.behavior.losses(traj, torch.randn(traj.disc.shape))
    assert actor_loss == 0.0 and critic_loss == 0.0


def test_truncation_is_not_termination():
    """Only is_terminal teaches the continue head that an episode ends."""
    agent, batch = make()
    targets = []
    agent.world_model.cont.forward = lambda x: type(
        "Cont", (), {"log_prob": lambda self, y: targets.append(y) or y}
    )()
    batch["is_terminal"][0, 3] = True
    agent.world_model.loss(networks.preprocess(batch))
    assert torch.equal(targets[0], 1.0 - batch["is_terminal"].float())
    assert "is_last" not in batch


def test_slow_critic_regularises_with_a_gradient():
    """In the lineage this term had none: both sides were detached."""
    agent, batch = make()
    traj = imagine(agent, batch)
    rew = torch.zeros(traj.disc.shape)
    grads = []
    for value in (0.0, 50.0):
        torch.nn.init.zeros_(agent.behavior.slow.out.weight)
        agent.behavior.slow.out.bias.data.zero_()[127 + int(value)] = 20.0
        _, loss, _ = agent.behavior.losses(traj, rew)
        grads.append(torch.autograd.grad(loss, agent.behavior.critic.out.bias)[0])
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_slow_critic_follows():
    agent, batch = make(**{"critic.slow_rate": 0.25})
    slow = agent.behavior.slow.out.bias.clone()
    agent.update(batch)
    fast = agent.behavior.critic.out.bias
    assert torch.allclose(agent.behavior.slow.out.bias, torch.lerp(slow, fast, 0.25))


def test_saved_state_goes_on_exactly():
    agent, batch = make(EVERYTHING, **{"expl.behavior": "plan2explore"})
    agent.update(batch)
    other, _ = make(EVERYTHING, **{"expl.behavior": "plan2explore"})
    other.load_state(copy.deepcopy(agent.save_state()))
    torch.manual_seed(1)
    a = agent.update(batch)
    torch.manual_seed(1)
    assert torch.equal(a, other.update(batch))
    assert not changed(agent.state_dict(), other.state_dict())


def test_other_sizes_are_refused_with_both_shapes():
    agent, _ = make()
    other, _ = make(**{"actor.net.units": 17})
    with pytest.raises(ValueError, match=r"behavior\.actor.*\(17, 32\).*\(16, 32\)"):
        other.load_state(agent.save_state())


@pytest.mark.parametrize(
    ("target", "action_cond"),
    [("embed", "true"), ("stoch", "false"), ("deter", "true"), ("feat", "false")],
)
def test_plan2explore(target, action_cond):
    overrides = {
        "expl.target": target,
        "expl.action_cond": action_cond,
        "expl.models": 3,
        "expl.units": 32,
        "model.lr": 1e-3,
    }
    agent, batch = make(**overrides, **{"expl.behavior": "plan2explore"})
    losses = [
        dict(zip(agent.metric_names, agent.update(batch).tolist(), strict=False)) for _ in range(40)
    ]
    assert losses[-1]["expl_model_loss"] < losses[1]["expl_model_loss"]
    assert {"expl_actor_loss", "expl_critic_grad_norm", "actor_loss"} < losses[-1].keys()
    obs = {key: batch[key][:, 0] for key in ("vector", "is_first")}
    assert agent.act(agent.initial(2), obs, "explore").action.shape == (2, 3)


def test_disagreement_is_paid_where_the_ensemble_disagrees():
    agent, batch = make(**{"expl.behavior": "plan2explore", "expl.log": "false"})
    traj = imagine(agent, batch)
    spread = agent.explorer.reward(traj, torch.zeros(traj.disc.shape))
    assert (spread > 0).all()
    for net in agent.explorer.ensemble[1:]:
        net.load_state_dict(agent.explorer.ensemble[0].state_dict())
    agreed = agent.explorer.reward(traj, torch.full(traj.disc.shape, 3.0))
    assert agreed.abs().max() < 1e-6  # extr_scale is 0


@pytest.mark.parametrize("act", ACTIONS)
def test_acting(act):
    agent, batch = make(act=act)
    obs = {key: batch[key][:, 0] for key in ("vector", "is_first")}
    state = agent.initial(2)
    kept = copy.deepcopy(state)
    greedy = [torch.manual_seed(3) and agent.act(state, obs, "greedy").action for _ in range(2)]
    assert torch.equal(*greedy)
    assert all(
        torch.equal(x, y)
        for x, y in zip((*state.carry, state.action), (*kept.carry, kept.action), strict=True)
    )
    samples = torch.stack([agent.act(state, obs).action for _ in range(20)])
    assert samples.std(0).max() > 0
    assert (samples.abs() <= 1).all()
    if act == "multi":
        assert (samples[..., :2].sum(-1) == 1).all() and (samples[..., 2:].sum(-1) == 1).all()


def test_acting_under_bfloat16_and_update_stay_finite():
    agent, batch = make(EVERYTHING, precision="bfloat16")
    for _ in range(2):
        assert agent.update(batch).isfinite().all()
    assert all(x.dtype == torch.float32 for x in agent.state_dict().values())


def test_fewer_starts_dream_less():
    agent, batch = make(**{"imag.starts": 2})
    sizes = []
    original = agent.behavior.imagine
    agent.behavior.imagine = lambda *args: sizes.append(original(*args)) or sizes[-1]
    agent.update(batch)
    assert sizes[0].disc.shape == (4, 4)


def test_open_loop_shows_truth_then_dreams():
    agent, batch = make(EVERYTHING)
    truth, model = agent.world_model.open_loop(batch, context=5)
    assert truth.keys() == model.keys() == {"image", "wide", "grid", "vector"}
    assert torch.allclose(truth["image"], batch["image"] / 255.0, atol=1e-6)
    assert all(truth[key].shape == model[key].shape for key in truth)
    assert model["image"].min() >= 0.0 and model["image"].max() <= 1.0
    # The imagined steps do not look at what it is compared with.
    torch.manual_seed(3)
    _, a = agent.world_model.open_loop(batch, context=5)
    later = {key: x.clone() for key, x in batch.items()}
    later["image"][:, 5:] = 0
    torch.manual_seed(3)
    _, b = agent.world_model.open_loop(later, context=5)
    assert torch.equal(a["image"], b["image"])


@pytest.mark.parametrize(
    "preset", ["hdreamer", "hdreamer_asymmetric", "hidreamer", "hidreamer_spatial"]
)
def test_large_presets_act_and_learn_at_their_sizes(preset):
    shape = {"replay.batch": 1, "replay.length": 4, "imag.horizon": 2, "imag.starts": 2}
    config = tools.load_config([preset], shape)
    obs, space = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}, spaces.Discrete(6)
    agent = models.Agent(obs, space, 6, config)
    agent.make_optimizers()
    batch = agent.tensors(random_rows(obs, space, 1, 4))
    metrics = torch.stack([agent.update(batch).clone() for _ in range(3)])
    assert metrics.isfinite().all()
    loss = agent.metric_names.index("image_loss")
    assert metrics[2, loss] < metrics[0, loss]  # of the same four frames
    assert agent.act(
        agent.initial(1), {key: batch[key][:, 0] for key in ("image", "is_first")}
    ).action.shape == (1, 6)
