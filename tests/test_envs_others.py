"""DMC, Crafter, Gymnasium and the dummies: their observations,
ends and faults that we must not inherit.
"""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from test_envs import build, hold, one_hot, play, same, sample, until

from envs import EnvError, make_env
from envs.base import ActionError
from envs.vector import Envs

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------- DMC, Crafter


def test_dmc_observations_scaling_and_ends():
    both = build("dmc_quadruped_walk", dmc={"proprio": True}, size=(32, 48))
    output = both.reset()
    assert output["image"].shape == (32, 48, 3) and output["image"].std() > 10
    assert output["torso_upright"].shape == (1,) and output["egocentric_state"].shape == (44,)
    assert (
        both.suite._camera == 2
        and build("dmc_quadruped_walk", dmc={"camera": 1}).suite._camera == 1
    )
    env = build("dmc_cup_catch", action_repeat=10, dmc={"image": False, "proprio": True})
    assert set(env.reset()) & {"image", "position", "velocity"} == {"position", "velocity"}
    outputs = [env.step(np.zeros(2)) for _ in range(100)]
    assert [output["is_last"] for output in outputs] == [False] * 99 + [True] and not outputs[-1][
        "is_terminal"
    ]
    env.reset()
    physics = env.suite._env
    stop, physics.step = (
        physics.step,
        lambda action: stop(action)._replace(step_type=2, discount=0.0),
    )
    assert env.step(np.zeros(2))[
        "is_terminal"
    ]  # no task of the suite has such an end, so we made one
    with pytest.raises(EnvError, match="the agent would see nothing"):
        build("dmc_cup_catch", dmc={"image": False})


def test_dmc_by_itself_is_seeded_and_what_its_space_says():
    both = [build("dmc_walker_walk", dmc={"image": False, "proprio": True}).suite for _ in "ab"]
    first, second = (suite.reset()[0] for suite in both)
    assert both[0].observation_space.contains(first)
    assert any((x != second[key]).any() for key, x in first.items())


def test_dmc_without_opengl_does_physics_and_says_what_pictures_need():
    build("dmc_cup_catch", dmc={"image": False, "proprio": True})
    code = (
        "from envs import make_env, EnvError\n"
        "def cup(image): return make_env('dmc_cup_catch', "
        "{'size': [64, 64], 'action_repeat': 1, 'time_limit': 0, 'dmc': {'image': image, "
        "'proprio': True}}, 0)\n"
        "env = cup(False); env.reset(); print(env.step([0, 0])['position'].shape)\n"
        "for draw in (env.render, lambda: cup(True)):\n"
        "    try: draw()\n"
        "    except EnvError as error: print(error)\n"
    )
    variables = os.environ | {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    first, *errors = done.stdout.splitlines()
    assert first == "(4,)" and len(errors) == 2 and done.stderr == ""
    assert all("no OpenGL to draw with (" in error for error in errors)
    assert all("): apt install libegl1" in error for error in errors)


@pytest.mark.parametrize("parallel", [False, True])
def test_crafter_score_is_the_geometric_mean_of_success_rates(parallel):
    build("crafter_reward")  # or skip
    from envs.crafter import ACHIEVEMENTS, crafter_score

    assert crafter_score([0.07, 0.01]) == pytest.approx(
        3.0
    )  # sqrt((1 + 7) (1 + 1)) - 1, in percent
    assert crafter_score([0.0] * 22) == 0.0 and crafter_score([1.0] * 22) == pytest.approx(100.0)
    config = {"size": [64, 64], "action_repeat": 1, "time_limit": 0}
    envs = Envs(lambda index, restart: make_env("crafter_reward", config, index), 1, parallel)
    episode = dict.fromkeys((f"log_success_{name}" for name in ACHIEVEMENTS), 0.0)
    better = episode | {"log_success_collect_coal": 1.0}
    # One of 22 in half of the episodes: 51^(1/22) - 1
    assert envs.summary([episode, better]) == {"score": pytest.approx(np.exp(np.log(51) / 22) - 1)}
    assert envs.summary([]) == {}
    envs.close()
    assert (
        Envs(lambda index, restart: make_env("dummy_vector", config, 0), 1, parallel).summary([{}])
        == {}
    )


def test_crafter_counts_achievements_and_tells_death_from_time():
    env = build("crafter_reward")
    env.reset()
    inner = env.suite._env
    logs, first = [], []
    for times in (0, 1, 0, 2, 0):
        inner._player.achievements["collect_wood"] += times
        output = env.step(one_hot(env, 0))
        logs.append(output["log_achievement_collect_wood"])
        first.append(output["log_success_collect_wood"])
    assert logs == [0, 1, 0, 2, 0] and first == [0, 1, 0, 0, 0] and len(env.log_keys) == 44
    assert (
        env.reset()["log_achievement_collect_wood"]
        == 0
        == hold(env, 0, 1)[0]["log_achievement_collect_wood"]
    )
    inner._length = 4
    assert [(output["is_last"], output["is_terminal"]) for output in hold(env, 0, 3)][1:] == [
        (False, False),
        (True, False),
    ]
    env.reset()
    inner._player.health = 0
    output = hold(env, 0, 1)[0]
    assert output["is_last"] and output["is_terminal"] and output["reward"] < 0
    silent = build("crafter_noreward")
    assert not any(output["reward"] for output in play(silent, 50))


def test_crafter_is_fixed_by_its_seed_and_not_moved_by_drawing():
    """Crafter's own sets would order creatures by address,
    and its night draws noise from the game's generator.
    """
    quiet, drawn = build("crafter_reward", seed=3), build("crafter_reward", seed=3)
    rng, last, ballast = np.random.default_rng(0), {"is_last": True}, []
    for _ in range(350):
        action = sample(quiet.act_space, rng)
        step = (
            (lambda env: env.reset())
            if last["is_last"]
            else (lambda env, action=action: env.step(action))
        )
        ours, theirs = step(quiet), step(drawn)
        assert same([ours], [theirs])
        drawn.render(), ballast.append([object() for _ in range(rng.integers(9))])
        last = ours


# --------------------------------------------------------------------------------- Gymnasium, dummy


class Odd(gymnasium.Env):
    """One leaf of every kind that can be read."""

    observation_space = Dict(
        picture=Box(0, 255, (30, 40), np.uint8),
        colour=Box(0, 255, (30, 40, 3), np.uint8),
        planes=Box(0, 1, (5, 6, 2), np.bool_),
        matrix=Box(-1, 1, (2, 3), np.float64),
        choice=Discrete(4, start=1),
        flags=MultiBinary(3),
    )
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample() | {
            "choice": np.int64(3),
            "flags": np.array([1, 0, 1], np.int8),
        }, {}

    def step(self, action):
        return self.reset()[0], 1, False, bool(action), {"is_terminal": True}


def test_gym_reads_every_kind_of_leaf():
    gymnasium.register("Odd-v0", Odd)
    try:
        env = build("gym_Odd-v0", size=(16, 8))
        output = play(env, 2)[0]
        shapes = {key: (space.dtype.name, space.shape) for key, space in env.obs_space.items()}
        assert shapes == {
            "picture": ("uint8", (16, 8, 1)),
            "colour": ("uint8", (16, 8, 3)),
            "planes": ("bool", (5, 6, 2)),
            "matrix": ("float32", (6,)),
            "choice": ("float32", (4,)),
            "flags": ("float32", (3,)),
        }
        assert output["choice"].tolist() == [0, 0, 1, 0] and output["flags"].tolist() == [1, 0, 1]
        env.reset()
        output = env.step(one_hot(env, 1))
        assert output["is_last"] and not output["is_terminal"]  # infos of strangers mean nothing
        with pytest.raises(EnvError, match="Odd-v0 cannot be drawn: NotImplementedError"):
            env.render()
    finally:
        del gymnasium.registry["Odd-v0"]


class Reuse(gymnasium.Env):
    """Returns one buffer that it overwrites."""

    observation_space, action_space = Box(0, 255, (64, 64, 3), np.uint8), Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.buffer = np.zeros((64, 64, 3), np.uint8)
        return self.buffer, {}

    def step(self, action):
        self.buffer += 1
        return self.buffer, 0, False, False, {}


def test_outputs_do_not_change_with_the_environments_buffers():
    gymnasium.register("Reuse-v0", Reuse)
    try:
        assert [output["image"].max() for output in play(build("gym_Reuse-v0"), 4)] == [0, 1, 2, 3]
    finally:
        del gymnasium.registry["Reuse-v0"]


def test_gym_ends_and_scaling():
    falling, climbing, swinging = (
        build(f"gym_{name}") for name in ("CartPole-v1", "MountainCar-v0", "Pendulum-v1")
    )
    falling.reset(), climbing.reset(), swinging.reset()
    assert until(falling, 0, "is_last")["is_terminal"]
    outputs = hold(climbing, 0, 200)
    assert [output["is_last"] for output in outputs] == [False] * 199 + [True] and not outputs[-1][
        "is_terminal"
    ]
    for ours, torque in ((1, 2), (-1, -2), (0.25, 0.5), (7, 2)):
        swinging.step(np.array([ours], np.float32))
        assert swinging.suite._env.unwrapped.last_u == torque


@pytest.mark.parametrize("name", ["continuous", "grid", "image", "multi", "vector"])
def test_dummies_reward_the_right_answer(name):
    env = build(f"dummy_{name}", action_repeat=2)

    def answer(obs):
        if name == "continuous":
            return obs["vector"]
        if name == "grid":
            return np.eye(4, dtype=np.float32)[obs["grid"][-1, 0].argmax()]
        bar = (
            np.eye(4, dtype=np.float32)[obs["image"][-1, 8::16, 0].argmax()]
            if "image" in obs
            else None
        )
        return {
            "vector": lambda: obs["vector"],
            "image": lambda: bar,
            "multi": lambda: np.append(bar[:3], obs["vector"]),
        }[name]()

    output, total = env.reset(), 0.0
    while not output["is_last"]:
        output = env.step(answer(output))
        total += output["reward"]
    assert total == pytest.approx(40, abs=1e-3)  # 20 steps of 2 frames
    assert output["is_terminal"] == (name in ("grid", "image"))
    assert sum(output["reward"] for output in play(env, 21)) < 36


def test_dummy_crash_crashes():
    env = build("dummy_crash")
    with pytest.raises(RuntimeError, match="broke"):
        play(env, 60)
    with pytest.raises(ActionError):
        env.step(np.zeros(4))
