"""The laws of a latent state (DESIGN: one interface), for every one of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import tools
from hidreamer.dynamics import TYPES, make_dynamics
from hidreamer.dynamics.base import start_steps

B, T, E, A = 3, 9, 7, 4
SMALL = {"deter": 16, "hidden": 12}
SIZES = {"rssm": {"stoch": 3, "classes": 4}, "hrssm": {"stoch": [2, 3], "classes": [4, 3]}}
SIZES["hrvq"] = {
    "levels": 3,
    "groups": 2,
    "codes": 5,
    "code_dim": 4,
    "layers": 2,
    "heads": 2,
    "window": 4,
}


GRU = {"memory": "gru", "posterior_sees": "memory"}
AS_2024 = {"cell": "block_gru", "blocks": 2, "prior_layers": 2, "norm": "rms"}
TYPE_KINDS = {kind: (kind, {}) for kind in sorted(TYPES)}  # a type of one's own, too
VARIANTS = TYPE_KINDS | {
    "barrier": ("hrvq", {"mask": "barrier"}),
    "causal": ("hrvq", {"mask": "causal"}),
    "no chain": ("hrvq", {"chain": False}),
    "one level": ("hrvq", {"levels": 1}),
    "one level, no chain": ("hrvq", {"levels": 1, "chain": False}),
    "window of one": ("hrvq", {"window": 1}),
    "long window": ("hrvq", {"window": 30}),
    "nearest": ("hrvq", {"posterior": "nearest"}),
    "fsq": ("hrvq", {"posterior": "fsq", "codes": 12}),
    "frozen": ("hrvq", {"posterior": "frozen"}),
    "stacked": ("hrvq", {"memory": "stacked"}),
    "stacked, coarse": ("hrvq", {"memory": "stacked", "memory_reads": "coarse", "copy": True}),
    "stacked, no chain": ("hrvq", {"memory": "stacked", "chain": False}),
    "gru": ("hrvq", {"memory": "gru"}),
    "gru, coarse, nearest": (
        "hrvq",
        {"memory": "gru", "memory_reads": "coarse", "posterior": "nearest", "copy": True},
    ),
    "gru, memory seen": ("hrvq", GRU | {"residual": "expected", "copy": True}),
    "gru, innovation": ("hrvq", GRU | {"residual": "innovation", "memory_reads": "coarse"}),
    "copy": ("hrvq", {"copy": True}),
    "rms": ("hrvq", {"norm": "rms"}),
    "stacked, rms": ("hrvq", {"memory": "stacked", "norm": "rms"}),
    "gru, as of 2024": ("hrvq", {"memory": "gru", **AS_2024}),
    "gru, memory seen, as of 2024": ("hrvq", GRU | AS_2024),
}
# For the laws of ``observe`` alone.
KINDS = TYPE_KINDS | {name: VARIANTS[name] for name in ("stacked", "gru")}
KINDS["gru, memory seen"] = ("hrvq", GRU)


def build(kind, dtype=torch.float64, action_scale=1.0, **overrides):
    """A small dynamics whose zero-initialised layers are random,
    so that every output depends on every input.
    """
    config = tools.load_config([], {"dynamics.type": kind}).dynamics.tree() | SMALL
    config["action_scale"] = action_scale
    config[kind] = config[kind] | SIZES.get(kind, {}) | overrides
    dynamics = make_dynamics(config, E, A)
    for p in dynamics.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.5)
    return dynamics.to(dtype)


def inputs(dtype=torch.float64, firsts=((0, 0), (1, 0), (2, 0), (1, 4), (2, 7))):
    embed = torch.randn(B, T, E, dtype=dtype)
    action = F.one_hot(torch.randint(0, A, (B, T)), A).to(dtype)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    for b, t in firsts:
        is_first[b, t] = True
    return embed, action, is_first


def flat(post):
    return [*post.feat, *(x for level in post.levels for x in level)]


def close(xs, ys):
    return all(torch.allclose(x, y, rtol=0, atol=1e-10) for x, y in zip(xs, ys, strict=True))


@pytest.fixture(params=KINDS)
def dynamics(request):
    kind, overrides = KINDS[request.param]
    return build(kind, **overrides)


def observe(dynamics, embed, action, is_first, carry=None):
    carry = dynamics.initial(len(embed)) if carry is None else carry
    return dynamics.observe(carry, embed, action, is_first, sample=False)


def test_shapes(dynamics):
    carry, post = dynamics.observe(dynamics.initial(B), *inputs())
    assert post.feat.deter.shape == (B, T, dynamics.deter_dim)
    assert post.feat.stoch.shape == (B, T, dynamics.stoch_dim)
    assert post.feat.cat().shape == (B, T, dynamics.feat_dim)
    assert all(
        level.post.shape == level.prior.shape and level.post.shape[:2] == (B, T)
        for level in post.levels
    )
    losses, metrics = dynamics.loss(post)
    assert all(loss.shape == (B, T) for loss in losses.values())
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())
    _, feat, action = dynamics.imagine(
        dynamics.starts(carry, post, T), lambda feat: torch.zeros(B * T, A).double(), 5
    )
    assert feat.deter.shape == (B * T, 6, dynamics.deter_dim) and action.shape == (B * T, 6, A)


def test_law_chunk(dynamics):
    embed, action, is_first = inputs()
    carry_all, post = observe(dynamics, embed, action, is_first)
    for cut in (1, 4, 5):
        carry, first = observe(dynamics, embed[:, :cut], action[:, :cut], is_first[:, :cut])
        carry, second = observe(dynamics, embed[:, cut:], action[:, cut:], is_first[:, cut:], carry)
        assert close(
            flat(post), [torch.cat(pair, 1) for pair in zip(flat(first), flat(second), strict=True)]
        )
        # The carries lead to the same dreams.
        given = torch.randn(B, 4, A).double()
        assert close(
            dynamics.imagine(carry_all, given, 4, False)[1],
            dynamics.imagine(carry, given, 4, False)[1],
        )


def test_law_acting_is_observing_step_by_step(dynamics):
    embed, action, is_first = inputs()
    _, post = observe(dynamics, embed, action, is_first)
    carry, steps = dynamics.initial(B), []
    for t in range(T):
        carry, step = observe(
            dynamics, embed[:, t : t + 1], action[:, t : t + 1], is_first[:, t : t + 1], carry
        )
        steps.append(flat(step))
    assert close(flat(post), [torch.cat(xs, 1) for xs in zip(*steps, strict=True)])


def test_law_reset(dynamics):
    embed, action, is_first = inputs()
    _, post = observe(dynamics, embed, action, is_first)
    other = embed.clone(), action.clone(), is_first.clone()
    other[0][1, :4], other[1][1, :5] = (
        9.0,
        9.0,
    )  # all before step 4 of sequence 1, and the action into it
    noise = type(dynamics.initial(B))(
        *(torch.randn_like(x) if x.is_floating_point() else x for x in dynamics.initial(B))
    )
    _, changed = observe(dynamics, *other, noise)
    assert close([x[1, 4:] for x in flat(post)], [x[1, 4:] for x in flat(changed)])
    assert not torch.allclose(post.feat.deter[1, 1:4], changed.feat.deter[1, 1:4])


def test_memory_reaches_across_steps(dynamics):
    """The reset law would also hold for a state without memory; this one has some."""
    embed, action, is_first = inputs()
    _, post = observe(dynamics, embed, action, is_first)
    embed = embed.clone()
    embed[0, 2] *= -3.0
    _, changed = observe(dynamics, embed, action, is_first)
    assert (post.feat.deter[0, 3:] - changed.feat.deter[0, 3:]).abs().amax(-1).min() > 1e-6
    assert close([x[0, :2] for x in flat(post)], [x[0, :2] for x in flat(changed)])


def test_law_starts(dynamics):
    embed, action, is_first = inputs()
    carry, post = observe(dynamics, embed, action, is_first)
    given = torch.randn(
        B * T, 4, A
    ).double()  # other actions than the replayed ones, which must not be peeked at
    _, feat, _ = dynamics.imagine(dynamics.starts(carry, post, T), given, 4, sample=False)
    for t in range(T):
        carry_t, _ = observe(dynamics, embed[:, : t + 1], action[:, : t + 1], is_first[:, : t + 1])
        _, feat_t, _ = dynamics.imagine(carry_t, given.unflatten(0, (B, T))[:, t], 4, sample=False)
        assert close(feat_t, [x.unflatten(0, (B, T))[:, t] for x in feat])


@pytest.mark.parametrize(
    ("n", "steps"), [(0, range(9)), (9, range(9)), (3, (2, 5, 8)), (4, (2, 4, 6, 8)), (1, (8,))]
)
def test_fewer_starts(dynamics, n, steps):
    carry, post = observe(dynamics, *inputs())
    given = torch.randn(B, len(steps), 2, A).double()
    _, some, _ = dynamics.imagine(
        dynamics.starts(carry, post, n), given.flatten(0, 1), 2, sample=False
    )
    assert list(range(T))[start_steps(T, n)] == list(steps)
    assert torch.allclose(some.deter[:, 0].unflatten(0, (B, -1)), post.feat.deter[:, list(steps)])


def test_law_purity(dynamics):
    args = inputs()
    carry = dynamics.initial(B)
    kept = [x.clone() for x in (*args, *carry)]
    new, post = dynamics.observe(carry, *args)
    starts = dynamics.starts(new, post, T)
    kept_too = [x.clone() for x in (*flat(post), *new, *starts)]
    dynamics.loss(post)
    dynamics.imagine(starts, lambda feat: torch.ones(B * T, A).double(), 3)
    assert all(torch.equal(x, y) for x, y in zip(kept, (*args, *carry), strict=True))
    assert all(
        torch.equal(x, y) for x, y in zip(kept_too, (*flat(post), *new, *starts), strict=True)
    )


@pytest.fixture(params=VARIANTS)
def variant(request):
    kind, overrides = VARIANTS[request.param]
    return build(kind, **overrides)


BLOCKS = {"block_gru": ("rssm", {"cell": "block_gru", "blocks": 2})}
BLOCKS["gru, as of 2024"] = VARIANTS["gru, as of 2024"]


@pytest.mark.parametrize("name", [*KINDS, *BLOCKS])
def test_the_weights_that_read_an_action_are_those_that_are_scaled(name):
    """Hardly anything of an action is left where they begin at about 0; the state is still read."""
    kind, overrides = (KINDS | BLOCKS)[name]

    def dreamt(scale):
        torch.manual_seed(0)
        dynamics = build(kind, action_scale=scale, **overrides)
        carry = dynamics.initial(A)
        carry = carry._replace(stoch=torch.eye(A, dynamics.stoch_dim).double())
        action = torch.eye(A).double().unsqueeze(1).repeat(1, 2, 1)  # (A, 2, A)
        same = dynamics.select(carry, torch.zeros(A, dtype=torch.long))
        return [dynamics.imagine(x, action, 2, False)[1].deter[:, 1] for x in (same, carry)]

    alone, with_states = dreamt(1e-12)
    assert torch.allclose(alone, alone[:1].expand_as(alone))
    assert name == "hrvq" or not torch.allclose(with_states[1:], with_states[:1])
    alone, _ = dreamt(1.0)
    assert not torch.allclose(alone[1:], alone[:1])
    assert not torch.allclose(alone, dreamt(3.0)[0])


def carries(dynamics):
    """Every kind of carry that the interface gives out, and what may follow it, by name."""
    args = inputs()
    seen, post = dynamics.observe(dynamics.initial(B), *args)
    starts = dynamics.starts(seen, post, 0)
    given = torch.randn(B * T, 6, A).double()
    dreamt, *_ = dynamics.imagine(starts, given, 2)
    beyond, *_ = dynamics.imagine(starts, given, 6)  # further than the window
    one, *_ = dynamics.imagine(seen, given[:B], 1)
    back, _ = dynamics.observe(one, *inputs(firsts=((0, 2),)))
    of_initial, *_ = dynamics.imagine(dynamics.initial(B), given[:B], 3)
    after, post = dynamics.observe(one, *inputs(firsts=((1, 3),)))
    return {
        "initial": dynamics.initial(B),
        "observe": seen,
        "starts": starts,
        "imagine": dreamt,
        "imagine beyond the window": beyond,
        "imagine from initial": of_initial,
        "observe after imagine": back,
        "starts after that": dynamics.starts(after, post, 3),
        "imagine again": dynamics.imagine(dreamt, given, 1)[0],
    }


def glued(parts):
    """The features of a dream in parts: each begins with the last state of the one before."""
    for before, after in itertools.pairwise(parts):
        assert close([x[:, -1] for x in before], [x[:, 0] for x in after])
    return [torch.cat([x[0], *(y[:, 1:] for y in x[1:])], 1) for x in zip(*parts, strict=True)]


def dream(dynamics, carry, actor, lengths, sample):
    """Imagine ``lengths`` steps one after another. -> features, actions, as of one dream."""
    torch.manual_seed(5)
    feats, actions, done = [], [], 0
    for length in lengths:
        part = actor[:, done : done + length] if isinstance(actor, torch.Tensor) else actor
        carry, feat, action = dynamics.imagine(carry, part, length, sample)
        assert close(dynamics.feat(carry), [x[:, -1] for x in feat])
        feats.append(feat)
        actions.append(action[:, :-1])
        done += length
    return glued(feats), torch.cat(actions, 1)


@torch.no_grad()
def test_law_a_carry_is_a_carry(variant):
    """H1 steps and then H2 are H1 + H2 steps: from every carry, drawn or not,
    with given actions or a policy.
    """
    weight = torch.randn(variant.feat_dim, A).double()
    policy = lambda feat: torch.tanh(feat.cat() @ weight)
    for name, carry in carries(variant).items():
        given = torch.randn(len(variant.feat(carry).deter), 6, A).double()
        for actor, sample, parts in ((given, True, [2, 4]), (policy, False, [1] * 6)):
            whole, taken = dream(variant, carry, actor, [6], sample)
            again, actions = dream(variant, carry, actor, parts, sample)
            assert close(again, whole) and close([actions], [taken]), (name, parts)
            assert actor is policy or whole[0].std(0).amax() > 1e-3, (
                "this test needs dreams that differ"
            )


def test_law_memory_imagined_and_observed_is_one(variant):
    """An action leads from any carry to the same memory,
    whether what follows is imagined or observed.
    """
    for name, carry in carries(variant).items():
        count = len(variant.feat(carry).deter)
        action, embed = torch.randn(count, 1, A).double(), torch.randn(count, 1, E).double()
        _, feat, _ = variant.imagine(carry, action, 1)
        _, post = variant.observe(carry, embed, action, torch.zeros(count, 1, dtype=torch.bool))
        assert close([feat.deter[:, 1]], [post.feat.deter[:, 0]]), name


def test_law_observing_from_a_start_is_observing_on(variant):
    """Starts can be observed from as well: as from the carry that was reached there."""
    embed, action, is_first = inputs()
    carry, post = observe(variant, embed, action, is_first)
    starts = variant.starts(carry, post, 0)
    again = [
        x.repeat(T, *(1,) * (x.ndim - 1)).unflatten(0, (T, B)).transpose(0, 1)
        for x in inputs(firsts=((0, 3),))
    ]
    _, found = variant.observe(starts, *(x.flatten(0, 1) for x in again), sample=False)
    for t in range(T):
        carry_t, _ = observe(variant, embed[:, : t + 1], action[:, : t + 1], is_first[:, : t + 1])
        _, expected = variant.observe(carry_t, *(x[:, t] for x in again), sample=False)
        assert close(flat(expected), [x.unflatten(0, (B, T))[:, t] for x in flat(found)])


def test_law_purity_of_an_imagined_carry(variant):
    """Dreams and observations that go on from it leave it as it was."""
    starts = carries(variant)["starts"]
    given = torch.randn(B * T, 5, A).double()
    for graphs in ((False, False), (False, True), (True, False)):
        with torch.set_grad_enabled(graphs[0]):
            carry, feat, _ = variant.imagine(starts, given, 2)
        kept = [x.clone() for x in feat]
        with torch.set_grad_enabled(graphs[1]):
            first = variant.imagine(carry, given, 5, sample=False)[1]
            variant.imagine(carry, 2.0 * given, 3)
            variant.observe(carry, *(x[:1].repeat(B * T, *(1,) * (x.ndim - 1)) for x in inputs()))
            again = variant.imagine(carry, given, 5, sample=False)[1]
        assert (
            close(first, again)
            and close(feat, kept)
            and close(variant.feat(carry), [x[:, -1] for x in kept])
        )


def test_the_gradient_goes_through_an_imagined_carry(variant):
    """What ``actor.gradient: dynamics`` follows through one dream it follows through two of half
    the length.
    """
    for name in ("observe", "starts"):
        found = []
        carry = carries(variant)[name]
        given = torch.randn(len(variant.feat(carry).deter), 6, A).double().requires_grad_()
        for lengths in ([6], [2, 4]):
            feat, _ = dream(variant, carry, given, lengths, sample=True)
            weighted = sum((x[:, -1] * torch.arange(1.0, 1.0 + x.shape[-1])).sum() for x in feat)
            found.append([*feat, *torch.autograd.grad(weighted, given, retain_graph=True)])
        assert found[0][-1][:, -1].abs().max() > 1e-6 and close(*found)


@torch.no_grad()
def test_law_rows_of_a_carry_go_on_as_they_were(variant):
    """Rows that are picked, reordered, repeated and joined dream on as where they stood."""
    found = carries(variant)
    del found["initial"]
    given = {
        name: torch.randn(len(variant.feat(c).deter), 3, A).double() for name, c in found.items()
    }
    whole = {}
    for name, carry in found.items():
        whole[name] = variant.imagine(carry, given[name], 3, sample=False)[1]
    for name, carry in found.items():
        index = torch.tensor([2, 0, 2])
        for other, second in found.items():
            joined = variant.join([variant.select(carry, index), second])
            action = torch.cat([given[name][index], given[other]])
            _, feat, _ = variant.imagine(joined, action, 3, sample=False)
            expected = [
                torch.cat([x[index], y]) for x, y in zip(whole[name], whole[other], strict=True)
            ]
            assert close(feat, expected), (name, other)


def test_rows_of_a_single_sequence(variant):
    """A long episode's start is picked without copying what all starts share."""
    embed, action, is_first = (x[:1] for x in inputs(firsts=((0, 0), (0, 4))))
    carry, post = variant.observe(variant.initial(1), embed, action, is_first)
    starts, given = variant.starts(carry, post, 0), torch.randn(T, 3, A).double()
    _, whole, _ = variant.imagine(starts, given, 3, sample=False)
    index = torch.tensor([7, 5])
    _, some, _ = variant.imagine(variant.select(starts, index), given[index], 3, sample=False)
    assert close(some, [x[index] for x in whole])


@torch.no_grad()
def test_classes_and_prior_logits(variant):
    """They name what stands in stoch, and what an imagined state was drawn from."""
    carry, post = variant.observe(variant.initial(B), *inputs())
    sizes, shapes = variant.level_dims, variant.shapes
    assert sum(sizes) == variant.stoch_dim
    parts = post.feat.stoch.split(sizes, -1)
    for index, part, (variables, classes) in zip(variant.classes(post), parts, shapes, strict=True):
        assert index.shape == (B, T, variables) and index.min() >= 0 and index.max() < classes
        by_class = {}
        for i in range(variables):
            values = part.unflatten(-1, (variables, -1))[..., i, :].flatten(0, 1)
            for c, value in zip(index[..., i].flatten().tolist(), values, strict=True):
                assert torch.equal(by_class.setdefault((i, c), value), value)
        assert len(by_class) > variables
    dreamt, feat, _ = variant.imagine(carry, torch.randn(B, 2, A).double(), 2, sample=False)
    logits = variant.prior_logits(dreamt)
    assert [x.shape for x in logits] == [(B, *shape) for shape in shapes]
    if not hasattr(variant, "quantizer"):
        modes = torch.cat([F.one_hot(x.argmax(-1), x.shape[-1]).flatten(1) for x in logits], -1)
        assert torch.equal(modes.double(), feat.stoch[:, -1])
    else:
        for i, (logit, part) in enumerate(
            zip(logits, feat.stoch[:, -1].split(sizes, -1), strict=True)
        ):
            onehot = F.one_hot(logit.argmax(-1), logit.shape[-1]).double()
            code = variant.quantizer.decode(i, onehot).flatten(1)
            assert torch.allclose(variant._stoch(code), part)


def gradient(loss, xs):
    grads = torch.autograd.grad(loss, xs, allow_unused=True, retain_graph=True)
    return [0.0 if g is None else g.abs().max().item() for g in grads]


def test_law_gradient_of_the_kl(dynamics):
    embed, action, is_first = inputs()
    embed.requires_grad_()
    dynamics.kl_config = dynamics.kl_config._replace(rep=0.1, free_nats=0.0)
    _, post = dynamics.observe(dynamics.initial(B), embed, action, is_first)
    losses, _ = dynamics.loss(post)
    posts, priors = zip(*post.levels, strict=True)
    for t in range(T):
        # At its own step, dyn trains the prior alone and rep the posterior alone.
        (encoder,) = torch.autograd.grad(
            losses["dyn"][:, t].sum(), embed, retain_graph=True, allow_unused=True
        )
        assert encoder is None or encoder[:, t:].abs().max() == 0.0
    assert min(gradient(losses["dyn"].sum(), priors)) > 0.0
    assert gradient(losses["dyn"].sum(), posts) == [0.0] * len(posts)
    assert min(gradient(losses["rep"].sum(), posts)) > 0.0
    assert gradient(losses["rep"].sum(), priors) == [0.0] * len(priors)
    assert gradient(losses["rep"].sum(), [embed])[0] > 0.0


def test_rep_gives_the_prior_layers_nothing(dynamics):
    dynamics.kl_config = dynamics.kl_config._replace(rep=0.1, free_nats=0.0)
    _, post = dynamics.observe(dynamics.initial(B), *inputs())
    losses, _ = dynamics.loss(post)
    prior = [p for name, p in dynamics.named_parameters() if name.startswith("prior")]
    assert prior
    assert gradient(losses["rep"].sum(), prior) == [0.0] * len(prior)
    assert min(gradient(losses["dyn"].sum(), prior)) > 0.0


def test_every_parameter_is_trained(dynamics):
    dynamics.kl_config = dynamics.kl_config._replace(free_nats=0.0)
    _, post = dynamics.observe(dynamics.initial(B), *inputs())
    loss = sum(x.sum() for x in dynamics.loss(post)[0].values()) + (post.feat.cat() ** 2).sum()
    names, params = zip(*dynamics.named_parameters(), strict=True)
    assert [name for name, g in zip(names, gradient(loss, params), strict=True) if g == 0.0] == []


def test_starts_are_detached(dynamics):
    carry, post = dynamics.observe(dynamics.initial(B), *inputs())
    assert not any(x.requires_grad for x in dynamics.starts(carry, post, T))


def test_law_teacher_forcing(dynamics):
    """One imagined step with the real action carries the memory that training
    has at the next step.
    """
    embed, action, is_first = inputs(firsts=((0, 0), (1, 0), (2, 0)))
    carry, post = observe(dynamics, embed, action, is_first)
    following = torch.cat([action[:, 1:], action[:, :1]], 1).reshape(
        B * T, 1, A
    )  # the last one leads nowhere
    _, feat, _ = dynamics.imagine(dynamics.starts(carry, post, T), following, 1, sample=False)
    assert close([feat.deter.unflatten(0, (B, T))[:, :-1, 1]], [post.feat.deter[:, 1:]])


def test_law_finite_under_bfloat16(dynamics):
    dynamics = dynamics.float()
    embed, action, is_first = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        carry, post = dynamics.observe(dynamics.initial(B), 100 * embed, action, is_first)
        losses, _ = dynamics.loss(post)
        _, feat, _ = dynamics.imagine(
            dynamics.starts(carry, post, T), action[:, :1].repeat(T, 5, 1), 5
        )
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in losses.values())
    assert all(x.isfinite().all() for x in feat)


def test_free_bits_are_shared(dynamics):
    """A posterior equal to its prior costs exactly free x (dyn + rep),
    whatever the number of levels.
    """
    dynamics.kl_config = dynamics.kl_config._replace(rep=0.1, free_nats=1.0)
    _, post = dynamics.observe(dynamics.initial(B), *inputs())
    same = post._replace(levels=tuple(level._replace(post=level.prior) for level in post.levels))
    losses, metrics = dynamics.loss(same)
    total = losses["dyn"] + losses["rep"]
    assert torch.allclose(total, torch.full_like(total, 0.5 + 0.1))
    assert all(metrics[f"kl_{i}"].abs() < 1e-6 for i in range(len(post.levels)))
