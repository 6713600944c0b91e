"""MiniGrid, POPGym and Pin Pad: what they observe, how a game goes, and states from elsewhere."""

import collections
import itertools
import os
import pickle
import sys

import gymnasium
import numpy as np
import pytest
from test_envs import build, hold, one_hot, play, sample

from envs import EnvError, make_env, pickled
from envs.pinpad import HEIGHT, LENGTH, MOVES, PADS, REWARD, WIDTH
from envs.vector import Envs

CONFIG = {"size": [64, 64], "action_repeat": 1, "time_limit": 0}

# ------------------------------------------------------------------------------ MiniGrid and BabyAI


def test_minigrid_observes_planes_of_its_codes():
    env = build("minigrid_MemoryS7")
    shapes = {key: space.shape for key, space in env.obs_space.items()}
    assert shapes == {"grid": (7, 7, 20), "direction": (4,), "mission": (128,)}
    output, rng = None, np.random.default_rng(0)
    for _ in range(60):
        fresh = output is None or output["is_last"]
        output = env.reset() if fresh else env.step(sample(env.act_space, rng))
        codes = env.suite._env.unwrapped.gen_obs()["image"].transpose(
            1, 0, 2
        )  # x is its first axis
        grid = output["grid"]
        for i, planes in enumerate((grid[..., :11], grid[..., 11:17], grid[..., 17:])):
            assert (planes.argmax(-1) == codes[..., i]).all() and (planes.sum(-1) == 1).all()
    env.reset()
    inner = env.suite._env.unwrapped
    # the agent is in the middle of the lowest row and looks up: what is ahead is in its column
    inner.agent_pos, inner.agent_dir = np.array([1, inner.height // 2]), 3
    ahead = env.step(one_hot(env, 6))["grid"][5, 3, :11].argmax()
    assert ahead == inner.grid.get(1, inner.height // 2 - 1).encode()[0] in (5, 6)  # key or ball


def test_minigrid_shows_the_whole_grid_with_the_agents_direction():
    """FullyObsWrapper puts it where others have a state, of which there are three."""
    pytest.importorskip("minigrid")
    from minigrid.envs import EmptyEnv
    from minigrid.wrappers import FullyObsWrapper

    gymnasium.register("Whole-v0", lambda **keys: FullyObsWrapper(EmptyEnv(size=5, **keys)))
    try:
        env, seen = build("minigrid_Whole-v0"), set()
        assert env.obs_space["grid"].shape == (5, 5, 21)
        env.reset()
        for _ in range(4):
            grid = env.step(one_hot(env, 0))["grid"]  # turns left
            here = grid[grid[..., :11].argmax(-1) == 10]  # the agent
            seen.add(int(here[0, 17:].argmax()))
        assert seen == {0, 1, 2, 3}
    finally:
        del gymnasium.registry["Whole-v0"]


def test_minigrid_missions_are_bags_of_words_and_pairs():
    pytest.importorskip("minigrid")
    from envs.minigrid import bag_of_words

    mission = bag_of_words("put the red ball next to the blue key, then go to the door")
    words, pairs = 15, 14  # the comma is a word
    assert (
        mission.dtype == np.float32 and mission.shape == (128,) and mission.sum() == words + pairs
    )
    swapped = bag_of_words("put the blue ball next to the red key, then go to the door")
    assert not np.array_equal(mission, swapped)
    assert np.array_equal(bag_of_words("Go to"), bag_of_words("go  to"))
    env = build("minigrid_GoToLocal")
    missions = set()
    for _ in range(20):
        output = env.reset()
        assert np.array_equal(output["mission"], bag_of_words(env.suite._env.unwrapped.mission))
        missions.add(env.suite._env.unwrapped.mission)
    assert len(missions) > 5
    assert "mission" not in build("minigrid_GoToLocal", minigrid={"keys": "grid|direction"}).reset()


def test_minigrid_rewards_the_right_object_and_only_memory_tells_it():
    """A scripted player that looks into the simulator always earns; and at the junction, where it
    has to choose, what it sees does not say which is right.
    """
    env = build("minigrid_MemoryS7", minigrid={"keys": "grid|direction"})
    choices = collections.defaultdict(set)
    for _ in range(12):
        env.reset()
        inner = env.suite._env.unwrapped
        goal = tuple(inner.success_pos)
        output, junction = None, (inner.success_pos[0], inner.height // 2)
        for target in (junction, goal):
            while tuple(inner.agent_pos) != target and not (output and output["is_last"]):
                output = env.step(one_hot(env, towards(inner, target)))
            if target == junction:
                choices[output["grid"].tobytes(), int(inner.agent_dir)].add(goal[1] < junction[1])
        assert output["is_terminal"] and output["reward"] > 0.8
    assert any(len(sides) == 2 for sides in choices.values())


def towards(inner, target):
    """MiniGrid's action (0 left, 1 right, 2 forward) on a free way, first along x, then along y."""
    dx, dy = target[0] - inner.agent_pos[0], target[1] - inner.agent_pos[1]
    wanted = (0 if dx > 0 else 2) if dx else (1 if dy > 0 else 3)
    return 2 if inner.agent_dir == wanted else 1


@pytest.mark.parametrize(
    ("task", "options", "line"),
    [
        ("MemoryS77", {}, "unknown MiniGrid or BabyAI task 'MemoryS77'; nearest: Memory"),
        (
            "MiniGrid-Memry-v0",
            {},
            "unknown MiniGrid or BabyAI task 'MiniGrid-Memry-v0'; nearest: M",
        ),
        (
            "MemoryS7",
            {"kwargs": "{colour: 3}"},
            "cannot be built with env.minigrid.kwargs {'colour",
        ),
        ("MemoryS7", {"kwargs": "3"}, "env.minigrid.kwargs is '3'"),
        ("MemoryS7", {"keys": "grit"}, "no observation matches env.minigrid.keys 'grit'"),
        ("nomodule:X-v0", {}, "no module 'nomodule' for the task minigrid_nomodule:ID"),
        ("CartPole-v1", {}, "not the codes that MiniGrid observes"),
    ],
)
def test_minigrid_faults_are_one_line(task, options, line):
    with pytest.raises(EnvError) as caught:
        build(f"minigrid_{task}", minigrid=options)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_whose_patterns_pip_does_not_bring_says_how_to_get_them(monkeypatch):
    """As those of MiniGrid-WFC-..."""

    def reset(**_):
        raise FileNotFoundError(2, "No such file", "patterns/Maze.png")

    env = build("minigrid_MemoryS7")
    monkeypatch.setattr(env.suite._env.unwrapped, "reset", reset)
    with pytest.raises(EnvError, match=r"Maze.png, which pip does not bring: install minigrid"):
        env.reset()


def test_minigrid_says_nothing_and_views_may_be_larger(capfd):
    env = build("minigrid_BossLevel", minigrid={"kwargs": "{agent_view_size: 9}"})
    assert all(output["grid"].shape == (9, 9, 20) for output in play(env, 300))
    assert capfd.readouterr().out == ""


# ------------------------------------------------------------------------------------------- POPGym


def test_popgym_observes_what_its_tasks_show():
    env = build("popgym_AutoencodeEasy")
    assert {key: space.shape for key, space in env.obs_space.items()} == {"0": (2,), "1": (4,)}
    assert build("popgym_CountRecallEasy").obs_space["vector"].shape == (4,)
    env = build("popgym_RepeatPreviousEasy")  # the right action is what was seen four steps ago
    seen, rewards = [env.reset()["vector"]], []
    while True:
        output = env.step(seen[max(0, len(seen) - 4)])
        seen.append(output["vector"])
        rewards.append(float(output["reward"]))
        if output["is_last"]:
            break
    assert sum(rewards) == pytest.approx(1.0, abs=0.05) and all(x >= 0 for x in rewards)
    with pytest.raises(EnvError, match=r"unknown POPGym task 'RepeatEasy'; nearest: Repeat"):
        build("popgym_RepeatEasy")
    with pytest.raises(EnvError, match="mazes need the package mazelib"):
        build("popgym_LabyrinthEscapeEasy")


@pytest.mark.parametrize("suite", ["minigrid", "popgym"])
def test_a_missing_package_is_one_line_with_its_extra(suite, monkeypatch):
    monkeypatch.setitem(sys.modules, suite, None)
    monkeypatch.delitem(sys.modules, f"envs.{suite}", raising=False)
    with pytest.raises(EnvError, match=rf"'{suite}': pip install -e '.\[{suite}\]'$"):
        make_env(f"{suite}_X", CONFIG, 0)


# ------------------------------------------------------------------------------ states as pickles


class Dice(gymnasium.Env):
    """Two objects draw from one generator, and one of them points back."""

    observation_space, action_space = gymnasium.spaces.Discrete(6), gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.observation_space = gymnasium.spaces.Discrete(6)
        self.cup = Cup(self)
        self.fresh = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cup.random, self.fresh = self.np_random, {1, 2}
        return self.cup.roll(), {}


class Cup:
    def __init__(self, env):
        self.env, self.random = env, None

    def roll(self):
        return int(self.random.integers(6)) + int(self.env.np_random.integers(6))


def test_a_pickled_state_keeps_what_is_shared():
    ours, other = Dice(), Dice()
    ours.reset(seed=3)
    other.reset(seed=4)
    other.left_over = 5
    state = pickled.freeze(ours)
    rolls = [ours.cup.roll() for _ in range(20)]
    pickled.thaw(other, state)
    assert rolls == [other.cup.roll() for _ in range(20)] and not hasattr(other, "left_over")
    assert other.cup.env is other and other.cup.random is other.np_random
    ours.handle = lambda: None
    assert pickled.freeze(ours) is None
    ours.handle = collections.Counter("ab")  # what could be written, and not be read again
    assert pickled.freeze(ours) is None
    ours.handle = np.random.Generator(np.random.MT19937(0))  # whose state is not a PCG64's
    assert pickled.freeze(ours) is None


class Harm:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("true",)),
        (eval, ("1",)),
        (getattr, (1, "real")),
        (np.load, ("x",)),
        (np.fromfile, ("x",)),
        (gymnasium.make, ("CartPole-v1",)),
    ],
)
def test_a_state_runs_no_code_of_its_own(call):
    refuse_state(pickle.dumps({"x": Harm(call)}))


@pytest.mark.parametrize("name", ["os.system", "gymnasium.Space", "itertools.count", "Envs"])
def test_a_state_reaches_nothing_through_a_module_of_the_package(name):
    """A name with dots is a path; what a module has imported is no part of it."""
    module = __name__.encode()
    words = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)])
    refuse_state(words + name.encode() + b"\x93.")  # STACK_GLOBAL, of these two


def test_a_state_changes_no_class_and_imports_nothing():
    name = f"c{__name__}\nDice\n".encode()
    refuse_state(b"\x80\x04" + name + b"(N}\x8c\x04stepK\x07stb.")  # BUILD of slots
    assert Dice.step != 7
    before = set(sys.modules)
    refuse_state(b"cnumpy.f2py.__main__\ndtype\n.")
    refuse_state(b"cenvs.dummy_that_is_not_there\nDice\n.")
    assert set(sys.modules) == before


def refuse_state(data):
    state = np.frombuffer(data, np.uint8)
    with pytest.raises(pickle.UnpicklingError, match="is no part of an environment's state"):
        pickled.thaw(Dice(), state)


# ------------------------------------------------------------------------------------------ Pin Pad


@pytest.mark.parametrize("name", PADS)
def test_pinpad_shows_walls_pads_agent_and_notes(name):
    env = build(f"pinpad_{name}")
    grid = env.reset()["grid"]
    pads = len(PADS[name])
    assert grid.shape == (HEIGHT + 2, WIDTH, 2 + pads) and env.act_dim == 5
    assert grid[..., 0].sum() == 2 * (WIDTH + HEIGHT) - 4 and grid[..., 1].sum() == 1
    assert (grid[:HEIGHT, :, 2:].sum((0, 1)) == 9).all() and grid.sum(-1).max() == 1
    assert not grid[HEIGHT:].any()
    # every pad can be reached from every other without stepping on a third
    suite = env.suite
    for a, b in itertools.permutations(range(pads), 2):
        assert path(suite, tuple(np.argwhere(suite.floor[..., a])[0]), b, {a, b})


def path(suite, start, pad, allowed):
    """A shortest list of actions from a cell to a pad over free cells and allowed pads."""
    before, queue = {start: None}, collections.deque([start])
    while queue:
        cell = queue.popleft()
        if suite.floor[(*cell, pad)]:
            actions = []
            while before[cell]:
                cell, action = before[cell]
                actions.append(action)
            return actions[::-1]
        for action, (down, right) in list(enumerate(MOVES))[1:]:
            there = cell[0] + down, cell[1] + right
            on = set(map(int, np.flatnonzero(suite.floor[there])))
            if there not in before and not suite._board[(*there, 0)] and on <= allowed:
                before[there] = cell, action
                queue.append(there)
    raise AssertionError(f"pad {pad} cannot be reached from {start}")


@pytest.mark.parametrize("name", PADS)
def test_pinpad_is_solved_in_order_by_a_scripted_player(name):
    env = build(f"pinpad_{name}")
    env.reset()
    suite, rewards, last = env.suite, [], False
    while not last:
        progress = int(suite.variables()["progress"]) % suite.pads
        allowed = {progress - 1, progress}
        for action in path(suite, suite._at, progress, allowed):
            output = env.step(one_hot(env, action))
            rewards.append(float(output["reward"]))
            last = output["is_last"]
            if last:
                break
        assert not output["is_terminal"]
    assert len(rewards) == LENGTH and set(rewards) == {0.0, REWARD}
    done = rewards.count(REWARD)
    # the board is 14 x 12: with walks of at most 22 cells from pad to pad, and one to the first
    assert LENGTH / done < 24 * len(PADS[name])


def test_pinpad_pays_for_nothing_but_the_whole_order():
    env = build("pinpad_three")
    suite = env.suite

    def visit(*pads):
        total = 0.0
        for pad in pads:
            for action in path(suite, suite._at, pad, {*suite._visited[-1:], pad}):
                total += float(env.step(one_hot(env, action))["reward"])
        return total

    env.reset()
    suite._at = (7, 7)
    assert visit(1, 0, 2) == 0 and suite._visited == [1, 0, 2]
    assert visit(0, 1) == 0 and suite._visited == [2, 0, 1] and suite.variables()["progress"] == 2
    grid = env.step(one_hot(env, 0))["grid"]  # still on pad 1: noted once
    notes = grid[HEIGHT:, :6].argmax(-1) - 2
    assert notes.tolist() == [[2, 2, 0, 0, 1, 1]] * 2
    assert visit(2) == REWARD and suite._visited == []
    where = {tuple(map(int, suite._at))}
    for _ in range(30):
        env.reset()
        where.add(suite._at)
    assert len(where) > 15 and not any(suite.floor[cell].any() for cell in where)
    suite._at = (1, 7)
    hold(env, 1, 3)  # walls stop it
    assert suite._at == (1, 7)


def test_pinpad_at_random_earns_little_and_less_with_more_pads():
    returns = {}
    for name in ("three", "six"):
        env = build(f"pinpad_{name}", seed=1)
        rng = np.random.default_rng(1)
        env.reset()
        rewards = []
        for _ in range(3):
            outputs = [env.step(sample(env.act_space, rng)) for _ in range(LENGTH)]
            rewards.append(sum(float(output["reward"]) for output in outputs))
            assert outputs[-1]["is_last"] and not any(output["is_last"] for output in outputs[:-1])
            env.reset()
        returns[name] = rewards
    # the scripted player has over 250 an episode
    assert 0 < np.mean(returns["three"]) < 100 and sum(returns["six"]) == 0


# ------------------------------------------------------------------------------ in other processes


@pytest.mark.parametrize("task", ["minigrid_GoToObj", "popgym_AutoencodeEasy", "pinpad_four"])
def test_states_travel_between_processes(task):
    build(task)
    make = lambda index, restart: make_env(task, CONFIG, index)
    ours, theirs = Envs(make, 1, False), Envs(make, 1, True)
    action = one_hot(ours, 0)[None]
    try:
        ours.step(None), ours.step(action)
        state = ours.state()
        theirs.load_state(state)
        for _ in range(5):
            a, b = ours.step(action), theirs.step(action)
            assert all(np.array_equal(a[key], b[key]) for key in a)
    finally:
        ours.close(), theirs.close()
