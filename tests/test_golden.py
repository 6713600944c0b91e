"""The actor-critic and the world model's loss against slow loops in float64,
written from the paper's equations.

All heads get random weights: at their initial zeros most errors of alignment and sign are
invisible.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_agent import VECTOR, make

import networks
from hidreamer.dynamics import TYPES

GAMMA, LAM, ETA = 0.9, 0.8, 0.05  # far from 1 and from 0, so that each of them shows
SETTINGS = {
    "imag.discount": GAMMA,
    "imag.lam": LAM,
    "actor.entropy": ETA,
    "actor.net.unimix": 0.2,
    "imag.horizon": 4,
}
SETTINGS["actor.gradient"] = "reinforce"  # or what a test names
LOW, HIGH = -3.0, 7.0  # percentiles before the update


def build(act="discrete", kind="rssm", **overrides):
    """-> agent in float64 with random weights everywhere, preprocessed observations (B,T,.).

    Some of the steps are terminal.
    """
    agent, rows = make(VECTOR, act, length=6, **{"dynamics.type": kind, **SETTINGS, **overrides})
    for name, p in agent.named_parameters():
        if ".norm" not in name and "quantizer" not in name:
            torch.nn.init.normal_(p, std=0.6)
    agent = agent.double()
    agent.behavior.norm.float()  # percentiles are kept in float32
    agent.behavior.norm.range.copy_(torch.tensor([LOW, HIGH]))
    rows["is_terminal"][0, 2] = rows["is_terminal"][1, 5] = True
    rows["is_first"][1, 3] = True
    rows["reward"] = 3 * torch.randn_like(rows["reward"])
    return agent, {key: x.double() for key, x in networks.preprocess(rows).items()}


def trainable(agent, obs):
    """-> the agent in float32 with its optimisers, a raw batch."""
    agent = agent.float()
    agent.make_optimizers()
    batch = {key: x.float() for key, x in obs.items()}
    return agent, batch | {key: batch[key].bool() for key in ("is_first", "is_terminal")}


def logits(head, x):
    """What a head's perceptron computes, from its weights."""
    for block in head.blocks:
        x = F.silu(
            F.layer_norm(
                x @ block.linear.weight.T,
                block.norm.normalized_shape,
                *block.norm.parameters(),
                1e-3,
            )
        )
    return x @ head.out.weight.T + head.out.bias


def decode(logit):
    """Two-hot logits (..., 255) -> symexp of the expected bin (...)."""
    bins = torch.linspace(-20, 20, 255, dtype=logit.dtype)
    mean = (torch.softmax(logit, -1) * bins).sum(-1)
    return torch.sign(mean) * (torch.exp(torch.abs(mean)) - 1)


def twohot_logp(logit, target):
    """Log-likelihood of one number under logits (255,): its two neighbours share it by distance."""
    place = math.copysign(math.log1p(abs(target)), target)
    below = math.floor((place + 20) / (40 / 254))
    share = (place + 20) / (40 / 254) - below
    logp = torch.log_softmax(logit, -1)
    return (1 - share) * logp[below] + share * logp[below + 1]


def policy_terms(act, out, action):
    """Of one state: actor's output (.), action (A,) -> log-probability, entropy."""
    if act == "continuous":
        mean, std = torch.tanh(out[:2]), 0.9 * torch.sigmoid(out[2:] + 2) + 0.1
        logp = entropy = 0.0
        for m, s, a in zip(mean, std, action.tolist(), strict=True):
            normal = torch.distributions.Normal(m, s)
            inside = -((a - m) ** 2) / (2 * s**2) - torch.log(s * math.sqrt(2 * math.pi))
            logp = logp + (torch.log(1 - normal.cdf(torch.tensor(1.0).double())) if a >= 1 else 0.0)
            logp = logp + (torch.log(normal.cdf(torch.tensor(-1.0).double())) if a <= -1 else 0.0)
            logp = logp + (inside if -1 < a < 1 else 0.0)
            entropy = entropy + torch.log(s * math.sqrt(2 * math.pi * math.e))
        return logp, entropy
    logp = entropy = 0.0
    sizes = {"discrete": [3], "multi": [2, 3]}[act]
    for part, chosen in zip(out.split(sizes), action.split(sizes), strict=True):
        probs = 0.8 * torch.softmax(part, -1) + 0.2 / len(part)
        logp = logp + torch.log(probs[chosen.argmax()])
        entropy = entropy - sum(p * torch.log(p) for p in probs)
    return logp, entropy


def slow_losses(behavior, act, x, action, rew, cont, through):
    """Actor and critic loss by a double loop. x (N,H+1,F), action (N,H+1,A), rew and cont (N,H+1).

    ``through``: the gradient runs through the trajectory; else x, rew and cont are constants
    (REINFORCE).
    """
    count, horizon = x.shape[0], x.shape[1] - 1
    value = decode(logits(behavior.critic, x))
    if not through:
        value = value.detach()
    returns = torch.zeros(count, horizon + 1, dtype=x.dtype)
    rows = [[None] * (horizon + 1) for _ in range(count)]
    for n in range(count):
        rows[n][horizon] = value[n, horizon]
        for t in reversed(range(horizon)):
            ahead = (1 - LAM) * value[n, t + 1] + LAM * rows[n][t + 1]
            rows[n][t] = rew[n, t + 1] + GAMMA * cont[n, t + 1] * ahead
            returns[n, t] = rows[n][t].detach()
    low, high = np.quantile(returns[:, :horizon].numpy(), [0.05, 0.95])
    scale = max(1.0, (0.99 * HIGH + 0.01 * high) - (0.99 * LOW + 0.01 * low))
    actor = critic = 0.0
    fixed = x.detach()
    for n in range(count):
        weight = cont[n, 0].item()
        for t in range(horizon):
            if t:
                weight = weight * GAMMA * cont[n, t].item()
            logp, entropy = policy_terms(
                act, logits(behavior.actor, fixed[n, t]), action[n, t].detach()
            )
            advantage = (rows[n][t] - value[n, t]) / scale
            gain = advantage if through else logp * advantage.detach()
            actor = actor - weight * (gain + ETA * entropy)
            out = logits(behavior.critic, fixed[n, t])
            slow = decode(logits(behavior.slow, fixed[n, t])).item()
            critic = critic - weight * (
                twohot_logp(out, returns[n, t].item()) + twohot_logp(out, slow)
            )
    return actor / (count * horizon), critic / (count * horizon), returns[:, :horizon], scale


def imagined(agent, obs, seed=3):
    """-> start, terminal (N,), Trajectory."""
    _, carry, post, _, _ = agent.world_model.loss(obs)
    start = agent.world_model.dynamics.starts(carry, post, 0)
    terminal = obs["is_terminal"].flatten()
    torch.manual_seed(seed)
    return start, terminal, agent.behavior.imagine(agent.world_model, start, terminal)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def same(xs, ys, atol=1e-6):
    for x, y in zip(xs, ys, strict=True):
        assert y.abs().max() > 1e-6, "a gradient of zero would agree with anything"
        assert torch.allclose(x, y, rtol=1e-5, atol=atol), (x - y).abs().max()


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("act", ["discrete", "continuous"])
def test_the_trajectory(act, kind):
    """What is imagined: where it starts, who acts, where that leads,
    and how likely it is to continue.
    """
    agent, obs = build(act, kind)
    start, terminal, traj = imagined(agent, obs)
    assert terminal.sum() == 2
    here = agent.world_model.dynamics.feat(start)
    assert torch.equal(traj.x[:, 0], torch.cat([here.stoch, here.deter], -1))
    cont = torch.sigmoid(logits(agent.world_model.cont, traj.x).squeeze(-1))
    for n in range(len(terminal)):
        assert traj.disc[n, 0].item() == pytest.approx(GAMMA * (1 - terminal[n].item()))
        for t in range(1, 5):
            assert traj.disc[n, t].item() == pytest.approx(GAMMA * cont[n, t].item(), rel=1e-9)
    # The memory after one step is that of the start and the action that was taken there.
    *_, feat, _ = agent.world_model.dynamics.imagine(start, traj.action[:, :1], 1, sample=False)
    assert torch.allclose(
        feat.deter[:, 1], traj.x[:, 1, -feat.deter.shape[-1] :], rtol=0, atol=1e-10
    )


def test_imagined_actions_are_the_policys_in_their_own_state():
    agent, obs = build(**{"actor.net.unimix": 0})
    agent.behavior.actor.out.weight.data.mul_(1e4)  # saturated: a draw is the mode
    _, _, traj = imagined(agent, obs)
    assert torch.equal(
        traj.action, F.one_hot(logits(agent.behavior.actor, traj.x).argmax(-1), 3).double()
    )
    assert 0 < traj.action[..., 0].mean() < 1


@pytest.mark.parametrize("act", ["discrete", "multi", "continuous"])
def test_reinforce(act):
    agent, obs = build(act, **{"actor.gradient": "reinforce"})
    behavior = agent.behavior
    _, terminal, traj = imagined(agent, obs)
    rew = 2 * torch.randn(traj.disc.shape, dtype=torch.float64)
    cont = torch.sigmoid(logits(agent.world_model.cont, traj.x).squeeze(-1)).detach()
    cont[:, 0] = 1 - terminal
    actor, critic, returns, scale = slow_losses(
        behavior, act, traj.x, traj.action, rew, cont, through=False
    )
    assert scale > 1.5 and (traj.action.abs().max() == 1 or act != "continuous")
    got_actor, got_critic, metrics = behavior.losses(traj, rew)
    assert got_actor.item() == pytest.approx(actor.item(), abs=1e-6)
    assert got_critic.item() == pytest.approx(critic.item(), abs=1e-6)
    assert metrics["return_scale"].item() == pytest.approx(scale, rel=1e-6)
    assert metrics["imag_return"].item() == pytest.approx(returns.mean().item(), abs=1e-6)
    same(gradients(got_actor, behavior.actor), gradients(actor, behavior.actor))
    same(gradients(got_critic, behavior.critic), gradients(critic, behavior.critic))
    # Neither trains the other, nor the slow critic.
    for loss, other in ((got_actor, behavior.critic), (got_critic, behavior.actor)):
        found = torch.autograd.grad(
            loss, list(other.parameters()), allow_unused=True, retain_graph=True
        )
        assert all(g is None or not g.any() for g in found)
    assert not any(p.requires_grad for p in behavior.slow.parameters())


@pytest.mark.parametrize("act", ["discrete", "continuous"])
def test_backpropagation_through_the_dynamics(act):
    """The trajectory is repeated one step at a time with the same draws;
    its gradients must agree, too.
    """
    agent, obs = build(act, **{"actor.gradient": "dynamics"})
    behavior, model = agent.behavior, agent.world_model
    start, terminal, traj = imagined(agent, obs)
    torch.manual_seed(3)
    feats, actions, carry = [model.dynamics.feat(start)], [], start
    for _ in range(4):
        actions.append(behavior.actor(feats[-1].cat().detach()).sample())
        *_, feat, _ = model.dynamics.imagine(carry, actions[-1].unsqueeze(1), 1)
        carry = type(carry)(*(x[:, 1] for x in feat))
        feats.append(model.dynamics.feat(carry))
    actions.append(behavior.actor(feats[-1].cat().detach()).sample())
    x, action = torch.stack([feat.cat() for feat in feats], 1), torch.stack(actions, 1)
    assert torch.allclose(x, traj.x) and torch.equal(action, traj.action)
    cont = torch.sigmoid(logits(model.cont, x).squeeze(-1))
    cont = torch.cat([1 - terminal.unsqueeze(1), cont[:, 1:]], 1)
    actor, critic, _, _ = slow_losses(
        behavior, act, x, action, decode(logits(model.reward, x)), cont, through=True
    )
    got_actor, got_critic, _ = behavior.losses(traj, model.reward(traj.x).mode())
    assert got_actor.item() == pytest.approx(actor.item(), abs=1e-6)
    assert got_critic.item() == pytest.approx(critic.item(), abs=1e-6)
    same(gradients(got_actor, behavior.actor), gradients(actor, behavior.actor))
    same(gradients(got_critic, behavior.critic), gradients(critic, behavior.critic))


@pytest.mark.parametrize("starts", [0, 2])
def test_inputs_of_the_actor_critic_in_an_update(starts, monkeypatch):
    """Rewards of the states arrived in, terminal flags of the very steps that dreams start from."""
    agent, obs = build(**{"imag.starts": starts})
    agent, batch = trainable(agent, obs)
    agent.optimizers["model"].optim.param_groups[0]["lr"] = (
        0.0  # so that the heads can be evaluated afterwards
    )
    found = {}
    behavior, step = agent.behavior, agent.world_model.loss
    imagine, losses = behavior.imagine, behavior.losses
    monkeypatch.setattr(
        agent.world_model, "loss", lambda obs, _: found.setdefault("loss", step(obs))
    )
    monkeypatch.setattr(
        behavior,
        "imagine",
        lambda *args: found.update(args=args) or found.setdefault("traj", imagine(*args)),
    )
    monkeypatch.setattr(
        behavior,
        "losses",
        lambda traj, rew, _: found.update(used=traj, rew=rew) or losses(traj, rew),
    )
    assert not torch.equal(batch["is_first"], batch["is_terminal"])
    agent.update(batch)
    steps = [0, 1, 2, 3, 4, 5] if starts == 0 else [2, 5]
    _, start, terminal, _ = found["args"]
    assert terminal.tolist() == batch["is_terminal"][:, steps].float().flatten().tolist()
    assert 0 < terminal.sum() < len(terminal)
    post = found["loss"][2]
    assert torch.equal(start.deter, post.feat.deter[:, steps].flatten(0, 1))
    assert found["used"] is found["traj"]
    assert torch.allclose(
        found["rew"], decode(logits(agent.world_model.reward, found["traj"].x)), atol=1e-4
    )


@pytest.mark.parametrize("explorer", [False, True])
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_rewards_have_a_gradient_only_through_the_dynamics(gradient, explorer, monkeypatch):
    behaves = {
        "actor.gradient": gradient,
        "expl.behavior": "plan2explore" if explorer else "greedy",
    }
    agent, obs = build("continuous", **behaves)
    agent, batch = trainable(agent, obs)
    behavior = agent.explorer.behavior if explorer else agent.behavior
    losses, found = behavior.losses, []

    def look(traj, rew, _):
        through = rew.requires_grad and traj.x.requires_grad
        grads = (
            torch.autograd.grad(rew.sum(), [traj.x], allow_unused=True, retain_graph=True)
            if through
            else [None]
        )
        found.append(grads[0] is not None and bool(grads[0].any()))
        return losses(traj, rew)

    monkeypatch.setattr(behavior, "losses", look)
    agent.update(batch)
    assert found == [gradient == "dynamics"]


def test_one_update_moves_the_slow_critic_after_the_critic():
    """slow = 0.98 slow + 0.02 critic, with the critic that this update made."""
    agent, obs = build()
    agent, batch = trainable(agent, obs)
    before = copy.deepcopy(agent.behavior.slow.state_dict())
    agent.update(batch)
    for name, x in agent.behavior.slow.state_dict().items():
        now = agent.behavior.critic.state_dict()[name]
        assert torch.allclose(x, 0.98 * before[name] + 0.02 * now, atol=1e-7)


def slow_kl(p, q):
    """KL in nats between two (S,K) tables of probabilities."""
    return sum(
        p[s, k] * (torch.log(p[s, k]) - torch.log(q[s, k]))
        for s in range(len(p))
        for k in range(p.shape[1])
    )


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_world_models_losses(kind):
    """Each loss of a step, worked out from the features and logits:
    KL with unimix and free nats, and the heads'.
    """
    unimix, total = (
        0.3,
        {"rssm": 1.95, "hrssm": 1.3, "hrvq": 1.0}[kind],
    )  # between the values that occur
    agent, obs = build(kind=kind, **{"dynamics.unimix": unimix, "dynamics.free": total})
    model, seen = agent.world_model, []
    decoded = model.dynamics.decoder_features
    model.dynamics.decoder_features = lambda post, _: seen.append(decoded(post)) or seen[-1]
    if kind == "hrvq":
        model.dynamics.level_weights = [0.5, 0.25]
    losses, _, post, _, metrics = model.loss(obs)
    x = post.feat.cat()
    free = total / len(post.levels) if kind != "hrvq" else 0.0
    mix = lambda logit: (1 - unimix) * torch.softmax(logit, -1) + unimix / logit.shape[-1]
    below = above = 0
    for b in range(2):
        for t in range(6):
            kls = [slow_kl(mix(level.post[b, t]), mix(level.prior[b, t])) for level in post.levels]
            below, above = below + sum(k < free for k in kls), above + sum(k > free for k in kls)
            clipped = [max(k.item(), free) for k in kls]
            weights = [0.5, 0.25] if kind == "hrvq" else [1.0] * len(kls)
            dyn = 0.5 * sum(w * k for w, k in zip(weights, clipped, strict=True))
            assert losses["dyn"][b, t].item() == pytest.approx(dyn, abs=1e-9)
            if kind != "hrvq":
                assert losses["rep"][b, t].item() == pytest.approx(0.1 * sum(clipped), abs=1e-9)
            reward, cont = (
                logits(model.reward, x[b, t]),
                torch.sigmoid(logits(model.cont, x[b, t])).item(),
            )
            alive = 1 - obs["is_terminal"][b, t].item()
            assert losses["reward"][b, t].item() == pytest.approx(
                -twohot_logp(reward, obs["reward"][b, t].item()).item()
            )
            assert losses["cont"][b, t].item() == pytest.approx(
                -math.log(cont if alive else 1 - cont)
            )
            target = torch.sign(obs["vector"][b, t]) * torch.log(obs["vector"][b, t].abs() + 1)
            error = (logits(model.decoder.vector, seen[0].cat()[b, t]) - target).square().sum()
            assert losses["vector"][b, t].item() == pytest.approx(error.item())
    assert above and (below or kind == "hrvq")
    for i, level in enumerate(post.levels):
        kl = (
            sum(
                slow_kl(mix(level.post[b, t]), mix(level.prior[b, t]))
                for b in range(2)
                for t in range(6)
            )
            / 12
        )
        assert metrics[f"kl_{i}"].item() == pytest.approx(kl.item())
    expected = {"dyn", "reward", "cont", "vector"} | ({"rep"} if kind != "hrvq" else set())
    assert losses.keys() == expected


def test_the_update_sums_the_losses_and_averages_over_steps():
    agent, obs = build()
    agent, batch = trainable(agent, obs)
    torch.manual_seed(5)
    losses = agent.world_model.loss(networks.preprocess(batch))[0]
    torch.manual_seed(5)
    values = agent.update(batch).tolist()
    metrics = dict(zip(agent.metric_names, values, strict=True))
    assert metrics["model_loss"] == pytest.approx(
        sum(x.mean().item() for x in losses.values()), rel=1e-5
    )
    for name, x in losses.items():
        assert metrics[f"{name}_loss"] == pytest.approx(x.mean().item(), rel=1e-5)
