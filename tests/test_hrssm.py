"""Two levels: the bottom depends on the top, dreams of both agree,
and a flat state can be split over them.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_agent import EVERYTHING, changed, make

import models
from hidreamer.dynamics import hrssm
from hidreamer.dynamics.base import KLConfig, kl_losses

NO_FREE = KLConfig(dyn=0.5, rep=0.1, free_nats=0.0, unimix=0.01)


def build(kind=hrssm.HRSSM, kl_config=NO_FREE, stoch=(2, 3), classes=(4, 5), embed=6, act=2):
    return kind(
        embed, act, kl_config, deter=16, hidden=16, stoch=list(stoch), classes=list(classes)
    )


def observed(dynamics, batch=5, length=4, sample=False):
    embed = torch.randn(batch, length, dynamics.obs_out.linear.in_features - dynamics.deter_dim)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = True
    action = torch.randn(batch, length, dynamics.act_dim)
    return dynamics.observe(dynamics.initial(batch), embed, action, first, sample)[1]


def test_at_first_the_bottom_posterior_is_its_prior():
    top, bottom = observed(build()).levels
    assert torch.allclose(bottom.post, bottom.prior, atol=1e-6)
    assert not torch.allclose(top.post, top.prior, atol=1e-3)


def test_the_bottom_prior_is_asked_about_the_posteriors_top():
    dynamics = build()
    post = observed(dynamics, sample=True)
    size = 2 * 4
    expected = dynamics._bottom_prior(
        dynamics.img_out(post.feat.deter), post.feat.stoch[..., :size]
    )
    assert torch.allclose(post.levels[1].prior, expected, atol=1e-6)
    other = dynamics._bottom_prior(
        dynamics.img_out(post.feat.deter), post.feat.stoch[..., :size].roll(1, -1)
    )
    assert not torch.allclose(post.levels[1].prior, other, atol=1e-3)


def test_bottom_depends_on_top_and_never_the_reverse():
    dynamics = build()
    torch.nn.init.normal_(dynamics.delta.weight)
    u = torch.randn(16)
    top = torch.randn(8)
    jacobian = torch.autograd.functional.jacobian(lambda z: dynamics._bottom_prior(u, z), top)
    assert jacobian.abs().amax((0, 1)).min() > 0
    # Through a whole step: moving the layers of the bottom moves the bottom's logits alone.
    deter, v = torch.randn(1, 16), torch.randn(1, 16)
    _, (top_logit, bottom_logit) = dynamics.post_step(deter, v, (None, None))
    for layer in (dynamics.prior_bottom, dynamics.delta):
        torch.nn.init.normal_(layer.weight)
    _, (top_after, bottom_after) = dynamics.post_step(deter, v, (None, None))
    assert torch.equal(top_logit, top_after) and not torch.allclose(bottom_logit, bottom_after)


def test_rep_does_not_reach_the_prior_through_the_residual():
    """Attached, the lineage's gradient there was 0.24 to 0.31."""
    dynamics = build()
    torch.nn.init.normal_(dynamics.delta.weight)
    losses, _ = kl_losses(observed(dynamics).levels, NO_FREE)
    shared = ("prior_top", "prior_bottom", "img_out")
    params = [p for name, p in dynamics.named_parameters() if name.startswith(shared)]
    grads = torch.autograd.grad(losses["rep"].sum(), params, allow_unused=True, retain_graph=True)
    assert all(g is None or g.abs().max() == 0 for g in grads)
    (reached,) = torch.autograd.grad(losses["rep"].sum(), dynamics.delta.weight)
    assert reached.abs().max() > 0


def test_free_nats_are_per_level_and_add_up_to_the_flat_ones():
    kl_config = NO_FREE._replace(free_nats=1.0)
    post = observed(build(kl_config=kl_config))
    top, bottom = post.levels
    far = top._replace(post=top.prior + 9 * torch.randn_like(top.prior))
    # The bottom costs its floor whatever the top does: nats cannot be lent from level to level.
    for levels, floors in (((top._replace(post=top.prior), bottom), 2), ((far, bottom), 1)):
        losses, metrics = kl_losses(levels, kl_config)
        above = metrics["kl_0"].item() if floors == 1 else 0.0
        assert losses["dyn"].mean().item() == pytest.approx(0.5 * (0.5 * floors + above), rel=1e-4)


@pytest.mark.parametrize(("stoch", "classes"), [([4], [32]), ([4, 8, 2], [32, 32, 32])])
def test_other_than_two_levels_are_refused(stoch, classes):
    with pytest.raises(ValueError, match="two levels"):
        build(stoch=stoch, classes=classes)


class AskedAboutItself(hrssm.HRSSM):
    """The lineage's fault: the bottom prior in the KL sees a top of its own drawing."""

    def priors(self, deter, stoch):
        u = self.img_out(deter)
        return self._top_prior(u), self._bottom_prior(
            u, self.sample_stoch(self._top_prior(u), torch.rand(*u.shape[:-1], 2, 1))
        )


def coherence(kind, steps=600, classes=8):
    """Train on unpredictable classes coded in both levels.
    -> how often the levels of a dream agree on the class.
    """
    torch.manual_seed(1)
    dynamics = build(
        kind, NO_FREE._replace(free_nats=0.2), stoch=(2, 2), classes=(8, 8), embed=classes, act=1
    )
    readers = torch.nn.ModuleList(torch.nn.Linear(16, classes) for _ in range(2))
    params = [*dynamics.parameters(), *readers.parameters()]
    adam = torch.optim.Adam(params, lr=3e-3)
    first = torch.zeros(64, 2, dtype=torch.bool)
    first[:, 0] = True
    action = torch.zeros(64, 2, 1)
    read = lambda stoch: [reader(z) for reader, z in zip(readers, stoch.chunk(2, -1), strict=True)]
    for _ in range(steps):
        label = torch.randint(0, classes, (64, 2))
        _, post = dynamics.observe(
            dynamics.initial(64), F.one_hot(label, classes).float(), action, first
        )
        losses, _ = dynamics.loss(post)
        guesses = sum(
            F.cross_entropy(logit.flatten(0, 1), label.flatten()) for logit in read(post.feat.stoch)
        )
        adam.zero_grad()
        (guesses + sum(loss.mean() for loss in losses.values())).backward()
        adam.step()
    with torch.no_grad():
        known = [logit.argmax(-1) for logit in read(post.feat.stoch)]
        assert min((guess == label).float().mean().item() for guess in known) > 0.75, (
            "the levels do not code the class"
        )
        start = dynamics.starts(None, post, 0)
        _, feat, _ = dynamics.imagine(start, torch.zeros(128, 8, 1), 8)
        top, bottom = (logit.argmax(-1) for logit in read(feat.stoch[:, 1:]))
        return (top == bottom).float().mean().item()


def test_dreamt_levels_agree():
    """Chance is 0.125; the lineage was there (0.13)."""
    assert coherence(hrssm.HRSSM) > 0.3


def test_dreamt_levels_disagree_in_the_negative_control():
    assert coherence(AskedAboutItself) < 0.2


# ---------------------------------------------------------------- from a flat state

FLAT = {"dynamics.type": "rssm", "dynamics.rssm.stoch": 5, "dynamics.rssm.classes": 4}
SPLIT = {"dynamics.type": "hrssm", "dynamics.hrssm.stoch": [2, 3], "dynamics.hrssm.classes": [4, 4]}


def outputs(agent, batch):
    """Features, reward, value and policy on a batch, with the mode instead of samples."""
    with torch.no_grad():
        obs = models.networks.preprocess(batch)
        _, post, _ = agent.world_model.observe(obs, sample=False)
        x = post.feat.cat()
        return (
            x,
            agent.world_model.reward(x).mode(),
            agent.behavior.critic(x).mode(),
            agent.behavior.actor(x).probs[0],
        )


def test_conversion_changes_nothing_until_training_does():
    flat, batch = make(EVERYTHING, **FLAT)
    for _ in range(4):
        flat.update(batch)
    for p in (flat.behavior.critic.out.weight, flat.world_model.reward.out.weight):
        torch.nn.init.normal_(p, std=0.1)
    split, _ = make(EVERYTHING, **SPLIT)
    mapping = split.load_state(copy.deepcopy(flat.save_state()))
    before = outputs(flat, batch)
    for ours, theirs in zip(outputs(split, batch), before, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert (
        mapping["world_model.dynamics.prior_bottom"] == "split"
        and mapping["world_model.dynamics.cell.linear"] == "mapped"
    )
    assert (
        mapping["model optimiser, dynamics.delta"] == "fresh"
        and "model optimiser, dynamics.cell.linear" not in mapping
    )
    # The moments of what carried over came along, and training goes on.
    assert torch.equal(
        split.optimizers["model"].state_dict()["decoder.vector.out.weight"]["exp_avg"],
        flat.optimizers["model"].state_dict()["decoder.vector.out.weight"]["exp_avg"],
    )
    weights = copy.deepcopy(split.state_dict())
    assert split.update(batch).isfinite().all()
    assert "world_model.dynamics.delta.weight" in changed(weights, split.state_dict())


def test_conversion_is_not_trivial():
    """Swapping two variables of the flat heads would show."""
    flat, batch = make(EVERYTHING, **FLAT)
    split, _ = make(EVERYTHING, **SPLIT)
    state = copy.deepcopy(flat.save_state())
    weight = state["params"]["world_model.dynamics.post_out.weight"]
    weight[:4], weight[4:8] = weight[4:8].clone(), weight[:4].clone()
    split.load_state(state)
    assert not torch.allclose(outputs(split, batch)[0], outputs(flat, batch)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        ({"dynamics.hrssm.stoch": [2, 4]}, r"\(20, 16\).*\(24, 16\)"),
        ({"dynamics.hrssm.stoch": [2, 6], "dynamics.hrssm.classes": [4, 2]}, r"cannot be split"),
        ({"dynamics.deter": 17}, r"\(51, 33\).*\(48, 32\)|\(17.*\(16"),
    ],
)
def test_sizes_that_cannot_be_mapped_are_refused_with_the_shapes(sizes, shapes):
    flat, _ = make(**FLAT)
    split, _ = make(**(SPLIT | sizes))
    with pytest.raises(ValueError, match=shapes):
        split.load_state(flat.save_state())


def test_two_levels_do_not_become_one():
    split, _ = make(**SPLIT)
    flat, _ = make(**FLAT)
    with pytest.raises(ValueError, match="nothing there"):
        flat.load_state(split.save_state())


def test_partial_decodes_keep_the_top_and_resample_the_bottom_prior():
    agent, batch = make(EVERYTHING, **SPLIT)
    _, post, _ = agent.world_model.observe(models.networks.preprocess(batch))
    (name, feat), *others = agent.world_model.dynamics.coarse_features(post.feat).items()
    assert name == "top" and not others
    assert torch.equal(feat.deter, post.feat.deter) and torch.equal(
        feat.stoch[..., :8], post.feat.stoch[..., :8]
    )
    assert not torch.equal(feat.stoch[..., 8:], post.feat.stoch[..., 8:])
