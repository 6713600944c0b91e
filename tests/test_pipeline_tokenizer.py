"""The tokenizer stage: metrics by hand and at their floors, commitment, tokens, its gate."""

import math
import types

import numpy as np
import pytest
import torch
from small_pipeline import copied, read, rows, run, run_killed, same
from small_runs import one_line
from test_pipeline import recording

import tools
from pipeline import data, encoder, nets, tokenizer
from pipeline import tokenizer_gate as metrics
from pipeline.gate import Table

CPU = torch.device("cpu")


def config(**overrides):
    return tools.load_config(["pipeline_debug"], overrides)


# ---------------------------------------------------------------- metrics


def test_persistence_by_hand_and_at_its_floor():
    code = np.array([1, 1, 2, 2, 2, 3])
    assert metrics.persists(code, np.array([0, 1, 2, 3])).mean() == 0.75
    assert not metrics.persists(code, np.array([1])).any()
    # pairs of equal codes: 2 of 1 and 6 of 2, of 30
    assert metrics.shuffled_persistence(code) == pytest.approx(8 / 30)
    assert metrics.shuffled_persistence(np.arange(9)) == 0.0
    shuffled = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 2000))
    measured = metrics.persists(shuffled, np.arange(len(shuffled) - 1)).mean()
    assert measured == pytest.approx(metrics.shuffled_persistence(shuffled), abs=0.02)


def test_entropy_by_hand_and_at_its_floor():
    assert metrics.entropy_bits(np.array([0, 1, 2, 3])) == 2.0
    assert metrics.entropy_bits(np.array([0, 0, 0, 7])) == pytest.approx(0.8112781)
    assert metrics.entropy_bits(np.zeros(5, int)) == 0.0


def test_cosine_is_not_the_lineages_dot_product():
    z, codes = np.array([[3.0, 4.0], [0.0, 5.0]]) / 5.0, np.array([[0.3, 0.4], [0.0, 0.5]])
    assert metrics.cosine(z, codes) == pytest.approx(1.0)
    assert metrics.dot(z, codes) == pytest.approx(0.5)  # what they reported
    assert metrics.explained_energy(z, codes) == pytest.approx(0.75)
    assert metrics.explained_energy(z, z) == 1.0 and metrics.explained_energy(z, 0 * z) == 0.0
    assert metrics.cosine(z, 0 * z) == 0.0


def test_coding_the_mean_alone_explains_energy_and_no_variance():
    z = np.random.default_rng(0).normal(size=(500, 4)) + 10.0
    codes = np.broadcast_to(z.mean(0), z.shape)
    assert metrics.explained_energy(z, codes) > 0.98
    assert metrics.explained_variance(z, codes) == pytest.approx(0.0, abs=1e-9)


def test_shared_codes_by_hand_and_against_the_null():
    code, game = np.array([0, 1, 1, 1, 2, 5]), np.array([0, 0, 0, 1, 1, 1])
    assert metrics.shared(code, game, 8) == (1, pytest.approx((2 / 3 + 1 / 3) / 2))
    apart = np.repeat(np.arange(4), 100), np.repeat([0, 0, 1, 1], 100)
    measure = lambda code, game: metrics.shared(code, game, 4)
    assert measure(*apart) == (0, 0.0)
    assert metrics.permuted(measure, *apart).tolist() == [4.0, 1.0]


def test_mutual_information_by_hand_and_at_its_floor():
    code, game = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    assert metrics.mutual_information(code, game) == pytest.approx(1.0)
    assert metrics.mutual_information(code, np.array([0, 1, 0, 1])) == pytest.approx(0.0)
    rng = np.random.default_rng(0)
    noise = rng.integers(64, size=2000), rng.integers(2, size=2000)
    plug_in = metrics.mutual_information(*noise)
    null = metrics.permuted(metrics.mutual_information, *noise)
    assert plug_in > 0.01, "the estimate alone would see information in noise"
    assert plug_in == pytest.approx(null, abs=0.01)


# ---------------------------------------------------------------- the quantiser


def unit(count, dim, seed=0):
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("kind", ["nearest", "sampled", "fsq"])
def test_every_learning_kind_comes_to_explain_more(kind):
    base = unit(8, 24)[torch.arange(400) % 8]
    settings = config(**{"dynamics.hrvq.posterior": kind})
    before, after = (tokenizer.fit(settings, base, n) for n in (0, 400))
    energy = lambda q: metrics.explained_energy(base.numpy(), tokenizer.encode(q, base)[1].sum(1))
    assert energy(after) > max(energy(before) + 0.1, 0.2)


def test_frozen_codes_stay():
    settings = config(**{"dynamics.hrvq.posterior": "frozen"})
    before, after = (tokenizer.fit(settings, unit(100, 24), n) for n in (0, 20))
    assert torch.equal(before.book, after.book)


def test_codes_of_all_levels_add_up():
    polls = []
    quantizer = tokenizer.fit(config(), unit(200, 24), 50, poll=lambda: polls.append(1))
    assert len(polls) == 50, "a gate's fit could not be stopped"
    index, codes = tokenizer.encode(quantizer, unit(200, 24))
    assert index.shape == (200, 3, 1) and codes.shape == (200, 3, 24)
    found = quantizer.encode(tokenizer.grouped(unit(200, 24)))
    assert np.allclose(tokenizer.quantised(found).numpy(), codes.sum(1), atol=1e-6)


def gradient(encoded, weights):
    """What a commitment with these weights alone does to the encoder's last bias."""
    settings = config(**{"pipeline.tokenizer.joint": "true", "dynamics.hrvq.commitment": weights})
    torch.manual_seed(0)
    stage = tokenizer.Tokenizer(settings, encoded, CPU, print)
    rows = encoder.Rows(np.zeros(16, int), stage.recordings[0].pairs(1, False)[:16])
    _, metrics, codes = stage.joint_loss(rows)
    loss = tokenizer.commitment(codes, stage.weights)
    assert loss.item() == pytest.approx(metrics["commitment_loss"].item())
    return torch.autograd.grad(loss, stage.objective.encoder.norm.weight)[0]


def test_jointly_the_commitment_of_every_level_reaches_the_encoder(encoded):
    """The lineage's schedules gave codebooks that were equal to the last bit."""
    for level in range(3):
        weights = [1.0 if i == level else 0.0 for i in range(3)]
        assert gradient(encoded, weights).norm() > 1e-4, level
    assert gradient(encoded, [0.0] * 3).norm() == 0.0


def test_commitment_by_hand():
    quantizer = tokenizer.make_quantizer(config(), 4)
    codes = quantizer.encode(tokenizer.grouped(unit(6, 4)))
    error = (codes.residual - codes.code.detach()).square().mean((0, 2, 3))
    expected = 0.5 * error[0] + 2.0 * error[2]
    assert torch.allclose(tokenizer.commitment(codes, [0.5, 0.0, 2.0]), expected)


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("joint", ["false", "true"])
def test_two_commitments_differ_jointly_and_are_the_same_on_frozen_embeddings(joint, encoded):
    books = []
    for weights in ([0.05, 0.25, 0.6], [0.5, 0.5, 0.5]):
        keys = {"pipeline.tokenizer.joint": joint, "dynamics.hrvq.commitment": weights}
        torch.manual_seed(0)
        stage = tokenizer.Tokenizer(config(**keys), encoded, CPU, print)
        for _ in range(3):
            stage.advance()
        books.append(stage.quantizer.book)
    assert torch.equal(*books) == (joint == "false")


def test_the_gate_says_that_commitment_is_without_effect(tokenized):
    assert "without effect" in read(tokenized / "tokenizer")["facts"]["commitment"]


def test_tokens_are_those_of_the_saved_tokenizer(tokenized):
    """The lineage's came from another epoch than the tokenizer that it kept."""
    net, quantizer = tokenizer.load(tokenized, config(), CPU)
    for game in ("pong", "breakout"):
        recording = data.load(tokenized, config(), game)
        saved = tokenizer.load_tokens(tokenized, recording)
        stacks = torch.from_numpy(recording.stacks(np.arange(len(recording)), 4)) / 255.0
        with torch.no_grad():
            index, _ = tokenizer.encode(quantizer, net(stacks))
        assert saved.shape == (len(recording), 3) and (saved == index[:, :, 0]).mean() > 0.999


def test_the_gate(tokenized):
    folder = tokenized / "tokenizer"
    levels = rows(folder, "Levels")
    for level in range(3):
        use, kept = levels[f"L{level}: codes in use"], levels[f"L{level}: persistence"]
        assert 1 <= use["value"] <= use["baselines"]["there are"] == 16
        assert 1 <= use["baselines"]["untrained"] <= 16
        assert 0 <= kept["value"] <= 1 and "shuffled" in kept["baselines"]
        assert levels[f"L{level}: bits"]["value"] <= 4.0
    energy = rows(folder, "Reconstruction of the embedding")
    whole = energy["L0+L1+L2: explained energy"]
    assert whole["baselines"].keys() == {"the mean alone", "untrained", "flat, equal bits"}
    for name in ("L0", "L0+L1+L2"):
        variance = energy[f"{name}: explained variance"]["baselines"]["the mean alone"]
        assert variance == pytest.approx(0.0, abs=1e-5)
    assert energy["L0+L1+L2: cosine"]["value"] <= 1.0
    shared = rows(folder, "Across games")
    assert shared["L0: bits about the game"]["baselines"].keys() == {
        "shuffled games",
        "the game's own",
    }
    assert rows(folder, "Transfer to a game that the codebooks never saw")
    probes = rows(folder, "pong: what a linear probe finds in the codes")
    assert {"ball x: R²", "ball x: R², L0", "ball x: R², before quantising"} <= probes.keys()
    assert read(folder)["facts"]["code bits a frame"] == 3 * math.log2(16)


def test_one_code_is_a_warning_and_more_are_no_merit(encoded):
    """Two codes of 256 had passed, ahead of a collapsed level."""
    part = data.load(encoded, config(), "pong")
    stage = types.SimpleNamespace(recordings=[part], quantizer=types.SimpleNamespace(codes=256))
    codes = np.arange(len(part))[:, None] // np.array([len(part), 2, 1]) % 9
    control = np.zeros((part.held.sum(), 3), int)
    table = metrics.level_table(stage, [codes], control)
    found = {row.metric: row for row in table.rows}
    assert found["L0: codes in use"].beaten_by() == ["a collapsed level"]
    for name in ("codes in use", "perplexity"):
        row = found[f"L1: {name}"]
        assert not row.better and not row.beaten_by() and row.beside["untrained"] == 1


def test_the_gate_fits_what_it_compares_with_once_and_on_the_encoder_as_it_began(
    tmp_path, monkeypatch
):
    settings, fits, polls, fit = config(), [], [], tokenizer.fit
    part = recording([40, 20, 40])
    part.image = np.random.default_rng(0).integers(256, size=(100, 84, 84, 1), dtype=np.uint8)
    monkeypatch.setattr(data, "load_all", lambda root, config: [part, part])
    tools.seed_all(settings.seed)  # as ``stage.run``
    began = encoder.Encoder(settings, tmp_path, CPU, print)
    stage = types.SimpleNamespace(config=settings, device=CPU, total=2, name="tokenizer")
    stage.recordings, stage.poll = [part, part], lambda: polls.append(1)
    stage.quantizer = tokenizer.make_quantizer(settings, 384)
    theirs = metrics.untrained_embeddings(stage)
    assert np.array_equal(theirs[0], nets.embed(began.untrained, part, np.arange(100), 4, CPU))
    monkeypatch.setattr(tokenizer, "fit", lambda *a, **k: fits.append(a[2]) or fit(*a, **k))
    monkeypatch.setattr(metrics, "probe_table", lambda *args: Table("", []))
    metrics.evaluate(stage, theirs, [np.zeros((100, 3), int)] * 2)
    assert fits == [2, 2, 2, 2, 0]  # control, flat codes, other games', its own and random ones
    assert len(polls) > 8, "the gate could not be stopped"


@pytest.mark.parametrize("joint", ["false", "true"])
def test_a_killed_tokenizer_continues_to_the_same_end(joint, encoded, tmp_path, monkeypatch):
    words = ["--joint", joint, "--epochs", 1 if joint == "true" else 2]
    whole = copied(encoded, tmp_path / "whole", "collect", "encoder")
    assert run("tokenizer", whole, *words) == 0
    folder = copied(encoded, tmp_path / "killed", "collect", "encoder")
    run_killed(monkeypatch, "tokenizer", folder, 3, *words)
    assert run("tokenizer", folder, *words) == 0
    assert same(folder / "tokenizer", whole / "tokenizer")


def test_one_game_has_no_tables_across_games(tmp_path):
    few = ["--games", "pong"]
    for stage in ("collect", "encoder", "tokenizer"):
        assert run(stage, tmp_path, *few) == 0
    titles = [table["title"] for table in read(tmp_path / "tokenizer")["tables"]]
    assert "Levels" in titles and "Across games" not in titles


def test_wrong_sizes_are_told(encoded, tmp_path, capsys):
    folder = copied(encoded, tmp_path / "run", "collect", "encoder")
    assert run("tokenizer", folder, "--dynamics.hrvq.commitment", "0.1", "0.2") == 2
    one_line(capsys, "dynamics.hrvq.commitment", "2 values for 3 levels")
    assert run("tokenizer", folder, "--batch", 100_000) == 2
    one_line(capsys, "pipeline.tokenizer.batch")
    words = ["--dynamics.hrvq.posterior", "fsq", "--dynamics.hrvq.codes", "11"]
    assert run("tokenizer", folder, *words) == 2
    one_line(capsys, "dynamics.hrvq", "fsq")
