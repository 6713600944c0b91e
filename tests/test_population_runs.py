"""Several seeds in one process: folders, ends, failures, kills."""

import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import TINY, latest, one_line, records, run
from test_compile import FailingCapture

import dreamer
import forked
import hidreamer
import population
from envs.errors import ActionError
from hidreamer import capture, checkpoint
from hidreamer.feed import Feed
from run_config import saved_config
from tools import load_config
from training import Failure, Run

STEPS = ("--steps", 60, "--checkpoint_every", 45)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Seeds 0, 1 and 2; ``made`` is 0 alone."""
    folder = tmp_path_factory.mktemp("three")
    assert run(folder, *STEPS, "--seeds", 0, 1, 2) == 0
    return folder


def same(found, expected):
    """Records that are equal but for rounding."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


def exactly_the_same(folder, expected):
    for member in sorted(path.name for path in expected.iterdir()):
        assert records(folder / member) == records(expected / member)
        ours, theirs = (latest(path / member) for path in (folder, expected))
        for name, x in theirs["agent"]["params"].items():
            assert torch.equal(ours["agent"]["params"][name], x), (member, name)
        episodes = [sorted(os.listdir(path / member / "train_eps")) for path in (folder, expected)]
        assert episodes[0] == episodes[1]


def test_a_member_s_folder_is_that_of_its_seed_alone(three, made):
    same(records(three / "0"), records(made))
    assert records(three / "1") != records(three / "0")
    assert sorted(os.listdir(three / "0" / "train_eps")) == sorted(os.listdir(made / "train_eps"))
    for part in ("config.yaml", "metrics.jsonl", "starts.jsonl", "checkpoints/latest.pt"):
        assert (three / "0" / part).exists() and (made / part).exists()
    alone, member = latest(made), latest(three / "0")
    assert torch.equal(alone["torch_rng"], member["torch_rng"])
    for name, moments in alone["agent"]["optim"].items():
        for key, state in moments.items():
            for what, x in state.items():
                found = member["agent"]["optim"][name][key][what]
                assert torch.allclose(found, x, atol=1e-4), (name, key, what)
    tensors = [x for x in torch.utils._pytree.tree_leaves(member) if isinstance(x, torch.Tensor)]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)  # nothing of the others
    assert hidreamer.load(three / "2").config.seed == 2


def test_a_member_goes_on_alone_and_the_others_without_it(three, tmp_path):
    shutil.copytree(three, tmp_path / "runs")
    assert run(tmp_path / "runs" / "1", "--steps", 90, "--seed", 1) == 0
    assert latest(tmp_path / "runs" / "1")["step"] == 90
    more = ("--steps", 120, "--checkpoint_every", 45)
    assert run(tmp_path / "runs", *more, "--seeds", 0, 1, 2) == 0
    for seed in (0, 1, 2):
        assert latest(tmp_path / "runs" / str(seed))["step"] == 120


KILL = """
import os, signal, sys
import dreamer, population
from hidreamer import checkpoint
save, count = checkpoint.save_checkpoint, [0]
def killed(path, state):
    count[0] += 1
    if count[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, state)
checkpoint.save_checkpoint = killed
dreamer.main(sys.argv[2:])
"""


def test_a_kill_between_two_members_checkpoints_loses_no_step(three, tmp_path):
    """Three first checkpoints, then those of step 45: the second member's never comes to be."""
    words = [*TINY, *map(str, STEPS), "--seeds", "0", "1", "2", "--logdir", str(tmp_path / "runs")]
    assert forked.run([sys.executable, "-c", KILL, "5", *words]).returncode == -signal.SIGKILL
    moments = [latest(tmp_path / "runs" / seed)["moment"] for seed in "012"]
    assert moments == [1, 0, 0]
    assert dreamer.main(words) == 0
    exactly_the_same(tmp_path / "runs", three)


class Killed(BaseException):
    pass


def break_off(monkeypatch, number):
    """Kill the process at the checkpoint of this number."""
    save, count = checkpoint.save_checkpoint, [0]

    def killed(path, state):
        count[0] += 1
        if count[0] == number:
            raise Killed
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", killed)


def begin_together(folder):
    """What the next process begins from."""
    folders = {path: load_config([], saved_config(path)) for path in sorted(folder.iterdir())}
    population.roll_back(folders)
    return [latest(path)["moment"] for path in folders]


def test_members_that_end_take_part_in_the_last_moment_of_all(three, tmp_path, monkeypatch):
    """Killed while all are saved because they end: the first of them has its last step."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_off(patch, 8)  # three first ones, three of step 45
        run(tmp_path, *STEPS, "--seeds", 0, 1, 2)
    assert [latest(tmp_path / seed)["moment"] for seed in "012"] == [2, 1, 1]
    assert begin_together(tmp_path) == [1, 1, 1]
    assert run(tmp_path, *STEPS, "--seeds", 0, 1, 2) == 0
    exactly_the_same(tmp_path, three)


def test_members_that_ended_apart_go_on_together(three, tmp_path, monkeypatch):
    """Their moments differ until the first that they have again in common."""
    folder = tmp_path / "runs"
    shutil.copytree(three, folder)
    path = folder / "1" / "checkpoints" / "latest.pt"
    state = checkpoint.load_checkpoint(path)
    torch.save(state | {"moment": 9}, path)  # as if it had left later
    more = ("--steps", 90, "--checkpoint_every", 15, "--seeds", 0, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_off(patch, 3)
        run(folder, *more)
    assert [latest(folder / seed)["moment"] for seed in "012"] == [10, 10, 2]
    assert begin_together(folder) == [2, 9, 2]
    # one that was put back from a backup calls nobody else back
    state = latest(folder / "0") | {"moment": 20, "company": {0: 19, 1: 19}}
    torch.save(state, folder / "0" / "checkpoints" / "latest.pt")
    assert begin_together(folder) == [20, 9, 2]


def test_all_are_saved_once_in_a_period(tmp_path, monkeypatch):
    """Members are a few steps ahead of others, and come to a period one after the other."""
    save, steps = population.Population.save, []

    def spy(self):
        steps.append([run.step for run in self.active])
        save(self)

    monkeypatch.setattr(population.Population, "save", spy)
    words = ("--steps", 200, "--checkpoint_every", 40, "--eval_episodes", 0, "--env.count", 4)
    words = ("--task", "gym_CartPole-v1", *words, "--replay.ratio", 0)
    assert run(tmp_path, *words, "--seeds", 0, 1, 2) == 0
    assert any(len(set(found)) > 1 for found in steps), steps  # else this shows nothing
    assert len(steps) == 5, steps  # four periods and the end


def test_agents_whose_optimisers_stepped_differently_are_trained_apart(made, tmp_path, capsys):
    """As many updates of their runs: one began with the optimisers of another run."""
    shutil.copytree(made, tmp_path / "0")
    weights = shutil.copy(made / "checkpoints" / "latest.pt", tmp_path / "weights.pt")
    assert run(tmp_path / "1", *STEPS, "--seed", 1, "--resume", weights) == 0
    assert (
        latest(tmp_path / "0")["counters"]["updates"]
        == (latest(tmp_path / "1")["counters"]["updates"])
    )
    more = ("--steps", 90, "--checkpoint_every", 45)
    assert run(tmp_path, *more, "--seeds", 0, 1) == 0
    assert (
        "one after the other, as their updates are not as many: 0; 1\n" in capsys.readouterr().out
    )
    assert [latest(tmp_path / seed)["step"] for seed in "01"] == [90, 90]


def test_a_run_that_is_broken_off_goes_on_exactly(three, tmp_path, monkeypatch):
    learn, count = population.Population._learn, [0]

    def killed(self):
        count[0] += 1
        if count[0] == 3:
            raise Killed
        learn(self)

    monkeypatch.setattr(population.Population, "_learn", killed)
    with pytest.raises(Killed):
        run(tmp_path, *STEPS, "--seeds", 0, 1, 2)
    assert run(tmp_path, *STEPS, "--seeds", 0, 1, 2) == 0
    exactly_the_same(tmp_path, three)


def test_where_recording_fails_all_go_on(three, tmp_path, monkeypatch):
    def make_update(self):
        self.captured_act = capture.CapturedAct(self, self.own, FailingCapture)
        return capture.FastUpdate(self, None, True, self.own)

    monkeypatch.setattr(capture, "WARMUP", 1)
    monkeypatch.setattr(capture, "Captured", FailingCapture)
    monkeypatch.setattr(population.Stack, "make_update", make_update)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing") as seen:
        assert run(tmp_path, *STEPS, "--seeds", 0, 1, 2) == 0
    lines = {str(warning.message).partition(",")[0] for warning in seen}
    assert {"cannot record acting", "cannot record the update"} <= lines
    exactly_the_same(tmp_path, three)


def test_a_member_that_fails_takes_no_other_down(made, tmp_path, monkeypatch, capsys):
    learn = population.Population._learn

    def poison(self):
        if self.active[-1].updates == 2:
            with torch.no_grad():
                self.active[-1].agent.world_model.reward.out.bias[0] = float("nan")
        learn(self)

    monkeypatch.setattr(population.Population, "_learn", poison)
    assert run(tmp_path, *STEPS, "--seeds", 0, 1) == 1
    one_line(capsys, "1 of 2 seeds", "reward_loss", str(tmp_path / "1"))
    same(records(tmp_path / "0"), records(made))
    assert all(np.isfinite(x) for line in records(tmp_path / "1") for x in line.values())
    state = checkpoint.load_checkpoint(tmp_path / "1" / "checkpoints" / "latest.pt")
    assert all(x.isfinite().all() for x in state["agent"]["params"].values())


def break_down(run):
    """Its next metrics are not finite, which is seen when it logs or saves."""
    with torch.no_grad():
        run.agent.world_model.reward.out.bias[0] = float("nan")


def failing(monkeypatch, faults):
    """faults: {seed: (updates, what happens to the run then)}, once each, after a step."""
    store, left = Run.store, dict(faults)

    def fail(self, action):
        store(self, action)
        updates, fault = left.get(self.config.seed, (None, None))
        if self.updates == updates:
            del left[self.config.seed]
            fault(self)

    monkeypatch.setattr(Run, "store", fail)


def environment_breaks(run):
    raise Failure("made to fail")


def test_the_last_member_may_fail_too(tmp_path, monkeypatch, capsys):
    """And is found by a checkpoint, which then has nobody to save."""
    failing(monkeypatch, {0: (1, environment_breaks), 1: (2, break_down)})
    words = ("--steps", 190, "--checkpoint_every", 45, "--log_every", 1000, "--seeds", 0, 1)
    assert run(tmp_path, *words) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: 2 of 2 seeds failed") and said.err.count("\n") == 1
    assert "--steps 380" in said.out  # the command that goes on asks for no fewer than before


def test_members_that_fail_at_once_take_no_other_down(tmp_path, monkeypatch, capsys):
    """One breaks, and the checkpoint that follows finds another that is not finite."""
    failing(monkeypatch, {2: (2, environment_breaks), 3: (1, break_down)})
    words = ("--steps", 60, "--checkpoint_every", 45, "--log_every", 1000, "--seeds", 0, 1, 2, 3)
    assert run(tmp_path, *words) == 1
    one_line(capsys, "2 of 4 seeds failed", "made to fail")
    assert [latest(tmp_path / seed)["step"] for seed in "01"] == [60, 60]


def test_a_member_that_failed_is_not_evaluated(tmp_path, monkeypatch):
    failing(monkeypatch, {1: (1, break_down)})
    evaluate, evaluated = Run.evaluate, []

    def note(self):
        evaluated.append(self.config.seed)
        return evaluate(self)

    monkeypatch.setattr(Run, "evaluate", note)
    words = ("--checkpoint_every", 55, "--eval_every", 55, "--log_every", 1000, "--seeds", 0, 1)
    assert run(tmp_path, "--steps", 60, *words) == 1
    assert evaluated and set(evaluated) == {0}


class Buffered(Feed):
    """As on CUDA: what was sent first is written over by the next batch."""

    buffer = None

    def rows(self):
        return self.buffer

    def send(self, rows):
        self.buffer = self.buffer or rows
        assert rows is self.buffer
        return {key: torch.from_numpy(x.copy()) for key, x in rows.items()}


def test_those_that_go_on_have_batches_of_their_own_number(tmp_path, monkeypatch):
    monkeypatch.setattr(population, "Feed", Buffered)
    store = Run.store

    def fail(self, action):
        store(self, action)
        if self.config.seed == 0 and self.updates == 2:
            raise Failure("it broke")

    monkeypatch.setattr(Run, "store", fail)
    assert run(tmp_path, *STEPS, "--seeds", 0, 1, 2) == 1
    assert [latest(tmp_path / seed)["step"] for seed in "12"] == [60, 60]


def test_a_nan_names_itself_where_it_becomes_an_action():
    broken = object.__new__(Run)
    broken.config, broken.envs = None, SimpleNamespace(receive=raiser(ActionError("nan")))
    broken.metrics = raiser(Failure("model_loss became nan"))
    with pytest.raises(Failure, match="model_loss"):
        broken.store(np.full((1, 2), np.nan))
    broken.metrics = dict
    with pytest.raises(ActionError):
        broken.store(np.full((1, 2), 9.0))


def raiser(error):
    def fn():
        raise error

    return fn


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--seeds 0 0", "twice"),
        ("--seeds a", "--seeds 0 1 2"),
        ("--seeds 1,2", "--seeds 0 1 2"),
        ("--seeds 1 2 --capacity tiny_hdreamer", "--capacity"),
        ("--seeds", "seeds"),
        ("--population 0", "at least 1"),
        ("--population 2 --seeds 1", "leave out"),
        ("--seeds 1 --seed 2", "leave out"),
    ],
)
def test_wrong_seeds_are_one_line(words, hint, tmp_path, capsys):
    assert run(tmp_path / "runs", *words.split()) == 2
    one_line(capsys, hint)
    assert not (tmp_path / "runs").exists()


def test_a_population_counts_from_its_seed(tmp_path, capsys):
    assert run(tmp_path, "--steps", 10, "--population", 2, "--seed", 5) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("continue: ") and "--population 2 --seed 5" in last
    assert last.endswith("--steps 20")
    assert sorted(os.listdir(tmp_path)) == ["5", "6"]
    assert latest(tmp_path / "6")["config"]["seed"] == 6


def test_the_screen_of_a_population_counts_all_updates():
    runs = population.Population([])
    runs.runs = [
        SimpleNamespace(step=step, updates=updates, last_return=last)
        for step, updates, last in ((4, 3, None), (6, 5, 2.0), (5, 4, 3.0))
    ]
    assert runs.totals() == (5, 12, 2.5)
