"""`Envs`: the same in one process or many, through crashes, kills, states, and its own end."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from small_envs import maker
from test_envs import build, same

from envs import EnvError
from envs.base import ActionError
from envs.vector import Envs

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("parallel", [False, True])


def actions(envs, rng):
    return np.eye(envs.act_dim, dtype=np.float32)[rng.integers(envs.act_dim, size=envs.count)]


def play(envs, steps, seed=0, start=True):
    rng = np.random.default_rng(seed)
    first = [envs.step(None)] if start else []
    return first + [envs.step(actions(envs, rng)) for _ in range(steps)]


def pids(envs):
    return [worker._process.pid for worker in envs._workers]


def alive(pid):
    """True also for a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids, seconds=5.0):
    """Waits until no process is left."""
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@BOTH
@pytest.mark.parametrize(
    ("task", "key"), [("dummy_image", "image"), ("dummy_vector", "vector")]
)  # one is truncated
def test_outputs_are_stacked_and_resets_are_part_of_stepping(task, key, parallel):
    envs = Envs(maker(task), 3, parallel)
    assert (envs.count, envs.act_dim, envs.repeat, envs.log_keys, envs.restarts) == (3, 4, 1, (), 0)
    outputs = play(envs, 65)
    first = np.stack([output["is_first"] for output in outputs])
    last = np.stack([output["is_last"] for output in outputs])
    assert first[0].all() and np.array_equal(first[1:], last[:-1]) and last.sum() == 9
    assert (
        outputs[0][key].shape == (3, *envs.obs_space[key].shape)
        and outputs[0][key].dtype == envs.obs_space[key].dtype
    )
    kinds = {name: value.dtype.name for name, value in outputs[0].items() if name != key}
    assert kinds == {
        "reward": "float32",
        "is_first": "bool",
        "is_last": "bool",
        "is_terminal": "bool",
    }
    assert envs.render(2).shape == (64, 64, 3)
    envs.close()


PAIRS = {
    "atari_pong": {"action_repeat": 4, "time_limit": 100, "atari": {"sticky": 0.25}},
    "crafter_reward": {"time_limit": 25},
    "dummy_image": {},
    "vizdoom_basic": {"action_repeat": 4, "time_limit": 100},
}


@pytest.mark.parametrize("task", PAIRS)
def test_one_process_or_many_give_the_same(task):
    build(task, **PAIRS[task])  # or skip
    inside, outside = (Envs(maker(task, **PAIRS[task]), 2, parallel) for parallel in (False, True))
    for name in ("obs_space", "act_space", "act_dim", "log_keys", "repeat"):
        assert getattr(inside, name) == getattr(outside, name)
    ours = play(inside, 60)
    assert same(ours, play(outside, 60)) and sum(output["is_first"].sum() for output in ours) > 2
    assert not np.array_equal(ours[-1]["image"][0], ours[-1]["image"][1])


@BOTH
def test_actions_are_checked(parallel):
    envs = Envs(maker("dummy_vector"), 2, parallel)
    envs.step(None)
    with pytest.raises(ValueError, match="mid-episode"):
        envs.step(None)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), not \(1, 4\)"):
        envs.step(np.eye(4, dtype=np.float32)[:1])
    for _ in range(6):  # a fault of the agent is no crash
        with pytest.raises(ActionError):
            envs.step(np.array([[np.nan, 0, 0, 0], [1, 0, 0, 0]], np.float32))
    assert envs.restarts == 0
    assert envs.render(1).shape == (64, 64, 3)  # no answer to the steps was left in the pipe


@BOTH
def test_a_crash_truncates_the_episode_and_the_environment_is_replaced(parallel):
    envs = Envs(maker("dummy_crash"), 2, parallel)
    outputs = []
    with pytest.warns(
        RuntimeWarning,
        match=r"^environment [01] crashed and is replaced: RuntimeError: dummy_crash broke",
    ):
        outputs = play(envs, 120)
    assert envs.restarts == 4  # both, after 50 steps of life and again after 50 more
    at = 50 + 2  # steps and two resets: the crash is in mid-episode
    before, crash, after = outputs[at - 1], outputs[at], outputs[at + 1]
    assert crash["is_last"].all() and not crash["is_terminal"].any() and not crash["is_first"].any()
    assert not crash["reward"].any() and np.array_equal(crash["vector"], before["vector"])
    assert after["is_first"].all() and not np.array_equal(after["vector"], outputs[0]["vector"])
    fresh = Envs(lambda index, restart: maker("dummy_crash")(index, restart + 1), 2, False)
    assert same([fresh.step(None)], [after])  # made by make(index, 1)
    if not parallel:  # with good steps in between, crashes are never too many
        with pytest.warns(RuntimeWarning):
            play(envs, 200, start=False)
        assert envs.restarts == 12


def test_a_killed_process_is_replaced_and_others_go_on():
    envs, calm = Envs(maker("dummy_vector"), 3, True), Envs(maker("dummy_vector"), 3, False)
    play(envs, 5), play(calm, 5)
    victim = pids(envs)[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.warns(
        RuntimeWarning,
        match="environment 1 crashed and is replaced: its process was killed by SIGKILL",
    ):
        output = envs.step(np.eye(4, dtype=np.float32)[:3])
    expected = calm.step(np.eye(4, dtype=np.float32)[:3])
    assert output["is_last"].tolist() == [False, True, False] and envs.restarts == 1
    assert all(np.array_equal(output[key][[0, 2]], expected[key][[0, 2]]) for key in output)
    assert envs.step(np.eye(4, dtype=np.float32)[:3])["is_first"].tolist() == [False, True, False]
    os.kill(
        pids(envs)[0], signal.SIGKILL
    )  # between two steps, the state of the others is still to be had
    with pytest.warns(RuntimeWarning, match="environment 0 could not save its state"):
        states = envs.state()
    assert [state is None for state in states] == [True, False, False]
    with pytest.warns(RuntimeWarning, match="environment 0 crashed"):
        assert envs.step(np.eye(4, dtype=np.float32)[:3])["is_last"].tolist() == [
            True,
            False,
            False,
        ]
    assert not alive(victim)


def test_a_killed_doom_leaves_no_game_behind():
    build("vizdoom_basic")
    envs = Envs(maker("vizdoom_basic"), 2, True)
    play(envs, 3)

    def games():
        found = subprocess.run(
            ["ps", "-eo", "sid,args"], capture_output=True, text=True
        ).stdout.splitlines()
        return [
            line for line in found if "vizdoom/vizdoom" in line and int(line.split()[0]) in sessions
        ]

    sessions = pids(envs)
    assert len(games()) == 2
    os.kill(
        sessions[0], signal.SIGKILL
    )  # its game holds no pipe open, or we would wait here for ever
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        play(envs, 1, start=False)
    sessions += pids(envs)
    assert len(games()) == 2
    envs.close()
    assert games() == [] and gone(sessions)


@BOTH
def test_crashes_without_a_good_step_are_too_many(parallel):
    class Broken:
        def __init__(self, method, restart):
            self.env, self.method, self.restart = maker("dummy_vector")(0, 0), method, restart

        def __getattr__(self, name):
            if name == self.method:
                raise [OSError, LookupError][self.restart % 2](
                    "out of luck"
                )  # not the same twice in a row
            return getattr(self.env, name)

    for method in ("step",) if parallel else ("step", "reset"):
        envs = Envs(lambda index, restart, method=method: Broken(method, restart), 1, parallel)
        with (
            warnings.catch_warnings(),
            pytest.raises(EnvError, match=r"environment 0 crashed 5 times .* out of luck"),
        ):
            warnings.simplefilter("ignore")
            for _ in range(20):
                envs.step(np.eye(4, dtype=np.float32)[:1])
        assert envs.restarts == 4


@BOTH
def test_construction_errors_are_env_errors_of_one_line(parallel):
    with pytest.raises(EnvError, match=r"^unknown Atari game 'pongg'; nearest: pong"):
        Envs(maker("atari_pongg"), 2, parallel)
    with pytest.raises(
        EnvError,
        match=r"^environment 0 cannot be built: ZeroDivisionError: "
        r"division by zero \(test_vector.py:\d+\)$",
    ):
        Envs(lambda index, restart: 1 / 0, 2, parallel)
    with pytest.raises(ValueError, match="count"):
        Envs(maker("dummy_vector"), 0, parallel)


@BOTH
@pytest.mark.parametrize("task", ["atari_pong", "dummy_image"])
def test_a_state_goes_on_exactly(task, parallel):
    make = maker(task, time_limit=40, atari={"sticky": 0.25})
    ours, other = (
        Envs(make, 2, parallel),
        Envs(lambda index, restart: make(index + 5, restart), 2, not parallel),
    )
    assert other.load_state(ours.state()).all()  # of environments that have not started
    assert same(play(ours, 30), play(other, 30))
    while not play(ours, 1, start=False)[0][
        "is_last"
    ].all():  # that the next step is a reset is part of the state
        pass
    assert other.load_state(ours.state()).tolist() == [True, True]
    assert same(play(ours, 100, start=False), play(other, 100, start=False))


def test_what_cannot_be_restored_starts_anew():
    envs = Envs(maker("dummy_vector"), 3, False)
    play(envs, 5)
    states = envs.state()
    wrong = {
        "env": {"seed": None, "frames": 0, "suite": {"steps": 1}},
        "output": states[2]["output"],
    }
    other = Envs(maker("dummy_vector"), 3, False)
    with pytest.warns(RuntimeWarning, match="environment 2 could not be restored, and starts anew"):
        assert other.load_state([states[0], None, wrong]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="mid-episode"):
        other.step(None)
    assert other.step(np.eye(4, dtype=np.float32)[:3])["is_first"].tolist() == [False, True, True]
    with pytest.raises(ValueError, match="2 states for 3"):
        other.load_state(states[:2])
    frozen = Envs(maker("gym_FrozenLake-v1"), 2, False)
    frozen.step(None)
    assert frozen.state() == [None, None]


def test_what_cannot_be_restored_still_has_its_seed():
    """An environment without one would begin otherwise each time that a run is continued."""
    firsts = []
    for _ in range(2):
        envs = Envs(maker("gym_CartPole-v1"), 1, False)
        states = envs.state()
        states[0] = {"env": {"seed": None, "frames": 3, "suite": {"no": 1}}, "output": {}}
        with pytest.warns(RuntimeWarning, match="could not be restored"):
            assert not envs.load_state(states).any()
        firsts.append(envs.step(None)["vector"])
    assert np.array_equal(*firsts)


def test_a_crash_right_after_a_restore_returns_the_saved_observation():
    envs = Envs(maker("dummy_vector"), 1, True)
    last = play(envs, 5)[-1]
    other = Envs(maker("dummy_vector"), 1, True)
    other.load_state(envs.state())
    os.kill(pids(other)[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        output = other.step(np.eye(4, dtype=np.float32)[:1])
    assert np.array_equal(output["vector"], last["vector"]) and output["is_last"].all()
    assert {key: value.dtype for key, value in output.items()} == {
        key: value.dtype for key, value in last.items()
    }


def test_processes_end_with_close_garbage_collection_and_exit():
    envs = Envs(maker("dummy_vector"), 2, True)
    workers = pids(envs)
    envs.close(), envs.close()
    assert gone(workers)
    envs = Envs(maker("dummy_vector"), 2, True)
    workers = pids(envs)
    del envs
    gc.collect()
    assert gone(workers)


SCRIPT = """
    import sys, time
    from envs import make_env
    from envs.vector import Envs
    config = {"size": [64, 64], "action_repeat": 1, "time_limit": 0}
    # no main guard is needed
    envs = Envs(lambda index, restart: make_env("dummy_vector", config, index), 2, True)
    envs.step(None)
    print(*(worker._process.pid for worker in envs._workers), flush=True)
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGKILL"])
def test_processes_end_with_their_parent_and_in_silence(end, tmp_path):
    last = "" if end == "exit" else "time.sleep(60)"
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + last)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    if end.startswith("SIG"):
        if end == "SIGINT":
            for pid in workers:
                os.kill(pid, signal.SIGINT)  # they ignore it
            time.sleep(0.1)
            assert all(alive(pid) for pid in workers)
        parent.send_signal(signal.Signals[end])
    error = parent.communicate(timeout=20)[1]
    assert gone(workers)
    assert error == "" or (
        end == "SIGINT"
        and error.count("Traceback") == 1
        and error.rstrip().endswith("KeyboardInterrupt")
    )
