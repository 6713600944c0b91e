"""Tokens and transformer: one computation for training, acting and dreaming,
and losses that reach what they should.
"""

import pytest
import torch
import torch.nn.functional as F
from test_agent import EVERYTHING, VECTOR, make

import models
import networks
import tools
from hidreamer import branches, cost, parallel, rollout
from hidreamer.dynamics import hrvq, make_dynamics
from hidreamer.quantizer import KINDS
from hidreamer.transformer import KV, MASKED, Bias, as_bias, attend_shared

E, A = 7, 4
SIZES = {
    "levels": 3,
    "groups": 2,
    "codes": 5,
    "code_dim": 4,
    "layers": 2,
    "heads": 2,
    "window": 5,
    "mask": "hierarchical",
}


def build(dtype=torch.float64, embed=E, **overrides):
    config = tools.load_config([], {"dynamics.type": "hrvq"}).dynamics.tree() | {
        "deter": 16,
        "hidden": 24,
    }
    config["hrvq"] = config["hrvq"] | SIZES | overrides
    return make_dynamics(config, embed, A).to(dtype)


def inputs(
    batch=3, length=14, dtype=torch.float64, firsts=((0, 0), (1, 0), (2, 0), (1, 4), (2, 9))
):
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    for b, t in firsts:
        is_first[b, t] = True
    action = F.one_hot(torch.randint(0, A, (batch, length)), A).to(dtype)
    return torch.randn(batch, length, E, dtype=dtype), action, is_first


STACKED = {"memory": "stacked"}
VARIANTS = [
    {},
    STACKED,
    STACKED | {"memory_reads": "coarse", "copy": True},
    {"mask": "barrier", "chain": False},
    {"mask": "barrier"},
    {"mask": "causal"},
    {"levels": 1},
    {"chain": False},
    {"levels": 2, "chain": False},
]
FRAME = {"memory": "gru"}
SEEN = FRAME | {"posterior_sees": "memory"}
RECURRENT = [FRAME, SEEN, FRAME | {"memory_reads": "coarse", "chain": False}]
POSTERIORS = [{"posterior": "nearest"}, {"posterior": "fsq", "codes": 12}, {"posterior": "frozen"}]


@pytest.mark.parametrize("variant", VARIANTS + POSTERIORS + RECURRENT, ids=str)
def test_cached_stepping_equals_the_parallel_pass(variant):
    """Across resets and far beyond the window, to 1e-10."""
    dynamics = build(**variant)
    embed, action, is_first = inputs()
    with torch.no_grad():  # as acting does; what follows is computed as training does
        _, whole = dynamics.observe(dynamics.initial(3), embed, action, is_first, sample=False)
    carry = dynamics.initial(3)
    for t in range(embed.shape[1]):
        now = slice(t, t + 1)
        carry, step = dynamics.observe(
            carry, embed[:, now], action[:, now], is_first[:, now], sample=False
        )
        assert not hasattr(carry, "segment") or carry.segment.shape[1] <= 5
        for a, b in zip(
            (*step.feat, *(level.prior for level in step.levels)),
            (*whole.feat, *(level.prior for level in whole.levels)),
            strict=True,
        ):
            assert torch.allclose(a[:, 0], b[:, t], rtol=0, atol=1e-10)


def test_the_window_ends_where_it_should():
    """What lies further back than layers x (window - 1) steps cannot be felt;
    what lies one window back can.
    """
    dynamics = build(window=3)
    embed, action, is_first = inputs(firsts=((0, 0), (1, 0), (2, 0)))
    _, before = dynamics.observe(dynamics.initial(3), embed, action, is_first, sample=False)
    embed[:, 2] += 3 * torch.randn(E, dtype=torch.float64)
    _, after = dynamics.observe(dynamics.initial(3), embed, action, is_first, sample=False)
    moved = (before.feat.deter - after.feat.deter).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def codes_of(dynamics, stoch):
    """States (B, T, Z) as the codes that ``encode`` would have found;
    their posterior is of no use.
    """
    groups, dim = dynamics.code_shape
    code = stoch.unflatten(-1, (dynamics.levels, groups, dim)) * dim**0.5
    index = torch.zeros(code.shape[:-1], dtype=torch.long)
    logit = tuple(stoch.new_zeros(*stoch.shape[:2], groups, 5) for _ in range(dynamics.levels))
    return hrvq.Codes(code, index, logit, code)


@pytest.mark.parametrize("graph", [False, True], ids=["in place", "with a graph"])
@pytest.mark.parametrize("variant", [*VARIANTS, FRAME, RECURRENT[-1]], ids=str)
def test_prefix_sharing_imagination_equals_re_encoding_every_start(variant, graph):
    """Imagine from every step at once; then encode each start's past and its dream as one sequence.

    Float32, 1e-5.
    """
    dynamics = build(torch.float32, **variant)
    embed, action, is_first = inputs(dtype=torch.float32)
    length, horizon = embed.shape[1], 8
    carry, post = dynamics.observe(dynamics.initial(3), embed, action, is_first)
    given = F.one_hot(
        torch.randint(0, A, (3 * length, horizon)), A
    ).float()  # not the replayed actions
    with torch.set_grad_enabled(graph):
        _, feat, _ = dynamics.imagine(dynamics.starts(carry, post, 0), given, horizon)
    stoch, deter = (x.unflatten(0, (3, length)) for x in (feat.stoch, feat.deter))  # (B, T, H+1, .)
    for t in range(length):
        codes = torch.cat([post.feat.stoch[:, : t + 1], stoch[:, t, 1:]], 1)
        actions = torch.cat([action[:, : t + 1], given.unflatten(0, (3, length))[:, t]], 1)
        firsts = torch.cat([is_first[:, : t + 1], torch.zeros(3, horizon, dtype=torch.bool)], 1)
        _, again = dynamics.follow(dynamics.initial(3), codes_of(dynamics, codes), actions, firsts)
        assert torch.allclose(again.feat.deter[:, t:], deter[:, t], rtol=0, atol=1e-5)


def test_observing_is_encoding_and_following():
    dynamics = build()
    embed, action, is_first = inputs()
    torch.manual_seed(1)
    carry, post = dynamics.observe(dynamics.initial(3), embed, action, is_first)
    torch.manual_seed(1)
    codes = dynamics.encode(embed)
    again, followed = dynamics.follow(dynamics.initial(3), codes, action, is_first)
    assert all(
        torch.equal(a, b)
        for a, b in zip((*carry, *post.feat), (*again, *followed.feat), strict=True)
    )
    assert all(torch.equal(a.post, b) for a, b in zip(post.levels, codes.logit, strict=True))


@pytest.mark.parametrize("variant", [*VARIANTS, FRAME, RECURRENT[-1]], ids=str)
def test_training_on_a_dream_finds_what_was_dreamt(variant):
    """Follow the codes of a dream: the same features, every part of them,
    and each code is what the prior says there.

    The lineage's imagination fed a wrong third of its features for its whole life.
    """
    dynamics = build(**variant)
    embed, action, is_first = inputs(firsts=((0, 0), (1, 0), (2, 0)))
    start, _ = dynamics.observe(dynamics.initial(3), embed[:, :1], action[:, :1], is_first[:, :1])
    _, feat, _ = dynamics.imagine(start, action[:, 1:], embed.shape[1] - 1, sample=False)
    _, post = dynamics.follow(dynamics.initial(3), codes_of(dynamics, feat.stoch), action, is_first)
    assert torch.allclose(feat.deter, post.feat.deter, atol=1e-10)
    assert torch.allclose(feat.stoch, post.feat.stoch, atol=1e-10)
    likeliest = [
        F.one_hot(level.prior.argmax(-1), 5).double() for level in post.levels
    ]  # (B, T, G, K) each
    codes = [dynamics.quantizer.decode(i, onehot).flatten(2) for i, onehot in enumerate(likeliest)]
    assert torch.allclose(
        dynamics._stoch(torch.cat(codes, -1))[:, 1:], feat.stoch[:, 1:], atol=1e-10
    )
    assert all(onehot.argmax(-1).unique().numel() > 1 for onehot in likeliest), (
        "this test needs codes that differ"
    )


@pytest.mark.parametrize(
    ("temperature", "unimix", "share"), [(1.0, 0.0, 0.8), (2.0, 0.0, 0.5), (1.0, 0.5, 0.5)]
)
def test_dreams_draw_from_the_mixed_prior(temperature, unimix, share):
    """A prior of 0.8 and four times 0.05; cooled and mixed,
    how often its likeliest code is drawn can be read off.
    """
    dynamics = build(levels=1, groups=1, temperature=[temperature])
    dynamics.kl_config = dynamics.kl_config._replace(unimix=unimix)
    torch.nn.init.zeros_(dynamics.prior[0].weight)
    dynamics.prior[0].bias.data = torch.tensor([0.05, 0.05, 0.8, 0.05, 0.05]).double().log()
    _, feat, _ = dynamics.imagine(dynamics.initial(4000), torch.zeros(4000, 1, A).double(), 1)
    likeliest = dynamics._stoch(dynamics.quantizer.book[0, 0, 2])
    assert (feat.stoch[:, 1] == likeliest).all(-1).double().mean().item() == pytest.approx(
        share, abs=0.03
    )


def memory_jacobian(dynamics, embed, action, is_first):
    """How each memory (T, D) moves with each code (T, D, 1, T, L, G, d)
    and with each action (T, D, 1, T, A).
    """
    found = dynamics.encode(embed)

    def memory(code, action):
        return dynamics.follow(dynamics.initial(1), found._replace(code=code), action, is_first)[
            1
        ].feat.deter[0]

    return torch.autograd.functional.jacobian(memory, (found.code.detach(), action))


def test_nothing_crosses_a_reset():
    """Exactly zero, by the Jacobian: steps before is_first, and the action into it,
    move nothing after it.
    """
    codes, actions = memory_jacobian(
        build(posterior="nearest"), *inputs(batch=1, length=8, firsts=((0, 0), (0, 5)))
    )  # (T, D, 1, T, .)
    for jacobian in (codes[:, :, 0].abs().amax((1, 3, 4, 5)), actions[:, :, 0].abs().amax((1, 3))):
        assert jacobian[5:, :5].max() == 0.0
        assert jacobian[6:, 5:7].max() > 1e-6 and jacobian[1:5, :5].max() > 1e-6
    assert actions[5:, :, 0, 5].abs().max() == 0.0


BARRIERS = [{"mask": "barrier"}, {"memory": "stacked"}, {"memory": "gru"}]
COARSE = {"memory_reads": "coarse"}
READS = [*BARRIERS, {}, BARRIERS[1] | COARSE, BARRIERS[2] | COARSE]


@pytest.mark.parametrize("variant", READS, ids=str)
def test_what_reaches_the_memory_at_depth_three(variant):
    """Behind the barrier, or where the memory reads coarse codes, no finer code, ever; with the
    hierarchical mask and in a memory of all codes those of the same episode do.
    """
    dynamics = build(layers=3, posterior="nearest", **variant)
    stopped = variant.get("mask") == "barrier" or "memory_reads" in variant
    codes, _ = memory_jacobian(dynamics, *inputs(batch=1, length=6, firsts=((0, 0),)))
    fine, coarse = (
        codes[:, :, 0, :, i].abs().amax((1, 3, 4)) for i in (slice(1, None), slice(0, 1))
    )  # (T, T, ...)
    assert coarse.max() > 1e-4
    assert fine.max() == 0.0 if stopped else fine.max() > 1e-4


@pytest.mark.parametrize("posterior", ["sampled", "nearest", "fsq"])
def test_the_image_loss_reaches_the_encoder(posterior):
    """In the nearest relative the decoder read raw codebook rows:
    the image loss gave the encoder exactly nothing.
    """
    agent, batch = make(
        EVERYTHING, **{"dynamics.type": "hrvq", "dynamics.hrvq.posterior": posterior}
    )
    for name in ("image", "reward", "cont"):
        torch.nn.init.normal_(agent.world_model.reward.out.weight)
        losses, *_ = agent.world_model.loss(models.networks.preprocess(batch))
        grads = torch.autograd.grad(
            losses[name].sum(), list(agent.world_model.encoder.parameters())
        )
        assert max(g.abs().max().item() for g in grads) > 1e-8, name


@pytest.mark.parametrize("variant", [*VARIANTS, FRAME, RECURRENT[-1]], ids=str)
def test_later_steps_teach_codes_through_the_memory_alone(variant):
    """What a later memory holds shapes the code it was read from;
    how well a code is predicted does not.
    """
    dynamics = build(**variant)
    embed, action, is_first = inputs(firsts=((0, 0), (1, 0), (2, 0), (1, 4)))
    embed.requires_grad_()
    _, post = dynamics.observe(dynamics.initial(3), embed, action, is_first)
    (grad,) = torch.autograd.grad(post.feat.deter[:, 5, :3].sum(), embed, retain_graph=True)
    assert (
        grad[0, 3].abs().max() > 1e-6 and grad[1, 3].abs().max() == 0.0
    )  # the second's episode starts at 4
    (none,) = torch.autograd.grad(dynamics.loss(post)[0]["dyn"].sum(), embed, allow_unused=True)
    assert none is None or none.abs().max() == 0.0


@pytest.mark.parametrize("variant", [{"mask": "barrier"}, *READS[-2:], SEEN | COARSE], ids=str)
def test_coarse_dreams_ignore_fine_levels_behind_the_barrier(variant):
    """The memory and L0 of a dream are the same whatever the finer levels were."""
    dynamics = build(**variant)
    carry, _ = dynamics.observe(dynamics.initial(3), *inputs())
    given = torch.randn(3, 5, A).double()
    _, before, _ = dynamics.imagine(carry, given, 5, sample=False)
    for prior in dynamics.prior[1:]:
        torch.nn.init.normal_(prior.weight)
    _, after, _ = dynamics.imagine(carry, given, 5, sample=False)
    size = dynamics.stoch_dim // 3
    assert torch.equal(before.deter, after.deter)
    assert torch.equal(before.stoch[..., :size], after.stoch[..., :size])
    assert not torch.allclose(before.stoch[:, 1:, size:], after.stoch[:, 1:, size:])


def test_temperature_cools_what_is_drawn():
    """Each level has its own: two dreams of a step differ in the fine codes alone,
    unless these are cool as well.
    """
    differ = []
    for fine in (1.0, 0.01):
        torch.manual_seed(3)
        dynamics = build(temperature=[0.01, fine, fine])
        carry, _ = dynamics.observe(dynamics.initial(64), *inputs(batch=64))
        given = torch.zeros(64, 1, A).double()
        once, again = (
            dynamics.imagine(carry, given, 1)[1].stoch[:, 1].unflatten(-1, (3, -1))
            for _ in range(2)
        )
        differ.append((once != again).double().mean((0, 2)))  # (3,) by level
    warm, cool = differ
    assert warm[1:].min() > 0.3 and max(warm[0], cool.max()) < 0.2


def test_spatial_groups_are_the_positions_of_the_map():
    obs = {"image": models.spaces.Box(0, 255, (16, 16, 3), "uint8")}
    overrides = {
        "dynamics.type": "hrvq",
        "dynamics.hrvq.spatial": "true",
        "dynamics.hrvq.groups": 16,
    }
    agent, batch = make(obs, **overrides)
    dynamics = agent.world_model.dynamics
    assert dynamics.quantizer.book.shape[1] == 1
    embed = torch.randn(1, 1, agent.world_model.encoder.dim)
    maps = embed.unflatten(-1, (-1, 4, 4)).clone()
    before = dynamics._project(embed)
    maps[..., 2, 1] += 5.0  # position 9
    moved = dynamics.in_proj(
        maps.flatten(2).unflatten(-1, (-1, 16)).transpose(-1, -2)
    ) - dynamics.in_proj(embed.unflatten(-1, (-1, 16)).transpose(-1, -2))
    assert moved.abs().amax(-1).flatten().nonzero().flatten().tolist() == [9] and before.shape == (
        1,
        1,
        16,
        4,
    )
    assert agent.update(batch).isfinite().all()
    with pytest.raises(ValueError, match="groups is 8 and the encoder's map has 16 positions"):
        make(obs, **overrides | {"dynamics.hrvq.groups": 8})


@pytest.mark.parametrize("obs", [VECTOR, EVERYTHING], ids=["vector", "everything"])
def test_spatial_trains_on_what_is_no_image_too(obs):
    """Numbers without a place are dealt out to the groups."""
    overrides = {
        "dynamics.type": "hrvq",
        "dynamics.hrvq.spatial": "true",
        "dynamics.hrvq.groups": 16,
    }
    agent, batch = make(obs, "continuous", **overrides)
    for _ in range(3):
        assert agent.update(batch).isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "hint"),
    [
        ({"heads": 3}, r"dynamics\.deter 16 must be dynamics\.hrvq\.heads \(3\)"),
        ({"heads": 16}, "even"),
        (
            {"posterior": "nearest", "commitment": [0.1, 0.1]},
            "commitment has 2 values for 3 levels",
        ),
        ({"spatial": True, "groups": 2}, "spatial"),
        ({"posterior": "fsq", "codes": 22}, "22 codes"),
        ({"mask": "none"}, "hierarchical"),
        ({"memory": "lstm"}, "interleaved, stacked, gru"),
        (STACKED | {"posterior_sees": "memory"}, "posterior_sees frame, or memory gru"),
        ({"memory_reads": "coarse"}, "mask barrier"),
        ({"residual": "innovation"}, "posterior_sees memory"),
        (SEEN | {"posterior": "nearest"}, "posterior_sees frame"),
        (SEEN | {"residual": "innovation", "copy": True}, "choose one"),
    ],
)
def test_bad_combinations_are_one_line(sizes, hint):
    with pytest.raises(ValueError, match=hint) as error:
        build(**sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("memory", ["interleaved", "stacked", "gru"])
@pytest.mark.parametrize("posterior", KINDS)
def test_a_dream_can_be_differentiated_by_its_actions(posterior, memory):
    """What ``actor.gradient: dynamics`` needs: an action moves the memory,
    and the codes of its own step.
    """
    dynamics = build(codes=12, posterior=posterior, memory=memory)
    carry, _ = dynamics.observe(dynamics.initial(3), *inputs())
    given = torch.randn(3, 2, A, dtype=torch.float64, requires_grad=True)
    _, feat, _ = dynamics.imagine(carry, given, 2)
    for x in feat:
        some = (
            x[:, 1] * torch.randn_like(x[:, 1])
        ).sum()  # the memory is normalised: its plain sum is constant
        (grad,) = torch.autograd.grad(some, given, retain_graph=True)
        assert grad[:, 0].abs().max() > 1e-6 and grad[:, 1].abs().max() == 0.0


@pytest.mark.parametrize(
    "sizes",
    [
        {"levels": 1, "groups": 1},
        {"levels": 5, "groups": 3, "codes": 3, "code_dim": 2},
        {"layers": 1, "heads": 1},
    ],
)
def test_any_sizes(sizes):
    dynamics = build(**sizes)
    carry, post = dynamics.observe(dynamics.initial(3), *inputs())
    _, feat, _ = dynamics.imagine(
        dynamics.starts(carry, post, 0), lambda feat: torch.zeros(42, A).double(), 3
    )
    assert (
        feat.stoch.shape == (42, 4, dynamics.stoch_dim)
        and dynamics.loss(post)[0]["dyn"].isfinite().all()
    )


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize("variant", [{}, STACKED, {"mask": "barrier"}], ids=str)
def test_starts_in_pieces_dream_as_those_of_whole_sequences(variant, before, n, monkeypatch):
    """Three pieces of 18 steps, the window being 5; also behind cached steps and across resets."""
    dynamics = build(**variant)
    embed, action, is_first = inputs(length=18 + before)
    carry = dynamics.initial(3)
    with torch.no_grad():
        if before:
            part = (x[:, :before] for x in (embed, action, is_first))
            carry, _ = dynamics.observe(carry, *part, sample=False)
        part = (x[:, before:] for x in (embed, action, is_first))
        carry, post = dynamics.observe(carry, *part, sample=False)
        cut = dynamics.starts(carry, post, n)
        monkeypatch.setattr(rollout.Carry, "cut", lambda self, lasts, length: self)
        whole = dynamics.starts(carry, post, n)
        assert len(cut.segment) == 3 * len(whole.segment) == 9
        assert cut.segment.shape[1] < whole.segment.shape[1] and torch.equal(cut.deter, whole.deter)
        given = F.one_hot(torch.randint(0, A, (len(whole.step), 7)), A).double()
        dreams = [dynamics.imagine(start, given, 7, sample=False) for start in (cut, whole)]
        for found, truth in zip(dreams[0][1], dreams[1][1], strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        on = [dynamics.imagine(dream[0], given, 3, sample=False)[1] for dream in dreams]
        for found, truth in zip(*on, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_memory_of_imagination_does_not_grow_with_starts_times_context():
    """The sequences' K/V are shared: no tensor holds a copy of them for every start."""
    dynamics = build(torch.float32, window=64)
    carry, post = dynamics.observe(
        dynamics.initial(2),
        *inputs(batch=2, length=64, dtype=torch.float32, firsts=((0, 0), (1, 0))),
    )
    start = dynamics.starts(carry, post, 0)
    assert start.keys.shape[0] == 2 and start.deter.shape[0] == 128
    assert start.keys.numel() == carry.keys.numel()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_of_branches_is_attention(dtype, grad):
    """Over a shared prefix and own positions, of which some rows see nothing but themselves."""
    torch.manual_seed(0)
    make_kv = lambda *shape: KV(*torch.randn(2, *shape, dtype=dtype).unbind())
    q = torch.randn(2, 3, 4, 5, 6, dtype=dtype, requires_grad=grad)
    own, prefix = make_kv(2, 3, 4, 9, 6), make_kv(2, 3, 7, 6)
    near, far = (KV(*(x[..., part, :] for x in own)) for part in (slice(3), slice(3, 5)))
    prefix_mask, own_mask = torch.rand(2, 1, 4, 5, 7) < 0.5, torch.ones(5, 5).tril().bool()
    prefix_mask[:, :, 1] = False
    biases = [as_bias(mask, dtype) for mask in (prefix_mask, own_mask[:, :3], own_mask[:, 3:])]
    whole = [near, far], prefix, Bias(biases[0], biases[1:])
    alone = [near], None, Bias(None, biases[1:2])
    for own, cached, bias in (whole, alone):
        for rows in (slice(None), slice(3, 4)):  # all, or one of several new positions
            given = q[..., rows, :], own, cached, bias.rows(rows)
            assert torch.allclose(attend_shared(*given), dense(*given), atol=1e-6)
    assert all(bias.unique().tolist() == [MASKED, 0.0] for bias in biases)


def dense(q, own, prefix, bias):
    """The same with the prefix copied for every branch. -> (B, n, Q, h * d)."""
    keys, values = (torch.cat(x, -2) for x in zip(*own, strict=True))
    scores = torch.cat(bias.own, -1).expand(*q.shape[:4], -1)
    if prefix:
        each = [x.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1) for x in prefix]
        keys, values = torch.cat([each[0], keys], -2), torch.cat([each[1], values], -2)
        scores = torch.cat([bias.prefix.expand(-1, q.shape[1], -1, -1, -1), scores], -1)
    scores = scores + q @ keys.mT * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1) @ values).permute(0, 2, 3, 1, 4).flatten(-2)


@pytest.mark.parametrize(("memory", "bound"), [("interleaved", 180), ("stacked", 92), ("gru", 61)])
def test_kernels_of_an_imagined_step(memory, bound):
    """Two layers and three levels, uncompiled, with the policy; and nothing is read on the host."""
    sizes = {"dynamics.hrvq.levels": 3, "dynamics.hrvq.layers": 2, "dynamics.hrvq.memory": memory}
    if memory == "gru":
        sizes["dynamics.hrvq.posterior_sees"] = "memory"

    def kernels(horizon):
        agent, batch = make(**{"dynamics.type": "hrvq", "imag.horizon": horizon} | sizes)
        with torch.no_grad():
            carry, post, _ = agent.world_model.observe(networks.preprocess(batch))
            start = agent.world_model.dynamics.starts(carry, post, 0)
            given = agent.world_model, start, torch.zeros(batch["reward"].numel())
            return cost.operators(lambda: agent.behavior.imagine(*given))["kernels"]

    found = (kernels(9) - kernels(3)) / 6
    assert found <= bound, found
    agent, batch = make(**{"dynamics.type": "hrvq"} | sizes)
    assert cost.operators(lambda: agent.update(batch))["host_reads"] == 0


@pytest.mark.parametrize("memory", ["interleaved", "stacked"])
@torch.no_grad()
def test_a_dream_costs_the_same_every_step(memory):
    """Beyond the window nothing is multiplied that no row sees, cached or own."""
    dynamics = build(torch.float32, memory=memory)
    carry, _ = dynamics.observe(dynamics.initial(3), *inputs(dtype=torch.float32))

    def flops(horizon):
        given = torch.zeros(3, horizon, A)
        return cost.flops(lambda: dynamics.imagine(carry, given, horizon))

    assert flops(40) - flops(30) == flops(30) - flops(20)


def test_rows_behind_the_barrier_that_no_one_reads_are_left_out():
    positions = lambda **sizes: build(**sizes).positions
    assert [positions(mask="barrier"), positions(mask="barrier", chain=False)] == [2, 1]
    assert [positions(), positions(mask="causal"), positions(memory="stacked")] == [3, 3, 0]
    assert positions(mask="barrier", ffn="level") == 3  # an expert for each level


@pytest.mark.parametrize("memory", ["interleaved", "stacked", "gru"])
def test_a_gate_copies_the_code_of_the_step_before(memory):
    """Wide open, a prior is the last code, but at an episode's start, where there is none."""
    dynamics = build(memory=memory, copy=True)
    for gate in dynamics.gate:
        torch.nn.init.constant_(gate.bias, 40.0)
    embed, action, is_first = inputs()
    carry, post = dynamics.observe(dynamics.initial(3), embed, action, is_first)
    index = post.aux.codes.index  # (B, T, L, G)
    for i, level in enumerate(post.levels):
        probs = torch.softmax(level.prior, -1)  # (B, T, G, K)
        copied = probs[:, 1:].argmax(-1) == index[:, :-1, i]
        assert copied[~is_first[:, 1:]].all() and probs[is_first].max() < 0.99
    _, feat, _ = dynamics.imagine(carry, action[:, :3], 3, sample=False)
    assert torch.equal(feat.stoch, feat.stoch[:, :1].expand_as(feat.stoch))


@pytest.mark.parametrize("variant", [{}, STACKED, FRAME, SEEN], ids=str)
def test_wrong_codes_reach_the_priors_alone(variant):
    """In training, and only there: features are those of the right codes."""
    embed, action, is_first = inputs()
    found = []
    for noise in (0.0, 1.0):
        torch.manual_seed(0)
        dynamics = build(noise=noise, **variant)
        given = dynamics.initial(3), embed.clone().requires_grad_(), action, is_first
        torch.manual_seed(1)
        found.append(dynamics.observe(*given)[1])
        with torch.no_grad():
            torch.manual_seed(1)
            found.append(dynamics.observe(*given)[1])
    plain, quiet, wrong, other = found
    assert torch.allclose(plain.feat.cat(), wrong.feat.cat(), atol=1e-10)
    assert torch.allclose(quiet.levels[1].prior, other.levels[1].prior, atol=1e-10)
    assert not torch.allclose(plain.levels[1].prior, wrong.levels[1].prior)


def test_an_action_weighs_in_its_token_beside_the_codes():
    """It was lost there: in this model it moved the token by .09 where codes moved it by 1.34."""
    dynamics = build(memory="stacked", code_dim=32)
    stoch = dynamics._stoch(torch.randn(500, dynamics.levels * dynamics.level_dims[0]).double())
    actions = torch.eye(dynamics.act_dim).double()
    zero = torch.zeros_like(actions), torch.zeros_like(stoch)
    of_action = dynamics._action_token(actions, zero[1][: len(actions)]).std(0).mean()
    of_codes = dynamics._action_token(zero[0][:1].expand(len(stoch), -1), stoch).std(0).mean()
    assert of_action > 0.2 * of_codes


def test_stacked_features_begin_as_long_in_deter_as_in_stoch():
    """Heads read both side by side: deter was W ** 0.5 long beside codes of norm 1 each."""
    dynamics = build(memory="stacked", code_dim=32)
    embed, action = torch.randn(8, 6, dynamics.embed_dim), torch.eye(dynamics.act_dim)[:1]
    is_first = torch.zeros(8, 6, dtype=torch.bool)
    steps = embed.double(), action.double().expand(8, 6, -1), is_first
    _, post = dynamics.observe(dynamics.initial(8), *steps)
    deter, stoch = (x.detach().norm(dim=-1).mean() for x in post.feat)
    assert 0.6 < deter / stoch < 1.7


def test_what_a_finer_level_codes():
    """By hand, of one group: z, then z without the first code or without the expected one."""
    dynamics = build(levels=2, groups=1)
    quantizer, z = dynamics.quantizer, torch.randn(4, 1, 4, dtype=torch.float64)
    drawn = quantizer.encode(z)
    assert torch.allclose(drawn.residual[:, 1], z - drawn.code[:, 0])
    expected = quantizer.encode(z, residual="expected")
    probs = 0.99 * torch.softmax(expected.logit[0], -1) + 0.01 / 5
    assert torch.allclose(expected.residual[:, 1], z - probs @ quantizer.book[0, 0])
    prior = torch.randn(1, 4, dtype=torch.float64)
    found = quantizer.encode(z, residual="innovation", expected=lambda level, codes: prior)
    assert torch.allclose(found.residual[:, 0], z - prior)


@pytest.mark.parametrize("variant", [{}, STACKED, {"mask": "barrier"}], ids=str)
def test_observing_in_chunks_is_observing(variant, monkeypatch):
    """Five chunks of 3 steps, the last of them not full; across resets, with gradients. The first
    sequence goes on in an episode of which nothing was seen.
    """
    embed, action, is_first = inputs(firsts=((1, 0), (2, 0), (1, 4), (2, 9)))
    found = []
    for chunks in (2, 100):
        monkeypatch.setattr(parallel, "CHUNKS", chunks)
        torch.manual_seed(0)
        dynamics, x = build(window=3, **variant), embed.clone().requires_grad_()
        carry, post = dynamics.observe(dynamics.initial(3), x, action, is_first)
        loss = post.feat.cat().pow(3).sum() + dynamics.loss(post)[0]["dyn"].sum()
        grads = torch.autograd.grad(loss, [x, *dynamics.transformer.parameters()])
        found.append([*post.feat, *(level.prior for level in post.levels), *carry, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", ["interleaved", "stacked"])
@torch.no_grad()
def test_observing_costs_the_same_every_step(memory):
    dynamics = build(torch.float32, memory=memory)

    def flops(length):
        steps = inputs(length=length, dtype=torch.float32)
        return cost.flops(lambda: dynamics.observe(dynamics.initial(3), *steps))

    assert flops(80) - flops(60) == flops(60) - flops(40)


@torch.no_grad()
def test_a_branch_gives_its_steps_in_order():
    """Near and far positions lie apart, and each step's far ones the other way round."""
    places = branches.Places([4, 2, 2, 2], near=2, window=9, horizon=2)
    branch = branches.Branch(places, torch.zeros(1), (1, 1, 1), dim=1)
    rows = [(0, 3), *((time, level) for time in (1, 2) for level in range(4))]  # 3: the action
    for time, level in rows:
        now = places.of(time, range(level, level + 1))
        branch.room(now).fill_(10 * time + level)
        branch.close(now)
    assert branch.steps()[0].flatten().tolist() == [3, 10, 11, 12, 13, 20, 21, 22]
