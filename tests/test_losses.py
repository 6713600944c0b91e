"""Weights of losses, objectives as a list, and optimisers: one by one or joint."""

import copy

import pytest
import torch
from test_agent import EVERYTHING, changed, imagine, make

import networks
from hidreamer.behavior import Replayed
from hidreamer.dynamics import TYPES
from hidreamer.losses import imag_loss, imag_targets
from hidreamer.optim import make_optimizer
from hidreamer.returns import lambda_return

OWN = {"model": "world_model.", "actor": "behavior.actor.", "critic": "behavior.critic."}


class Fixed:
    """A distribution whose log-likelihood and entropy (H,N) are given."""

    def __init__(self, logp, entropy=None):
        self.logp, self.of_entropy = logp, entropy

    def log_prob(self, *x):
        return self.logp

    def entropy(self):
        return self.of_entropy


@pytest.mark.parametrize("reinforce", [True, False])
def test_imagination_losses_need_no_networks(reinforce):
    """By hand: one trajectory of two steps,
    of which the second is reached with probability one half.
    """
    rew, value = (
        torch.tensor([[9.0, 1.0, 2.0]]),
        torch.tensor([[3.0, 4.0, 5.0]], requires_grad=True),
    )
    disc = torch.tensor([[0.8, 0.4, 0.0]])  # the discount is 0.8
    loss = imag_loss(
        torch.zeros(1, 3, 2),
        disc,
        rew,
        value,
        policy=Fixed(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0.5], [0.25]])),
        value_dist=Fixed(torch.tensor([[-3.0], [-5.0]])),
        slow_value=torch.zeros(2, 1),
        scale=lambda returns: torch.tensor(2.0),
        discount=0.8,
        lam=1.0,
        entropy=0.1,
        reinforce=reinforce,
    )
    returns = torch.tensor([[1.0 + 0.4 * 2.0, 2.0]])
    adv = (returns - torch.tensor([[3.0, 4.0]])) / 2.0
    gain = torch.tensor([[-1.0, -2.0]]) * adv if reinforce else adv
    weight = torch.tensor([[1.0, 0.4]])
    assert torch.allclose(loss.returns, returns)
    per_state = -weight * (gain + torch.tensor([[0.05, 0.025]]))
    assert torch.allclose(loss.actor, per_state.mean())
    assert torch.allclose(loss.critic, torch.tensor(2.5))
    assert loss.actor.requires_grad is not reinforce
    assert not any(x.requires_grad for x in loss.metrics.values())


def test_a_single_advantage_deviates_by_nothing():
    """Of the least batch that the config allows; a metric that is no number ends a run."""
    one = torch.ones(1, 2)
    scale = lambda returns: torch.tensor(1.0)
    metrics = imag_targets(0.9 * one, one, 0.0 * one, scale, discount=0.9, lam=0.95).metrics
    assert metrics["adv_std"] == 0.0 and all(x.isfinite() for x in metrics.values())
    one = torch.ones(2, 2)
    rew = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    metrics = imag_targets(0.0 * one, rew, 0.0 * one, scale, discount=0.9, lam=0.95).metrics
    assert torch.isclose(metrics["adv_std"], torch.tensor(2.0).sqrt())  # of two, unbiased


@pytest.mark.parametrize("name", ["decoder", "reward", "cont"])
def test_weights_scale_the_models_losses(name):
    agent, batch = make(EVERYTHING)
    other, _ = make(EVERYTHING, **{f"model.losses.{name}": 3.0})
    other.load_state(agent.save_state())
    found = []
    for each in (agent, other):
        torch.manual_seed(1)
        found.append(each.world_model.loss(networks.preprocess(batch))[0])
    keys = {"decoder": EVERYTHING.keys(), "reward": {"reward"}, "cont": {"cont"}}[name]
    assert all(x.abs().max() > 0 for x in found[0].values())
    for key, loss in found[0].items():
        assert torch.allclose(found[1][key], (3.0 if key in keys else 1.0) * loss)


def test_weights_scale_the_behaviors_losses():
    settings = {"actor.entropy": 0.1, "critic.replay_loss": 0.3}
    agent, batch = make(**settings)
    traj = imagine(agent, batch)
    rew = torch.randn(traj.disc.shape)
    steps = batch["reward"], batch["is_first"].bool(), batch["is_terminal"].float()
    x = torch.randn(*steps[0].shape, traj.x.shape[-1])
    replayed = Replayed(x, *steps, slice(0, None))
    before = agent.behavior.norm.range.clone()
    found = []
    for actor, critic in ((1.0, 1.0), (3.0, 5.0)):
        agent.behavior.norm.range.copy_(before)
        weights = {"loss_scales.actor": actor, "loss_scales.critic": critic}
        other, _ = make(**settings, **weights)
        other.load_state(agent.save_state())
        found.append(other.behavior.losses(traj, rew, replayed))
    (actor, critic, plain), (scaled_actor, scaled_critic, weighted) = found
    assert actor != 0 and critic != 0
    assert torch.allclose(scaled_actor, 3.0 * actor) and torch.allclose(scaled_critic, 5.0 * critic)
    parts = [{key: x for key, x in m.items() if "critic" in key} for m in (plain, weighted)]
    assert parts[0].keys() == {"critic_loss", "replay_critic_loss"}
    for metrics, whole in zip(parts, (critic, scaled_critic), strict=True):
        assert torch.allclose(sum(metrics.values()), whole)


class Guess(torch.nn.Module):
    """Another objective, with a layer of its own: tell the embedding from the state."""

    def __init__(self, inp, out):
        super().__init__()
        self.layer = torch.nn.Linear(inp, out)

    def loss(self, post, embed, obs, generator):
        error = self.layer(post.feat.cat()) - embed.detach()
        metrics = {"guess_size": error.detach().abs().max()}
        return {"guess": error.square().mean(-1)}, metrics


def test_an_objective_more_is_a_module_and_an_entry():
    agent, batch = make()
    wm = agent.world_model
    wm.guess = Guess(wm.feat_dim, wm.encoder.dim)
    wm.objectives["guess"], wm.scales["guess"] = wm.guess, 0.5
    agent.make_optimizers()
    before = copy.deepcopy(agent.state_dict())
    metrics = dict(zip(agent.metric_names, agent.update(batch), strict=False))
    metrics = dict(zip(agent.metric_names, agent.update(batch).tolist(), strict=True)) | metrics
    assert metrics["guess_loss"] > 0 and metrics["guess_size"] > 0
    assert metrics["model_grad_norm_guess"] > 0
    assert "world_model.guess.layer.weight" in changed(before, agent.state_dict())


def test_objectives_add_no_names_and_survive_a_copy():
    agent, _ = make()
    assert not [name for name in agent.state_dict() if "objective" in name]
    copied = copy.deepcopy(agent.world_model)
    assert copied.objectives["decoder"].decoder is copied.decoder
    assert copied.objectives["decoder"].dynamics is copied.dynamics
    assert (
        copied.objectives["reward"].head is copied.reward
        and copied.objectives["cont"].head is copied.cont
    )


def test_an_optimiser_that_there_is_not():
    with pytest.raises(ValueError, match=r"'adamant'.*adam"):
        make_optimizer("adamant", {"a": torch.nn.Linear(1, 1)}, lr=1.0, eps=1.0, clip=0.0)


def test_gathered_losses_are_one_step_along_their_sum():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    settings = {"lr": 0.1, "eps": 1e-8, "clip": 0.5}
    others = copy.deepcopy((a, b))
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    losses = lambda a, b: ((a(x) - b(x)).square().sum(), a(y).square().sum())
    together = make_optimizer("adam", dict(zip("ab", others, strict=True)), **settings)
    expected = together.step(sum(losses(*others)))
    apart = make_optimizer("adam", {"a": a, "b": b}, **settings)
    first, second = losses(a, b)
    apart.gather(first)
    apart.gather(second, ["a"])
    metrics = apart.apply()
    assert (
        metrics.keys() == {"grad_norm", "grad_norm_a", "grad_norm_b", "clipped"}
        and metrics["clipped"] == 1
    )
    for name, value in expected.items():
        assert torch.allclose(metrics[name], value)
    for p, q in zip(
        (*a.parameters(), *b.parameters()), [q for m in others for q in m.parameters()], strict=True
    ):
        assert torch.allclose(p, q, atol=1e-6) and p.grad is None


@pytest.mark.parametrize("act", ["discrete", "continuous"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_a_joint_step_moves_everything_along_its_own_loss(kind, act):
    """With enough room to clip nothing, Adam's first averages are those
    of the optimisers one by one.
    """
    free = {"model.clip": 0, "actor.clip": 0, "critic.clip": 0, "actor.entropy": 0.1}
    free |= {"model.lr": 0, "dynamics.type": kind}  # the model that is traj with is the same
    one, batch = make(EVERYTHING, act, **free)
    joint, _ = make(EVERYTHING, act, optim="joint", **free)
    assert joint.optimizers.keys() == {"joint"}
    joint.load_state({"params": one.state_dict(), "optim": {}})
    for agent in (one, joint):
        torch.manual_seed(1)
        agent.update(batch)
    average = {}
    for name in OWN:
        average |= one.optimizers[name].state_dict()
    found = joint.optimizers["joint"].state_dict()
    assert found.keys() == average.keys()
    for name, state in average.items():
        assert torch.allclose(found[name]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-7), name


def test_a_joint_agent_learns_clips_once_and_resumes_exactly():
    settings = {
        "optim": "joint",
        "model.lr": 3e-3,
        "model.clip": 50.0,
        "expl.behavior": "plan2explore",
    }
    agent, batch = make(**settings)
    before = copy.deepcopy(agent.state_dict())
    metrics = [
        dict(zip(agent.metric_names, agent.update(batch).tolist(), strict=False)) for _ in range(30)
    ]
    assert metrics[-1]["model_loss"] < 0.8 * metrics[1]["model_loss"]
    assert metrics[-1]["expl_model_loss"] < metrics[1]["expl_model_loss"]
    assert {"joint_clipped", "joint_grad_norm_encoder", "joint_grad_norm_expl_critic"} < metrics[
        -1
    ].keys()
    assert not {name for name in metrics[-1] if name.endswith("clipped")} - {"joint_clipped"}
    moved = changed(before, agent.state_dict())
    assert {name.split(".")[0] for name in moved} == {"world_model", "behavior", "explorer"}
    other, _ = make(**settings)
    report = other.load_state(copy.deepcopy(agent.save_state()))
    assert "fresh" not in report.values()
    torch.manual_seed(1)
    expected = agent.update(batch)
    torch.manual_seed(1)
    assert torch.equal(expected, other.update(batch))
    assert not changed(agent.state_dict(), other.state_dict())


def test_the_slow_critic_follows_after_a_joint_step():
    agent, batch = make(optim="joint", **{"critic.slow_rate": 0.25})
    slow = agent.behavior.slow.out.bias.clone()
    agent.update(batch)
    fast = agent.behavior.critic.out.bias
    assert not torch.equal(fast, slow)
    assert torch.allclose(agent.behavior.slow.out.bias, torch.lerp(slow, fast, 0.25))


def test_the_critic_s_loss_on_replay_has_its_targets_and_its_weight():
    """The lambda-return at the first state of each dream, which is the replayed step."""
    agent, batch = make(**{"critic.replay_loss": 0.3})
    behavior, traj, given = agent.behavior, imagine(agent, batch), []
    rew = torch.randn(traj.disc.shape)
    value = behavior.critic(traj.x).mode()
    returns = lambda_return(rew, value, traj.disc, agent.config.imag.lam)
    behavior.replay_loss = lambda replayed, imagined: given.append(imagined) or torch.tensor(2.0)
    _, critic, metrics = behavior.losses(traj, rew, object())
    assert torch.allclose(given[0], returns[:, 0])
    assert metrics["replay_critic_loss"].item() == pytest.approx(0.6)
    assert critic.item() == pytest.approx(metrics["critic_loss"].item() + 0.6)
