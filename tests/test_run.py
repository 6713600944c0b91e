"""The loop: nothing is lost, nothing stays due for ever, a signal or a full disk is one line."""

import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small_runs import TINY, latest, one_line, records, run, steps_of

import dreamer
import forked
import models
import run_setup
import signals
import tools
import training
from conftest import ROOT
from hidreamer import evaluation
from hidreamer.replay import Replay

# ---------------------------------------------------------------- the end of a run


@pytest.mark.parametrize("checkpoint_every", [30, 35, 1000])
@pytest.mark.parametrize("eval_every", [30, 35, 1000])
def test_a_finished_run_is_saved_and_evaluated_and_owes_nothing(
    eval_every, checkpoint_every, tmp_path, capsys
):
    """Periods that divide the steps, that do not, and that are longer than the run."""
    args = [
        "--steps",
        60,
        "--eval_every",
        eval_every,
        "--checkpoint_every",
        checkpoint_every,
        "--replay.ratio",
        8,
    ]
    assert run(tmp_path, *args) == 0
    out, state = capsys.readouterr().out, latest(tmp_path)
    counters = state["counters"]
    assert state["step"] == counters["step"] >= 60 and counters["pending_updates"] < 1
    assert (
        counters["evaluated"] == counters["step"]
        and steps_of("eval_return", tmp_path)[-1] == counters["step"]
    )
    assert f"{counters['updates']} updates" in out and counters["updates"] > 10
    assert records(tmp_path)[-1]["step"] == state["step"] and state["log_size"] == len(
        (tmp_path / "metrics.jsonl").read_bytes()
    )
    updates = [record["updates"] for record in records(tmp_path) if "updates" in record]
    assert updates[-1] == counters["updates"]  # the last window was logged, all of it
    assert len(set(steps_of("eval_return", tmp_path))) == len(steps_of("eval_return", tmp_path))
    # The command that is printed goes on.
    words = shlex.split(out.split("continue:")[1])
    assert words[:2] == ["python", "dreamer.py"] and dreamer.main(words[2:]) == 0
    assert "continuing" in capsys.readouterr().out and latest(tmp_path)["step"] >= 120


def test_a_run_shorter_than_its_periods_logs_its_metrics(tmp_path):
    assert (
        run(
            tmp_path,
            "--steps",
            60,
            "--log_every",
            1000,
            "--eval_every",
            1000,
            "--checkpoint_every",
            1000,
        )
        == 0
    )
    assert steps_of("model_loss", tmp_path) == [latest(tmp_path)["step"]]


def test_longer_periods_take_effect_when_a_run_is_continued(tmp_path):
    """Every kept the number of its old periods,
    so that nothing was due until as many of the new had passed.
    """
    periods = lambda *values: [word for pair in zip(PERIODS, values, strict=True) for word in pair]
    assert run(tmp_path, "--steps", 100, "--replay.ratio", 4, *periods(2, 10, 2)) == 0
    assert run(tmp_path, "--steps", 400, "--replay.ratio", 4, *periods(10, 100, 20)) == 0
    assert [step for step in steps_of("model_loss", tmp_path) if step > 100] == list(
        range(110, 401, 10)
    )
    assert [step for step in steps_of("eval_return", tmp_path) if step > 100] == [200, 300, 400]


PERIODS = ("--log_every", "--eval_every", "--checkpoint_every")


def test_old_checkpoints_count_in_periods_of_their_config(tiny):
    state = torch.load(tiny / "checkpoints" / "latest.pt", weights_only=True)
    del state["format"]
    state["every"] = {
        name: step // state["config"][f"{name}_every"] for name, step in state.pop("last").items()
    }
    state["counters"]["credit"] = state["counters"].pop("pending_updates")
    torch.save(state, tiny / "checkpoints" / "latest.pt")
    assert run(tiny, "--steps", 120, "--checkpoint_every", 30, "--log_every", 20) == 0
    # 60 was logged at 50 and at the end; 50 // 20 periods had passed by then.
    assert [step for step in steps_of("model_loss", tiny) if step > 60] == [80, 100, 120]


def test_every():
    every = tools.Every(20)
    assert not every.due(19) and every.due(20) and every.due(45)
    every.done(45)
    assert not every.due(59) and every.due(60)
    every.every = 100  # as a continued run may change it
    assert not every.due(99) and every.due(100)


def test_a_finished_run_is_evaluated_anew_when_that_is_asked_for(tiny, capsys):
    before = records(tiny)
    assert dreamer.main(["--resume", str(tiny), "--eval_episodes", "3"]) == 0
    after = records(tiny)
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert after[-1]["eval_episodes"] == 3 and after[-1]["step"] == before[-1]["step"]
    assert dreamer.main(["--resume", str(tiny), "--eval_episodes", "3"]) == 0
    assert records(tiny) == after  # it has these now
    assert dreamer.main(["--resume", str(tiny), "--eval_greedy", "false"]) == 0
    assert len(records(tiny)) == len(after) + 1


def test_a_checkpoint_comes_before_the_evaluation(tmp_path, monkeypatch):
    """An evaluation that kills the run costs nothing but itself,
    and is done again with the same numbers.
    """
    args = ["--steps", 100, "--eval_every", 50, "--checkpoint_every", 50]
    assert run(tmp_path / "whole", *args) == 0
    original = training.Run.evaluate
    monkeypatch.setattr(
        training.Run, "evaluate", lambda self: (self.step == 50 and 1 / 0) or original(self)
    )
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", *args)
    assert latest(tmp_path / "run")["step"] == 50
    monkeypatch.undo()
    assert run(tmp_path / "run", *args) == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_run_killed_before_its_first_step_begins_as_it_would_have(tmp_path, monkeypatch):
    """Its environments were made with the seeds of a first start,
    and nothing of their state was saved.
    """
    args = ["--task", "gym_CartPole-v1", "--steps", 60]
    assert run(tmp_path / "whole", *args) == 0
    monkeypatch.setattr(training.Run, "advance", lambda self: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", *args)
    monkeypatch.undo()
    assert latest(tmp_path / "run")["step"] == 0
    assert run(tmp_path / "run", *args) == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_capacity_that_the_streams_do_not_divide_trains(tmp_path):
    args = ["--steps", 300, "--replay.capacity", 100, "--env.count", 3, "--replay.prefill", 2500]
    assert run(tmp_path, *args) == 0
    assert latest(tmp_path)["counters"]["updates"] > 0


def test_a_run_too_short_to_train_says_so(tmp_path, capsys):
    assert run(tmp_path, "--steps", 60, "--replay.prefill", 500) == 0
    assert (
        "replay.prefill" in capsys.readouterr().out and latest(tmp_path)["counters"]["updates"] == 0
    )


def test_processes_for_environments_may_change_when_a_run_goes_on(tmp_path):
    args = [
        "--env.count",
        2,
        "--task",
        "gym_CartPole-v1",
        "--env.action_repeat",
        1,
        "--checkpoint_every",
        40,
    ]
    assert run(tmp_path / "whole", *args, "--steps", 60) == 0
    assert run(tmp_path / "whole", *args, "--steps", 120) == 0
    assert run(tmp_path / "run", *args, "--steps", 60, "--env.parallel", "true") == 0
    assert run(tmp_path / "run", *args, "--steps", 120, "--env.parallel", "false") == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_nan_reward_stays_in_its_episode():
    """0 times NaN is NaN: a product never forgets it."""
    from hidreamer.metrics import EpisodeScores

    scores = EpisodeScores(1, [])
    row = lambda first, reward, last: {
        "is_first": np.array([first]),
        "reward": np.array([reward]),
        "is_last": np.array([last]),
    }
    assert scores.add(row(True, 0.0, False)) == []
    assert scores.add(row(False, np.nan, True)) == [{"train_length": 1.0}]
    scores.add(row(True, 0.0, False))
    assert scores.add(row(False, 2.0, True)) == [{"train_return": 2.0, "train_length": 1.0}]


# ---------------------------------------------------------------- signals and what runs out


def spoilt(method, error, after=3):
    """``method`` of a class, which raises ``error`` at its call number ``after``."""
    calls = []

    def wrapped(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == after:
            raise error
        return method(self, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 384. MiB"), OSError(12, "Cannot allocate memory")]
)
def test_no_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Replay, "add", spoilt(Replay.add, error, 40))
    assert run(tmp_path, "--steps", 60, "--checkpoint_every", 20) == 1
    one_line(capsys, "memory", "replay.capacity")
    monkeypatch.undo()
    assert run(tmp_path, "--steps", 60, "--checkpoint_every", 20) == 0


def signalled(monkeypatch, signum, step):
    """The signal comes when the run is at ``step``."""
    original = training.Run._collect

    def collect(self):
        original(self)
        if self.step == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(training.Run, "_collect", collect)


def test_a_signal_while_the_disk_is_full_is_one_line(tmp_path, capsys, monkeypatch):
    signalled(monkeypatch, signal.SIGTERM, 45)
    full = tmp_path / "checkpoints" / "latest.pt.tmp"
    original = signals.Signals.check

    def check(self):
        if self.signum and not full.is_symlink():
            full.symlink_to("/dev/full")
        original(self)

    monkeypatch.setattr(signals.Signals, "check", check)
    assert run(tmp_path, "--steps", 60, "--checkpoint_every", 20) == 1
    one_line(capsys, "disk is full", "checkpoint is whole")
    assert latest(tmp_path)["step"] == 40


def test_a_signal_while_a_metric_is_nan_is_one_line(tmp_path, capsys, monkeypatch):
    signalled(monkeypatch, signal.SIGTERM, 45)
    original = training.Run.learn

    def update(self):
        original(self)
        if self.step > 40:
            self.window.add(torch.full_like(self.window.sums, float("nan")))

    monkeypatch.setattr(training.Run, "learn", update)
    assert run(tmp_path, "--steps", 60, "--checkpoint_every", 20, "--replay.ratio", 16) == 1
    one_line(capsys, "became nan", "latest.pt")
    assert latest(tmp_path)["step"] == 40


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_set_up_ends_it_cleanly(signum, tmp_path, capsys, monkeypatch):
    def slow(*args, **kwargs):
        os.kill(os.getpid(), signum)
        time.sleep(10)

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(run_setup, "make_env", slow)
    assert run(tmp_path / "run", "--steps", 60) == 128 + signum
    out, err = capsys.readouterr()
    assert signal.Signals(signum).name in out and not err
    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers


SECOND = """
import os, signal, sys, time
import dreamer, training
from hidreamer import checkpoint

original = checkpoint.write_tensors

def slow(path, state):
    if state["step"] > 40:
        original(path, state)
        print("saving", flush=True)
        time.sleep(120)
    original(path, state)

def collect(self, collect=training.Run._collect):
    collect(self)
    if self.step == 45:
        os.kill(os.getpid(), signal.SIGINT)

checkpoint.write_tensors, training.Run._collect = slow, collect
sys.exit(dreamer.main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_while_saving_ends_at_once_and_damages_nothing(tmp_path):
    args = [*TINY, "--steps", "60", "--checkpoint_every", "20", "--logdir", str(tmp_path)]
    command = [sys.executable, "-c", SECOND, *args]
    with forked.popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        while process.stdout.readline() != "saving\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # does not cut off what the first signal began
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT and process.stderr.read() == ""
    assert latest(tmp_path)["step"] == 40
    assert run(tmp_path, "--steps", 60, "--checkpoint_every", 20) == 0


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "dreamer.py"),
        *TINY,
        "--steps",
        "100",
        "--log_every",
        "10",
    ]
    command += ["--logdir", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    assert latest(tmp_path)["counters"]["evaluated"] == 100


def test_exploring_ends_at_expl_until(tmp_path, monkeypatch):
    modes, act = [], models.Agent.act
    spy = lambda self, *args: modes.append(args[2]) or act(self, *args)
    monkeypatch.setattr(models.Agent, "act", spy)
    settings = [
        "--steps",
        80,
        "--expl.behavior",
        "plan2explore",
        "--expl.until",
        50,
        "--eval_episodes",
        0,
    ]
    assert run(tmp_path / "run", *settings) == 0
    assert set(modes) == {"explore", "train"} and modes == sorted(
        modes
    )  # first "explore", then "train"


def test_every_evaluation_has_seeds_of_its_own(tmp_path, monkeypatch):
    seeds, make_env = [], run_setup.make_env

    def spy(task, env, seed, **kwargs):
        if kwargs["evaluation"]:
            seeds.append(seed)
        return make_env(task, env, seed, **kwargs)

    monkeypatch.setattr(run_setup, "make_env", spy)
    drawn, play = [], evaluation.play

    def first_draw(*args, generator, **kwargs):
        drawn.append(generator.get_state().numpy().tobytes())
        return play(*args, generator=generator, **kwargs)

    monkeypatch.setattr(evaluation, "play", first_draw)
    assert run(tmp_path / "run", "--steps", 120, "--eval_every", 40) == 0
    assert len(seeds) >= 3 and len(set(seeds)) == len(seeds) and len(set(drawn)) == len(drawn)


def test_a_run_killed_while_it_acts_at_random_goes_on_exactly(tmp_path, monkeypatch):
    args = ["--steps", 60, "--replay.prefill", 50, "--checkpoint_every", 10]
    assert run(tmp_path / "whole", *args) == 0
    collect = training.Run._collect
    monkeypatch.setattr(
        training.Run, "_collect", lambda self: 1 / 0 if self.step >= 25 else collect(self)
    )
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", *args)
    monkeypatch.undo()
    assert 0 < latest(tmp_path / "run")["step"] < 25
    assert run(tmp_path / "run", *args) == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_weights_of_other_sizes_name_what_to_choose(tiny, tmp_path, capsys):
    other = ("--resume", tiny, "--task", "dummy_image", "--steps", 40)
    assert run(tmp_path / "other", *other) == 2
    one_line(capsys, "there", "other observations, actions or sizes", "presets of that run")
    assert not (tmp_path / "other").exists()


def test_a_folder_without_its_config_says_how_it_goes_on(tiny, capsys):
    assert dreamer.main(["--logdir", str(tiny)]) == 2
    one_line(capsys, f"--resume {tiny} without --configs continues it", "another --logdir")


def test_a_script_of_the_user_s_own_continues_by_itself(tmp_path):
    """It may add an objective or a task, which dreamer.py has not."""
    path = tmp_path / "mine.py"
    path.write_text("import sys, dreamer\nsys.exit(dreamer.main(sys.argv[1:]))\n")
    words = [sys.executable, path, *TINY, "--logdir", tmp_path / "run", "--steps", 40]
    done = subprocess.run(
        [*map(str, words), "--video", "false", "--eval_episodes", "0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last == "continue:   python mine.py with --steps 80"
