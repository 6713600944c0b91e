"""A NaN or an infinity never gets past `Env`: it stops the run,
or its episode is closed as truncated.
"""

import contextlib
import sys
import textwrap

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from test_envs import build, is_plain, one_hot, same

from envs import EnvError, make_env
from envs.base import BadValue, Env, Suite
from envs.vector import Envs

NAN, INF = float("nan"), float("inf")


class Faulty(Suite):
    """Counts; what `faulty[(step of the episode, key)]` holds replaces the value,
    `reset` being step 0.
    """

    log_keys = ("log_things",)
    observation_space = Dict(
        vector=Box(-np.inf, np.inf, (3,)),
        other=Box(-np.inf, np.inf, (1,)),
        image=Box(0, 255, (4, 4, 1), np.uint8),
        grid=Box(0, 1, (2, 2, 1), np.bool_),
    )
    action_space = Discrete(2)

    def __init__(self, faulty):
        self.faulty, self.t, self.resets = faulty, 0, 0

    def _look(self):
        obs = {
            "vector": np.full(3, self.t, np.float64),
            "other": np.float32([self.t]),
            "image": np.full((4, 4, 1), self.t, np.uint8),
            "grid": np.ones((2, 2, 1), bool),
        }
        return obs | {key: x for (t, key), x in self.faulty.items() if t == self.t and key in obs}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        return self._look(), {}

    def step(self, action):
        self.t += 1
        value = lambda key, x: self.faulty.get((self.t, key), x)
        return (
            self._look(),
            value("reward", 1.0),
            False,
            False,
            {"log_things": value("log_things", 2.0)},
        )

    def get_state(self):
        return {"t": self.t}

    def set_state(self, state):
        self.t = state["t"]


def faulty(values, invalid="truncate", **arguments):
    return Env(Faulty(values), 2, 0, 0, invalid, **arguments)


WRONG = {
    "reward": (NAN, "reward is nan"),
    "infinite reward": (-INF, "reward is -inf"),
    "a float64 that no float32 holds": (1e300, "reward is inf (as float32)"),
    "log_things": (NAN, "log_things is nan"),
    "vector": ([1, 2, NAN], "observation 'vector'[2] is nan"),
    "other": ([INF], "observation 'other'[0] is inf"),
    "a vector's 1e300": ([0, 1e300, 0], "observation 'vector'[1] is inf"),
}


def place(name):
    return (
        "vector"
        if "vector" in name
        else "reward"
        if "reward" in name or "float64" in name
        else name
    )


@pytest.mark.parametrize("name", WRONG)
def test_stop_names_environment_step_key_and_remedy(name):
    value, expected = WRONG[name]
    env = faulty({(2, place(name)): value}, "stop", task="gym_faulty", index=3)
    env.reset(), env.step(one_hot(env, 0))
    with pytest.raises(BadValue) as caught:
        env.step(one_hot(env, 0))
    line = str(caught.value)
    assert (
        line.startswith("gym_faulty, environment 3, step 2 (frame 4) of its episode: ")
        and "\n" not in line
    )
    assert expected in line and "--env.invalid truncate" in line
    assert isinstance(caught.value, EnvError) and "log_invalid" not in env.log_keys


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("error")
def test_truncate_closes_the_episode_with_the_observation_before_it(name):
    value, expected = WRONG[name]
    env = faulty({(2, place(name)): value})
    env.reset()
    good = env.step(one_hot(env, 0))
    assert good["log_invalid"] == 0 and good["reward"] == 1
    with pytest.warns(RuntimeWarning) as warned:
        bad = env.step(one_hot(env, 0))
    assert len(warned) == 1 and expected in str(warned[0].message)
    flags = {key: bad[key] for key in ("is_first", "is_last", "is_terminal")}
    assert flags == {"is_first": False, "is_last": True, "is_terminal": False}
    assert bad["reward"] == bad["log_things"] == 0 and bad["log_invalid"] == 1
    assert all(
        np.array_equal(bad[key], good[key]) and bad[key].dtype == good[key].dtype
        for key in env.obs_space
    )
    assert not any(np.shares_memory(bad[key], good[key]) for key in env.obs_space)
    assert all(np.isfinite(bad[key]).all() for key in bad) and bad.keys() == good.keys()
    assert env.reset()["is_first"] and env.step(one_hot(env, 0))["log_invalid"] == 0


def test_a_reset_is_repeated_and_counted():
    class FaultyTwice(Faulty):
        def reset(self, **arguments):
            obs, info = super().reset(**arguments)
            return obs | ({"vector": [NAN] * 3} if self.resets < 3 else {}), info

    env = Env(FaultyTwice({}), 1, 0, 7, "truncate")
    with pytest.warns(
        RuntimeWarning, match="the reset of an episode: observation 'vector'"
    ) as warned:
        output = env.reset()
    assert (
        output["is_first"] and output["log_invalid"] == 2 == len(warned) and env.suite.resets == 3
    )
    with pytest.raises(BadValue, match="reset of an episode"):
        Env(FaultyTwice({}), 1, 0, 7, "stop").reset()
    with pytest.warns(RuntimeWarning), pytest.raises(BadValue, match="5 resets in a row"):
        faulty({(0, "vector"): [NAN] * 3}).reset()


def test_a_restored_environment_closes_with_what_it_was_restored_to():
    ours, other = (faulty({(3, "reward"): NAN}) for _ in range(2))
    ours.reset(), ours.step(one_hot(ours, 0)), ours.step(one_hot(ours, 0))
    state = ours.get_state()
    assert is_plain(state)
    other.set_state(state)
    with pytest.warns(RuntimeWarning):
        assert same([ours.step(one_hot(ours, 0))], [other.step(one_hot(other, 0))])


def test_values_of_another_kind_than_their_space_are_refused():
    for key, value, expected in (
        ("vector", np.zeros(4), r"shape \(4,\), its space says \(3,\)"),
        ("vector", ["a", "b", "c"], "not numbers"),
        ("image", np.zeros((4, 4, 1)), "is float64, its space says uint8"),
        ("grid", np.zeros((2, 2, 1), np.uint8), "is uint8, its space says bool"),
    ):
        for invalid in ("stop", "truncate"):  # a mistake, not a moment's fault
            env = faulty({(1, key): value}, invalid)
            env.reset()
            with pytest.raises(EnvError, match=expected):
                env.step(one_hot(env, 0))
    with pytest.raises(EnvError, match=r"env\.invalid"):
        faulty({}, "ignore")


@pytest.mark.parametrize("parallel", [False, True])
def test_through_many_environments(parallel):
    """A NaN is no crash: nothing is built anew, and `stop` reaches the caller as it is."""

    def make(index, restart):
        return Env(
            Faulty({(2, "reward"): NAN} if index else {}), 1, 0, 0, kind, task="t", index=index
        )

    action = np.eye(2, dtype=np.float32)
    kind = "truncate"
    with contextlib.closing(Envs(make, 2, parallel)) as envs:
        envs.step(None), envs.step(action)
        with contextlib.nullcontext() if parallel else pytest.warns(RuntimeWarning):
            output = envs.step(action)
        assert (
            output["is_last"].tolist()
            == [False, True]
            == output["log_invalid"].astype(bool).tolist()
        )
        assert envs.step(action)["is_first"].tolist() == [False, True] and envs.restarts == 0
    kind = "stop"
    with contextlib.closing(Envs(make, 2, parallel)) as envs:
        envs.step(None), envs.step(action)
        with pytest.raises(BadValue, match="t, environment 1, step 2"):
            envs.step(action)
        assert envs.restarts == 0


MODULE = """
    import gymnasium as gym, numpy as np

    class Fails(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)
        age = 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.t = 0
            return np.zeros(3, np.float32), {}

        def step(self, action):
            self.t, self.age = self.t + 1, self.age + 1
            reward = float("nan") if self.age == 50 else 1.0
            return np.zeros(3, np.float32), reward, False, self.t == 20, {}

    gym.register("Fails-v0", Fails)
"""


@pytest.fixture
def fails(tmp_path, monkeypatch):
    (tmp_path / "failing_env.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield "gym_failing_env:Fails-v0"
    gymnasium.registry.pop("Fails-v0", None)
    sys.modules.pop("failing_env", None)


QUICK = [
    "--video",
    "false",
    "--eval_episodes",
    "0",
    "--log_every",
    "20",
    "--checkpoint_every",
    "20",
    "--steps",
    "100",
]


def test_what_was_saved_with_stop_goes_on_with_truncate():
    """The step after it may be the one that is not finite."""
    first = build("gym_CartPole-v1")
    first.reset()
    before = first.step(one_hot(first, 0))
    again = build("gym_CartPole-v1", invalid="truncate")
    again.set_state(first.get_state())
    again.suite._env.unwrapped.state = np.full(4, NAN)
    with pytest.warns(RuntimeWarning, match="closed as truncated"):
        output = again.step(one_hot(again, 0))
    assert output["is_last"] and not output["is_terminal"]
    assert np.array_equal(output["vector"], before["vector"])


def test_a_run_stops_in_one_line_and_continues_with_truncate(fails, tmp_path, capsys):
    """As reported: one NaN reward ended a run hundreds of steps later,
    and every continuation of it.
    """
    import dreamer  # not above: processes of environments import this file, and need no torch
    from hidreamer.checkpoint import load_checkpoint

    run = ["--configs", "gym", "debug", "--task", fails, *QUICK, "--logdir", str(tmp_path / "run")]
    assert dreamer.main(run) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {fails}, environment 0, step 10 (frame 10) of its episode: reward is nan"
    )
    assert error.count("\n") == 1
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert checkpoint["step"] == 40
    with pytest.warns(RuntimeWarning, match="closed as truncated"):
        assert dreamer.main([*run, "--env.invalid", "truncate"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and '"train_invalid": 1.0' in lines
    for path in (tmp_path / "run" / "train_eps").glob("*.npz"):
        with np.load(path) as file:
            assert all(np.isfinite(file[key]).all() for key in file.files)
    assert (
        dreamer.main([*run, "--steps", "120"]) == 0
    )  # back to `stop`: its log keys are fewer again


def test_every_suite_is_checked():
    env = make_env("dummy_vector", {"size": [64, 64], "action_repeat": 1, "time_limit": 0}, 0)
    env.reset()
    env.suite._show = lambda: {"vector": np.array([0, NAN, 0, 0])}
    with pytest.raises(BadValue, match="dummy_vector, step 1"):
        env.step(one_hot(env, 0))
    assert "log_invalid" in build("dummy_vector", invalid="truncate").log_keys
