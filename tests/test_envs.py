"""The contract of `envs`, the same for all suites;
test_envs_games and test_envs_others have what differs.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from envs import EnvError, make_env
from envs.actions import action_codec
from envs.base import ActionError, resize

CLASSIC = ("CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "Acrobot-v1")
DUMMIES = ("continuous", "grid", "image", "multi", "vector")
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
TASKS = {  # task -> what it overrides of the defaults in `build`
    "atari_pong": {"action_repeat": 4},
    "atari_breakout": {"action_repeat": 4, "atari": {"grayscale": True, "sticky": 0.25}},
    "crafter_reward": {},
    "dmc_cup_catch": {"dmc": {"image": False, "proprio": True}},
    "dmc_walker_walk": {"action_repeat": 2},
    "vizdoom_deadly_corridor": {"action_repeat": 4},
    "gym_FrozenLake-v1": {},
    "minatar_seaquest": {},
    "minigrid_MemoryS7": {},
    "minigrid_GoToSeqS5R2": {},
    "pinpad_three": {},
    "pinpad_eight": {},
    **{f"gym_{name}": {} for name in CLASSIC},
    **{f"dummy_{name}": {} for name in DUMMIES},
}


def build(task, seed=0, **overrides):
    """An environment; skips the test, saying why, where its package or its OpenGL is missing."""
    try:
        return make_env(
            task, {"size": [64, 64], "action_repeat": 1, "time_limit": 0} | overrides, seed
        )
    except EnvError as error:
        if re.search(
            "needs the package '(crafter|dm_control|minigrid|popgym|vizdoom)'|no OpenGL", str(error)
        ):
            pytest.skip(str(error))
        raise


def sample(space, rng):
    """A random action as the agent would give it, float32 (A,)."""
    if isinstance(space, Box):
        return rng.uniform(-1, 1, space.shape).astype(np.float32)
    sizes = space.nvec if isinstance(space, MultiDiscrete) else [space.n]
    return np.concatenate([np.eye(n, dtype=np.float32)[rng.integers(n)] for n in sizes])


def play(env, steps, seed=0, output=None):
    """Outputs of random actions; continues from `output`, or from a reset."""
    rng = np.random.default_rng(seed)
    outputs = []
    for _ in range(steps):
        action = sample(env.act_space, rng)
        output = env.reset() if output is None or output["is_last"] else env.step(action)
        outputs.append(output)
    return outputs


def same(ours, theirs):
    """Two lists of outputs, bit for bit."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.keys() == b.keys() for a, b in pairs)
    assert all(np.asarray(a[key]).dtype == np.asarray(b[key]).dtype for a, b in pairs for key in a)
    return all(np.array_equal(a[key], b[key]) for a, b in pairs for key in a)


def one_hot(env, index):
    return np.eye(env.act_dim, dtype=np.float32)[index]


def hold(env, index, steps):
    """Outputs of one discrete action, repeated."""
    return [env.step(one_hot(env, index)) for _ in range(steps)]


def until(env, index, wanted, most=3000):
    """The first output with `wanted` set under one discrete action."""
    for _ in range(most):
        output = env.step(one_hot(env, index))
        if output[wanted] or output["is_last"]:
            return output
    raise AssertionError(f"no {wanted} in {most} steps")


@pytest.mark.parametrize("task", TASKS)
def test_outputs_match_the_spaces_and_flags(task):
    env = build(task, **TASKS[task])
    outputs = play(env, 12)
    first = outputs[0]
    assert (
        first["is_first"]
        and first["reward"] == 0
        and not first["is_last"]
        and not first["is_terminal"]
    )
    assert not any(
        step["is_first"] and not before["is_last"] for before, step in itertools.pairwise(outputs)
    )
    for output in outputs:
        assert set(output) == {
            *env.obs_space,
            *env.log_keys,
            "reward",
            "is_first",
            "is_last",
            "is_terminal",
        }
        for key, space in env.obs_space.items():
            assert (space.dtype.name, len(space.shape)) in {
                ("uint8", 3),
                ("bool", 3),
                ("float32", 1),
            }
            assert output[key].dtype == space.dtype and output[key].shape == space.shape
            assert np.isfinite(output[key]).all()
        assert all(type(output[key]) is np.float32 for key in (*env.log_keys, "reward"))
        assert all(type(output[key]) is bool for key in ("is_first", "is_last", "is_terminal"))
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    expected = {
        Discrete: lambda s: s.n,
        MultiDiscrete: lambda s: s.nvec.sum(),
        Box: lambda s: s.shape[0],
    }
    assert env.act_dim == expected[type(env.act_space)](env.act_space)
    assert env.repeat == TASKS[task].get("action_repeat", 1)
    env.close()


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_trajectory_and_outputs_are_no_aliases(task):
    steps = 8 if "walker" in task else 80
    envs = [build(task, seed, **TASKS[task]) for seed in (1, 1, 2)]
    outputs = play(envs[0], steps)
    copies = [{key: np.copy(value) for key, value in output.items()} for output in outputs]
    assert same(outputs, play(envs[1], steps))
    assert not same(outputs, play(envs[2], steps))
    play(envs[0], 5, output=outputs[-1])
    assert same(outputs, copies)


ENDLESS = [
    "crafter_reward",
    "vizdoom_deadly_corridor",
    "gym_Pendulum-v1",
    "minatar_freeway",
    "pinpad_three",
    "dummy_vector",
]


@pytest.mark.parametrize("task", ["atari_pong", "dmc_cup_catch", *ENDLESS])
@pytest.mark.parametrize("limit", [10, 12])
def test_a_time_limit_counts_frames_and_truncates(task, limit):
    env = build(task, **TASKS.get(task, {}) | {"action_repeat": 4, "time_limit": limit})
    outputs = play(env, 8)
    assert [output["is_last"] for output in outputs] == [False, False, False, True] * 2
    assert not any(output["is_terminal"] for output in outputs)


REPEATED = {
    "gym_Pendulum-v1": 60,
    "minatar_breakout": 60,
    "dmc_reacher_easy": 60,
    "vizdoom_basic": 60,
}


@pytest.mark.parametrize(
    ("task", "steps"), [*REPEATED.items(), ("crafter_reward", 25), ("atari_ms_pacman", 120)]
)
def test_action_repeat_sums_rewards(task, steps):
    options = {"minatar": {"sticky": 0.0}, "dmc": {"image": False, "proprio": True}}
    slow, fast = build(task, action_repeat=4, **options), build(task, action_repeat=1, **options)
    slow.reset(), fast.reset()
    rng = np.random.default_rng(0)
    total = 0.0
    for _ in range(steps):
        action = sample(slow.act_space, rng)
        output, frames = slow.step(action), [fast.step(action)]
        while len(frames) < 4 and not frames[-1]["is_last"]:
            frames.append(fast.step(action))
        assert output["reward"] == pytest.approx(sum(frame["reward"] for frame in frames), abs=1e-4)
        assert (
            output["is_last"] == frames[-1]["is_last"]
            and output["is_terminal"] == frames[-1]["is_terminal"]
        )
        total += abs(output["reward"])
        if output["is_last"]:
            slow.reset(), fast.reset()
    assert total > 0  # else the sums were 0 = 0


EXACT = [
    *((f"atari_{game}", {"sticky": sticky, "noops": noops, "lives": lives})
      for game, sticky, noops, lives in (
        ("pong", 0.0, 0, "unused"), ("pong", 0.25, 30, "unused"), ("boxing", 0.9, 0, "unused"),
        ("breakout", 0.0, 30, "discount"), ("breakout", 0.25, 30, "reset"),
    )),
    *((f"minatar_{game}", {"sticky": 0.9}) for game in GAMES),
    *((f"minigrid_{name}", {}) for name in ("MemoryS7", "Dynamic-Obstacles-5x5", "PutNextS4N1")),
    *((f"popgym_{name}", {}) for name in (
        "AutoencodeEasy", "CountRecallEasy", "MineSweeperEasy", "NoisyPositionOnlyPendulumEasy",
    )),
    *((f"pinpad_{name}", {}) for name in ("three", "eight")),
    *((f"gym_{name}", {}) for name in CLASSIC),
    *((f"dummy_{name}", {}) for name in DUMMIES),
]  # fmt: skip


def is_plain(value):
    if isinstance(value, dict | list):
        return all(
            is_plain(item) for item in (value.values() if isinstance(value, dict) else value)
        )
    return type(value) in (type(None), bool, int, float, str, np.ndarray)


@pytest.mark.parametrize(("task", "options"), EXACT)
def test_a_state_continues_exactly_in_a_fresh_object(task, options):
    repeat = 3 if task.startswith("atari") else 1
    limit = 0 if task == "gym_MountainCar-v0" else 90 * repeat  # once the limit of its own
    config = {"action_repeat": repeat, "time_limit": limit, task.split("_")[0]: options}
    if not options:
        config.pop(task.split("_")[0])
    ours, fresh, used = (build(task, seed, **config) for seed in (1, 2, 3))
    start = play(ours, 137)[-1]
    play(used, 60)
    draw = (lambda env: 0) if task.startswith("popgym") else (lambda env: env.render())
    state, picture = ours.get_state(), draw(ours)
    assert is_plain(state)
    future = play(ours, 250, seed=1, output=start)
    assert any(output["is_first"] for output in future)
    for other in (
        fresh,
        used,
    ):  # one that never was reset, one in mid-episode; and the state serves twice
        other.set_state(state)
        assert np.array_equal(draw(other), picture)
        assert same(future, play(other, 250, seed=1, output=start))


@pytest.mark.parametrize("task", ["atari_pong", "minatar_breakout", "dmc_cup_catch", *ENDLESS])
def test_a_state_from_before_the_first_reset_starts_all_randomness_afresh(task):
    options = TASKS.get(task, {}) | {"atari": {"sticky": 0.9}, "minatar": {"sticky": 0.9}}
    ours, other = build(task, 1, **options), build(task, 2, **options)
    play(other, 33)
    other.set_state(ours.get_state())
    assert same(play(ours, 50), play(other, 50))


@pytest.mark.parametrize(
    "task", ["crafter_reward", "dmc_cup_catch", "vizdoom_basic", "gym_FrozenLake-v1"]
)
def test_states_that_cannot_be_told_are_none(task):
    env = build(task, **TASKS.get(task, {}))
    env.reset()
    assert env.get_state() is None


def test_discrete_actions_are_one_hot():
    space, dim, decode = action_codec(Discrete(3, start=5))
    assert (space, dim) == (Discrete(3), 3)
    assert [decode(row) for row in np.eye(3, dtype=np.float32)] == [5, 6, 7]
    space, dim, decode = action_codec(MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [0, 0]]))
    assert (space, dim) == (MultiDiscrete([2, 3, 4, 2]), 11)
    action = np.concatenate([np.eye(n)[i] for n, i in ((2, 1), (3, 2), (4, 0), (2, 1))])
    assert decode(action).tolist() == [[1, 3], [0, 1]]


def test_box_actions_are_clipped_and_scaled():
    low, high = (
        np.array([[-2, 0], [-np.inf, 0]], np.float32),
        np.array([[2, 10], [np.inf, np.inf]], np.float32),
    )
    space, dim, decode = action_codec(Box(low, high))
    assert dim == 4
    assert space.low.tolist() == [-1, -1, -np.inf, -1] and space.high.tolist() == [
        1,
        1,
        np.inf,
        np.inf,
    ]
    assert decode(np.array([-1, -1, -7, 3], np.float32)).tolist() == [[-2, 0], [-7, 4]]
    assert decode(np.array([0.5, 0, 7, -3], np.float32)).tolist() == [[1, 5], [7, 0]]
    assert decode(np.array([9, 1, 0, 0], np.float32)).tolist() == [[2, 10], [0, 1]]
    # a policy's [-1, 1] reaches more than the bound where the other one is infinite
    decode = action_codec(Box(np.float32([5, -np.inf]), np.float32([np.inf, -9])))[2]
    assert decode(np.array([-1, -1], np.float32)).tolist() == [5, -11]
    assert decode(np.array([1, 1], np.float32)).tolist() == [7, -9]


@pytest.mark.parametrize(
    "action",
    [[1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0.5, 0.5, 0, 0], [-1, 1, 1, 0], [1, np.nan, 0, 0]],
)
def test_invalid_actions_raise(action):
    env = build("dummy_vector")
    env.reset()
    with pytest.raises(ValueError, match=r"action|one-hot") as caught:
        env.step(np.array(action, np.float32))
    assert caught.type is ActionError
    with pytest.raises(ValueError, match="finite"):
        build("gym_Pendulum-v1").step(np.array([np.inf], np.float32))


def test_images_are_resized_by_area():
    image = np.array([[0, 100, 8, 8], [0, 100, 8, 8]], np.uint8)
    assert resize(image, (1, 2)).tolist() == [[[50], [8]]]
    assert resize(np.dstack([image, image]), (2, 4)).shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("atarii_pong", "unknown suite 'atarii'; nearest: atari"),
        ("atari_pongg", "unknown Atari game 'pongg'; nearest: pong"),
        ("atari_combat", "unknown Atari game 'combat'"),  # loading it would end the process
        ("crafter_rewards", "unknown Crafter task 'rewards'; nearest: reward"),
        ("dmc_walker_wlk", "unknown DMC task 'walker_wlk'; nearest: walker_walk"),
        ("vizdoom_basics", "unknown ViZDoom scenario 'basics'; nearest: basic"),
        ("minatar_brakout", "unknown MinAtar game 'brakout'; nearest: breakout"),
        ("gym_CartPoel-v1", "unknown Gymnasium id 'CartPoel-v1'; nearest: CartPole-v1"),
        ("pinpad_tree", "unknown Pin Pad task 'tree'; nearest: three"),
        ("dummy_imag", "unknown dummy task 'imag'; nearest: image"),
    ],
)
def test_errors_are_one_line_and_name_the_nearest(task, line):
    with pytest.raises(EnvError) as caught:
        build(task)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    monkeypatch.delitem(sys.modules, "envs.crafter", raising=False)
    with pytest.raises(EnvError, match=r"'crafter': pip install -e '.\[crafter\]'$"):
        make_env("crafter_reward", {"size": [64, 64], "action_repeat": 1, "time_limit": 0}, 0)


def test_suites_are_imported_only_when_asked_for_and_in_silence():
    code = (
        "import sys; from envs import make_env; "
        "assert not {'ale_py', 'minatar', 'crafter', 'vizdoom', 'dm_control', "
        "'torch'} & set(sys.modules); "
        "make_env('atari_pong', {'size': [64, 64], 'action_repeat': 4, 'time_limit': 0}, 0).reset()"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
