"""The world model on tokens: the data's sides, the lineage's faults, training, its gate."""

import functools
import math
import types

import numpy as np
import pytest
import torch
from small_pipeline import copied, read, rows, run, run_killed, same
from small_runs import one_line
from test_pipeline import recording

import tools
from pipeline import data, token_model, tokenizer, training, world_model
from pipeline import world_model_gate as metrics
from pipeline.gate import Row
from pipeline.manifest import InputError
from pipeline.token_model import Actions, TokenWorldModel, Windows, stacked, tensors, token_rows

CPU = torch.device("cpu")


def config(**overrides):
    return tools.load_config(["pipeline_debug"], {"pipeline.world_model.dropout": 0.0, **overrides})


def make_model(settings=None, act_dim=3, seed=0, dim=8):
    settings = settings or config()
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 4, dim))
    quantizer = tokenizer.make_quantizer(settings, dim)
    return TokenWorldModel(net, quantizer, act_dim, settings)


def batch_of(model, batch=4, length=6, seed=1):
    rng = np.random.default_rng(seed)
    rows = {
        "index": rng.integers(16, size=(batch, length, 3)).astype(np.int32),
        "prev_action": np.eye(model.dynamics.act_dim, dtype=np.float32)[
            rng.integers(model.dynamics.act_dim, size=(batch, length))
        ],
        "reward": rng.normal(size=(batch, length)).astype(np.float32),
        "is_first": np.arange(length) == np.zeros((batch, 1)),
        "is_terminal": np.zeros((batch, length), bool),
    }
    return tensors(rows, CPU)


# ---------------------------------------------------------------- data


def test_no_transition_is_on_both_sides_and_no_judged_window_crosses_an_end():
    """The lineage split windows, so that every validated transition had been trained on."""
    parts = [recording([9, 7, 8, 9, 7]), recording([12, 5, 6, 11])]
    actions = Actions([3, 3], True)
    tokens = [np.stack([np.arange(len(p))] * 2, -1) for p in parts]
    seen = {}
    for held in (False, True):
        found = [
            token_rows(p, t, actions, i) for i, (p, t) in enumerate(zip(parts, tokens, strict=True))
        ]
        windows = Windows(parts, found, 16, 4, True, held)
        seen[held] = set()
        for _ in range(40):
            where = windows.draw()
            rows = windows.read(where)
            for game, index in zip(where.stream, rows["index"][:, :, 0], strict=True):
                assert not held or len(set(parts[game].episode[index])) == 1
                seen[held] |= {(game, int(i)) for i in index}
            pairs = zip(where.stream, rows["index"][:, :, 0], strict=True)
            begins = np.stack([parts[game].is_first[index] for game, index in pairs])
            begins[:, 0] = True  # a window's own
            assert (rows["is_first"] == begins).all()
    assert seen[False] and seen[True] and not seen[False] & seen[True]
    for game, part in enumerate(parts):
        assert all(part.held[i] for g, i in seen[True] if g == game)


def test_games_are_balanced_by_key():
    parts = [recording([60, 60, 60]), recording([10, 10, 10])]
    actions = Actions([3, 3], True)
    found = [token_rows(p, np.zeros((len(p), 1), int), actions, i) for i, p in enumerate(parts)]
    share = {}
    for balance in (True, False):
        windows = Windows(parts, found, 8, 4, balance)
        share[balance] = np.mean([(windows.draw().stream == 1).mean() for _ in range(200)])
    assert share[True] == 0.5 and share[False] == pytest.approx(17 / (17 + 117), abs=0.03)


def test_an_end_is_as_often_trained_on_as_any_other_row():
    """Within episodes it was in one window, and other rows in ``length``: dreams hardly ended."""
    part = recording([20, 20, 20, 20])
    rows = token_rows(part, np.arange(80)[:, None], None)
    windows = Windows([part], [rows], 64, 8, True)
    drawn = np.concatenate([windows.sample()["index"].ravel() for _ in range(200)])
    ends = np.flatnonzero(part.is_last & ~part.held)[:-1]  # the last one is at the edge
    expected = 1.0 / (~part.held).sum()
    shares = np.bincount(drawn, minlength=80)[ends] / len(drawn)
    assert shares == pytest.approx(expected, rel=0.25)
    held = Windows([part], [rows], 4, 8, True, held=True)
    assert [int(r) + 7 for r in held.tails(0).row] == np.flatnonzero(
        part.is_last & part.held
    ).tolist()


def test_windows_apart_share_no_row():
    part = recording([9, 7, 8])
    windows = Windows([part], [token_rows(part, np.zeros((24, 1), int), None)], 2, 3, True, True)
    rows = [int(r) for start in windows.apart(0).row for r in range(start, start + 3)]
    assert len(rows) == len(set(rows)) == 3 * (7 // 3)


def test_an_action_says_which_game_it_is_of():
    separate, common = Actions([2, 3], True), Actions([2, 3], False)
    second = np.eye(2, 3, dtype=np.float32)
    assert separate.width == 5 and common.width == 3
    assert separate.widen(second, 1)[0].tolist() == [0, 0, 1, 0, 0]
    assert separate.widen(second[:, :2], 0)[0].tolist() == [1, 0, 0, 0, 0]
    assert common.widen(second[:, :2], 0)[0].tolist() == common.widen(second, 1)[0].tolist()


def test_an_episode_that_is_too_short_is_told(tokenized, tmp_path, capsys):
    folder = copied(tokenized, tmp_path / "run", "collect", "encoder", "tokenizer")
    assert run("world_model", folder, "--length", 90) == 2
    one_line(capsys, "episode of pong", "90", "env.time_limit")


def test_too_short_held_out_episodes_are_told_before_training(tokenized, monkeypatch):
    """The gate looks at windows of them; it said so when all had been trained."""
    windows = data.Recording.windows
    short = lambda self, length, held: windows(self, length, held)[: 0 if held else None]
    monkeypatch.setattr(data.Recording, "windows", short)
    with pytest.raises(tools.ConfigError, match="no held-out episode of pong has 16 steps"):
        world_model.WorldModel(config(), tokenized, CPU, print)


def test_a_discount_that_the_continue_head_learns_decides_the_model():
    """A policy with another one would discount twice, or not at all."""
    identity = lambda **keys: world_model.WorldModel.identity(config(**keys))
    plain = identity()
    assert plain == identity(**{"imag.discount": 0.9})  # the policy's alone
    learned = {"imag.contdisc": True, "imag.discount": 0.9}
    assert plain != identity(**learned) != identity(**{"imag.contdisc": True})


# ---------------------------------------------------------------- the model


def test_the_lineages_sizes():
    settings = tools.load_config(["pipeline"], {})
    quantizer = tokenizer.make_quantizer(settings, 384)
    dynamics = token_model.TokenDynamics(quantizer, 19, settings)
    count = sum(p.numel() for p in dynamics.parameters() if p.requires_grad)
    assert dynamics.stoch_dim == 1152 and dynamics.deter_dim == 384
    assert sum(p.numel() for p in dynamics.prior[0].parameters()) == 98_560
    assert 10.5e6 < count < 12e6  # the lineage's had 11,341,440
    assert dynamics.level_weights == [1.0, 0.5, 0.1]


def test_stored_tokens_are_what_the_encoder_would_find():
    """observe of images and observe of their tokens are one path: features are equal."""
    model = make_model().double()
    images = torch.rand(2, 5, 2, 2, 1).double()
    obs = batch_of(model, 2, 5)
    del obs["index"]
    obs = {key: x.double() for key, x in obs.items()} | {"image": images - 0.5}
    _, seen, _ = model.observe(obs)
    index = seen.aux.codes.index[..., 0]
    _, known, _ = model.observe(obs | {"index": index})
    for a, b in zip(seen.feat, known.feat, strict=True):
        assert torch.allclose(a, b)
    assert torch.equal(model.dynamics.tokens(seen.feat.stoch), index)


def test_under_bfloat16_frames_have_the_codes_that_were_stored():
    """The tokenizer stage computes in float32. An encoder that rounds to 7 bits finds others, and
    the policy would act on codes that the world model never saw there.
    """
    model = make_model()
    obs = batch_of(model, 8, 40)
    del obs["index"]
    obs["image"] = torch.rand(8, 40, 2, 2, 1) - 0.5
    with torch.no_grad():
        index = model.observe(obs)[1].aux.codes.index
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.observe(obs)[1]
            known = model.observe(obs | {"index": index[..., 0]})[1]
    assert torch.equal(seen.aux.codes.index, index)
    assert all(torch.equal(a, b) for a, b in zip(seen.feat, known.feat, strict=True))


def test_acting_step_by_step_sees_the_stacks_and_features_of_the_whole_sequence():
    """The lineage paired tokens with the action before the one that was taken."""
    model = make_model().double()
    obs = {key: x.double() for key, x in batch_of(model, 2, 7).items()}
    del obs["index"]
    obs["image"] = torch.rand(2, 7, 2, 2, 1).double() - 0.5
    obs["is_first"] = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).double()
    _, whole, _ = model.observe(obs)
    carry, parts = None, []
    for t in range(7):
        carry, post, _ = model.observe({key: x[:, t : t + 1] for key, x in obs.items()}, carry)
        parts.append(post.feat.cat())
    assert torch.allclose(torch.cat(parts, 1), whole.feat.cat())


def test_stacks_are_those_of_the_recording():
    part = recording([6, 5])
    images = torch.from_numpy(part.image[None].astype(np.float64))
    first = torch.from_numpy(part.is_first)[None]
    stacks, after = stacked(images[:, :1].expand(-1, 2, -1, -1, -1), images, first)
    expected = part.stacks(np.arange(11), 3)
    assert np.array_equal(stacks[0].numpy(), expected)
    assert after[0, :, 0, 0, 0].tolist() == [9.0, 10.0]


def test_dreams_of_recorded_actions_have_the_features_of_training():
    """The lineage's dreams had code 0 in place of every level-2 code."""
    model = make_model().double().eval()
    batch = {key: x.double() for key, x in batch_of(model, 2, 6).items()}
    torch.manual_seed(0)
    carry, post, _ = model.observe({key: x[:, :2] for key, x in batch.items()})
    start = model.dynamics.starts(carry, post, 1)
    _, feat, _ = model.dynamics.imagine(start, batch["prev_action"][:, 2:], 4)
    dreamt = model.dynamics.tokens(feat.stoch[:, 1:])
    assert len(dreamt[..., 2].unique()) > 1
    index = torch.cat([batch["index"][:, :2].long(), dreamt], 1)
    _, real, _ = model.observe(batch | {"index": index})
    assert torch.allclose(feat.cat()[:, 1:], real.feat.cat()[:, 2:])


def test_the_loss_is_weighted_by_level_and_reaches_no_frozen_part():
    model = make_model(config(**{"dynamics.dyn": 1.0, "dynamics.unimix": 0.0}))
    batch = batch_of(model)
    losses, _, post, _, _ = model.loss(batch)
    expected = 0.0
    for weight, level, i in zip((1.0, 0.5, 0.1), post.levels, range(3), strict=True):
        logp = torch.log_softmax(level.prior[:, :, 0], -1)
        right = logp.gather(-1, batch["index"][..., i, None].long())[..., 0]
        expected = expected - weight * right
    assert torch.allclose(losses["dyn"], expected, atol=1e-4)
    sum(losses.values()).mean().backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("encoder.", "dynamics.quantizer."))
        assert (p.grad is None) == frozen or name in ("dynamics.bos_token",), name


def test_wrong_codes_reach_the_priors_of_learning_alone():
    model = make_model(config(**{"dynamics.hrvq.noise": 1.0}))
    batch = batch_of(model)
    learned = model.observe(batch)[1]
    with torch.no_grad():
        quiet = model.observe(batch)[1]
    assert torch.allclose(learned.feat.deter, quiet.feat.deter, atol=1e-6)
    for one, other in zip(learned.levels, quiet.levels, strict=True):
        assert not torch.allclose(one.prior[:, 1:], other.prior[:, 1:])


def test_dropout_is_of_learning_alone():
    model = make_model(config(**{"pipeline.world_model.dropout": 0.5}))
    batch = batch_of(model)
    twice = lambda: [model.observe(batch)[1].feat.deter for _ in range(2)]
    assert not torch.equal(*twice())
    with torch.no_grad():
        assert torch.equal(*twice())
    model.eval()
    assert torch.equal(*twice())


def toy_batch(rng, size):
    """L0 counts on by the action, 8 codes in a ring; L1 and L2 follow it. Code 0 is rewarded."""
    action = rng.integers(2, size=(size, 8))
    action[:, 0] = 0
    coarse = (rng.integers(8, size=(size, 1)) + action.cumsum(1)) % 8
    return {
        "index": np.stack([coarse, 2 * coarse, coarse], -1).astype(np.int32),
        "prev_action": np.eye(2, dtype=np.float32)[action],
        "reward": (coarse == 0).astype(np.float32),
        "is_first": np.arange(8) == np.zeros((size, 1)),
        "is_terminal": np.zeros((size, 8), bool),
    }


# The world model's, and what tests/test_pipeline_policy.py learns in its dreams with.
TOY = {"dynamics.deter": 32, "dynamics.hidden": 64, "reward.units": 32}
TOY |= {"actor.lr": 3e-3, "critic.lr": 3e-3, "actor.net.units": 32, "critic.net.units": 32}
TOY |= {"imag.horizon": 8, "imag.starts": 2, "imag.discount": 0.9, "pipeline.policy.length": 8}


@functools.cache
def toy_model():
    """A world model that has learned the toy. -> config, model, metrics of its last update."""
    settings = config(**TOY)
    model = make_model(settings, act_dim=2)
    optimizer = world_model.make_optimizer(model, settings.pipeline.world_model, CPU)
    training.set_lr(optimizer, 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(250):
        batch = tensors(toy_batch(rng, 32), CPU)
        found = world_model.accumulate(model, optimizer, [batch], settings)
    return settings, model, found


def test_it_learns_a_rule_that_copying_cannot_know():
    """Frozen tokens and real heads, in a minute."""
    _, _, found = toy_model()
    assert found["accuracy_0"] > 0.9 > 0.7 > found["accuracy_copy_0"]
    assert found["accuracy_1"] > 0.9 and found["accuracy_changed_0"] > 0.8


# ---------------------------------------------------------------- the gate's metrics


def test_area_under_the_curve_by_hand_and_at_its_floor():
    area = metrics.area_under_curve
    score = np.array([3.0, 1.0, 2.0, 0.0])
    assert area(score, np.array([True, False, False, False])) == 1.0
    assert area(score, np.array([False, False, True, False])) == pytest.approx(2 / 3)
    assert area(np.zeros(4), np.array([True, False, True, False])) == 0.5
    assert math.isnan(area(score, np.zeros(4, bool)))


def test_the_copy_model_by_hand():
    tokens = np.array([[0], [0], [1], [1], [1]])
    copy = metrics.CopyModel(tokens, np.array([0, 1, 2, 3]), 2)
    assert copy.kept.tolist() == [0.75] and copy.frequency[0].tolist() == [0.5, 0.5]
    expected = -(math.log(0.75 + 0.125) + math.log(0.125)) / 2
    assert copy.nats(np.array([1, 0]), np.array([1, 1]), 0) == pytest.approx(expected)


def test_counted_pairs_know_what_copying_cannot():
    """Codes in a ring: the next one is never the last, and a table of pairs knows it."""
    tokens = (np.arange(300) % 3)[:, None]
    pairs = metrics.PairModel(tokens, np.arange(299), 4)
    before = np.array([0, 1, 2])
    assert (
        pairs.right((before + 1) % 3, before, 0).all() and not pairs.right(before, before, 0).any()
    )
    assert pairs.nats((before + 1) % 3, before, 0) < 0.1
    copy = metrics.CopyModel(tokens, np.arange(299), 4)
    assert copy.nats((before + 1) % 3, before, 0) > 1.0
    assert (
        pairs.drawn((before + 2) % 3, before, 0, 2) > 0.8 > 0.2 > pairs.drawn(before, before, 0, 2)
    )
    assert np.allclose(pairs.next[0].sum(1), 1.0)
    # of a code that was never seen it knows what the copy model knows
    now, last = np.array([0, 3]), np.array([3, 3])
    assert pairs.nats(now, last, 0) == pytest.approx(copy.nats(now, last, 0))
    still = metrics.PairModel(np.zeros((50, 1), int), np.arange(49), 2)
    assert still.right(np.zeros(3, int), np.zeros(3, int), 0).all()


def test_rollouts_start_where_they_say(modelled):
    """A model that is certain of the truth is right at every horizon; keeping the last is not."""
    settings = tools.load_config(["pipeline_debug"], {})
    stage = world_model.WorldModel(settings, modelled, CPU, print)
    windows = Windows(stage.recordings, stage.rows, 8, 12, False, True)
    polls, model = [], stage.models[0].eval()
    stage.poll = lambda: polls.append(1)
    first, dreamt, embed = metrics.rollouts(stage, model, windows, 0, 4)
    metrics.predictions(stage, model, windows, 0)
    assert len(polls) >= 2, "the gate could not be stopped"
    assert dreamt.shape == (len(first), 8, 3) and embed.shape == (len(first), 8, 384)
    assert stage.recordings[0].held[first].all()
    sums = metrics.code_sums(stage.models[0], dreamt.reshape(-1, 3)).reshape(embed.shape)
    assert np.allclose(sums, embed, atol=1e-5)


def test_the_gate_judges_every_mask_once(monkeypatch):
    part = recording([12] * 6)
    sizes = types.SimpleNamespace(batch=2, length=3, context=1)
    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    stage = types.SimpleNamespace(
        name="world_model", block=sizes, recordings=[part], models=models, updates=1
    )
    stage.masks, stage.rows = "abc", [token_rows(part, np.zeros((72, 1), int), None)]
    seen, none = [], lambda *args: []
    judge = lambda stage, model, *args: seen.append(model) or [Row("pong: nats", 1.0 * len(seen))]
    dream = lambda stage, model, *args: (seen.append(model) or np.zeros(1, int), None, None)
    for name, fn in (("teacher_rows", judge), ("rollouts", dream)):
        monkeypatch.setattr(metrics, name, fn)
    monkeypatch.setattr(metrics, "right_rows", none)
    monkeypatch.setattr(metrics, "read_rows", none)
    (row,) = metrics.evaluate(stage).tables[-1].rows
    assert seen == [model for model in models for _ in range(2)]
    assert row.value == 1.0 and row.baselines == {"b": 3.0, "c": 5.0}


# ---------------------------------------------------------------- the stage


def test_the_gate(modelled):
    folder = modelled / "world_model"
    teacher = rows(folder, "Teacher-forced")
    for game in ("pong", "breakout"):
        for level in range(3):
            accuracy = teacher[f"{game}: L{level} accuracy"]
            assert 0 <= accuracy["value"] <= 1 and "copy-last" in accuracy["baselines"]
            nats = teacher[f"{game}: L{level} nats"]["baselines"]
            assert {"copy or frequency", "counted pairs"} == nats.keys()
            assert "counted pairs" in teacher[f"{game}: L{level} accuracy, changed"]["baselines"]
    tokens = rows(folder, "Free-running: tokens")
    assert {f"pong: L0 right after {h}" for h in (1, 5, 15, 30)} <= tokens.keys()
    probes = rows(folder, "Free-running: what a linear probe reads")
    assert {"pong: player y R² after 1", "pong: player y R² after 1, true codes"} <= probes.keys()
    masks = rows(folder, "Masks: hierarchical here")
    assert masks["L0 nats"]["baselines"].keys() == {"barrier", "causal"}
    copied_share = teacher["pong: L0 accuracy"]["baselines"]["copy-last"]
    config = tools.load_config(["pipeline_debug"], {})
    recording = data.load(modelled, config, "pong")
    index, held = tokenizer.load_tokens(modelled, recording)[:, 0], recording.pairs(1, True)
    assert copied_share == pytest.approx((index[held + 1] == index[held]).mean(), abs=0.1)


def test_masks_begin_equal_and_see_the_same_batches(modelled):
    """Also after updates: dropout had moved what windows are drawn by, a row less for `barrier`."""
    settings = tools.load_config(["pipeline_debug"], {"pipeline.world_model.compare": ["barrier"]})
    stage = world_model.WorldModel(settings, modelled, CPU, print)
    begun, seen = [{key: p.clone() for key, p in stage.models[0].named_parameters()}], []
    stage.windows.draw = lambda: seen.append(Windows.draw(stage.windows)) or seen[-1]
    for step in (0, 1):
        stage.step = step
        stage.advance()
    stage._begin(1)
    begun.append(dict(stage.models[1].named_parameters()))
    assert all(torch.equal(p, begun[1][key]) for key, p in begun[0].items())
    for step in (stage.updates, stage.updates + 1):
        stage.step = step
        stage.advance()
    half = len(seen) // 2
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert np.array_equal(one.row, other.row) and np.array_equal(one.stream, other.stream)
    assert not np.array_equal(seen[0].row, seen[half - 1].row)
    state = stage.save_state()
    del state["draws"]  # as an older version saved it
    with pytest.raises(InputError, match="python -m pipeline world_model"):
        stage.load_state(state)


def test_a_killed_world_model_continues_to_the_same_end(modelled, tmp_path, monkeypatch):
    folder = copied(modelled, tmp_path / "run", "collect", "encoder", "tokenizer")
    total = read(modelled / "world_model", "manifest.json")["steps"]
    run_killed(monkeypatch, "world_model", folder, total // 2)
    assert run("world_model", folder) == 0
    assert same(folder / "world_model", modelled / "world_model")


def test_another_tokenizer_is_refused(modelled, tmp_path, capsys):
    folder = copied(modelled, tmp_path / "run", "collect", "encoder", "tokenizer", "world_model")
    import shutil

    shutil.rmtree(folder / "tokenizer")
    assert run("tokenizer", folder, "--epochs", 1) == 0
    assert run("world_model", folder, "--tokenizer.epochs", 1) == 2
    one_line(capsys, "world_model", "another tokenizer")


def test_one_game_of_a_model_of_several(modelled):
    """Its own action vectors do what the wide ones did."""
    settings = tools.load_config(["pipeline_debug"], {})
    wide, own = (world_model.load(modelled, settings, CPU, game) for game in (None, 1))
    part = data.load(modelled, settings, "breakout")
    tokens = tokenizer.load_tokens(modelled, part)
    actions = world_model.actions_of(settings)
    feats = []
    for model, part_rows in (
        (wide, token_rows(part, tokens, actions, 1)),
        (own, token_rows(part, tokens, None)),
    ):
        few = {key: x[None, :20] for key, x in part_rows.items() if key != "is_last"}
        batch = tensors(few, CPU)
        feats.append(model.observe(batch)[1].feat.cat())
    assert own.dynamics.act_dim == 4 and torch.allclose(*feats, atol=1e-5)
