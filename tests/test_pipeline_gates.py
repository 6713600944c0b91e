"""The numbers of the gates and their pictures: each of the rows and steps that it says."""

import types

import numpy as np
import pytest
import torch
from small_pipeline import rows
from test_pipeline import recording
from test_pipeline_world_model import CPU, toy_model

import tools
from pipeline import encoder_gate, pictures, probing, tokenizer, tokenizer_gate
from pipeline import world_model_gate as metrics
from pipeline.token_model import Actions, token_rows

LENGTH = 9  # of an episode

# ---------------------------------------------------------------- the world model's, on a toy


def toy_recording(episodes=180):
    """Episodes of the toy's rule; those held out end, the others are cut."""
    rng, part = np.random.default_rng(5), recording([LENGTH] * episodes)
    action = rng.integers(2, size=(episodes, LENGTH))
    action[:, 0] = 0
    coarse = ((rng.integers(8, size=(episodes, 1)) + action.cumsum(1)) % 8).ravel()
    part.action = np.eye(2, dtype=np.float32)[action.ravel()]
    part.reward = (coarse == 0).astype(np.float32)
    part.is_terminal = part.is_last & part.held
    part.ram = part.ram.copy()
    part.ram[:, metrics.probes.BYTES["atari_pong"]["player y"]] = 20 * coarse + 1
    return part, np.stack([coarse, 2 * coarse, coarse], -1)


def toy_stage():
    settings, model, _ = toy_model()
    part, tokens = toy_recording()
    sizes = types.SimpleNamespace(batch=2, length=8, context=2, balance=False)
    return types.SimpleNamespace(
        name="world_model",
        block=sizes,
        recordings=[part],
        tokens=[tokens],
        device=CPU,
        rows=[token_rows(part, tokens, None)],
        masks=["a", "b"],
        models=[model.eval()] * 2,
        updates=1,
        config=settings,
        quantizer=model.dynamics.quantizer,
        poll=lambda: None,
    )


def test_the_gate_of_a_model_that_knows_the_rule(monkeypatch):
    """Every number stands beside the row that it is of."""
    stage, counted = toy_stage(), []
    init = metrics.CopyModel.__init__
    spy = lambda self, tokens, rows, codes: counted.append(rows) or init(self, tokens, rows, codes)
    monkeypatch.setattr(metrics.CopyModel, "__init__", spy)
    teacher, tokens, probed, masks = (
        {row.metric.removeprefix("pong: "): row for row in table.rows}
        for table in metrics.evaluate(stage).tables
    )
    part = stage.recordings[0]
    assert counted and not any(part.held[rows].any() for rows in counted)
    nats = teacher["L0 nats"]
    assert nats.value < 0.4 < nats.baselines["copy or frequency"]
    end = teacher["probability of ends that come"]
    assert end.value < 0.2 and end.baselines["frequency"] == 0.0
    for h, least in ((1, 0.75), (5, 0.4)):
        right = tokens[f"L0 right after {h}"]
        assert right.value > least > right.baselines["keep the last"] + 0.1, h
        truth = probed[f"player y R² after {h}, true codes"]
        assert (
            truth.value > 0.99 > 0.9 > probed[f"player y R² after {h}"].baselines["keep the last"]
        )
    assert probed["player y R² after 1"].value > 0.6
    for row in masks.values():
        assert row.value == pytest.approx(row.baselines["b"], nan_ok=True), row.metric


def test_the_pictures_of_a_dream_lie_beside_its_frames(monkeypatch):
    stage, seen = toy_stage(), {}
    part, tokens = stage.recordings[0], stage.tokens[0]
    sums = torch.from_numpy(metrics.code_sums(stage.models[0], tokens)).unsqueeze(1)

    class Decoder:
        recordings, device = [part], CPU
        __call__ = staticmethod(lambda x: x.numpy())

    decoder = Decoder()
    decoder.sums = [sums]
    monkeypatch.setattr(pictures.world_model, "actions_of", lambda config: Actions([2], True))
    monkeypatch.setattr(pictures, "grid", lambda images, title: seen.update(images))
    block = types.SimpleNamespace(context=2)
    config = types.SimpleNamespace(pipeline=types.SimpleNamespace(world_model=block))
    close, apart = [], pictures.Windows.apart
    for k in range(8):
        later = lambda self, game: apart(self, game)._make(x[k:] for x in apart(self, game))  # noqa: B023
        monkeypatch.setattr(pictures.Windows, "apart", later)
        pictures.dreams(decoder, stage.models[0], config, [tokens], 0)
        row = (255 * seen["frame"][:, 0, 0, 0]).round().astype(int)
        start = int(np.flatnonzero(part.held & part.is_first)[k])
        steps = np.linspace(1, LENGTH - 2, pictures.COLUMNS).round().astype(int)
        assert np.array_equal(row, (start + 1 + steps) % 256)
        assert np.allclose(seen["its codes"], sums[start + 1 + steps, -1].numpy())
        close.append(np.isclose(seen["dream"], seen["its codes"], atol=1e-4).all(-1).mean())
    assert np.mean(close) > 0.7


def test_probes_are_fitted_on_training_rows():
    part = recording([40, 30, 50])
    assert not part.held[np.concatenate(probing.training_rows(part, 1000))].any()


def test_a_picture_is_the_newest_of_a_stack():
    decoder = pictures.Decoder.__new__(pictures.Decoder)
    decoder.recordings, decoder.device = [recording([4, 3, 5])], CPU
    decoder.net = lambda x: torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(len(x), 3, 2, 2)
    assert decoder(torch.zeros(2, 8)) == pytest.approx(np.full((2, 2, 2, 1), 0.3))


def test_pictures_learn_sums_of_codes_with_their_own_frames(monkeypatch):
    class Shows(torch.nn.Module):
        def __init__(self, shape, dim):
            super().__init__()
            self.shape, self.weight = shape, torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight * x[:, 0].view(-1, 1, 1, 1).expand(-1, *self.shape)

    part, gaps = recording([4, 3, 5]), []
    part.image = part.image.astype(np.uint8)
    codes = np.zeros((12, 2, 8), np.float32)
    codes[:, 0] = np.arange(12)[:, None] / 255.0  # all that the sums of both levels say
    original = pictures.reconstruction
    spy = lambda x, y, stack: (
        gaps.append((x - y)[:, -1].abs().max().item()) or original(x, y, stack)
    )
    monkeypatch.setattr(pictures, "reconstruction", spy)
    monkeypatch.setattr(pictures.nets, "StackDecoder", Shows)
    config = types.SimpleNamespace(pipeline=types.SimpleNamespace(stack=2))
    pictures.Decoder(config, [part], [codes], CPU).fit(1, lambda: None)
    assert len(gaps) == 2 and max(gaps) < 1e-6


# ---------------------------------------------------------------- the encoder's and tokenizer's


def gate_stage():
    part, other = recording([40, 30, 50]), recording([30, 40, 30])
    found = types.SimpleNamespace(recordings=[part, other], device=CPU, poll=lambda: None, total=1)
    found.config = tools.load_config(["pipeline_debug"], {})
    found.quantizer = tokenizer.make_quantizer(found.config, 8)
    return found


def test_controls_are_fitted_on_training_rows_of_the_games_that_are_named(monkeypatch):
    stage = gate_stage()
    numbers = [np.stack([np.arange(len(p))] * 8, 1).astype(np.float32) for p in stage.recordings]
    for games in ([0], [1], [0, 1]):
        found = tokenizer_gate.training_rows(stage, numbers, games)[:, 0].numpy()
        expected = [np.flatnonzero(~stage.recordings[i].held) for i in games]
        assert np.array_equal(found, np.concatenate(expected))
    asked, fit = [], tokenizer_gate.fit_all
    spy = lambda stage, embed, games: asked.append(games) or fit(stage, embed, games)
    monkeypatch.setattr(tokenizer_gate, "fit_all", spy)
    tokenizer_gate.transfer_table(stage, numbers)
    assert asked == [[0], [1]]


def test_levels_are_of_held_out_frames_and_codes_add_up():
    stage = gate_stage()
    part = stage.recordings[0]
    stage.recordings = [part]
    code = np.where(part.held, 3, np.arange(len(part)) % 7)[:, None]  # steady where it is held out
    table = tokenizer_gate.level_table(stage, [code], code[part.held])
    assert {row.metric: row.value for row in table.rows}["L0: persistence"] == 1.0
    z = np.random.default_rng(0).normal(size=(len(part), 8)).astype(np.float32)
    codes = tokenizer.encode(stage.quantizer, z[part.held])[1]
    table = tokenizer_gate.energy_table(stage, [z], [z], codes)
    found = {row.metric: row.value for row in table.rows}
    expected = tokenizer_gate.explained_energy(z[part.held], codes[:, :2].sum(1))
    assert found["L0+L1: explained energy"] == pytest.approx(expected)


def test_untrained_codes_are_of_the_control(monkeypatch):
    stage, seen, encode = gate_stage(), [], tokenizer.encode
    part, control = stage.recordings[0], tokenizer.make_quantizer(stage.config, 8)
    mine, theirs = np.zeros((2, len(part), 8), np.float32)
    spy = lambda quantizer, x: seen.append((quantizer, x)) or encode(quantizer, x)
    monkeypatch.setattr(tokenizer, "encode", spy)
    tokenizer_gate.probe_table(stage, part, mine, theirs, control)
    (a, x), (b, y) = seen
    assert a is stage.quantizer and x is mine and b is control and y is theirs


def test_the_flat_control_has_as_many_groups_as_there_are_levels(monkeypatch):
    stage, asked = gate_stage(), []
    levels = stage.quantizer.levels
    stage.quantizer = tokenizer.make_quantizer(stage.config, 4 * levels)
    fit = tokenizer_gate.fit_all
    spy = lambda *args, **keys: asked.append(keys) or fit(*args, **keys)
    monkeypatch.setattr(tokenizer_gate, "fit_all", spy)
    rng = np.random.default_rng(0)
    z = [rng.normal(size=(len(p), 4 * levels)).astype(np.float32) for p in stage.recordings]
    control = tokenizer.encode(stage.quantizer, tokenizer_gate.held(stage, z))[1]
    tokenizer_gate.energy_table(stage, z, z, control)
    assert asked == [{"groups": levels, "levels": 1}]


def test_the_encoder_s_metrics_are_of_held_out_frames(encoded):
    part = recording([40, 30, 50])
    x = np.where(part.held[:, None], np.random.default_rng(0).normal(size=(len(part), 4)), 0.0)
    found = {row.metric: row for row in encoder_gate.geometry_rows({"here": x}, part)}
    assert found["pong: temporal ratio"].value > 0.5
    part.ram = part.ram.copy()
    part.ram[:, metrics.probes.BYTES["atari_pong"]["ball x"]] = np.where(
        part.held, np.arange(len(part)), 5
    )
    table = encoder_gate.probe_table({"here": x}, part, 100, lambda: None)
    values = {row.metric: row.value for row in table.rows}
    assert np.isfinite(values["ball x: best r (lineage)"])
    for row in rows(encoded / "encoder", "Geometry").values():
        if "ratio" in row["metric"]:
            assert row["baselines"]["untrained"] != row["value"]
