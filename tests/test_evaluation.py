"""Evaluations: whose episodes count, where they end, what is filmed,
and that nothing else is touched.
"""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from small_runs import records
from test_agent import EVERYTHING, make

import dreamer
import forked
import tools
from conftest import ROOT
from envs.dummy import Dummy
from hidreamer import evaluation
from hidreamer.dynamics import TYPES

QUICK = ["--configs", "debug", "--task", "dummy_vector", "--eval_every", "40", "--log_every", "20"]


class StubEnvs:
    """Episodes of given lengths, reward 1 a step, 2 frames an action;
    a picture shows how many steps were taken.
    """

    obs_space, log_keys, repeat = {"vector": None}, ("log_hits",), 2

    def __init__(self, *lengths, terminal=True, render_fails_at=None):
        self.lengths, self.count, self.terminal, self.fails_at = (
            np.array(lengths),
            len(lengths),
            terminal,
            render_fails_at,
        )
        self.at, self.calls, self.drawn = None, 0, []
        self.crashed = np.zeros(self.count, bool)

    def step(self, action):
        self.calls += 1
        first = np.ones(self.count, bool) if self.at is None else self.at == self.lengths
        self.at = np.where(first, 0, 0 if self.at is None else self.at + 1)
        last = self.at == self.lengths
        one = (~first).astype(np.float32)
        flags = {"is_first": first, "is_last": last, "is_terminal": last & self.terminal}
        return {
            "vector": np.zeros((self.count, 1), np.float32),
            "reward": one,
            "log_hits": 3 * one,
            **flags,
        }

    def render(self, index):
        self.drawn.append(int(self.at[index]))
        if len(self.drawn) == self.fails_at:
            raise RuntimeError("no display")
        return np.full((2, 2, 3), self.at[index], np.uint8)


class StubAgent:
    def initial(self, count):
        return count

    def tensors(self, rows):
        return rows

    def act(self, state, obs, mode, generator):
        return SimpleNamespace(action=torch.zeros(len(obs["vector"]), 1))


def play(envs, episodes, **options):
    return evaluation.play(StubAgent(), envs, episodes, "greedy", **{"limit": 1000} | options)


# ---------------------------------------------------------------- play


@pytest.mark.parametrize("lengths", [(20, 3), (3, 20)])
def test_the_film_is_the_whole_first_episode_of_the_first_environment(lengths):
    envs = StubEnvs(*lengths)
    played = play(envs, 6, video=True)
    assert [frame[0, 0, 0] for frame in played.videos["agent"]] == list(range(lengths[0] + 1))
    assert envs.drawn == list(range(lengths[0] + 1)) and played.problem is None


@pytest.mark.parametrize("seed", [3, None])
def test_what_is_filmed_changes_no_action(seed):
    """What the levels decode to is drawn by chance, of which acting has its own."""

    class Chance(StubAgent):
        def act(self, state, obs, mode, generator):
            taken.append(float(torch.rand((), generator=generator)))
            return super().act(state, obs, mode, generator)

        def decode_state(self, obs, state, generator):
            torch.rand(5, generator=generator)
            return [{}]

    acted = []
    for video in (True, False):
        taken = []
        torch.manual_seed(1)
        generator = seed and torch.Generator().manual_seed(seed)
        options = {"limit": 1000, "video": video, "levels": True, "generator": generator}
        evaluation.play(Chance(), StubEnvs(6), 2, "train", **options)
        acted.append(taken)
    assert acted[0] == acted[1] and len(set(taken)) > 9


def test_a_film_has_an_end(monkeypatch):
    monkeypatch.setattr(evaluation, "LONGEST", 5)
    assert len(play(StubEnvs(20), 1, video=True).videos["agent"]) == 5


def test_every_environment_plays_its_share_and_all_it_logs_is_summed():
    played = play(StubEnvs(20, 3), 5)
    assert sorted(episode["length"] for episode in played.episodes) == [3, 3, 20, 20, 20]
    assert all(episode["return"] == episode["length"] for episode in played.episodes)
    assert all(episode["log_hits"] == 3 * episode["length"] for episode in played.episodes)
    assert played.videos["agent"] == []


def test_an_environment_that_cannot_be_drawn_is_evaluated_all_the_same():
    envs = StubEnvs(20, 3, render_fails_at=3)
    played = play(envs, 2, video=True)
    assert len(played.episodes) == 2 and len(played.videos["agent"]) == 2
    assert (
        str(played.problem) == "no display" and len(envs.drawn) == 3
    )  # it is not tried at every step


def test_an_episode_that_a_crash_ended_is_played_again():
    class Crashing(StubEnvs):
        """Environment 0 crashes in its third step, and is another one then."""

        def step(self, action):
            obs = super().step(action)
            self.crashed[0] = self.calls == 4
            if self.crashed[0]:
                self.at[0] = self.lengths[0]
                obs["is_last"][0], obs["is_terminal"][0], obs["reward"][0] = True, False, 0.0
            return obs

        def render(self, index):
            assert not self.crashed[index]
            return super().render(index)

    played = play(Crashing(20, 20), 4, video=True)
    assert [episode["length"] for episode in played.episodes] == [20] * 4
    assert [frame[0, 0, 0] for frame in played.videos["agent"]] == list(range(21))
    assert played.problem is None


def test_a_signal_is_seen_before_the_next_step():
    class Signal(Exception):
        pass

    envs, checks = StubEnvs(10**6), []

    def check():
        checks.append(envs.calls)
        if len(checks) == 8:
            raise Signal

    with pytest.raises(Signal):
        play(envs, 1, check=check, video=True)
    assert checks == list(range(8)) and envs.calls == 7


# ---------------------------------------------------------------- scores


def test_scores_are_means_and_name_what_was_cut():
    episodes = play(StubEnvs(20, 3, terminal=False), 2, limit=40).episodes  # 20 steps of 2 frames
    found = evaluation.scores(episodes)
    assert found["eval_truncated"] == 1 and found["eval_episodes"] == 2
    assert found["eval_return"] == found["eval_length"] == 11.5 and found["eval_return_std"] == 8.5
    assert found["eval_hits"] == 34.5
    assert (
        evaluation.scores(play(StubEnvs(20), 1, limit=40).episodes)["eval_truncated"] == 0
    )  # it ended there
    assert (
        evaluation.scores(play(StubEnvs(20, terminal=False), 1, limit=42).episodes)[
            "eval_truncated"
        ]
        == 0
    )


def test_a_suite_may_say_something_of_all_episodes_together():
    episodes = play(StubEnvs(20, 3), 2).episodes
    found = evaluation.scores(
        episodes, lambda all: {"score": sum(episode["log_hits"] for episode in all)}
    )
    assert found["eval_score"] == 69.0
    hostile = evaluation.scores(episodes, lambda all: {"return": -1.0})
    assert hostile["eval_return"] == 11.5


@pytest.mark.parametrize(
    ("own", "training", "repeat", "limit"),
    [(0, 0, 4, 40_000), (0, 108_000, 4, 108_000), (50, 108_000, 1, 50), (200, 100, 1, 200)],
)
def test_there_always_is_a_limit(own, training, repeat, limit):
    keys = {"eval_time_limit": own, "env.time_limit": training, "env.action_repeat": repeat}
    assert evaluation.time_limit(tools.load_config([], keys)) == limit


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pictures_are_computed_in_the_precision_of_training(kind, precision):
    agent, batch = make(EVERYTHING, **{"dynamics.type": kind, "precision": precision})
    seen = []
    agent.world_model.decoder.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    rows = {key: x.numpy() for key, x in batch.items()}
    torch.manual_seed(3)
    frames = evaluation.open_loop(agent, rows, True)
    obs = {key: x[:, 0] for key, x in batch.items() if key in (*EVERYTHING, "is_first")}
    state = agent.act(agent.initial(2), obs)
    shown = evaluation.board(agent.decode_state(obs, state))
    assert frames.dtype == shown.dtype == np.uint8 and frames.ndim == shown.ndim == 4
    assert seen and set(seen) == {precision == "bfloat16"}
    if precision == "float32":
        torch.manual_seed(3)
        assert np.array_equal(
            frames, evaluation.board(agent.world_model.open_loop(batch, 5, True), error=True)
        )


@pytest.mark.parametrize("channels", [1, 3, 4, 10])
def test_no_error_is_grey(channels):
    """Also for boards, whose planes are drawn in colours that add up."""
    x = 0.2 * torch.rand(2, 3, 8, 8, channels)
    truth, model, error = np.split(evaluation.picture([x, x], error=True), 3, axis=1)
    assert np.array_equal(truth, model) and set(error.flat) == {128}
    _, _, error = np.split(evaluation.picture([x, 0.0 * x], error=True), 3, axis=1)
    assert len(set(error.flat)) > 9


# ---------------------------------------------------------------- in a run


def run(logdir, *words):
    return dreamer.main([*QUICK, *words, "--logdir", str(logdir)])


def evaluations(logdir):
    return [record for record in records(logdir) if "eval_return" in record]


def test_a_policy_that_stands_still_is_cut(tmp_path, capsys):
    """CliffWalking has no clock of its own."""
    words = [
        "--task",
        "gym_CliffWalking-v1",
        "--env.action_repeat",
        "1",
        "--video",
        "false",
        "--checkpoint_every",
        "20",
    ]
    assert (
        run(tmp_path, *words, "--steps", "40", "--eval_time_limit", "30", "--eval_episodes", "2")
        == 0
    )
    (found,) = evaluations(tmp_path)
    assert found["eval_length"] == 30 and found["eval_truncated"] == found["eval_episodes"] == 2
    assert "2 of them cut by the limit" in capsys.readouterr().out
    # Another limit does not make it another run, and does not reach training.
    assert run(tmp_path, *words, "--steps", "80", "--eval_time_limit", "7") == 0
    assert [x["eval_length"] for x in evaluations(tmp_path)] == [30, 7]
    assert not any("train_length" in record for record in records(tmp_path))


@pytest.mark.parametrize("parallel", ["false", "true"])
def test_a_signal_ends_an_evaluation(parallel, tmp_path):
    words = [
        "--task",
        "gym_CliffWalking-v1",
        "--eval_time_limit",
        "1000000000",
        "--env.parallel",
        parallel,
    ]
    command = [sys.executable, str(ROOT / "dreamer.py"), *QUICK, *words, "--logdir", str(tmp_path)]
    process = forked.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    reached = lambda: (
        (tmp_path / "metrics.jsonl").exists() and any(x["step"] >= 40 for x in records(tmp_path))
    )
    while not reached() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(2.0)  # into the evaluation
    assert process.poll() is None and not evaluations(tmp_path)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "Traceback" not in out and (tmp_path / "checkpoints" / "latest.pt").exists()


def test_a_render_that_fails_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    def render(self):
        raise RuntimeError("no display\nin sight")

    monkeypatch.setattr(Dummy, "render", render)
    words = ["--task", "dummy_image", "--env.size", "16", "16", "--steps", "80"]
    with pytest.warns(
        RuntimeWarning, match="drawing the env.* failed .*--video false.*no display in sight"
    ) as seen:
        assert run(tmp_path, *words) == 0
    assert (
        len([x for x in seen if "--video" in str(x.message)]) == 1
        and len(evaluations(tmp_path)) == 2
    )
    assert {path.name[10:] for path in (tmp_path / "videos").iterdir()} == {
        "open_loop.mp4"
    }  # needs no drawing


def test_frames_that_grow_with_a_fourth_channel_are_filmed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Dummy, "render", lambda self: np.full((9 + self._steps, 7, 4), 99, np.uint8)
    )
    assert run(tmp_path, "--steps", "40") == 0
    (path,) = (tmp_path / "videos").glob("*-agent.mp4")
    assert iio.imread(path, plugin="pyav").shape[0] == 21


def test_an_evaluation_leaves_the_training_as_it_was(tmp_path):
    """Its films and its random numbers are its own."""
    words = [
        "--task",
        "dummy_image",
        "--env.size",
        "16",
        "16",
        "--env.count",
        "2",
        "--steps",
        "120",
        "--decode_levels",
    ]
    for name, episodes in (("with", "3"), ("without", "0")):
        assert run(tmp_path / name, *words, "--eval_episodes", episodes) == 0
    training = [
        [x for x in records(tmp_path / name) if "eval_return" not in x]
        for name in ("with", "without")
    ]
    assert training[0] == training[1] and any("model_loss" in x for x in training[0])
    assert len(evaluations(tmp_path / "with")) == 3 and not evaluations(tmp_path / "without")


def test_an_evaluation_hands_on_the_state_and_has_its_mode():
    """A greedy agent with memory, unless the config says otherwise."""
    seen = []

    class Counting(StubAgent):
        def initial(self, count):
            return SimpleNamespace(steps=0)

        def act(self, state, obs, mode, generator):
            seen.append((state.steps, mode))
            action = torch.zeros(len(obs["vector"]), 1)
            return SimpleNamespace(action=action, steps=state.steps + 1)

    config = SimpleNamespace(eval_episodes=2, eval_time_limit=100, video=False, decode_levels=False)
    for greedy, mode in ((True, "greedy"), (False, "train")):
        seen.clear()
        config.eval_greedy = greedy
        evaluation.evaluate(Counting(), StubEnvs(3), config, False, lambda: None)
        assert seen == [(step, mode) for step in range(8)]
