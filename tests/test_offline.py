"""``--paired-offline``: world models on the same recorded episodes,
and what is measured on held-out ones.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_agent import make

import forked
import run_comparison
import tools
from analysis import heldout, offline, probes
from analysis.heldout import CONTEXT
from comparison import stats
from conftest import ROOT
from envs import make_env
from hidreamer.checkpoint import CheckpointError
from hidreamer.distributions import BINS, Bernoulli, TwoHot
from hidreamer.episodes import save_episode
from hidreamer.spaces import random_rows

QUICK = {"task": "dummy_grid", "replay.length": 12, "env.action_repeat": 1}


def config(**values):
    return tools.load_config(["debug"], QUICK | values)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with 15 episodes of dummy_grid, played at random."""
    folder, rng = tmp_path_factory.mktemp("recorded"), np.random.default_rng(0)
    env = make_env("dummy_grid", config().env.tree(), 0)
    for i in range(15):
        action, out = np.zeros(env.act_dim, np.float32), env.reset()
        steps = [out | {"prev_action": action}]
        while not out["is_last"]:
            action = np.eye(env.act_dim, dtype=np.float32)[rng.integers(env.act_dim)]
            out = env.step(action)
            steps.append(out | {"prev_action": action})
        rows = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
        save_episode(folder / f"{i:07d}-00-{len(steps)}.npz", rows)
    return folder


# ---------------------------------------------------------------- measures, by hand


def test_chunks_cover_an_episode_and_begin_as_in_training():
    rows = {"reward": np.arange(10), "is_first": np.zeros(10, bool)}
    found = heldout.chunks(rows, 4)
    assert found["reward"].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert (
        found["is_first"].tolist() == [[True, False, False, False]] * 3
        and not rows["is_first"].any()
    )
    assert heldout.chunks(rows, 64)["reward"].shape == (1, 10)
    assert heldout.chunks({k: np.resize(x, 1000) for k, x in rows.items()}, 10)["reward"].shape == (
        8,
        10,
    )


def test_horizons_are_clipped_to_the_chunk():
    assert heldout.horizons(64) == [1, 5, 15, 30] and heldout.horizons(32) == [1, 5, 15, 27]
    assert heldout.horizons(7) == [1, 2] and heldout.horizons(CONTEXT) == []


def certain(rows):
    """A head that gives what came all its probability."""
    return Bernoulli(torch.where(rows, 100.0, -100.0))


def test_errors_by_hand():
    """One pixel of 2 x 2 moves at step 3: 0.5 everywhere errs by 0.25,
    repeating the first step errs there.
    """
    truth = torch.zeros(1, 8, 2, 2, 1)
    truth[:, 3:, 0, 0] = 1.0
    batch = {"reward": torch.zeros(1, 8), "is_terminal": torch.zeros(1, 8, dtype=torch.bool)}
    half, old = torch.full_like(truth, 0.5), truth[:, :1].expand_as(truth)
    zero = TwoHot(torch.zeros(1, 8, BINS))
    said = heldout.Prediction({"grid": half}, {"grid": old}, zero, certain(~batch["is_terminal"]))
    found = heldout.score(said, {"grid": truth}, batch, 8)
    assert found["reconstruction"] == pytest.approx(0.25) and found[
        "reconstruction, moving"
    ] == pytest.approx(0.25)
    assert found["open loop, 1"] == pytest.approx(0.25)  # one pixel in four is wrong by 1
    assert math.isnan(found["open loop, 1, moving"])  # nothing moves at step 5
    assert found["reward log-likelihood"] == pytest.approx(-math.log(BINS), abs=1e-4)
    assert found["continue log-likelihood"] == pytest.approx(0.0, abs=1e-4)
    assert heldout.errors({"grid": old}, {"grid": truth}, slice(1, None)) == (
        pytest.approx(5 / 28),
        1.0,
    )
    assert heldout.score(said, {"grid": truth}, batch, 64)["open loop, 30"] is not None
    assert math.isnan(
        heldout.score(said, {"grid": truth}, batch, 64)["open loop, 30"]
    )  # the episode is too short


def test_open_loops_are_judged_behind_what_was_seen():
    truth = (torch.arange(12.0) / 12).view(1, 12, 1, 1, 1)
    batch = {"reward": torch.zeros(1, 12), "is_terminal": torch.zeros(1, 12, dtype=torch.bool)}
    nothing, reward = {"grid": 0 * truth}, TwoHot(torch.zeros(1, 12, BINS))
    said = heldout.Prediction(nothing, nothing, reward, certain(~batch["is_terminal"]))
    found = heldout.score(said, {"grid": truth}, batch, 12)
    for h in (1, 5, 7):
        step = CONTEXT - 1 + h
        assert found[f"open loop, {h}"] == pytest.approx((step / 12) ** 2)
    rows = {"reward": np.zeros(3, np.float32), "is_terminal": np.zeros(3, bool)}
    rows["grid"] = np.zeros((3, 1, 1, 1), bool)
    last = heldout.Baseline(rows, ["grid"]).predict({"grid": truth}).open_loop["grid"]
    assert torch.equal(last, truth[:, CONTEXT - 1 : CONTEXT].expand_as(truth))


def test_ends_are_judged_without_the_discount():
    agent, batch = make(**{"imag.contdisc": True, "imag.discount": 0.5})
    torch.nn.init.constant_(agent.world_model.cont.out.bias, -2.0)
    said = heldout.predict(agent.world_model, batch).cont
    assert torch.allclose(said.log_prob(torch.ones(2, 8)), said.mean().log(), atol=1e-5)


def test_the_baseline_knows_frequencies():
    rows = {"reward": np.array([0.0] * 6 + [1.0] * 2, np.float32), "is_terminal": np.arange(8) > 6}
    rows["vector"] = np.arange(8, dtype=np.float32)[:, None]
    said = heldout.Baseline(rows, ["vector"]).predict({"vector": torch.zeros(1, 8, 1)})
    assert said.reconstruction["vector"].unique().item() == 3.5
    zeros = said.reward.log_prob(torch.zeros(1, 8))[0, 0].item()
    assert zeros == pytest.approx(math.log(6 / 8), abs=1e-3)
    assert said.cont.mean()[0, 0].item() == pytest.approx(
        8 / 10
    )  # 7 of 8 went on, one of each added
    random = TwoHot(torch.randn(1, 8, BINS))
    reward = torch.from_numpy(rows["reward"])[None]
    assert said.reward.log_prob(reward).mean() > random.log_prob(reward).mean()


def test_pairing_shows_what_luck_hides():
    """A twentieth less error, under noise that both models share:
    3 seeds and 40 episodes show it, means do not.
    """
    rng = np.random.default_rng(0)
    shared = rng.lognormal(size=(3, 40))
    columns = {"a": shared, "b": 0.95 * shared + 0.02 * rng.normal(size=(3, 40))}
    value, low, high = stats.paired(columns, "a")["b"]
    assert low < value < high < 0
    alone = stats.compare([columns["b"].mean(1)], [columns["a"].mean(1)], 1)
    assert alone.low < 0 < alone.high


# ---------------------------------------------------------------- training


def trainer(recorded, folder, **values):
    folder.mkdir(exist_ok=True)
    return offline.Trainer(
        config(**values), offline.find([str(recorded)]), folder, torch.device("cpu")
    )


def test_models_see_the_same_batches(recorded, tmp_path):
    kinds = {"rssm": {}, "hrvq": {"dynamics.type": "hrvq"}, "seed": {"seed": 1}}
    seen = {}
    for name, values in kinds.items():
        made = trainer(recorded, tmp_path / name, **values)
        sampled, sample = [], made.replay.sample
        made.replay.sample = lambda sample=sample, sampled=sampled: (
            sampled.append(sample()),
            sampled[-1],
        )[1]
        for _ in range(3):
            made.step()
        seen[name] = np.stack([batch["grid"] for batch in sampled])
    assert np.array_equal(seen["rssm"], seen["hrvq"]) and not np.array_equal(
        seen["rssm"], seen["seed"]
    )


def test_held_out_episodes_are_never_trained_on(recorded, tmp_path):
    made = trainer(recorded, tmp_path)
    assert [path.name[:7] for path in made.held_files] == ["0000004", "0000009", "0000014"]
    assert len(made.replay) == 12 * 21 and not set(made.train_files) & set(made.held_files)


def test_an_interrupted_job_goes_on_exactly(recorded, tmp_path):
    whole = trainer(recorded, tmp_path / "whole")
    whole.train(8)
    first = trainer(recorded, tmp_path / "parts")
    first.train(3)
    second = trainer(recorded, tmp_path / "parts")
    second.resume(8)
    assert second.update == 3
    second.train(8)
    a, b = whole.evaluate(), second.evaluate()
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)
    assert not np.array_equal(first.evaluate()["model/reconstruction"], a["model/reconstruction"])
    with pytest.raises(tools.ConfigError, match="other episodes"):
        trainer(recorded, tmp_path / "parts", seed=1, **{"model.lr": 1.0}).resume(8)
    with pytest.raises(tools.ConfigError, match="has had 8 updates"):
        trainer(recorded, tmp_path / "parts").resume(3)


def test_a_killed_job_has_no_record_twice(recorded, tmp_path, monkeypatch):
    """After SIGKILL it goes on from its last checkpoint, with the records of then."""
    monkeypatch.setattr(offline, "LOG", 1)
    monkeypatch.setattr(offline, "SAVE", 3)
    folder, seen = tmp_path / "job", []
    for dies in (2, 5, 9):  # before the first checkpoint, and after it
        made = trainer(recorded, folder)
        made.resume(8)
        seen.append(made.update)
        step = made.step
        made.step = lambda made=made, step=step, dies=dies: 1 / 0 if made.update == dies else step()
        if dies == 9:
            made.train(8)
        else:
            with pytest.raises(ZeroDivisionError):
                made.train(8)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert seen == [0, 0, 3] and [json.loads(line)["step"] for line in lines] == [*range(1, 9)]


def test_a_damaged_checkpoint_falls_back_to_the_previous(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(offline, "LOG", 1)
    monkeypatch.setattr(offline, "SAVE", 3)
    whole = trainer(recorded, tmp_path / "whole")
    whole.train(8)
    for how in ("damaged", "gone"):
        folder = tmp_path / how
        trainer(recorded, folder).train(6)
        latest = folder / "checkpoints" / "latest.pt"
        latest.write_bytes(b"no checkpoint") if how == "damaged" else latest.unlink()
        capsys.readouterr()
        made = trainer(recorded, folder)
        made.resume(8)
        assert made.update == 3 and "continuing from" in capsys.readouterr().err
        assert (folder / "checkpoints" / "latest.damaged").exists() == (how == "damaged")
        made.train(8)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, 9)]
        mine, expected = made.evaluate(), whole.evaluate()
        assert all(np.array_equal(mine[key], expected[key], equal_nan=True) for key in expected)
    for name in ("latest.pt", "previous.pt"):
        (folder / "checkpoints" / name).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=f"move {folder} away to start anew"):
        trainer(recorded, folder).resume(8)


YEAR_2024 = {"optim": "joint", "reward.bins": "symexp", "imag.contdisc": True, "model.agc": 0.3}
YEAR_2024 |= {"model.algorithm": "laprop", "model.warmup": 2, "dynamics.rssm.cell": "block_gru"}
YEAR_2024 |= {"critic.replay_loss": 0.3, "critic.replay_grad": True, "replay.write_back": True}


@pytest.mark.parametrize("probe", [False, True])
def test_models_of_2024_are_trained_alone_and_evaluated(probe, recorded, tmp_path):
    """Along the sum of all losses there is nothing of actor and critic, which stay as they are."""
    values = YEAR_2024 | ({"model.losses.decoder": 0, "decoder.probe": True} if probe else {})
    whole = trainer(recorded, tmp_path / "whole", **values)
    before = {key: x.clone() for key, x in whole.agent.state_dict().items()}
    whole.train(6)
    after = whole.agent.state_dict()
    moved = {key for key, x in before.items() if not torch.equal(x, after[key])}
    parts = {".".join(key.split(".")[:2]) for key in moved}
    expected = {f"world_model.{x}" for x in ("encoder", "dynamics", "decoder", "reward", "cont")}
    assert parts == expected
    for updates in (3, 6):
        made = trainer(recorded, tmp_path / "parts", **values)
        made.resume(6)
        made.train(updates)
    a, b = whole.evaluate(), made.evaluate()
    assert all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)
    assert all(
        np.isfinite(a[f"model/{name} log-likelihood"]).all() for name in ("reward", "continue")
    )


def test_the_baseline_has_the_models_bins():
    """Rewards of 0 and 250: frequencies in either's bins, and a mean in those of 2024."""
    rows = {
        "reward": np.array([0.0] * 6 + [250.0] * 2, np.float32),
        "is_terminal": np.arange(8) > 6,
    }
    rows["vector"] = np.zeros((8, 1), np.float32)
    dist = {}
    for bins in ("symlog", "symexp"):
        made = heldout.Baseline(rows, ["vector"], bins).predict({"vector": torch.zeros(1, 8, 1)})
        dist[bins] = made.reward
        zeros = made.reward.log_prob(torch.zeros(1, 8))[0, 0].item()
        assert zeros == pytest.approx(math.log(6 / 8), abs=1e-3)
    assert dist["symexp"].mode()[0, 0].item() == pytest.approx(250 / 4, rel=1e-3)
    assert dist["symlog"].mode()[0, 0].item() < 10


def test_learning_beats_the_baseline(recorded, tmp_path):
    """The bar stays where it is for nobody: its place is a fair coin,
    so only having seen it helps.
    """
    made = trainer(recorded, tmp_path, **{"model.lr": 3e-3, "replay.batch": 8, "decoder.units": 64})
    before = made.evaluate()
    made.train(150)
    after = made.evaluate()
    for name in ("reconstruction", "reconstruction, moving"):
        assert after[f"model/{name}"].mean() < 0.8 * before[f"model/{name}"].mean(), name
        assert after[f"model/{name}"].mean() < after[f"baseline/{name}"].mean(), name
        assert np.array_equal(before[f"baseline/{name}"], after[f"baseline/{name}"])


# ---------------------------------------------------------------- the whole


def test_a_paired_comparison(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", forked.popen)
    args = [
        "--paired-offline",
        recorded,
        "--task",
        "dummy_grid",
        "--configs",
        "debug",
        "--models",
        "tiny_dreamerv3",
    ]
    args += [
        "tiny_hidreamer",
        "--seeds",
        2,
        "--updates",
        8,
        "--jobs",
        2,
        "--replay.length",
        12,
        "--logdir",
        tmp_path,
    ]
    args = list(map(str, args))
    assert run_comparison.main(args) == 0
    found = json.loads((tmp_path / "offline" / "summary.json").read_text())["offline"]
    assert (found["seeds"], found["updates"], found["train_episodes"], found["held_out"]) == (
        2,
        8,
        12,
        3,
    )
    for name, metric in found["metrics"].items():
        low, high = metric["differences"]["tiny_hidreamer"][1:]
        assert low <= metric["differences"]["tiny_hidreamer"][0] <= high, name
        values = metric["values"]
        difference = values["tiny_hidreamer"] - values["tiny_dreamerv3"]
        assert metric["differences"]["tiny_hidreamer"][0] == pytest.approx(difference, abs=1e-6)
    assert {"reconstruction, moving", "open loop, 7", "reward log-likelihood"} <= found[
        "metrics"
    ].keys()
    assert "without a model" in (tmp_path / "offline" / "report.html").read_text()
    results = list((tmp_path / "offline").glob("dummy_grid/*/*/results.npz"))
    times = {path: path.stat().st_mtime_ns for path in results}
    assert run_comparison.main(args) == 0 and len(results) == 4
    assert times == {path: path.stat().st_mtime_ns for path in results}  # what is finished is kept
    capsys.readouterr()
    # nor does it stand for what was asked in another way
    fewer = shutil.copytree(recorded, tmp_path / "fewer")
    next(fewer.iterdir()).unlink()
    for changed, says in (
        ([*args, "--replay.batch", "3"], "replay.batch"),
        ([args[0], str(fewer), *args[2:]], "other episodes: choose another --logdir"),
    ):
        assert run_comparison.main(changed) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and says in err and "--resume" not in err, err


BAD = [("episodes", "10 are needed"), ("task", "no vector"), ("tasks", "one --task")]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_bad_episodes_are_one_line(change, says, recorded, tmp_path, capsys):
    source = tmp_path if change == "episodes" else recorded
    tasks = {
        "episodes": ["dummy_grid"],
        "task": ["dummy_vector"],
        "tasks": ["dummy_grid", "dummy_vector"],
    }[change]
    args = [
        "--paired-offline",
        str(source),
        "--task",
        *tasks,
        "--configs",
        "debug",
        "--logdir",
        str(tmp_path),
    ]
    assert run_comparison.main(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err, err


def test_what_a_job_needs_is_one_line(capsys):
    given = ["--logdir", "nowhere", "--episodes", "nowhere", "--updates", "1"]
    for i in (0, 2, 4):
        for words in (given[:i] + given[i + 2 :], given[: i + 1] + given[i + 2 :]):
            assert offline.main(words) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and err.startswith(f"error: {given[i]} is missing")
    assert offline.main(["--help"]) == 0 and "--episodes FOLDER" in capsys.readouterr().out


def test_a_signal_ends_an_evaluation_at_once(recorded, tmp_path, monkeypatch):
    """Which takes long where RAM is recovered, and loses nothing: the weights are saved."""
    signals, seen = (signal.SIGTERM, signal.SIGINT), []
    before = [signal.getsignal(x) for x in signals]

    def evaluate(self):
        seen.extend(signal.getsignal(x) for x in signals)
        raise ArithmeticError

    monkeypatch.setattr(offline.Trainer, "evaluate", evaluate)
    words = ["--configs", "debug", "--task", "dummy_grid", "--env.action_repeat", "1"]
    words += ["--replay.length", "12", "--episodes", str(recorded), "--updates", "1"]
    try:
        assert offline.main([*words, "--logdir", str(tmp_path)]) == 1
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    assert seen == [signal.SIG_DFL, signal.default_int_handler]
    assert (tmp_path / "checkpoints" / "latest.pt").exists()


def test_held_out_episodes_are_of_all_ages():
    """A run's first episodes are a beginner's: judging on those alone would say little."""
    files = [Path(f"{i:05d}.npz") for i in range(5000)]
    train, rest = offline.split(files)
    assert len(train) == 4000 and not set(train) & set(rest)
    held = list(offline.Trainer.held(SimpleNamespace(held_files=rest, load=list)))
    assert len(held) == offline.MOST and held[0] == files[4] and held[-1] == files[-1]
    gaps = np.diff([int(path.stem) for path in held])
    assert gaps.min() > 90 and gaps.max() < 115
    # and so are those that probes are fitted on
    fitted = offline.spread(train, probes.EPISODES)
    assert (len(fitted), fitted[0], fitted[-1]) == (20, train[0], train[-1])


def test_rows_of_pong_have_the_bits_of_the_first(monkeypatch, tmp_path):
    """Codes stand at the positions of the map; where they cannot,
    as many groups of the whole image do.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantiser_rows
    import quantisers

    rows = quantisers.WORLDS["pong"].rows
    blocks = {row: quantisers.make_config("pong", row, 0, tmp_path).dynamics.hrvq for row in rows}
    bits = {
        row: block.levels * block.groups * math.log2(block.codes) for row, block in blocks.items()
    }
    assert {row for row, x in bits.items() if x != bits["sampled"]} == {"tiny_hidreamer"}
    assert {row for row, block in blocks.items() if not block.spatial} == {
        "flat",
        *quantiser_rows.WHOLE,
    }
    assert quantisers.spatial_note("pong", ["rssm", "sampled"]) == [
        "Groups are positions of the encoder's map."
    ]
    assert quantisers.spatial_note("pong", ["fsq", "flat"]) == [
        "Groups are positions of the encoder's map, but in flat."
    ]
    small = quantisers.WORLDS["minatar"].rows
    assert not quantisers.spatial_note("minatar", list(small))
    sizes = [quantisers.make_config("minatar", row, 0, tmp_path).dynamics.hrvq for row in small]
    assert {block.levels * block.groups for block in sizes} == {12} and {
        block.codes for block in sizes
    } == {16}
    assert quantisers.make_config("minatar", "two levels", 0, tmp_path).dynamics.hrvq.levels == 2
    first, preset = blocks["sampled"], tools.load_config(["tiny_hidreamer"], {}).dynamics.hrvq
    assert first.groups == 16 and blocks["tiny_hidreamer"].tree() == preset.tree()


def test_late_chunks_are_those_behind_three_points(monkeypatch):
    """Of an episode with a point in every tenth step the ball is right in the last chunks alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantisers

    length, total = 24, 96
    rows = {"reward": (np.arange(total) % 10 == 9).astype(np.float32)}
    rows |= {"is_first": np.arange(total) == 0, "time": np.arange(total, dtype=np.float32)}
    rows["grid"] = np.zeros((total, 2, 2, 1))

    class Model:
        dynamics = None

        def observe(self, obs):
            return None, SimpleNamespace(feat=None, _replace=lambda feat: None), None

        def decode(self, feat):
            return {"grid": self.grid}, None

        def open_loop(self, batch, context):
            start = batch["time"][:, 0]  # 0, 24, 48, 72: returns before 0, 2, 4, 7
            cell = torch.zeros(len(start), length, 2, 2, 1)
            cell[:, :, 0, 0] = 1.0
            self.grid = torch.where((start >= 48)[:, None, None, None, None], cell, cell.flip(2))
            return {"grid": cell}, {"grid": self.grid}

    trainer = SimpleNamespace(
        config=SimpleNamespace(replay=SimpleNamespace(length=length)),
        agent=SimpleNamespace(world_model=Model()),
        load=lambda files: {"one": rows},
        held_files=[],
        train_files=[],
        batch=lambda rows: {key: torch.as_tensor(x) for key, x in rows.items()},
    )
    monkeypatch.setattr(quantisers, "tokens", lambda dynamics, posts: {})
    found = quantisers.judge(trainer, ("ball", 0))
    assert (found["chunks"], found["late"]) == (4, 2)
    for h in quantisers.HORIZONS:
        assert found[f"ball {h}"] == 0.5 and found[f"ball {h} late"] == 1.0
        assert found[f"ball {h}, counted"] == 1.0  # it never leaves the first cell
    rows["reward"][:] = 0.0
    assert not any("late" in name for name in quantisers.judge(trainer, ("ball", 0)))


def test_a_table_of_counts_by_hand(monkeypatch):
    """A ball that goes to and fro along three cells is foreseen without a model."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import counted

    path = np.array([0, 1, 2, 1] * 5)
    grid = np.zeros((20, 1, 3, 2))
    grid[np.arange(20), 0, path, 1] = 1.0
    table = counted.Table([grid, grid[:2]], 1, (1, 3))
    seen = np.array([[0, 1], [1, 2], [2, 1], [1, 0], [0, 2]])
    assert table(*seen.T, 1).tolist() == [2, 1, 0, 1, 2]  # nobody saw the last pair: it stays
    assert table(*seen.T, 3).tolist() == [0, 1, 2, 1, 2]
    assert counted.cells(grid, 1).tolist() == path.tolist()
    assert counted.cells(torch.from_numpy(grid), 1).tolist() == path.tolist()


def test_a_table_is_of_breakout_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import counted

    config = tools.load_config(["gym"], {})
    (tmp_path / "config.yaml").write_text(tools.dump_yaml(config.tree()))
    for folder, says in (
        (tmp_path, "give one on minatar_breakout"),
        (tmp_path / "no", "name the --logdir of a run"),
    ):
        monkeypatch.setattr("sys.argv", ["counted.py", str(folder)])
        assert counted.main() == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_nats_are_of_steps_that_something_foretold(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantisers

    agent, batch = make(**{"dynamics.type": "hrvq"})
    dynamics, unimix = agent.world_model.dynamics, agent.config.dynamics.unimix
    with torch.no_grad():
        post = agent.world_model.observe(batch)[1]
    probs = [
        [torch.softmax(x[:, 1:], -1) * (1 - unimix) + unimix / x.shape[-1] for x in level]
        for level in post.levels
    ]
    by_hand = sum((p * (p / q).log()).sum((-2, -1)).mean() for p, q in probs)
    assert quantisers.tokens(dynamics, [post, post])["nats"] == pytest.approx(
        by_hand.item(), rel=1e-4
    )


def test_returns_of_a_report_without_settings_that_came_later(tmp_path, monkeypatch):
    """They are as by default: an agent of interleaved tokens is no row of stacked ones."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantiser_rows
    import quantisers

    minatar = quantisers.WORLDS["minatar"]
    few = {row: minatar.rows[row] for row in ("sampled", "stacked", "noise")}
    monkeypatch.setitem(quantisers.WORLDS, "minatar", minatar._replace(rows=few))
    monkeypatch.setattr(quantiser_rows, "DREAMS", {})
    latent = quantisers.make_config("minatar", "sampled", 0, tmp_path).dynamics.flat()
    del latent["hrvq.memory"], latent["hrvq.noise"]
    report = {"dynamics": "hrvq", "more": [], "negative_control": False, "latent": latent}
    report["runs"] = {"0": {"figures": {"return_at_20000": 1.5}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert quantisers.returns("minatar", [tmp_path / "report.json"]) == {"sampled": ([1.5], "")}


def test_a_picture_shows_the_frames_themselves_first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantisers

    obs = {"image": spaces.Box(0, 255, (16, 16, 3), "uint8")}
    agent, _ = make(obs)
    rows = {key: x[0] for key, x in random_rows(obs, spaces.Discrete(3), 1, 5 * 24).items()}
    held = SimpleNamespace(
        held=lambda: {"episode": rows},
        config=SimpleNamespace(replay=SimpleNamespace(length=24)),
        agent=agent,
        batch=lambda rows: agent.tensors({key: x for key, x in rows.items() if key != "is_last"}),
    )
    shown = quantisers.picture(held)
    frames = np.concatenate([rows["image"][2 * 24 + i] for i in quantisers.FRAMES], 1)
    assert shown.shape == (3 * 128, 128 * len(quantisers.FRAMES), 3) and shown.dtype == np.uint8
    assert np.array_equal(shown[:128:8, ::8], frames)


def test_agents_of_the_same_episodes(recorded, tmp_path, monkeypatch, capsys):
    """Playing in between changes no training, and what is kept is not trained again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import offline_agents

    rows = {"sampled": {}, "rssm": {"type": "rssm"}}
    tiny = offline_agents.WORLDS["pong"]._replace(presets=["debug"], rows=rows)
    tiny = tiny._replace(settings={"task": "dummy_grid"})
    monkeypatch.setitem(offline_agents.WORLDS, "tiny", tiny)
    for name, value in (("EVERY", 1), ("EPISODES", 3), ("ENVS", 2)):
        monkeypatch.setattr(offline_agents, name, value)
    made_by = {"commit": "0" * 12, "command": "python benchmarks/offline_agents.py"}
    monkeypatch.setattr(offline_agents, "provenance", lambda: made_by)

    def run(name, *words):
        words = ("--seeds", "0", "--updates", "2", "--runs", str(tmp_path / name), *words)
        out = str(tmp_path / f"{name}.json")
        argv = ["offline_agents.py", "tiny", "--episodes", str(recorded), "--out", out, *words]
        monkeypatch.setattr(sys, "argv", argv)
        assert offline_agents.main() == 0
        return json.loads(Path(out).read_text(encoding="utf-8"))["rows"]

    found = run("often")
    assert found.keys() == rows.keys()
    assert [step["updates"] for step in found["rssm"]["0"]] == [1, 2]
    assert "return after 2" in (tmp_path / "often.md").read_text()
    monkeypatch.setattr(offline_agents, "EVERY", 9)
    once = run("once", "--rows", "rssm")["rssm"]["0"]
    assert [once[0][key] for key in ("return", "updates")] == [found["rssm"]["0"][1]["return"], 2]
    monkeypatch.setattr(offline_agents, "train", None)
    assert run("often") == found
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], "--episodes", "x", "--rows", "nearest"])
    with pytest.raises(SystemExit):
        offline_agents.main()
    assert "no row 'nearest'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_quantisers(recorded, tmp_path, monkeypatch, capsys):
    """Every row trains and is judged; a state without codes leaves their columns empty."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantiser_rows
    import quantisers

    monkeypatch.setattr(quantisers, "ROOT", tmp_path)
    tiny = quantiser_rows.World(["debug"], {"task": "dummy_grid"}, quantiser_rows.ROWS)
    monkeypatch.setitem(quantiser_rows.WORLDS, "tiny", tiny)
    monkeypatch.setattr(quantisers, "CONTEXT", 2)
    monkeypatch.setattr(quantisers, "HORIZONS", (1, 3))
    words = ["quantisers.py", "tiny", "--episodes", str(recorded), "--seeds", "0", "--updates", "1"]
    run = lambda score: {"figures": {"return_at_20000": score}}
    report = {
        "dynamics": "hrvq",
        "more": ["--imag.starts", "8", "--dynamics.hrvq.chain", "false"],
        "negative_control": False,
    }
    (tmp_path / "returns.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [*words, "--returns", str(tmp_path / "returns.json")])
    assert (
        quantisers.main() == 2 and "no report of" in capsys.readouterr().err
    )  # before anything is trained
    monkeypatch.setattr(
        sys, "argv", [*words, "--rows", "sampled", "whole image"]
    )  # a row of Pong alone
    with pytest.raises(SystemExit):
        quantisers.main()
    assert "no row 'whole image'" in capsys.readouterr().err
    (tmp_path / "returns.json").write_text(
        json.dumps(report | {"runs": {"0": run(1.25), "1": run(2.5)}})
    )
    groups = config().dynamics.hrvq.levels * config().dynamics.hrvq.groups
    report["more"] = ["--dynamics.hrvq.levels", "1", "--dynamics.hrvq.groups", str(groups)]
    (tmp_path / "flat.json").write_text(json.dumps(report | {"runs": {"0": run(3.75)}}))
    # What a report says of its latent state counts, whatever presets say today.
    latent = config().dynamics.flat() | {"type": "hrvq", "hrvq.mask": "causal"}
    report |= {"more": [], "latent": latent, "runs": {"0": run(0.5)}}
    (tmp_path / "causal.json").write_text(json.dumps(report))
    words += [
        "--returns",
        *(str(tmp_path / f"{name}.json") for name in ("returns", "flat", "causal")),
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "table.json")])
    assert quantisers.main() == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows.keys() == {*quantiser_rows.ROWS, *quantisers.DREAMS, "last frame seen"}
    assert [row for row, by in rows.items() if "returns" in by["0"]] == [
        "flat",
        "independent",
        "causal",
    ]
    copied = rows.pop("last frame seen")["0"]
    assert copied["open loop 3, moving"] == rows["fsq"]["0"]["open loop 3, moving, copy"]
    block = config().dynamics.hrvq
    for row, by in rows.items():
        assert all(math.isfinite(x) for x in np.hstack(list(by["0"].values()))), row
        levels = 1 if row in ("flat", "flat, all at 0.1", "rssm") else 2
        assert len(by["0"]["kl"]) == levels and ("perplexity" in by["0"]) == (
            row not in ("rssm", "hrssm")
        )
        assert by["0"]["nats"] == pytest.approx(sum(by["0"]["kl"]))
    assert rows["flat"]["0"]["perplexity"][0] <= block.codes
    lines = [
        line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")
    ]
    assert len(lines) == 3 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert next(line for line in lines if "1.25 2.50" in line).startswith("| independent |")
    assert (
        "nothing in flat, causal; --imag.starts 8 in independent"
        in (tmp_path / "table.md").read_text()
    )
    # Agents that came later are added to what was judged, and take the place of earlier ones.
    kept = (tmp_path / "table.json").read_text()
    words = [*words[:2], "--from", str(tmp_path / "table.json"), "--returns", *words[-2:]]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "later.json")])
    assert quantisers.main() == 0
    later = json.loads((tmp_path / "later.json").read_text())
    assert [row for row, by in later["rows"].items() if "returns" in by["0"]] == ["flat", "causal"]
    kept = json.loads(kept)
    assert (
        kept["rows"]["independent"]["0"].pop("returns") == [1.25, 2.5]
        and later["rows"] == kept["rows"]
    )
    assert (
        later["command"] == kept["command"]
        and "returns added by `" in (tmp_path / "later.md").read_text()
    )
    monkeypatch.setattr(sys, "argv", [*words[:3], str(tmp_path / "flat.json")])
    assert quantisers.main() == 2 and "is no report of" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--updates", "3"])
    with pytest.raises(SystemExit):
        quantisers.main()
    assert "do not go with it" in capsys.readouterr().err


def test_results_of_version_0_1_are_read(tmp_path):
    """Their baseline was called otherwise; a comparison continued now has both."""
    row = np.ones(2)
    np.savez(tmp_path / offline.RESULTS, **{"model/x": row, "sceptic/x": 2 * row, "updates": 3})
    found = offline.read(tmp_path)
    assert list(found) == ["model/x", "baseline/x", "updates"] and found["baseline/x"].sum() == 4.0
