"""What tokens are trained by and what is reported of them: losses, codebooks, metrics,
what heads and decoder read.
"""

import copy

import pytest
import torch
from test_agent import EVERYTHING, make
from test_hrvq import POSTERIORS, build, inputs

import models
import tools
from hidreamer.quantizer import code_accuracy


def test_each_levels_commitment_reaches_the_encoder():
    for level in range(3):
        weights = [0.0, 0.0, 0.0]
        weights[level] = 1.0
        dynamics = build(posterior="nearest", commitment=weights)
        embed, action, is_first = inputs()
        embed.requires_grad_()
        _, post = dynamics.observe(dynamics.initial(3), embed, action, is_first)
        (grad,) = torch.autograd.grad(dynamics.loss(post)[0]["commit"].sum(), embed)
        assert grad.abs().max() > 1e-3


def test_exactly_one_codebook_update_per_training_update(monkeypatch):
    agent, batch = make(
        EVERYTHING, **{"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"}
    )
    quantizer, calls = agent.world_model.dynamics.quantizer, []
    update = quantizer.update_codebook

    def counted(codes, generator):
        calls.append(quantizer.count.clone())
        update(codes, generator=generator)

    monkeypatch.setattr(quantizer, "update_codebook", counted)
    state, obs = agent.initial(2), {key: batch[key][:, 0] for key in (*EVERYTHING, "is_first")}
    for n in range(1, 4):
        agent.act(state, obs)
        agent.world_model.open_loop(batch, 3)
        before = quantizer.count.clone()
        agent.update(batch)
        assert (
            len(calls) == n
            and torch.equal(calls[-1], before)
            and not torch.equal(quantizer.count, before)
        )


def test_checkpoints_with_former_names_are_read():
    """Parameters and moments alike: the next update is the same to the bit."""
    agent, batch = make(EVERYTHING, **{"dynamics.type": "hrvq"})
    for _ in range(2):
        agent.update(batch)
    former = {"dynamics.bos_token": "dynamics.begin", "dynamics.level_emb": "dynamics.place"}
    for kind in ("weight", "bias"):
        former[f"dynamics.in_proj.{kind}"] = f"dynamics.inp.{kind}"
        for name in ("up", "down"):
            layer = "dynamics.transformer.layers.0"
            former[f"{layer}.ffn.{name}.{kind}"] = f"{layer}.{name}.{kind}"
    state = copy.deepcopy(agent.save_state())
    for name, old in former.items():
        state["params"][f"world_model.{old}"] = state["params"].pop(f"world_model.{name}")
        state["optim"]["model"][old] = state["optim"]["model"].pop(name)
    other, _ = make(EVERYTHING, **{"dynamics.type": "hrvq"})
    assert set(other.load_state(state).values()) == {"mapped"}
    results = []
    for each in (agent, other):
        torch.manual_seed(1)
        results.append(each.update(batch))
    assert torch.equal(*results)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in agent.state_dict().items())


def test_metrics_name_every_level():
    dynamics = build()
    _, post = dynamics.observe(dynamics.initial(3), *inputs())
    _, metrics = dynamics.loss(post)
    for name in (
        "kl",
        "accuracy",
        "accuracy_copy",
        "accuracy_changed",
        "perplexity",
        "dead",
        "post_ent",
        "prior_ent",
    ):
        assert all(f"{name}_{i}" in metrics for i in range(3)), name


def test_accuracy_is_beside_copy_and_on_changes_only():
    """By hand: a prior that always repeats the last token is right exactly
    where nothing changed.
    """
    index = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 0]]).reshape(1, 8, 1, 1)
    prior = torch.zeros(1, 8, 1, 5)
    prior[0, 1:].scatter_(-1, index[0, :-1], 9.0)
    is_first = torch.tensor(
        [[True] + [False] * 4 + [True] + [False] * 2]
    )  # step 5 repeats by chance
    metrics = code_accuracy([prior], index, is_first)
    assert metrics["accuracy_0"].item() == pytest.approx(3 / 6)  # steps 1, 3, 6 of 1, 2, 3, 4, 6, 7
    assert metrics["accuracy_copy_0"].item() == pytest.approx(3 / 6)
    assert metrics["accuracy_changed_0"].item() == 0.0


def test_heads_read_codes_as_long_as_one_hots():
    """Twice as long is what the heads would otherwise see at 4 numbers a code."""
    dynamics = build(posterior="frozen")
    _, post = dynamics.observe(dynamics.initial(3), *inputs())
    stoch = post.feat.stoch.unflatten(-1, (3, 2, 4))
    assert torch.allclose(stoch * 2.0, post.aux.codes.code)
    assert 0.5 < stoch[..., 0, :, :].norm(dim=-1).mean() < 1.5


def test_partial_decodes_are_sums_of_coarse_codes():
    dynamics = build()
    _, post = dynamics.observe(dynamics.initial(3), *inputs())
    partial = dynamics.coarse_features(post.feat)
    assert list(partial) == ["L0", "L0+L1"]
    size = dynamics.stoch_dim // 3
    for kept, feat in enumerate(partial.values(), 1):
        assert torch.equal(feat.stoch[..., : kept * size], post.feat.stoch[..., : kept * size])
        assert feat.stoch[..., kept * size :].abs().max() == 0


def test_level_dropout_hides_fine_codes_from_the_decoder_alone():
    dynamics = build(level_dropout=0.5)
    _, post = dynamics.observe(dynamics.initial(50), *inputs(batch=50, firsts=()))
    levels = (
        dynamics.decoder_features(post).stoch.unflatten(-1, (3, -1)).abs().amax(-1) > 0
    )  # (B, T, L)
    share = levels.float().mean((0, 1))
    assert (
        share[0] == 1.0 and 0.7 < share[1] < 0.8 and 0.45 < share[2] < 0.55
    )  # 1 level kept in 25%, 2 in 25%
    assert (levels[..., 1] >= levels[..., 2]).all()
    assert build(level_dropout=0.0).decoder_features(post) is post.feat


TASK_KINDS = {
    "image": models.spaces.Box(0, 255, (64, 64, 3), "uint8"),
    "grid": models.spaces.Box(0, 1, (10, 10, 4), bool),
    "vector": models.spaces.Box(-1.0, 1.0, (4,), "float32"),
}
MATCHED = ("tiny_hdreamer", "tiny_hidreamer", "tiny_hidreamer_stacked", "tiny_hidreamer_gru")


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_matched_capacity(kind):
    """World models within 5% of the flat one's parameters, on every kind of observation."""
    count = {}
    for preset in ("tiny_dreamerv3", *MATCHED):
        model = models.WorldModel({kind: TASK_KINDS[kind]}, 6, tools.load_config([preset], {}))
        dyn = model.dynamics
        count[preset] = sum(p.numel() for p in model.parameters())
        assert (dyn.bits, dyn.stoch_dim, dyn.deter_dim, dyn.feat_dim) == (60, 384, 256, 640)
    for preset in MATCHED:
        assert 0.95 < count[preset] / count["tiny_dreamerv3"] < 1.05, (preset, count)


def test_the_lineages_size():
    agent = models.WorldModel(
        {"image": TASK_KINDS["image"]}, 6, tools.load_config(["hidreamer"], {})
    )
    assert 10.5e6 < sum(p.numel() for p in agent.dynamics.transformer.parameters()) < 11.5e6


@pytest.mark.parametrize("variant", [{}, *POSTERIORS], ids=str)
def test_the_prior_alone_follows(variant):
    """Drawn to its prior, a posterior that sees its frame alone would become vague;
    and no nats are free.
    """
    dynamics = build(**variant)
    _, post = dynamics.observe(dynamics.initial(3), *inputs())
    losses, metrics = dynamics.loss(post)
    assert "rep" not in losses
    assert torch.allclose(
        losses["dyn"].mean(), 0.5 * sum(metrics[f"kl_{i}"] for i in range(dynamics.levels))
    )


def test_weights_of_levels():
    dynamics = build(level_weights=[1.0, 0.5, 0.25])
    _, post = dynamics.observe(dynamics.initial(3), *inputs())
    losses, metrics = dynamics.loss(post)
    expected = 0.5 * (metrics["kl_0"] + 0.5 * metrics["kl_1"] + 0.25 * metrics["kl_2"])
    assert torch.allclose(losses["dyn"].mean(), expected)
