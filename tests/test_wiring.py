"""Which step goes with which, how often draws happen, and which settings reach which optimiser.

An error of one step raises nothing: only the results are worse.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_agent import ACTIONS, VECTOR, imagine, make

import networks
import tools
from hidreamer.dynamics import TYPES, make_dynamics

MIXED = (
    0.4  # unimix; of K saturated classes the others are drawn with probability MIXED (K - 1) / K
)
DRAWS = 2000
TOLERANCE = 4 * math.sqrt(0.25 / DRAWS)  # four standard deviations


def saturate(layer, size, choice=0):
    """Let a linear layer say ``choice`` for each of its variables of ``size`` classes, whatever its
    input.
    """
    layer.weight.data.zero_()
    layer.bias.data.zero_().unflatten(-1, (-1, size))[:, choice] = 80.0


def saturated(kind):
    """-> dynamics whose every level has 4 classes and says class 0 with certainty, but for
    unimix.
    """
    config = tools.load_config(["debug"], {"dynamics.type": kind, "dynamics.unimix": MIXED})
    dynamics = make_dynamics(config.dynamics, 5, 3)
    if kind == "hrvq":
        for layer in dynamics.prior:
            saturate(layer, 4)
        dynamics.quantizer.log_tau.data.fill_(-20.0)
        return dynamics
    names = {"rssm": ["prior_out", "post_out"], "hrssm": ["prior_top", "post_top", "prior_bottom"]}[
        kind
    ]
    for name in names:
        saturate(getattr(dynamics, name), 4)
    return dynamics


def others(dynamics, stoch, likeliest=None):
    """Of features (N, Z): by level, the share of variables that are not the likeliest class (N, L,
    S), or class 0.
    """
    if "quantizer" in dict(dynamics.named_children()):
        size = dynamics.quantizer.book.shape[-1]
        codes = stoch.unflatten(-1, (dynamics.levels, -1, size)) * size**0.5  # (N, L, G, d)
        index = (
            (codes.unsqueeze(-2) - dynamics.quantizer.book).square().sum(-1).argmin(-1)
        )  # (N, L, G)
    else:
        index = stoch.unflatten(-1, (-1, 4)).argmax(-1).unflatten(-1, (len(dynamics.shapes), -1))
    likeliest = torch.zeros_like(index) if likeliest is None else likeliest
    return (index != likeliest).float().mean((0, 2)).tolist()


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_saturated_states_are_still_drawn_with_unimix(kind):
    """2,000 draws of each level: of posteriors, of imagined states,
    of a coarse level's resampled rest.
    """
    dynamics = saturated(kind)
    count = DRAWS // dynamics.shapes[0][0]
    embed, first = torch.randn(count, 1, 5), torch.ones(count, 1, dtype=torch.bool)
    with torch.no_grad():
        carry, post = dynamics.observe(
            dynamics.initial(count), embed, torch.zeros(count, 1, 3), first
        )
        *_, feat, _ = dynamics.imagine(dynamics.starts(carry, post, 1), torch.zeros(count, 1, 3), 1)
    expected = pytest.approx([MIXED * 3 / 4] * len(dynamics.shapes), abs=TOLERANCE)
    mode = torch.stack([level.post[:, 0].argmax(-1) for level in post.levels], 1)  # (N, L, S)
    assert others(dynamics, post.feat.stoch[:, 0], mode) == expected
    assert others(dynamics, feat.stoch[:, 1]) == expected
    if kind == "hrssm":
        bottom = dynamics.coarse_features(post.feat)["top"].stoch[:, 0]
        assert others(dynamics, bottom)[1] == pytest.approx(MIXED * 3 / 4, abs=TOLERANCE)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_mode_is_never_mixed(kind):
    dynamics = saturated(kind)
    with torch.no_grad():
        inputs = (
            torch.randn(200, 1, 5),
            torch.zeros(200, 1, 3),
            torch.ones(200, 1, dtype=torch.bool),
        )
        carry, post = dynamics.observe(dynamics.initial(200), *inputs, sample=False)
        *_, feat, _ = dynamics.imagine(carry, torch.zeros(200, 1, 3), 1, sample=False)
    mode = torch.stack([level.post[:, 0].argmax(-1) for level in post.levels], 1)
    assert (
        others(dynamics, post.feat.stoch[:, 0], mode)
        == others(dynamics, feat.stoch[:, 1])
        == [0.0] * mode.shape[1]
    )


def test_a_saturated_policy_still_explores():
    agent, _ = make(**{"actor.net.unimix": MIXED})
    saturate(agent.behavior.actor.out, 3, choice=1)
    state = agent.initial(DRAWS)
    obs = {"vector": torch.randn(DRAWS, 5), "is_first": torch.ones(DRAWS, dtype=torch.bool)}
    drawn = agent.act(state, obs, "train").action.mean(0).tolist()
    assert drawn == pytest.approx([MIXED / 3, 1 - MIXED * 2 / 3, MIXED / 3], abs=TOLERANCE)
    assert agent.act(state, obs, "greedy").action.mean(0).tolist() == [0.0, 1.0, 0.0]


def test_the_explorer_acts_in_mode_explore():
    agent, _ = make(**{"expl.behavior": "plan2explore", "actor.net.unimix": 0})
    saturate(agent.behavior.actor.out, 3, choice=1)
    saturate(agent.explorer.behavior.actor.out, 3, choice=2)
    obs = {"vector": torch.randn(7, 5), "is_first": torch.ones(7, dtype=torch.bool)}
    chosen = {
        mode: agent.act(agent.initial(7), obs, mode).action.argmax(-1).unique().tolist()
        for mode in MODES
    }
    assert chosen == {"train": [1], "greedy": [1], "explore": [2]}


MODES = ("train", "greedy", "explore")


def test_acting_uses_the_last_action_and_the_carry():
    agent, batch = make()
    seen, one_step = [], agent._one_step
    dynamics = agent.world_model.dynamics
    carries, observe = [], dynamics.observe_features
    agent._one_step = lambda *args: seen.append(one_step(*args)) or seen[-1]
    dynamics.observe_features = lambda carry, embed, action, is_first, generator: (
        carries.append((carry, action, is_first))
        or observe(carry, embed, action, is_first, generator)
    )
    state = agent.initial(2)
    for t in range(3):
        now = agent.act(state, {key: batch[key][:, t] for key in ("vector", "is_first")})
        carry, action, is_first = carries[-1]
        assert torch.equal(action[:, 0], state.action) and carry is state.carry
        assert torch.equal(seen[-1]["vector"][:, 0], batch["vector"][:, t])
        assert torch.equal(is_first[:, 0], batch["is_first"][:, t])
        state = now
    assert state.action.sum() == 2


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_open_loop_follows_each_action_at_its_own_step(kind):
    """Another action into step t changes what is shown from t on, and nothing before."""
    agent, batch = make(**{"dynamics.type": kind})
    model, context = agent.world_model, 3
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def shown(actions):
        torch.manual_seed(3)
        return model.open_loop(batch | {"prev_action": actions}, context)[1]["vector"]

    before = shown(batch["prev_action"])
    for t in range(1, 8):
        actions = batch["prev_action"].clone()
        actions[:, t] = actions[:, t].roll(1, -1)
        moved = (shown(actions) - before).abs().amax((0, 2))
        assert moved[:t].max() == 0.0 < moved[t]


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_explorers_loss_and_bonus(conditioned):
    """Against a loop: the ensemble predicts step t + 1 from state t and the action between, within
    an episode; its spread is the bonus.
    """
    scales = {
        "expl.intr_scale": 2.0,
        "expl.extr_scale": 0.5,
        "expl.models": 3,
        "expl.units": 16,
        "expl.log": "false",
    }
    agent, batch = make(
        **scales, **{"expl.behavior": "plan2explore", "expl.action_cond": str(conditioned).lower()}
    )
    explorer = agent.explorer
    batch["is_first"][1, 3] = True
    obs = networks.preprocess(batch)
    with torch.no_grad():
        _, carry, post, embed, _ = agent.world_model.loss(obs)
        join = lambda x, action: torch.cat([x, action]) if conditioned else x
        x, action, losses = post.feat.cat(), obs["prev_action"], []
        is_first = obs["is_first"].bool()
        for b in range(2):
            for t in range(7):
                for net in explorer.ensemble:
                    error = net(join(x[b, t], action[b, t + 1])) - post.feat.stoch[b, t + 1]
                    if not is_first[b, t + 1]:  # else the step before is another episode's
                        losses.append(0.5 * error.square().sum().item())
        found = explorer.loss(post, embed, action, is_first).item()
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        start = agent.world_model.dynamics.starts(carry, post, 0)
        found = agent.behavior.imagine(agent.world_model, start, obs["is_terminal"].flatten())
        extrinsic = torch.randn(found.disc.shape)
        paid = explorer.reward(found, extrinsic)
        for n in range(16):
            for t in range(4):
                of = t - 1 if conditioned else t  # the step that the prediction is made from
                spread = 0.0
                if of >= 0:
                    guesses = [
                        net(join(found.x[n, of], found.action[n, of])) for net in explorer.ensemble
                    ]
                    spread = torch.stack(guesses).std(0).mean().item()
                expected = 2.0 * spread + 0.5 * extrinsic[n, t].item()
                assert paid[n, t].item() == pytest.approx(expected, abs=1e-5)


def test_every_optimiser_has_its_own_settings():
    blocks = ("model", "actor", "critic")
    settings = {
        name: {"lr": 10.0**-i, "eps": 10.0 ** -(i + 4), "clip": 10.0 * i}
        for i, name in enumerate(blocks, 1)
    }
    flat = {f"{name}.{key}": x for name, block in settings.items() for key, x in block.items()}
    agent, _ = make(**flat, **{"expl.behavior": "plan2explore"})
    assert agent.optimizers.keys() == {*blocks, *(f"expl_{name}" for name in blocks)}
    for name, optimizer in agent.optimizers.items():
        (group,) = optimizer.optim.param_groups
        found = {"lr": group["lr"], "eps": group["eps"], "clip": optimizer.clip}
        assert found == settings[name.removeprefix("expl_")]
        assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0


def test_an_update_clips_what_is_too_long():
    agent, batch = make(
        **{"model.clip": 1e-3, "actor.clip": 1e-4, "critic.clip": 1e-5, "actor.entropy": 1}
    )
    agent.update(batch)
    for name, bound in (("model", 1e-3), ("actor", 1e-4), ("critic", 1e-5)):
        first = torch.cat(
            [x["exp_avg"].flatten() for x in agent.optimizers[name].state_dict().values()]
        )
        assert first.norm().item() == pytest.approx(
            0.1 * bound, rel=1e-2
        )  # Adam's average begins with a tenth


def test_bfloat16_is_for_products_alone():
    """Matrix products are narrow; probabilities, two-hot logits, losses and returns are not."""
    agent, batch = make(precision="bfloat16")
    seen = {}
    for name in ("world_model.reward", "world_model.cont", "behavior.critic", "behavior.actor"):
        layer = agent.get_submodule(name).blocks[0].linear
        layer.register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: out.dtype})
        )
    behavior, losses = agent.behavior, agent.behavior.losses
    behavior.losses = lambda found, rew, _: (
        seen.update(rew=rew.dtype, disc=found.disc.dtype) or losses(found, rew)
    )
    agent.update(batch)
    assert {seen.pop("rew"), seen.pop("disc")} == {torch.float32}
    assert len(seen) == 4 and set(seen.values()) == {torch.bfloat16}
    x = torch.randn(3, 2 * agent.world_model.feat_dim)[:, : agent.world_model.feat_dim]
    with torch.autocast("cpu", torch.bfloat16):
        reward, policy = agent.world_model.reward(x), behavior.actor(x)
        assert reward.logit.dtype == reward.mode().dtype == torch.float32
        assert policy.probs[0].dtype == agent.world_model.cont(x).mean().dtype == torch.float32
    agent, batch = make()
    agent.world_model.reward.blocks[0].linear.register_forward_hook(
        lambda *args: seen.update(full=args[-1].dtype)
    )
    agent.update(batch)
    assert seen["full"] == torch.float32


def test_codebooks_learn_once_and_after_the_step():
    agent, batch = make(**{"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"})
    calls, model = [], agent.optimizers["model"]
    learn, step = agent.world_model.dynamics.update_codebook, model.step
    agent.world_model.dynamics.update_codebook = lambda post, _: (
        calls.append("update_codebook") or learn(post)
    )
    model.step = lambda loss: calls.append("step") or step(loss)
    agent.update(batch)
    assert calls == ["step", "update_codebook"]


@pytest.mark.parametrize("act", ["discrete", "multi"])
def test_actions_in_dreams_are_one_hot(act):
    agent, batch = make(act=act)
    action = imagine(agent, batch).action
    sizes = [ACTIONS[act].n] if act == "discrete" else ACTIONS[act].nvec.tolist()
    for part in action.split(sizes, -1):
        assert torch.equal(part, F.one_hot(part.argmax(-1), part.shape[-1]).float())


def test_vectors_enter_through_symlog():
    agent, batch = make(VECTOR)
    seen = []
    agent.world_model.encoder.vector.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    agent.world_model.encoder(
        networks.preprocess(batch | {"vector": torch.full((2, 8, 5), math.e - 1)})
    )
    assert torch.allclose(seen[0], torch.ones(2, 8, 5))


@pytest.mark.parametrize("share", [0.2, 0.75])
def test_level_dropout_hides_the_finest_codes_of_its_share_of_steps(share):
    """Of three levels, L2 or L1 and L2 are hidden, each as often; L0 never."""
    sizes = {"dynamics.hrvq.levels": 3, "dynamics.hrvq.level_dropout": share}
    config = tools.load_config(["debug"], {"dynamics.type": "hrvq", **sizes})
    dynamics = make_dynamics(config.dynamics, 5, 3)
    with torch.no_grad():
        first = torch.ones(DRAWS, 1, dtype=torch.bool)
        _, post = dynamics.observe(
            dynamics.initial(DRAWS), torch.randn(DRAWS, 1, 5), torch.zeros(DRAWS, 1, 3), first
        )
        codes = dynamics.decoder_features(post).stoch.unflatten(-1, (3, -1))  # (B, 1, L, G * d)
    hidden = (codes == 0).all(-1).float().mean((0, 1)).tolist()
    assert hidden[0] == 0.0 and hidden[1:] == pytest.approx([share / 2, share], abs=TOLERANCE)
    kept = codes != 0
    assert torch.equal(codes[kept], post.feat.stoch.unflatten(-1, (3, -1))[kept])


def test_the_explorers_log_goes_far_down():
    """Where the ensemble agrees to the last bit, the bonus is log(1e-8): low, and finite."""
    agent, batch = make(**{"expl.behavior": "plan2explore", "expl.models": 2, "expl.log": "true"})
    first, second = agent.explorer.ensemble
    second.load_state_dict(first.state_dict())
    found = imagine(agent, batch)
    paid = agent.explorer.reward(found, torch.zeros_like(found.disc))
    assert torch.allclose(paid, torch.full_like(paid, math.log(1e-8)))


def test_the_slow_critic_begins_as_the_critic():
    agent, _ = make()
    slow = agent.behavior.slow.state_dict()
    assert all(torch.equal(x, slow[name]) for name, x in agent.behavior.critic.state_dict().items())


def test_what_hrvq_quantises_is_normalised():
    """Codes begin with a deviation of about 1,
    so numbers of another scale would all get one code.
    """
    agent, _ = make(**{"dynamics.type": "hrvq"})
    dynamics = agent.world_model.dynamics
    z = dynamics._project(50.0 + 30.0 * torch.randn(6, agent.world_model.encoder.dim)).flatten(1)
    assert torch.allclose(z.mean(-1), torch.zeros(6), atol=1e-4)
    assert torch.allclose(z.var(-1, unbiased=False), torch.ones(6), atol=1e-2)
