"""The frame of the pipeline: command line, manifests, gates, resuming."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest
import torch
from small_pipeline import DEBUG, copied, made, read, rows, run, run_killed, same
from small_runs import one_line

import forked
import tools
from conftest import ROOT
from envs import make_env
from hidreamer.checkpoint import FolderError, load_checkpoint
from pipeline import __main__ as command
from pipeline import collect, data, gate, manifest, speed, stage
from pipeline.gate import HIGHER, LOWER, Gate, Row, Table

CPU = torch.device("cpu")

# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["colect"], ["colect", "collect"]),
        (["collect", "--configs", "pipeline_debug"], ["--logdir"]),
        (["collect", "--logdir", "x", "--stepz", "3"], ["stepz"]),
        (["collect", "--logdir", "x", "--steps", "1"], ["pipeline.collect.steps", "at least 10"]),
        (["encoder", "--logdir", "x", "--steps", "90"], ["no key of encoder", "collect.steps"]),
        (["collect", "--logdir", "x", "--eval_episodes", "3"], ["--pipeline.policy.eval_episodes"]),
        (["collect", "--logdir", "x", "--games", "pongg"], ["pongg", "pong"]),
        (["collect", "--logdir", "x", "--games", "pong", "pong"], ["twice"]),
        (["collect", "--logdir", "x", "--resume", "y"], ["--resume"]),
        (["collect", "--logdir", "x", "--agent", "nowhere"], ["nowhere", "random play"]),
        (["collect", "--logdir", "x", "--from-minari", "nowhere"], ["minari"]),
        (
            ["collect", "--logdir", "x", "--dynamics.hrvq.memory", "stacked"],
            ["--dynamics.hrvq.memory interleaved"],
        ),
        (["all", "--logdir", "x", "--dynamics.hrvq.residual", "expected"], ["residual drawn"]),
    ],
)
def test_wrong_arguments_are_told_in_one_line(words, hints, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    one_line(capsys, *hints)


def test_short_keys_stand_for_those_of_the_stage():
    keys = tools.load_config([], {}).flat()
    full = lambda key, stage: command.full_key(key, stage, keys)
    assert full("steps", "collect") == full("steps", "all") == "pipeline.collect.steps"
    assert full("collect.steps", "encoder") == "pipeline.collect.steps"
    assert full("games", "collect") == "pipeline.games"
    assert full("env.size", "collect") == "env.size" and full("nothing", "all") == "nothing"


# ---------------------------------------------------------------- gates


def test_a_gate_warns_where_a_baseline_is_matched_or_beats():
    better = Row("a", 2.0, {"x": 1.0, "y": math.nan}, HIGHER)
    equal = Row("b", 2.0, {"x": 2.0, "y": 1.0}, HIGHER)
    lower = Row("c", 2.0, {"x": 1.0}, LOWER)
    broken = Row("d", math.nan, {"x": 1.0}, LOWER)
    record = Row("e", 0.0, {"x": 1.0}, HIGHER, {"y": 1.0})
    record.baselines = {}  # what stands beside a value is shown, and not compared
    assert Gate("s", [Table("t", [record])]).tree()["tables"][0]["rows"][0]["baselines"] == {
        "y": 1.0
    }
    assert [row.beaten_by() for row in (better, equal, lower, broken, record)] == [
        [],
        ["x"],
        ["x"],
        ["x"],
        [],
    ]
    assert not Gate("s", [Table("t", [better, record])]).warnings()
    assert len(Gate("s", [Table("t", [better, equal, lower, broken])]).warnings()) == 3


def test_a_gate_as_files(tmp_path):
    found = Gate("s", [Table("t", [Row("m", math.nan, {"x": 0.5}, HIGHER)], "a note")], {"n": 3})
    found.write(tmp_path)
    tree = gate.read(tmp_path)
    assert tree == found.tree() and not tree["passed"]
    assert tree["tables"][0]["rows"][0]["value"] is None
    text = (tmp_path / "gate.md").read_text()
    assert "| m ↑ | – ⚠ | 0.5 |" in text and "a note" in text and "- n: 3" in text


def test_strict_fails_where_the_gate_warns(collected, tmp_path, monkeypatch, capsys):
    folder = copied(collected, tmp_path / "run", "collect")
    for passed, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(command.gate, "markdown", lambda tree: "")
        tree = read(folder / "collect") | {"passed": passed}
        monkeypatch.setattr(command.stage.gate, "read", lambda path, tree=tree: tree)
        assert run("collect", folder, "--strict") == status
        assert run("collect", folder) == 0


# ---------------------------------------------------------------- collect


def test_collect_records_what_the_format_asks_for(collected):
    config = tools.load_config(["pipeline_debug"], {})
    for game, actions in (("pong", 6), ("breakout", 4)):
        recording = data.load(collected, config, game)
        steps = (~recording.is_first).sum()
        assert steps == config.pipeline.collect.steps
        assert recording.image.shape == (len(recording), 84, 84, 1)
        assert recording.action.shape[1] == actions and recording.ram.any()
        assert (recording.action[~recording.is_first].sum(-1) == 1.0).all()
        assert not recording.action[recording.is_first].any()
        # env.time_limit 240 frames: every episode but the last is 60 steps, and a truncation
        assert recording.is_last.sum() == recording.is_first.sum() == 4
        assert not recording.is_terminal.any()


def test_frames_actions_and_memory_belong_together(collected):
    """Playing the recorded actions again from the recorded seeds gives every row again."""
    config = tools.load_config(["pipeline_debug"], {})
    from analysis import probes

    recording = data.load(collected, config, "pong")
    one = slice(0, 61)
    rows = {"image": recording.image[one], "prev_action": recording.action[one]}
    theirs = tools.load_config(["pipeline_debug"], {"task": "atari_pong"})
    found = probes.recover(rows | {"reward": recording.reward[one]}, theirs)
    assert np.array_equal(found, recording.ram[one])


def test_dreamer_reads_what_collect_wrote(collected, tmp_path):
    """The episodes are those of a run: another command trains on them."""
    from analysis import offline

    files = offline.find([str(collected / "collect" / game) for game in ("pong",)] * 3)
    config = tools.load_config(["pipeline_debug", "debug"], {"task": "atari_pong"})
    offline.check(files, config)


def test_every_episode_is_another_and_every_seed(collected, tmp_path):
    config = tools.load_config(["pipeline_debug"], {})
    recording = data.load(collected, config, "pong")
    episodes = [recording.action[x] for x in recording.episodes(False)]
    assert not np.array_equal(episodes[0], episodes[1])
    assert run("collect", tmp_path, "--seed", 1, "--games", "pong", "--steps", 60) == 0
    other = read(tmp_path / "collect", "manifest.json")["outputs"]
    ours = read(collected / "collect", "manifest.json")["outputs"]
    assert other["pong/train_eps/0000000-00-61.npz"] != ours["pong/train_eps/0000000-00-61.npz"]


def test_a_killed_collect_continues_to_the_same_end(collected, tmp_path, monkeypatch):
    run_killed(monkeypatch, "collect", tmp_path, 3)
    assert not (tmp_path / "collect" / "manifest.json").exists()
    (tmp_path / "collect/pong/train_eps/0000099-00-61.npz").write_bytes(b"half")
    assert run("collect", tmp_path) == 0
    assert same(tmp_path / "collect", collected / "collect")


def test_files_that_collect_did_not_write_are_neither_deleted_nor_used(
    collected, tmp_path, monkeypatch, capsys
):
    """Nobody's play counts as the recording, which the manifests of later stages vouch for."""
    run_killed(monkeypatch, "collect", tmp_path, 3)
    mine = tmp_path / "collect/pong/train_eps/my_own_play.npz"
    first = sorted(mine.parent.glob("*.npz"))[0]
    mine.write_bytes(first.read_bytes())
    assert run("collect", tmp_path) == 0
    assert mine.read_bytes() == first.read_bytes()
    with pytest.raises(manifest.InputError, match=r"my_own_play\.npz is none of the recorded"):
        data.load(tmp_path, tools.load_config(["pipeline_debug"], {}), "pong")
    folder = tmp_path / "new/collect/pong/train_eps"
    folder.mkdir(parents=True)
    (folder / first.name).write_bytes(b"mine")
    capsys.readouterr()
    assert run("collect", tmp_path / "new") == 2
    one_line(capsys, "1 episode in train_eps", "move them away")
    assert (folder / first.name).read_bytes() == b"mine"


def test_a_missing_minari_is_told_before_anything_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minari", None)
    words = ("--pipeline.collect.to_minari", str(tmp_path / "sets"))
    assert run("collect", tmp_path / "run", *words) == 2
    one_line(capsys, "minari")
    assert not list((tmp_path / "run").glob("collect/*"))


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_stage_goes_on_from_its_checkpoint_before(how, collected, tmp_path, monkeypatch, capsys):
    run_killed(monkeypatch, "collect", tmp_path, 5, "--checkpoint_every", "1")
    latest = tmp_path / "collect" / "checkpoints" / "latest.pt"
    step = load_checkpoint(latest.with_name("previous.pt"))["step"]
    assert 0 < step < load_checkpoint(latest)["step"]
    latest.write_bytes(b"no checkpoint") if how == "damaged" else latest.unlink()
    capsys.readouterr()
    assert run("collect", tmp_path) == 0
    assert f"previous.pt at step {step}" in capsys.readouterr().out
    assert (latest.parent / "latest.damaged").exists() == (how == "damaged")
    assert same(tmp_path / "collect", collected / "collect")


def test_sigkill(collected, tmp_path):
    """The real signal, to a process of its own, in the middle of it."""
    words = [sys.executable, "-m", "pipeline", "collect", *DEBUG, "--logdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = forked.popen(words, env=environment, cwd="/", stdout=subprocess.DEVNULL)
    folder = tmp_path / "collect" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (folder / "latest.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run("collect", tmp_path) == 0
    assert same(tmp_path / "collect", collected / "collect")


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("critic.replay_loss", 0.3, "--critic.replay_loss 0.0"),
        ("optim", "joint", "--optim separate"),
        ("replay.write_back", "true", "--replay.write_back false"),
        ("dynamics.hrvq.memory", "gru", "--dynamics.hrvq.memory interleaved"),
        ("model.losses.ac_cpc", 1, "--model.losses.ac_cpc 0.0"),
        ("model.losses.harmony", 1, "--model.losses.harmony 0.0"),
    ],
)
def test_what_only_the_online_agent_can_is_refused_before_anything_is_recorded(
    key, value, remedy, tmp_path, capsys
):
    assert run("all", tmp_path / "a", f"--{key}", value) == 2
    one_line(capsys, key, remedy)
    assert not (tmp_path / "a").exists()


def test_a_trained_agent_collects(tmp_path, capsys):
    import dreamer

    agent = tmp_path / "agent"
    same_env = ["--env.size", "84", "84", "--env.action_repeat", "4", "--env.time_limit", "240"]
    same_env += ["--env.atari.grayscale", "true", "--task", "atari_pong", "--video", "false"]
    same_env += ["--encoder.minres", "21", "--decoder.minres", "21", "--eval_episodes", "0"]
    words = ["--configs", "debug", *same_env, "--steps", "160", "--logdir", str(agent)]
    assert dreamer.main(words) == 0
    few = ["--games", "pong", "--steps", "120", "--agent", agent]
    assert run("collect", tmp_path / "a", *few) == 0
    assert run("collect", tmp_path / "b", *few) == 0
    assert same(tmp_path / "a/collect", tmp_path / "b/collect")
    noted = read(tmp_path / "a/collect", "manifest.json")["agent"]
    assert noted["step"] == 160 and len(noted["sha256"]) == 64
    assert run("collect", tmp_path / "c", *few, "--random", "1") == 0
    assert made(tmp_path / "a/collect") != made(tmp_path / "c/collect")
    knows_what_was_done(tmp_path / "a", agent)
    capsys.readouterr()
    assert run("collect", tmp_path / "d", *few, "--games", "breakout") == 2
    one_line(capsys, "atari_pong", "6 actions", "4 actions", "pipeline.games")
    latest = agent / "checkpoints" / "latest.pt"
    latest.write_bytes(latest.read_bytes()[:-300])
    with pytest.warns(RuntimeWarning, match=r"latest\.pt is damaged.*; reading .*previous\.pt"):
        assert run("collect", tmp_path / "e", *few) == 0


def knows_what_was_done(folder, agent):
    """Also where a random action was taken instead of the agent's own."""
    changes = {"pipeline.collect.agent": str(agent), "pipeline.collect.random": 0.5}
    settings = tools.load_config(["pipeline_debug"], changes | {"pipeline.games": ["pong"]})
    with contextlib.closing(collect.Collect(settings, folder / "again", CPU, print)) as stage:
        told, act = [], stage.policy.agent.act

        def listen(state, *args):
            told.append(state.action[0].numpy().copy())
            return act(state, *args)

        stage.policy.agent.act = listen
        done = stage._play(0, 0, 60).rows["prev_action"]
    assert len(told) == len(done) - 1 == 60 and len(np.unique(done.argmax(1))) > 2
    assert np.array_equal(np.array(told)[1:], done[1:-1])


def test_an_agent_that_trained_on_does_not_continue_a_recording(tmp_path, monkeypatch):
    """Its path was all that was compared: half the episodes had been another policy's."""
    config = tools.load_config(
        ["pipeline_debug"], {"pipeline.games": ["pong"], "pipeline.collect.agent": "agent"}
    )
    identity = {"step": 160, "sha256": "a"}
    agent = lambda: types.SimpleNamespace(logdir=tmp_path / "agent", identity=dict(identity))
    monkeypatch.setattr(collect, "RecordedPolicy", lambda *args: agent())
    lines = []
    with contextlib.closing(collect.Collect(config, tmp_path, CPU, lines.append)) as begun:
        state = begun.save_state()
        begun.load_state(state)
        identity["sha256"] = "b"
        begun.policy = agent()
        with pytest.raises(manifest.InputError, match=r"at step 160, .* collect` again$"):
            begun.load_state(state)
        begun.load_state({key: x for key, x in state.items() if key != "agent"})
    assert len(lines) == 1 and "two policies" in lines[0]


def test_minari_both_ways(collected, tmp_path, capsys):
    """What is written and read again is, to the last bit, what was recorded."""
    pytest.importorskip("minari")
    folder = copied(collected, tmp_path / "a", "collect")  # finished: what is asked for is written
    assert run("collect", folder, "--to-minari", tmp_path / "sets") == 0
    assert run("collect", tmp_path / "b", "--from-minari", tmp_path / "sets") == 0
    assert made(tmp_path / "b/collect") == made(folder / "collect")
    few = ["--from-minari", tmp_path / "sets", "--steps", 100]
    assert run("collect", tmp_path / "c", *few) == 0
    config = tools.load_config(["pipeline_debug"], {})
    assert (~data.load(tmp_path / "c", config, "pong").is_first).sum() == 100
    capsys.readouterr()
    assert run("collect", tmp_path / "d", *few, "--env.size", 64, 64) == 2
    one_line(capsys, "env.size", "84, 84")
    assert run("collect", tmp_path / "e", "--from-minari", tmp_path / "sets", "--steps", 999) == 2
    one_line(capsys, "pipeline.collect.steps", "240")
    assert run("collect", tmp_path / "f", "--to-minari", tmp_path / "sets") == 2
    one_line(capsys, "is there already")
    assert run("collect", tmp_path / "g", *few, "--env.atari.actions", "all") == 2
    one_line(capsys, "Discrete(", "18 of them", "env.atari.actions")
    assert not (tmp_path / "f/collect/manifest.json").exists()
    assert run("collect", folder, "--to-minari", tmp_path / "sets") == 0  # again changes nothing
    assert "left as it is" in capsys.readouterr().out


def test_an_episode_from_elsewhere_has_steps_and_rewards_that_are_numbers():
    from pipeline import minari

    space = types.SimpleNamespace(spec={"image": ((4, 4, 1), np.uint8)}, actions=3, task="t")
    episode = lambda rewards: types.SimpleNamespace(
        observations=np.zeros((len(rewards) + 1, 4, 4, 1), np.uint8),
        actions=np.zeros(len(rewards), int),
        rewards=np.array(rewards),
        terminations=np.zeros(len(rewards), bool),
        infos={"ram": np.zeros((len(rewards) + 1, 128), np.uint8)},
    )
    assert minari.converted(episode([1.0, 2.0]), space, "x").score == 3.0
    for rewards in ([1.0, np.nan], []):
        with pytest.raises(tools.ConfigError, match="x has an episode without a step, or a reward"):
            minari.converted(episode(rewards), space, "x")


def test_what_a_kill_left_of_a_minari_data_set_is_made_again(tmp_path, monkeypatch):
    """Half a data set, found by the next process, had ended every one after it in a traceback."""
    package = pytest.importorskip("minari")
    from pipeline import minari

    part = recording([4, 3, 5])
    part.image = part.image.astype(np.uint8)
    write = lambda: minari.write(tmp_path, ["pong"], lambda game: part)
    left = tmp_path / "pong.tmp" / "pong-v0" / "data"
    for path in (left, tmp_path / "pong-v0" / "data"):  # the second is an older version's
        path.mkdir(parents=True)
        (path / "half").touch()
    original = package.create_dataset_from_buffers

    def full(name, *args, **keys):
        original(name, *args, **keys)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(package, "create_dataset_from_buffers", full)
        write()
    assert not (tmp_path / "pong").exists() and not (tmp_path / "pong.tmp" / "pong-v0").exists()
    assert "3 episodes" in write()[0]
    assert not (tmp_path / "pong" / "data" / "half").exists()
    assert not (tmp_path / "pong.tmp").exists()
    (tmp_path / "pong").rename(tmp_path / "other")
    (tmp_path / "pong.tmp").touch()
    with pytest.raises(FolderError, match=r"pong\.tmp"):
        write()
    (tmp_path / "pong.tmp").unlink()

    def refuse(*args, **keys):
        raise ValueError("two\nlines")

    monkeypatch.setattr(package, "create_dataset_from_buffers", refuse)
    with pytest.raises(tools.ConfigError, match=r"to_minari.*pong.*\(two\)"):
        write()


def test_speed_stands_beside_that_of_ale_py(collected):
    (row,) = [row for name, row in rows(collected / "collect", "Speed").items() if "/s" in name]
    share = rows(collected / "collect", "Speed")["share of ale-py's own"]["value"]
    (asked,) = row["baselines"].values()
    assert row["value"] / asked == pytest.approx(share / 0.8)


def test_a_game_is_opened_once_and_its_episodes_are_those_of_new_environments(
    collected, tmp_path, monkeypatch
):
    """Loading a cartridge for every episode had cost as much as hundreds of steps."""
    made = []

    def counting(*args, **keys):
        made.append(make_env(*args, **keys))
        return made[-1]

    settings = tools.load_config(["pipeline_debug"], {"logdir": str(tmp_path)})
    stage = collect.Collect(settings, tmp_path, torch.device("cpu"), print)
    monkeypatch.setattr(collect, "make_env", counting)
    with contextlib.closing(stage):
        while stage.step < stage.total:
            stage.advance()
        assert len(made) == len(settings.pipeline.games)
        for index in (3, 0):  # in any order
            entropy = [settings.seed, zlib.crc32(b"breakout"), index]
            seeds = np.random.SeedSequence(entropy).generate_state(2)
            fresh = make_env("atari_breakout", settings.env.tree(), int(seeds[0] >> 1))
            choose = collect.random_player(fresh, np.random.default_rng(seeds))
            found, asked = stage._play(1, index, 60).rows, collect.play(fresh, choose, 60).rows
            assert all(np.array_equal(found[key], asked[key]) for key in asked)


def test_the_speed_is_that_of_the_stage_itself(monkeypatch):
    """Slow starts of episodes count."""
    monkeypatch.setattr(speed, "bare_speed", lambda config, game: 100.0)
    slow, fast = (speed.table(None, "pong", 50, seconds).rows for seconds in (1.0, 0.5))
    assert slow[0].value == 50.0 and slow[0].beaten_by() and slow[1].value == 0.5
    assert not fast[0].beaten_by() and fast[1].value == 1.0


# ---------------------------------------------------------------- the split


def test_held_out_episodes_by_hand():
    assert data.held_out(5, 0.2).tolist() == [False, False, True, False, False]
    assert data.held_out(10, 0.2).nonzero()[0].tolist() == [2, 7]
    assert data.held_out(2, 0.9).sum() == data.held_out(2, 0.01).sum() == 1
    with pytest.raises(ValueError, match="two episodes"):
        data.held_out(1, 0.5)


def recording(lengths, held_share=0.34):
    """Episodes of so many rows, whose images show the row's number."""
    first = np.concatenate([np.arange(n) == 0 for n in lengths])
    last = np.concatenate([np.arange(n) == n - 1 for n in lengths])
    count = len(first)
    rows = {
        "image": np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1)),
        "prev_action": np.eye(3, dtype=np.float32)[np.arange(count) % 3],
        "reward": np.arange(count, dtype=np.float32),
        "ram": np.zeros((count, 128), np.uint8),
        "is_first": first,
        "is_last": last,
        "is_terminal": last,
    }
    return data.Recording("pong", rows, held_share)


def test_no_pair_and_no_window_crosses_an_end_and_none_is_on_both_sides():
    found = recording([4, 3, 5])  # the second is held out
    assert found.held.tolist() == [False] * 4 + [True] * 3 + [False] * 5
    assert found.pairs(1, False).tolist() == [0, 1, 2, 7, 8, 9, 10]
    assert found.pairs(2, True).tolist() == [4] and found.pairs(3, True).tolist() == []
    assert found.windows(3, False).tolist() == [0, 1, 7, 8, 9]
    assert found.windows(3, True).tolist() == [4] and found.windows(99, True).tolist() == []
    reach = lambda held: {i + k for i in found.windows(3, held) for k in range(3)}
    assert not reach(True) & reach(False)
    assert found.episodes(True) == [slice(4, 7)]


def test_stacks_repeat_the_first_image_and_never_look_into_another_episode():
    found = recording([4, 3, 5])
    stacks = found.stacks(np.array([0, 3, 4, 6]), 3)
    assert stacks.shape == (4, 3, 2, 2)
    assert stacks[:, :, 0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 4, 4], [4, 5, 6]]


# ---------------------------------------------------------------- manifests


def test_a_finished_stage_is_shown_and_left_alone(collected, capsys):
    before = {path: path.stat().st_mtime_ns for path in collected.rglob("*") if path.is_file()}
    assert run("collect", collected) == 0
    assert "Gate of collect" in capsys.readouterr().out
    now = {path: path.stat().st_mtime_ns for path in collected.rglob("*") if path.is_file()}
    assert now == before


def test_another_config_is_refused(collected, capsys):
    assert run("collect", collected, "--steps", 100) == 2
    one_line(capsys, "pipeline.collect.steps 240 -> 100", "--logdir")


def damage(folder, how):
    path = sorted(folder.rglob("*.npz"))[0]
    if how == "another":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif how == "missing":
        path.unlink()
    elif how == "manifest":
        (folder / "manifest.json").write_text("{")
    elif how == "field":
        (folder / "manifest.json").write_text(json.dumps({"stage": "collect"}))
    elif how == "type":
        body = read(folder, "manifest.json") | {"outputs": 3}
        (folder / "manifest.json").write_text(json.dumps(body))
    elif how == "list":
        (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ("another", "is not what the stage wrote"),
        ("missing", "is missing"),
        ("manifest", "is damaged"),
        ("field", "no 'inputs'"),
        ("type", "'outputs'"),
        ("list", "is damaged"),
    ],
)
def test_damaged_inputs_are_told_in_one_line(how, hint, collected, tmp_path, capsys):
    folder = copied(collected, tmp_path / "run", "collect")
    damage(folder / "collect", how)
    config = tools.load_config(["pipeline_debug"], {})
    with pytest.raises(manifest.InputError) as error:
        manifest.check_input(folder, "collect", "encoder", config.flat())
    assert hint in str(error.value) and "\n" not in str(error.value)
    assert "python -m pipeline collect" in str(error.value)


def test_damaged_checkpoints_are_told_with_what_to_do(tmp_path, monkeypatch, capsys):
    run_killed(monkeypatch, "collect", tmp_path, 5)
    for path in (tmp_path / "collect" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    capsys.readouterr()
    assert run("collect", tmp_path) == 2
    one_line(capsys, "latest.pt", "previous.pt", f"move {tmp_path / 'collect'} away")


def test_a_finished_stage_whose_input_is_damaged_is_not_shown(encoded, tmp_path, capsys):
    folder = copied(encoded, tmp_path / "run", "collect", "encoder")
    damage(folder / "collect", "another")
    capsys.readouterr()
    assert run("encoder", folder) == 2
    one_line(capsys, "is not what the stage wrote", "python -m pipeline collect")


def test_a_logdir_that_is_a_file_is_told(tmp_path, capsys):
    for name in ("root", "stage"):
        (tmp_path / name).mkdir()
    (tmp_path / "root" / "x").touch()
    assert run("collect", tmp_path / "root" / "x") == 2
    one_line(capsys, "is a file", "--logdir")
    (tmp_path / "stage" / "collect").touch()
    assert run("collect", tmp_path / "stage") == 2
    one_line(capsys, "is a file")


def test_inputs_that_are_not_there_unfinished_or_of_another_config(collected, tmp_path):
    config = tools.load_config(["pipeline_debug"], {})
    check = lambda root, config: manifest.check_input(root, "collect", "encoder", config.flat())
    assert check(collected, config) == read(collected / "collect", "manifest.json")["digest"]
    with pytest.raises(manifest.InputError, match="is not there: run `python -m pipeline collect`"):
        check(tmp_path, config)
    (tmp_path / "collect").mkdir()
    with pytest.raises(manifest.InputError, match="is not finished"):
        check(tmp_path, config)
    other = tools.load_config(["pipeline_debug"], {"env.time_limit": 100})
    with pytest.raises(manifest.InputError, match=r"another config \(env.time_limit 240 -> 100\)"):
        check(collected, other)


def test_a_manifest_names_where_a_stage_comes_from(collected):
    body = read(collected / "collect", "manifest.json")
    assert {"commit", "command", "hardware", "torch", "seed", "seconds"} <= body.keys()
    assert body["config"]["env.size"] == [84, 84] and body["inputs"] == {}
    assert all(len(x) == 64 for x in body["outputs"].values())
    assert "env.dmc.camera" not in body["config"]


class Nothing(stage.Stage):
    """A stage of one empty step."""

    name = "nothing"

    def advance(self):
        self.step = 1
        return {}

    def save_state(self):
        return {}

    def finish(self):
        return gate.Gate(self.name, []), []


def test_a_stage_has_the_precision_of_the_config(tmp_path, monkeypatch):
    """On CUDA products had torch's default, TF32 for convolutions alone, whatever was asked for."""
    config, seen = tools.load_config(["pipeline_debug"], {"precision": "float32"}), []
    spy = lambda config, device: seen.append((config.precision, device.type))
    monkeypatch.setattr(stage.precision, "set_precision", spy)
    stage.run(Nothing, config, tmp_path, torch.device("cpu"), lambda: None)
    assert seen == [("float32", "cpu")]


def test_the_command_line_knows_the_stages_in_their_order():
    assert tuple(command.STAGES) == command.NAMES
