"""The encoder stage: its layers, losses and metrics by hand and at their floors, and its gate."""

import math

import numpy as np
import pytest
import torch
from small_pipeline import copied, read, rows, run, run_killed, same
from small_runs import one_line
from test_pipeline import recording

import tools
from hidreamer.checkpoint import FolderError
from pipeline import data, encoder, nets, probing

# ---------------------------------------------------------------- layers and losses


def test_the_lineages_layers():
    net = nets.StackEncoder((4, 84, 84), 384)
    assert sum(p.numel() for p in net.parameters()) == 1_881_888
    z = net(torch.rand(3, 4, 84, 84))
    assert z.shape == (3, 384) and torch.allclose(z.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("shape", [(4, 84, 84), (12, 64, 64), (3, 50, 37)])
def test_the_decoder_mirrors_the_encoder(shape):
    x = torch.rand(2, *shape)
    assert nets.StackDecoder(shape, 16)(nets.StackEncoder(shape, 16)(x)).shape == x.shape


def test_images_that_are_too_small_are_told(collected, tmp_path, capsys):
    assert run("encoder", tmp_path, "--env.size", 30, 30) == 2
    one_line(capsys, "needs collect")
    with pytest.raises(ValueError, match="36 at least"):
        nets.StackEncoder((1, 35, 84), 8)


def test_info_nce_by_hand():
    a = torch.eye(3)
    # every row: its positive 1 / 0.5, two negatives 0
    expected = -math.log(math.e**2 / (math.e**2 + 2))
    assert encoder.info_nce(a, a, 0.5).item() == pytest.approx(expected, rel=1e-6)
    # the floor of knowing nothing: all embeddings the same
    assert encoder.info_nce(a[:1].expand(8, -1), a[:1].expand(8, -1), 0.1).item() == pytest.approx(
        math.log(8)
    )


def test_one_negative_by_hand():
    a, n = torch.eye(2)[:1], torch.eye(2)[1:]
    expected = -math.log(math.exp(1 / 0.1) / (math.exp(1 / 0.1) + 1.0))
    assert encoder.one_negative(a, a, n, 0.1).item() == pytest.approx(expected, rel=1e-4)
    assert encoder.one_negative(a, a, a, 0.1).item() == pytest.approx(math.log(2.0))


def test_reconstruction_by_hand():
    x = torch.zeros(2, 4, 3, 3)
    assert encoder.reconstruction(x + 0.5, x, 4).item() == pytest.approx(0.25 * 9)
    assert encoder.reconstruction(x, x, 4).item() == 0.0


def test_positives_stay_in_their_episode_and_negatives_far_away():
    found = recording([40, 30, 50])
    frames = encoder.Frames([found, recording([50, 20, 60])], 2, 3)
    rows = frames.draw(500)
    after, far = frames.after(rows), frames.far(rows)
    assert set(rows.game) == {0, 1}, "several games in one batch"
    for game, part in enumerate(frames.recordings):
        mine = rows.game == game
        a, b, c = rows.row[mine], after.row[mine], far.row[mine]
        assert (part.episode[a] == part.episode[b]).all() and (b - a == 3).all()
        assert (np.abs(c - a) >= encoder.FAR).all()
        assert not (part.held[a] | part.held[b] | part.held[c]).any()
    stacks = frames.stacks(rows)
    assert (stacks[:, -1, 0, 0] == rows.row).all()


# ---------------------------------------------------------------- metrics


def test_temporal_ratio_by_hand_and_at_its_floors():
    x = np.array([[0.0], [1.0], [3.0], [10.0]]).__getitem__
    pairs = np.array([[0, 3], [1, 2]])
    assert probing.temporal_ratio(x, np.array([0, 1]), pairs) == pytest.approx(1.5 / 6.0)
    rng = np.random.default_rng(0)
    noise, rows = rng.normal(size=(3000, 8)), np.arange(3000)
    random = probing.random_pairs(rows, rng)
    ratio = probing.temporal_ratio(noise.__getitem__, rows[:-1], random)
    assert ratio == pytest.approx(1.0, abs=0.05)
    steady = np.repeat(noise[:3], 1000, 0)  # one vector an episode: perfect, and worth nothing
    inside = np.flatnonzero(np.arange(2999) % 1000 != 999)
    assert probing.temporal_ratio(steady.__getitem__, inside, random) == 0.0
    assert math.isnan(probing.temporal_ratio(np.zeros((4, 2)).__getitem__, np.array([0]), pairs))


def test_diversity_of_orthogonal_vectors_is_the_root_of_two():
    pairs = probing.random_pairs(np.arange(16), np.random.default_rng(0))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert np.allclose(probing.distances(np.eye(16).__getitem__, pairs), math.sqrt(2))


def test_state_correlation_by_hand_and_why_it_says_little():
    y = np.arange(6.0)
    x = np.stack([np.array([1.0, 0, 0, 0, 0, 0]), -2 * y, np.ones(6)], -1)
    assert probing.state_correlation(x, y) == pytest.approx(1.0)
    assert probing.state_correlation(x[:, :1], y) == pytest.approx(
        abs(np.corrcoef(x[:, 0], y)[0, 1])
    )
    assert math.isnan(probing.state_correlation(x, np.ones(6)))  # the lineage's paddles
    noise = np.random.default_rng(0).normal(size=(40, 384))
    assert probing.state_correlation(noise, np.arange(40.0)) > 0.3  # of nothing at all


def remembered(lengths, values):
    """A recording whose byte 49 (Pong's ball x) and 54 hold ``values`` (N,)."""
    found = recording(lengths)
    found.ram = found.ram.copy()
    found.ram[:, 49] = found.ram[:, 54] = values
    return found


def test_r2_is_one_where_a_linear_map_finds_it_and_not_above_zero_for_noise():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 200, 300).astype(np.uint8)
    found = remembered([100, 100, 100], values)
    known, noise = np.stack([values, values**0.5], -1).astype(float), rng.normal(size=(300, 5))
    features = {"known": lambda rows: known[rows], "noise": lambda rows: noise[rows]}
    r2 = probing.r2(features, found, 2000)
    assert r2["known"]["ball x"] > 0.99 and -0.2 < r2["noise"]["ball x"] < 0.1
    assert math.isnan(r2["known"]["player y"])  # never changes


def test_a_ball_that_is_not_in_play_is_left_out():
    values = np.where(np.arange(300) % 2, np.arange(300) % 200, 0).astype(np.uint8)
    found = remembered([100, 100, 100], values)
    known = values[:, None].astype(float)
    known[values == 0] = 1e6  # would ruin every probe
    polls = []
    r2 = probing.r2({"known": lambda rows: known[rows]}, found, 2000, lambda: polls.append(1))
    assert r2["known"]["ball x"] > 0.99 and polls, "a gate could not be stopped"


def test_variables_of_a_game_without_names():
    found = recording([10, 10, 10])
    found.game, found.ram = "asteroids", found.ram.copy()
    found.ram[:, 3] = np.arange(30)
    assert probing.variables(found) == {"byte 3": 3}


# ---------------------------------------------------------------- the stage


def test_the_gate_has_every_metric_beside_its_baselines(encoded):
    gate = read(encoded / "encoder")
    assert gate["facts"] == {"parameters": 1_881_888, "objective": "infonce"}
    table = rows(encoded / "encoder", "pong: what a linear probe finds")
    for name, row in table.items():
        assert {"untrained", "pixels"} == row["baselines"].keys(), name
    assert {"ball x: R²", "ball x: best r (lineage)", "player y: R²"} <= table.keys()
    geometry = rows(encoded / "encoder", "Geometry")
    assert geometry["pong: norm"]["value"] == pytest.approx(1.0)
    assert 0 < geometry["breakout: temporal ratio"]["value"] < 1


def test_embeddings_are_those_of_the_saved_encoder(encoded):
    config = tools.load_config(["pipeline_debug"], {})
    objective = encoder.load_objective(encoded, config, torch.device("cpu"))
    for game in ("pong", "breakout"):
        found = data.load(encoded, config, game)
        saved = encoder.load_embeddings(encoded, game)
        assert saved.shape == (len(found), 384)
        rows = np.arange(60, 70)
        again = nets.embed(objective.encoder, found, rows, 4, torch.device("cpu"))
        assert np.allclose(saved[rows], again, atol=1e-5)


def test_a_killed_encoder_continues_to_the_same_end(encoded, tmp_path, monkeypatch):
    folder = copied(encoded, tmp_path / "run", "collect")
    run_killed(monkeypatch, "encoder", folder, 7)
    assert run("encoder", folder) == 0
    assert same(folder / "encoder", encoded / "encoder")


@pytest.mark.parametrize("objective", ["lineage", "reconstruction", "both"])
def test_every_objective_learns_something(objective, collected):
    keys = {"pipeline.encoder.objective": objective, "pipeline.encoder.epochs": 3}
    settings = tools.load_config(["pipeline_debug"], keys)
    stage = encoder.Encoder(settings, collected, torch.device("cpu"), print)
    losses = [stage.advance()["encoder_loss"].item() for _ in range(16)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_inputs_are_checked_before_anything_is_written(collected, tmp_path, capsys):
    assert run("encoder", tmp_path) == 2
    one_line(capsys, "encoder needs collect", "python -m pipeline collect")
    folder = copied(collected, tmp_path / "run", "collect")
    assert run("encoder", folder, "--collect.steps", 300) == 2
    one_line(capsys, "pipeline.collect.steps 240 -> 300")
    assert run("encoder", folder, "--batch", 10_000) == 2
    one_line(capsys, "pipeline.encoder.batch")
    assert not list(folder.glob("encoder/*.jsonl"))


def test_dinov2_from_a_local_folder(collected, tmp_path, capsys):
    """A tiny one with random weights takes the path of the real one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "dino")
    capsys.readouterr()
    folder = copied(collected, tmp_path / "run", "collect")
    control = ["--encoder.kind", "dinov2", "--weights"]
    assert run("encoder", folder, *control, tmp_path / "nowhere") == 2
    one_line(capsys, "pipeline.encoder.weights", "model.safetensors")
    assert run("encoder", folder, *control, tmp_path / "dino") == 0
    assert encoder.load_embeddings(folder, "pong").shape[1] == 24
    table = rows(folder / "encoder", "pong: what a linear probe finds")
    assert table["ball x: R²"]["baselines"].keys() == {"pixels"}


def test_dinov2_of_timm(tmp_path):
    """A folder of timm's own writing goes through the same door; another architecture does not."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 28}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes)
    save_for_hf(model, tmp_path / "dino", model_args=sizes, safe_serialization=True)
    net = nets.DINOv2(tmp_path / "dino", 1)
    x = torch.rand(3, 4, 28, 28)
    images = x[:, -1:].expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = model.eval()((images - net.mean) / net.std)
    assert net.dim == 24
    assert torch.allclose(net(x), torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
    assert net(torch.rand(2, 4, 84, 84)).shape == (2, 24)
    path = tmp_path / "dino" / "config.json"
    path.write_text(path.read_text().replace("vit_small_patch14_dinov2", "resnet18"))
    with pytest.raises(FolderError, match="resnet18"):
        nets.DINOv2(tmp_path / "dino", 1)


def test_a_damaged_dinov2_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FolderError, match="is no DINOv2"):
        nets.DINOv2(tmp_path, 1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FolderError, match="is no DINOv2"):
        nets.DINOv2(tmp_path, 1)
