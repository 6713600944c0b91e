"""Objectives of the world model: worked out by hand, learning, and blind across episodes' ends."""

import copy
import math
import re

import pytest
import torch
from small_runs import one_line, run
from test_agent import EVERYTHING, VECTOR, changed, make
from torch.nn import functional as F

import hidreamer
import networks
import run_config
import tools
from conftest import ROOT
from hidreamer import losses, objectives, views
from hidreamer.behavior import Replayed
from hidreamer.dynamics import TYPES
from hidreamer.objectives import Harmony
from run_setup import notes

NEW = ("ac_cpc", "barlow", "next_embed", "harmony")
FREE = {"model.losses.decoder": 0}
SMALL = {"model.ac_cpc.units": 16, "model.ac_cpc.steps": 3, "model.next_embed.units": 16}


def on(*names, **more):
    weights = {f"model.losses.{name}": 1.0 for name in names}
    return SMALL | weights | {f"model.{key}": x for key, x in more.items()}


def test_contrastive_loss_by_hand():
    """Two sequences of two steps; in the second one, step 1 begins an episode."""
    first = torch.tensor([[False, False], [False, True]])
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    queries = [torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])]
    queries.append(torch.tensor([[[0.0, 4.0]], [[7.0, 7.0]]]))
    loss, right = losses.contrastive_loss(queries, keys, first, 0.5)
    r = math.sqrt(0.5)
    nats = lambda scores, i: math.log(sum(math.exp(r * s) for s in scores)) - r * scores[i]
    now = [nats([2, 0, -2, 0], 0), nats([0, 0, 0, 0], 1), nats([0, 2, 0, -2], 2)]
    ahead = nats([0, 4, 0, -4], 1)
    assert loss.item() == pytest.approx((sum(now) / 3 + 0.5 * ahead) / 1.5)
    assert right.tolist() == pytest.approx([1 / 3, 1.0])


def test_one_episode_by_hand():
    first = torch.tensor([[True, False, False, True, False]])
    assert losses.one_episode(first, 0).tolist() == [[False, True, True, False, True]]
    assert losses.one_episode(first, 1).tolist() == [[False, True, False, False]]
    assert losses.one_episode(first, 2).tolist() == [[False, False, False]]


def test_redundancy_loss_by_hand():
    """Columns of -1 and 1: x's first is y's first, its second is against y's second in one of four
    rows; a row that does not count changes nothing.
    """
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [50.0, math.inf]])
    y = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0], [9.0, 9.0]])
    valid = torch.tensor([True, True, True, True, False])
    scaled = x * torch.tensor([3.0, 0.5]) + 7.0
    # y's second column: mean 1/2, deviation sqrt(3)/2
    z = [(v - 0.5) / math.sqrt(0.75) for v in (1, -1, 1, 1)]
    other = (z[0] + z[1] - z[2] - z[3]) / 4
    own = (z[0] - z[1] + z[2] - z[3]) / 4
    expected = (own - 1) ** 2 + 0.1 * other**2
    assert losses.redundancy_loss(scaled, y, valid, 0.1).item() == pytest.approx(expected, abs=1e-5)


def test_harmony_by_hand():
    harmony = Harmony(0.5)
    harmony.log_sigma.data = torch.tensor([0.0, math.log(2.0), math.log(4.0)])
    given = {"dyn": torch.tensor([[8.0]]), "rep": torch.tensor([[4.0]])}
    given |= {"image": torch.tensor([[3.0]]), "cont": torch.tensor([[5.0]])}
    groups = {"dyn": "dynamics", "rep": "dynamics", "image": "observation", "cont": "cont"}
    found, metrics = harmony.balance(given, groups)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(
        # no loss of the reward, so its sigma has no part
        {"dyn": 2, "rep": 1, "image": 3, "cont": 5, "harmony": 0.5 * (math.log(2) + math.log(5))}
    )
    assert metrics["harmony_dynamics"].item() == pytest.approx(0.25)
    # The best sigma is where L / sigma^2 = weight / (1 + sigma).
    (grad,) = torch.autograd.grad(sum(x.sum() for x in found.values()), harmony.log_sigma)
    assert grad.tolist() == pytest.approx([-3 + 0.25, 0.0, -3 + 0.5 * 4 / 5])


def test_a_reward_head_without_a_weight_says_0():
    """Also in a run that begins from the weights of one that had learned it."""
    source, batch = make(**{"reward.layers": 1})
    model, found = source.world_model, networks.preprocess(batch)
    for _ in range(3):
        source.update(batch)
    feat = model.observe(found)[1].feat.cat()
    assert model.reward(feat).mode().abs().min() > 0
    silent, _ = make(**{"reward.layers": 1, "model.losses.reward": 0})
    assert silent.load_state(source.save_state())["world_model.reward.out"] == "fresh"
    assert not silent.world_model.reward(feat).mode().any()
    again, _ = make(**{"reward.layers": 1, "model.losses.reward": 0})
    assert "fresh" not in again.load_state(silent.save_state()).values()  # as a run goes on


STATES = {kind: {"dynamics.type": kind} for kind in sorted(TYPES)}
STATES |= {x: {"dynamics.type": "hrvq", "dynamics.hrvq.memory": x} for x in ("stacked", "gru")}


@pytest.mark.parametrize("kind", STATES)
def test_every_objective_trains_with_every_latent_state(kind):
    settings = on(*NEW) | STATES[kind] | {"dynamics.free": 0}
    agent, batch = make(EVERYTHING, **settings)
    before = copy.deepcopy(agent.state_dict())
    for _ in range(3):
        values = dict(zip(agent.metric_names, agent.update(batch).tolist(), strict=False))
    values = dict(zip(agent.metric_names, agent.update(batch).tolist(), strict=True))
    assert all(math.isfinite(x) for x in values.values())
    assert {f"{name}_loss" for name in NEW} | {"ac_cpc_accuracy_1", "harmony_reward"} < set(values)
    still = set(before) - changed(before, agent.state_dict())
    assert not still, still
    other, _ = make(EVERYTHING, **settings)
    assert "fresh" not in other.load_state(copy.deepcopy(agent.save_state())).values()
    torch.manual_seed(1)
    expected = agent.update(batch)
    torch.manual_seed(1)
    assert torch.equal(expected, other.update(batch))


def test_ac_cpc_is_as_wide_as_the_heads():
    """512 numbers in a model of 128 would more than double an update."""
    for given, expected in ((0, 24), (8, 8)):
        keys = {"model.losses.ac_cpc": 1, "reward.units": 24, "model.ac_cpc.units": given}
        agent, _ = make(**keys)
        assert agent.world_model.objectives["ac_cpc"].lag.shape[1] == expected


def test_without_a_weight_there_is_no_module():
    names = lambda agent: {key.split(".")[1] for key in agent.state_dict() if "model" in key}
    usual = {"encoder", "dynamics", "decoder", "reward", "cont"}
    assert names(make()[0]) == usual
    free, batch = make(**FREE, **on("barlow"))
    assert names(free) == usual - {"decoder"} | {"barlow"}
    free.update(batch)
    assert "vector_loss" not in free.metric_names
    assert free.world_model.open_loop(batch, 3)[1] == {}


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("contdisc", [False, True])
def test_without_a_continue_weight_dreams_never_end(kind, contdisc):
    """A head that nothing trains would end them by chance, about every second step."""
    over = {"dynamics.type": kind, "imag.discount": 0.9, "imag.contdisc": contdisc}
    agent, batch = make(**over, **{"model.losses.cont": 0})
    obs, model = networks.preprocess(batch), agent.world_model
    carry, post, _ = model.observe(obs)
    start, terminal = model.dynamics.starts(carry, post, 0), torch.zeros(16)
    disc = agent.behavior.imagine(model, start, terminal).disc
    assert torch.allclose(disc, torch.full_like(disc, 0.9))
    agent.update(batch)
    assert "cont_loss" not in agent.metric_names
    other = make(**over, **{"model.losses.cont": 0})[0]
    assert "fresh" not in other.load_state(agent.save_state()).values()
    ending = make(**over)[0]  # a run that begins from this one's weights
    assert ending.load_state(agent.save_state())["world_model.cont.out"] == "fresh"


@pytest.mark.parametrize("name", ["ac_cpc", "next_embed"])
def test_no_pair_crosses_an_episodes_end(name):
    """What was seen before an episode began changes no loss whose targets are all after it, and
    with every step an episode of its own there is no pair at all.
    """
    agent, batch = make(**on(name), length=6)
    obs = networks.preprocess(batch)
    obs["is_first"][:] = 1.0
    found = agent.world_model.loss(obs)[0][name]
    assert name == "next_embed" or (found == 0).all()
    objective = agent.world_model.objectives[name]
    for at in (2, 3):
        obs["is_first"] = torch.zeros(2, 6)
        obs["is_first"][:, [0, at]] = 1.0
        _, post, embed = agent.world_model.observe(obs)
        post = post._replace(feat=post.feat.map(lambda x: x.detach().requires_grad_()))
        embed = embed.detach().requires_grad_()
        loss = objective.loss(post, embed, obs)[0][name].mean()
        (grad,) = torch.autograd.grad(loss, [post.feat.deter])
        used = grad.abs().sum((0, 2)) > 0
        # the step before an end predicts nothing of what follows; with AC-CPC a state counts as
        # its own prior, which an episode's first one has of another episode
        without = {"ac_cpc": {0, at}, "next_embed": {at - 1, 5}}[name]
        assert {t for t in range(6) if not used[t]} == without


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_ac_cpc_predicts_from(kind, monkeypatch):
    """Of step t + k from step t: the last action that has a part in it is the one that led there,
    and the last observation that of step t - 1.
    """
    agent, batch = make(**on("ac_cpc"), **{"dynamics.type": kind}, length=6)
    obs, model = networks.preprocess(batch), agent.world_model
    obs["is_first"] = torch.zeros(2, 6)
    obs["is_first"][:, 0] = 1.0
    inputs = model.encoder(obs).detach(), obs["prev_action"].clone()
    embed, action = (x.requires_grad_() for x in inputs)
    start = model.dynamics.initial(2)
    _, post = model.dynamics.observe(start, embed, action, obs["is_first"].bool(), True, None)
    given = []
    spy = lambda queries, *args: given.extend(queries) or losses.contrastive_loss(queries, *args)
    monkeypatch.setattr(objectives, "contrastive_loss", spy)
    model.ac_cpc.loss(post, embed, obs | {"prev_action": action})
    assert [query.shape[1] for query in given] == [6, 5, 4]
    for k, query in enumerate(given):
        for t in range(2, query.shape[1]):
            row = query[:, t].square().sum()
            grads = torch.autograd.grad(row, [embed, action], retain_graph=True)
            used = [grad.abs().sum((0, 2)).nonzero().flatten().tolist() for grad in grads]
            assert max(used[1]) == t + k
            assert kind == "hrvq" or max(used[0]) == t - 1
            assert all(step < t for step in used[0])


def clips(steps=8, batch=4):
    """A vector that says the last two actions, so that the actions tell what comes."""
    agent, rows = make(
        batch=batch,
        length=steps,
        **on("ac_cpc"),
        **FREE,
        **{"model.lr": 3e-3, "dynamics.dyn": 0, "dynamics.rep": 0},
    )
    return agent, rows


def draw(batch, generator, shuffled=False):
    """New rows: vector t is a code of the actions before t and t - 1."""
    steps = torch.randint(3, batch["reward"].shape, generator=generator)
    action = F.one_hot(steps, 3).float()
    rows = dict(batch)
    rows["is_first"] = torch.zeros_like(batch["is_first"])
    rows["is_first"][:, 0] = True
    rows["vector"] = torch.cat([3.0 * action, action.roll(1, 1)[..., :2]], -1)
    if shuffled:
        action = F.one_hot(torch.randint(3, steps.shape, generator=generator), 3).float()
    rows["prev_action"] = action
    return rows


@pytest.mark.parametrize("shuffled", [False, True])
def test_ac_cpc_learns_what_follows_from_actions(shuffled):
    """The action alone tells the observation that it leads to; the negative control has others."""
    agent, batch = clips()
    generator, right = torch.Generator().manual_seed(0), []
    for _ in range(150):
        obs = networks.preprocess(draw(batch, generator, shuffled))
        found, _, _, _, metrics = agent.world_model.loss(obs)
        agent.optimizers["model"].step(found["ac_cpc"].mean())
        right.append(metrics["ac_cpc_accuracy_1"].item())
    # of 32 observations there are 9 kinds; known, it is one of those 3 or 4 that are equal
    late = sum(right[-30:]) / 30
    assert late < 0.12 if shuffled else late > 0.18


@pytest.mark.parametrize("name", ["barlow", "next_embed"])
def test_correlations_are_learned_without_collapse(name):
    """On new batches: near the floor, and the embedding still varies."""
    other, batch = make(batch=4, length=8, **on(name), **FREE, **{"model.lr": 3e-3})
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(150):
        obs = networks.preprocess(draw(batch, generator))
        loss, _, _, embed, _ = other.world_model.loss(obs)
        found.append(loss[name].mean().item())
        other.optimizers["model"].step(sum(loss.values()).mean())
    assert sum(found[-20:]) / 20 < 0.6 * found[0], (found[0], found[-1])
    assert embed.flatten(0, 1).std(0).mean() > 0.05


@pytest.mark.parametrize("optim", ["separate", "joint"])
@pytest.mark.parametrize("kind", ["rssm", "hrvq"])
def test_a_probe_learns_to_draw_and_changes_nothing_else(kind, optim):
    settings = {"dynamics.type": kind, "optim": optim, "model.clip": 0.1, "model.lr": 3e-3}
    torch.manual_seed(0)
    agent, batch = make(**settings, **FREE)
    then = torch.get_rng_state()
    torch.manual_seed(0)
    probed, _ = make(**settings, **FREE, **{"decoder.probe": True})
    assert torch.equal(torch.get_rng_state(), then)  # which a run goes on with
    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        agent.update(batch)
        torch.manual_seed(seed)
        values = dict(zip(probed.metric_names, probed.update(batch).tolist(), strict=False))
        errors.append(values.get("probe_vector_loss", math.inf))
    decoder = "world_model.decoder."
    own = {key: x for key, x in probed.state_dict().items() if not key.startswith(decoder)}
    assert not changed(own, agent.state_dict())
    assert errors[-1] < 0.9 * errors[1]
    assert probed.world_model.open_loop(batch, 3)[1].keys() == {"vector"}


@pytest.mark.parametrize("kind", ["crop", "shift"])
def test_views_move_images_alike_within_a_step(kind):
    agent, batch = make(EVERYTHING, **on("ac_cpc", **{"ac_cpc.augment": kind}))
    obs = networks.preprocess(batch)
    obs["image"] = torch.linspace(0, 1, 16).view(16, 1, 1).expand(2, 8, 16, 16, 3).contiguous()
    obs["wide"] = obs["image"][..., :1].clone()
    view = agent.world_model.ac_cpc.view
    one = view(obs, torch.Generator().manual_seed(0))
    two = view(obs, torch.Generator().manual_seed(0))
    assert all(torch.equal(one[key], two[key]) for key in obs)
    assert torch.equal(one["grid"], obs["grid"]) and not torch.equal(one["image"], obs["image"])
    assert torch.allclose(one["wide"], one["image"][..., :1])  # one place for all of a step
    assert one["image"].flatten(2).std(1).max() > 0  # and another for every step
    before = obs["image"].clone()
    assert torch.equal(obs["image"], before)
    agent.update(batch)


def test_a_resampled_image_by_hand():
    """The middle half of a ramp, and a shift by one of four pixels to the right."""
    ramp = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 4, 1).expand(1, 4, 4, 1)
    half = views.resample(ramp, torch.tensor([[0.5, 1.0, 0.0, 0.0]]))
    assert half[0, 0, :, 0].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25])
    moved = views.resample(ramp, torch.tensor([[1.0, 1.0, 0.5, 0.0]]))
    assert moved[0, 0, :, 0].tolist() == pytest.approx([1.0, 2.0, 3.0, 3.0])
    sides = views.crops(torch.rand(500, 4))
    area = sides[:, 0] * sides[:, 1] / 1.0
    assert area.min() > 0.2 and area.max() <= 1.0
    assert ((sides[:, 2:].abs() + sides[:, :2]) <= 1.0 + 1e-6).all()


def test_augmenting_needs_images():
    with pytest.raises(ValueError, match=r"model\.ac_cpc\.augment crop is for images"):
        make(VECTOR, **on("ac_cpc", **{"ac_cpc.augment": "crop"}))


def test_former_names_of_weights():
    """Of a command and of an older run's config."""
    assert tools.load_config([], {"model.losses.dyn": "0.7"}).dynamics.dyn == 0.7
    config = tools.load_config([], {"loss_scales.decoder": "0.5"})
    assert config.model.losses.decoder == 0.5
    old = config.tree()
    weights = old["model"].pop("losses")
    old["loss_scales"] |= {key: weights[key] for key in ("decoder", "reward", "cont")}
    del old["model"]["barlow"], old["decoder"]["probe"]
    run_config.check_same_run("folder", old, config)
    of = lambda units, weight=0: tools.load_config(
        [], {"model.ac_cpc.units": units, "model.losses.ac_cpc": weight}
    )
    run_config.check_same_run("folder", of(512).tree(), of(0))  # it sets up nothing
    with pytest.raises(tools.ConfigError, match=r"model\.ac_cpc\.units 512 -> 0"):
        run_config.check_same_run("folder", of(512, 1).tree(), of(0, 1))
    with pytest.raises(tools.ConfigError, match=r"model\.losses\.decoder 0\.5 -> 1\.0"):
        run_config.check_same_run("folder", old, tools.load_config([], {}))


def test_replay_returns_by_hand():
    """One sequence: step 2 is cut (its return is not used), step 4 terminal."""
    rew = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0, 9.0]])
    terminal = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    ends = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    boot = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0, 60.0]])
    found = losses.replay_returns(rew, terminal, ends, boot, 0.5, 0.8)[0].tolist()
    three = 3.0  # the terminal step's reward, and nothing after it
    one = 2.0 + 0.5 * 30.0  # cut: what follows is its value alone
    zero = 1.0 + 0.5 * (0.2 * 20.0 + 0.8 * one)
    assert [found[0], found[1], found[3]] == pytest.approx([zero, one, three])


@pytest.mark.parametrize("starts", [0, 3])
def test_the_critic_learns_from_replayed_steps(starts):
    """The loss of every step but the last ones, against the formula, from the dreams' returns."""
    settings = {"critic.replay_loss": 0.5, "imag.starts": starts, "imag.discount": 0.9}
    agent, batch = make(batch=2, length=6, **settings)
    behavior, model = agent.behavior, agent.world_model
    for head in (behavior.critic, behavior.slow):
        torch.nn.init.normal_(head.out.weight, std=0.5)
    obs = networks.preprocess(batch)
    obs["is_first"] = torch.zeros(2, 6)
    obs["is_first"][:, 0] = obs["is_first"][1, 3] = 1.0
    obs["is_terminal"] = torch.zeros(2, 6)
    obs["is_terminal"][1, 2] = 1.0
    _, post, _ = model.observe(obs)
    where = slice(0, None) if starts == 0 else slice(1, 6, 2)
    imagined = torch.randn(2 * len(range(6)[where]))
    steps = obs["reward"], obs["is_first"].bool(), obs["is_terminal"]
    found = behavior.replay_loss(Replayed(post.feat.cat(), *steps, where), imagined).item()
    values = behavior.critic(post.feat.cat()).mode().detach()
    values[:, where] = imagined.view(2, -1)
    total = 0.0
    for b in range(2):
        ahead = values[b, 5]
        for t in reversed(range(5)):
            ends = b == 1 and t + 1 == 2
            value = values[b, t + 1] if ends else 0.05 * values[b, t + 1] + 0.95 * ahead
            going_on = 0.0 if obs["is_terminal"][b, t + 1] else 0.9
            ahead = obs["reward"][b, t + 1] + going_on * value
            if not (b == 1 and t == 2):
                x = post.feat.cat()[b, t]
                target = ahead, behavior.slow(x).mode()
                total -= behavior.critic(x).log_prob(*target).item()
    assert found == pytest.approx(total / 10, rel=1e-4)


@pytest.mark.parametrize("optim", ["separate", "joint"])
@pytest.mark.parametrize("act", ["discrete", "continuous"])
def test_the_replay_loss_reaches_the_model_only_by_its_key(act, optim):
    """Without the gradient the model's step is that of no replay loss at all, and the critic's is
    the same either way.
    """
    moments = {}
    for name, settings in {
        "none": {},
        "critic": {"critic.replay_loss": 0.3},
        "model": {"critic.replay_loss": 0.3, "critic.replay_grad": True},
    }.items():
        torch.manual_seed(0)
        zero = {"model.lr": 0, "model.clip": 0, "actor.clip": 0, "critic.clip": 0}
        agent, batch = make(act=act, optim=optim, **zero, **settings)
        torch.nn.init.normal_(agent.behavior.critic.out.weight, std=0.5)
        torch.manual_seed(1)
        agent.update(batch)
        found = {}
        for optimizer in agent.optimizers.values():
            found |= {key: x["exp_avg"] for key, x in optimizer.state_dict().items()}
        moments[name] = found
    same = lambda a, b, key: torch.allclose(moments[a][key], moments[b][key], atol=1e-7)
    of_critic = {key for key in moments["none"] if key.startswith("critic")}
    of_actor = {key for key in moments["none"] if key.startswith("actor")}
    others = set(moments["none"]) - of_critic - of_actor
    assert all(same("none", "critic", key) for key in others | of_actor)
    assert not all(same("none", "critic", key) for key in of_critic)
    assert all(same("critic", "model", key) for key in of_critic | of_actor)
    moved = {key for key in others if not same("critic", "model", key)}
    assert any(key.startswith("encoder") for key in moved)
    assert any(key.startswith("dynamics") for key in moved)
    heads = ("decoder", "reward", "cont")
    assert not [key for key in moved if key.startswith(heads)]


# ---------------------------------------------------------------- what does not go together

REMARKS = [
    ({"model.losses.ac_cpc": 1, "model.ac_cpc.steps": 30}, "replay.length 8"),
    ({"model.losses.reward": 0}, "predicted ones alone"),
    ({"model.losses.decoder": 0}, "--decoder.probe true"),
    ({"decoder.probe": True}, "trained anyway"),
    ({"critic.replay_grad": True}, "critic.replay_loss is 0"),
    ({"dynamics.dyn": 0}, "nothing trains the prior"),
    (
        {"optim": "joint", "critic.lr": 1e-2, "actor.agc": 0.3},
        "without effect are actor.agc, critic.lr,",
    ),
    ({"dynamics.type": "hrvq", "dynamics.hrvq.cell": "block_gru"}, "is dynamics.hrvq.cell, for --"),
    (
        {
            "dynamics.type": "hrvq",
            "dynamics.hrvq.memory": "stacked",
            "dynamics.hrvq.mask": "causal",
        },
        "memory stacked: without effect is dynamics.hrvq.mask",
    ),
    (
        {"dynamics.type": "hrvq", "dynamics.hrvq.moe_top": 2, "dynamics.hrvq.moe_experts": [8]},
        "moe_experts, dynamics.hrvq.moe_top, for --dynamics.hrvq.ffn moe",
    ),
    ({"dynamics.rssm.blocks": 4}, "for --dynamics.rssm.cell block_gru"),
]


def test_what_a_key_will_not_do_is_one_line():
    short = {"model.ac_cpc.steps": 7}
    read = lambda values: notes(tools.load_config(["debug"], short | values), 1, 9)
    assert read({}) == []
    for values, hint in REMARKS:
        (line,) = read(values)
        assert hint in line and "\n" not in line
    assert read({"model.losses.decoder": 0, "video": False}) == []
    assert read({"dynamics.hrvq.mask": "causal"}) == []  # of another latent state
    assert read({"optim": "joint"}) == []
    assert read({"dynamics.dyn": 0, "model.losses.ac_cpc": 1}) == []  # which trains it as well
    assert read({"model.losses.reward": 0, "expl.behavior": "plan2explore"}) == []


def test_a_run_says_so_once_and_goes_on(tmp_path, capsys):
    more = ("--model.losses.decoder", 0, "--steps", 30, "--eval_every", 1000)
    assert run(tmp_path / "run", *more, "--video", "true") == 0
    assert capsys.readouterr().out.count("--decoder.probe true") == 1


@pytest.mark.parametrize("harmony", [0, 1])
def test_a_model_without_objectives_is_refused_in_one_line(harmony, tmp_path, capsys):
    off = [x for name in ("decoder", "reward", "cont") for x in (f"--model.losses.{name}", 0)]
    assert run(tmp_path / "run", *off, "--model.losses.harmony", harmony) == 2
    one_line(capsys, "model.losses", "--model.losses.decoder 1")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- docs/objectives.md

PAGE = (ROOT / "docs" / "objectives.md").read_text()


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The code and the key of the page, as a reader would add them."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (key,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    text = tools.CONFIGS.read_text()
    before = next(line for line in text.splitlines() if line.startswith("      harmony: 0.0"))
    (tmp_path / "configs.yaml").write_text(text.replace(before + "\n", before + "\n" + key))
    monkeypatch.setattr(tools, "CONFIGS", tmp_path / "configs.yaml")
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    exec(code, {})


def test_an_objective_of_ones_own_is_learned_and_saved(extended, tmp_path, capsys):
    more = {"model.losses.inverse": 1, "model.lr": 3e-3}
    agent, batch = make(batch=4, **more)
    found = []
    for _ in range(30):
        values = agent.update(batch)
        found.append(values[agent.metric_names.index("inverse_loss")].item())
    assert found[-1] < 0.7 * found[0]
    assert "world_model.inverse.guess.out.weight" in agent.state_dict()
    assert "inverse" not in make()[0].world_model.objectives
    run(tmp_path / "without", "--steps", 40, "--eval_episodes", 0)
    more = ("--model.losses.inverse", 0.1, "--steps", 40, "--resume", tmp_path / "without")
    assert run(tmp_path / "with", *more) == 0
    assert re.search(r"fresh +world_model\.inverse", capsys.readouterr().out)
    assert run(tmp_path / "refused", "--model.losses.inverse", -1) == 2
    one_line(capsys, "model.losses.inverse", "at least 0")
    # A process without the script that adds it does not train on in silence.
    del objectives.OBJECTIVES["inverse"]
    for name in ("with", "new"):
        assert run(tmp_path / name, "--model.losses.inverse", 0.1, "--steps", 80) == 2
        one_line(capsys, "model.losses.inverse is 0.1", "docs/objectives.md")
    assert hidreamer.load(tmp_path / "with").collect(seed=0)["reward"].size  # acting needs none


class SmallEmbedding:
    """An objective without parameters, which is no module."""

    def loss(self, post, embed, obs, generator=None):
        return {"small": embed.square().mean(-1)}, {}


def test_an_objective_without_parameters_needs_no_module(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "barlow", lambda model, config: SmallEmbedding())
    agent, batch = make(**on("barlow"))
    before = copy.deepcopy(agent.state_dict())
    agent.update(batch)
    assert "small_loss" in agent.metric_names and changed(before, agent.state_dict())
    monkeypatch.setitem(objectives.OBJECTIVES, "small", lambda model, config: SmallEmbedding())
    with pytest.raises(ValueError, match=r"'small' has no weight: add small to model\.losses"):
        make()


def test_the_commands_of_the_page_are_of_keys_that_there_are():
    text, judge = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert all("benchmarks/objectives.py" in line for line in judge.splitlines())
    for line in text.splitlines():
        args = tools.parse(line.split()[2:])
        assert tools.load_config(args.presets, args.overrides).model.losses
    for key in re.findall(r"^\| `([\w.]+)`", PAGE, re.MULTILINE):
        assert key in tools.load_config([], {}).flat()


def test_what_is_correlated_with_what(monkeypatch):
    """next_embed: the state at t and the action after it with the embedding at t + 1. barlow: the
    state with its own embedding. Neither teaches the encoder by the embedding.
    """
    agent, batch = make(**on("next_embed", "barlow"), length=6)
    obs, model, given = networks.preprocess(batch), agent.world_model, []
    _, post, embed = model.observe(obs)
    feat = post.feat.map(lambda x: x.detach().requires_grad_())
    embed, action = embed.detach().requires_grad_(), obs["prev_action"].requires_grad_()
    monkeypatch.setattr(objectives, "redundancy_loss", lambda *x: given.append(x) or x[0].sum())
    for name in ("next_embed", "barlow"):
        model.objectives[name].loss(post._replace(feat=feat), embed, obs)
    (guess, following, *_), (_, own, *_) = given
    assert torch.equal(following.unflatten(0, (2, 5)), embed[:, 1:])
    assert torch.equal(own.unflatten(0, (2, 6)), embed)
    assert not following.requires_grad and not own.requires_grad
    for t in range(5):
        one = guess.unflatten(0, (2, 5))[:, t].square().sum()
        grads = torch.autograd.grad(one, [feat.deter, action], retain_graph=True)
        steps = [grad.abs().sum((0, 2)).nonzero().flatten().tolist() for grad in grads]
        assert steps == [[t], [t + 1]]
