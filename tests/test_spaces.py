"""What Gymnasium's spaces are read as, and the lines for what is not of its space."""

import re
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from test_envs import build

import tools
from envs import EnvError
from envs.actions import MOST_ACTIONS, action_codec
from envs.base import PREFIXES, RESERVED, BadValue, resize
from envs.spaces import LARGEST
from run_setup import make_envs


class Shows(gymnasium.Env):
    """Shows `values`, in turn, under `observation_space`."""

    action_space = Discrete(2)
    values: tuple = ()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.values[0], {}

    def step(self, action):
        self.t += 1
        return self.values[self.t], 1.0, False, False, {}


@pytest.fixture
def shows(monkeypatch):
    """-> a function from a space and values to the environment."""

    def make(space, *values, size=(8, 8), **overrides):
        monkeypatch.setattr(Shows, "observation_space", space, raising=False)
        monkeypatch.setattr(Shows, "values", values)
        return build("gym_Shows-v0", size=size, **overrides)

    gymnasium.register("Shows-v0", Shows)
    yield make
    del gymnasium.registry["Shows-v0"]


def read(env, key=None):
    """The one observation of a reset."""
    output = env.reset()
    (name,) = env.obs_space
    assert key in (None, name) and output[name].dtype == env.obs_space[name].dtype
    assert output[name].shape == env.obs_space[name].shape
    return output[name]


RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (10, 12, 3), np.uint8)
FLOAT = np.float32
SAME = (10, 12)  # a size that leaves PICTURE as it is
PICTURES = {  # name -> space, value, what is seen
    "uint8": (Box(0, 255, (10, 12, 3), np.uint8), PICTURE, PICTURE),
    "int64 values": (Box(0, 255, (10, 12, 3), np.uint8), PICTURE.astype(np.int64), PICTURE),
    "int32 space": (Box(0, 255, (10, 12, 3), np.int32), PICTURE.astype(np.int32), PICTURE),
    "grey": (Box(0, 255, (10, 12), np.uint8), PICTURE[..., 0], PICTURE[..., :1]),
    "float [0, 1]": (Box(0, 1, (10, 12, 3), FLOAT), PICTURE / FLOAT(255), PICTURE),
    "float64 [0, 1]": (Box(0, 1, (10, 12, 3), np.float64), PICTURE / 255, PICTURE),
    "grey float": (Box(0, 1, (10, 12), FLOAT), PICTURE[..., 0] / FLOAT(255), PICTURE[..., :1]),
    "float [0, 255]": (Box(0, 255, (10, 12, 3), FLOAT), PICTURE + FLOAT(0.2), PICTURE),
    "uint8 under float [0, 255]": (Box(0, 255, (10, 12, 3), FLOAT), PICTURE, PICTURE),
    "outside by rounding": (
        Box(0, 1, (10, 12, 3), FLOAT),
        PICTURE / FLOAT(255) * FLOAT(1.0000001),
        PICTURE,
    ),
    "channels first": (Box(0, 255, (3, 10, 12), np.uint8), PICTURE.transpose(2, 0, 1), PICTURE),
    "float channels first": (
        Box(0, 1, (3, 10, 12), FLOAT),
        PICTURE.transpose(2, 0, 1) / FLOAT(255),
        PICTURE,
    ),
    "one channel first": (
        Box(0, 255, (1, 10, 12), np.uint8),
        PICTURE[None, ..., 0],
        PICTURE[..., :1],
    ),
    "grey stack": (
        Box(0, 255, (5, 10, 12), np.uint8),
        np.stack([PICTURE[..., 0]] * 5),
        PICTURE[..., [0] * 5],
    ),
    "stack of colour": (
        Box(0, 255, (2, 10, 12, 3), np.uint8),
        np.stack([PICTURE] * 2),
        np.dstack([PICTURE] * 2),
    ),
    "stack, channels first": (
        Box(0, 255, (2, 3, 10, 12), np.uint8),
        np.stack([PICTURE, 255 - PICTURE]).transpose(0, 3, 1, 2),
        np.dstack([PICTURE, 255 - PICTURE]),
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_by_their_space(name, shows):
    space, value, seen = PICTURES[name]
    assert np.array_equal(read(shows(space, value, size=SAME), "image"), seen)
    small = read(shows(space, value, size=(5, 6)), "image")
    halved = seen.reshape(5, 2, 6, 2, -1).mean((1, 3))
    assert small.dtype == np.uint8 and np.abs(small - halved).max() <= 1


def test_many_channels_are_resized_alike():
    image = RNG.integers(0, 256, (12, 8, 11), np.uint8)
    whole = resize(image, (6, 4))
    assert whole.shape == (6, 4, 11)
    for channel in range(11):
        assert np.array_equal(
            whole[..., channel : channel + 1], resize(image[..., channel], (6, 4))
        )


VECTORS = {  # name -> space, value, numbers
    "small ints": (Box(-3, 9, (2, 2), np.int64), [[-3, 4], [9, 0]], [-3, 4, 9, 0]),
    "uint8 vector": (Box(0, 255, (3,), np.uint8), np.uint8([1, 2, 255]), [1, 2, 255]),
    "unbounded ints": (
        Box(-(2**31), 2**31 - 1, (2,), np.int32),
        np.int32([-7, 70000]),
        [-7, 70000],
    ),
    "categories": (Box(0, 10, (9, 9), np.uint8), np.full((9, 9), 7, np.uint8), [7] * 81),
    "MiniGrid's board": (
        Box(0, 255, (7, 7, 3), np.uint8),
        np.full((7, 7, 3), 7, np.uint8),
        [7] * 147,
    ),
    "depth": (Box(0, np.inf, (9, 9), FLOAT), np.full((9, 9), 1e3), [1e3] * 81),
    "board of -1 to 1": (Box(-1, 1, (9, 9, 2), FLOAT), np.full((9, 9, 2), -0.5), [-0.5] * 162),
    "board of planes": (Box(0, 1, (8, 8, 12), FLOAT), np.ones((8, 8, 12)), [1] * 768),
    "rank 4": (Box(-1, 1, (2, 2, 2, 2), FLOAT), np.ones((2, 2, 2, 2)), [1] * 16),
    "one number": (Box(-1, 1, (), FLOAT), 0.25, [0.25]),
    "bool vector": (Box(0, 1, (2,), np.bool_), [True, False], [1, 0]),
    "a list": (Box(-1, 1, (2,), FLOAT), [0.5, -0.5], [0.5, -0.5]),
    "bits": (MultiBinary((2, 2)), np.int8([[1, 0], [0, 1]]), [1, 0, 0, 1]),
    "choice": (Discrete(3, start=-1), 0, [0, 1, 0]),
    "choice, numpy": (Discrete(3), np.array([2]), [0, 0, 1]),
    "choice, a flag": (Discrete(2), True, [0, 1]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, shows):
    space, value, numbers = VECTORS[name]
    vector = read(shows(space, value), "vector")
    assert vector.dtype == np.float32 and vector.tolist() == numbers


def test_bool_boards_are_grids(shows):
    board = RNG.random((5, 6)) < 0.5
    assert np.array_equal(read(shows(Box(0, 1, (5, 6), np.bool_), board), "grid"), board[..., None])
    planes = RNG.random((5, 6, 2)) < 0.5
    assert np.array_equal(read(shows(Box(0, 1, (5, 6, 2), np.bool_), planes), "grid"), planes)


def test_a_large_array_that_is_no_picture_is_read_with_a_warning(shows):
    with pytest.warns(
        RuntimeWarning, match=r"'vector' is Box\(-1.*read as a vector of 4096 numbers"
    ):
        env = shows(Box(-1, 1, (64, 64), FLOAT), np.zeros((64, 64)))
    assert env.obs_space["vector"].shape == (4096,)


WRONG = {  # name -> space, value, a part of the line
    "floats under uint8": (
        Box(0, 255, (9, 9, 3), np.uint8),
        np.full((9, 9, 3), 0.7),
        "is float64, its space says",
    ),
    "bools under uint8": (
        Box(0, 255, (9, 9, 3), np.uint8),
        np.ones((9, 9, 3), bool),
        "is bool, its space says uint8",
    ),
    "large ints": (
        Box(0, 255, (9, 9, 3), np.uint8),
        np.full((9, 9, 3), 256),
        "values in [256, 256]",
    ),
    "uint8 under [0, 1]": (
        Box(0, 1, (9, 9, 3), FLOAT),
        np.full((9, 9, 3), 9, np.uint8),
        "[9, 9], its space says",
    ),
    "too bright": (
        Box(0, 1, (9, 9, 3), FLOAT),
        np.full((9, 9, 3), 1.1),
        "values in [1.1, 1.1], its space says [0, 1]",
    ),
    "negative": (Box(0, 255, (9, 9, 3), FLOAT), np.full((9, 9, 3), -2.0), "values in [-2.0, -2.0]"),
    "stretched": (
        Box(0, 255, (9, 9, 3), np.uint8),
        np.zeros((9, 8, 3), np.uint8),
        "shape (9, 8, 3), its space says",
    ),
    "other rank": (
        Box(0, 255, (9, 9), np.uint8),
        np.zeros((9, 9, 1), np.uint8),
        "has shape (9, 9, 1)",
    ),
    "vector's shape": (Box(-1, 1, (3,)), np.zeros(4), "has shape (4,), its space says (3,)"),
    "ragged": (Box(-1, 1, (2, 2)), [[1, 2], [3]], "its space says Box"),
    "None": (Box(-1, 1, (2,)), None, "is None, its space says"),
    "text": (Box(-1, 1, (2,)), ["a", "b"], "its space says"),
    "uint8 under bool": (
        Box(0, 1, (4, 4, 2), np.bool_),
        np.ones((4, 4, 2), np.uint8),
        "uint8, its space says bool",
    ),
    "choice too large": (Discrete(3), 3, "is 3, its space says Discrete(3)"),
    "choice below start": (Discrete(3, start=1), 0, "is 0, its space says"),
    "choice of a float": (Discrete(3), 1.0, "is 1.0, its space says"),
    "bits of two": (MultiBinary(2), [2, 0], "its space says MultiBinary(2)"),
    "no dict": (
        Dict(a=Box(-1, 1, (2,))),
        np.zeros(2),
        "must be a dict as its space is, not a ndarray",
    ),
    "key missing": (Dict(a=Box(-1, 1, (2,)), b=Discrete(2)), {"a": np.zeros(2)}, "lacks 'b'"),
    "no tuple": (Tuple([Discrete(2)]), 1, "the observation must be a tuple as its space is, not a"),
    "short tuple": (
        Tuple([Discrete(2)] * 2),
        (1,),
        "must be a tuple as its space is, not 1 values",
    ),
    "no dict inside": (Dict(a=Dict(b=Discrete(2))), {"a": 1}, "observation 'a' must be a dict"),
    "lacks a part": (Dict(a=Dict(b=Discrete(2))), {"a": {}}, "observation 'a' lacks 'b'"),
    "wrong choice": (MultiDiscrete([2, 3]), np.int64([1, 3]), "is [1 3], its space says Multi"),
    "choice below": (MultiDiscrete([2], start=[4]), np.int64([3]), "is [3], its space says Multi"),
    "choice of floats": (MultiDiscrete([2, 3]), np.zeros(2), "its space says MultiDiscrete"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_are_not_of_their_space_are_one_line(name, shows):
    space, value, expected = WRONG[name]
    with pytest.raises(EnvError) as caught:
        shows(space, value).reset()
    line = str(caught.value)
    assert expected in line and "\n" not in line and "gym_Shows-v0" in line
    assert not isinstance(caught.value, BadValue)


def test_a_nan_in_a_picture_is_a_bad_value(shows):
    picture = np.full((9, 9, 3), 0.5)
    picture[3, 3, 1] = np.nan
    space = Box(0, 1, (9, 9, 3), FLOAT)
    with pytest.raises(
        BadValue, match=r"gym_Shows-v0, the reset of an episode: observation 'image'.* is nan"
    ):
        shows(space, picture).reset()
    env = shows(space, np.full((9, 9, 3), 0.5), picture, invalid="truncate")
    first = env.reset()
    with pytest.warns(RuntimeWarning):
        closed = env.step(np.array([1, 0], FLOAT))
    assert closed["is_last"] and np.array_equal(closed["image"], first["image"])


UNREAD = {
    "text": (Text(5), "'vector' is Text("),
    "sequence": (Sequence(Discrete(2)), "'vector' is Sequence("),
    "in a tuple": (Tuple([Sequence(Discrete(2)), Text(3)]), "'0' is Sequence("),
    "nested": (Dict(a=Dict(b=Sequence(Discrete(2)))), "'a/b' is Sequence("),
    "one of several": (
        Dict(image=Box(0, 255, (9, 9, 3), np.uint8), rest=Sequence(Discrete(2))),
        "'rest' is Sequence(",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_spaces_that_are_not_read_say_what_to_do(name, shows):
    space, expected = UNREAD[name]
    with pytest.raises(EnvError) as caught:
        shows(space)
    line = str(caught.value)
    assert expected in line and "\n" not in line and "wrapper (docs/own_environment.md)" in line
    assert ("--env.gym.keys 'image'" in line) == (name == "one of several")


def bits(sizes, indices):
    return np.concatenate([np.eye(n, dtype=FLOAT)[i] for n, i in zip(sizes, indices, strict=True)])


PARTS = {  # name -> space, value, {name: what is seen}
    "tuple": (
        Tuple([Discrete(2), Discrete(3, start=5)]),
        (1, 7),
        {"0": bits([2], [1]), "1": bits([3], [2])},
    ),
    "list for a tuple": (Tuple([Discrete(2)]), [1], {"0": bits([2], [1])}),
    "array for a tuple": (
        Tuple([Discrete(2), Discrete(3)]),
        np.int64([1, 2]),
        {"0": bits([2], [1]), "1": bits([3], [2])},
    ),
    "nested": (
        Dict(a=Dict(b=Discrete(2), c=Tuple([Box(-9, 9, (2,)), Discrete(2)])), d=MultiBinary(2)),
        {"a": {"b": 0, "c": (FLOAT([3, 4]), 1)}, "d": np.int8([1, 0])},
        {"a/b": FLOAT([1, 0]), "a/c/0": FLOAT([3, 4]), "a/c/1": FLOAT([0, 1]), "d": FLOAT([1, 0])},
    ),
    "several choices": (
        MultiDiscrete([2, 3]),
        np.int64([1, 0]),
        {"vector": bits([2, 3], [1, 0])},
    ),
    "several choices of rank 2 from elsewhere": (
        MultiDiscrete([[2, 3], [4, 2]], start=[[0, -1], [7, 0]]),
        np.int64([[0, 1], [9, 1]]),
        {"vector": bits([2, 3, 4, 2], [0, 2, 2, 1])},
    ),
    "one choice from elsewhere": (Discrete(3, start=-1), -1, {"vector": bits([3], [0])}),
    "an empty part": (Dict(a=Tuple([]), b=Discrete(1)), {"a": (), "b": 0}, {"b": FLOAT([1])}),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_an_observation_have_names(name, shows):
    space, value, expected = PARTS[name]
    env = shows(space, value)
    output = env.reset()
    assert set(env.obs_space) == set(expected)
    for key, seen in expected.items():
        assert env.obs_space[key].shape == seen.shape and np.array_equal(output[key], seen)


def test_text_is_left_out_with_one_line(shows):
    space = Dict(image=Box(0, 255, (9, 9, 3), np.uint8), mission=Text(9), said=Tuple([Text(3)]))
    value = {"image": np.zeros((9, 9, 3), np.uint8), "mission": "go", "said": ("a",)}
    with pytest.warns(RuntimeWarning) as caught:
        env = shows(space, value)
    assert set(env.obs_space) == {"image"} == {*env.reset()} & {"image", "mission", "said/0"}
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == 2 and "'mission' is text" in lines[0] and "keys 'image'" in lines[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shows(space, value, gym={"keys": "image"})
    # nor does each environment of a run say it again, nor each evaluation
    config = tools.load_config(["debug"], {"task": "gym_Shows-v0", "env.parallel": False})
    with pytest.warns(RuntimeWarning) as caught:
        for evaluating in (False, True):
            make_envs(config, 3, 0, evaluating=evaluating).close()
    assert len(caught) == 2


def test_two_observations_of_one_name_are_refused(shows):
    with pytest.raises(EnvError, match=r"^two observations are called 'a/b': rename one"):
        shows(Dict({"a/b": Discrete(2), "a": Dict(b=Discrete(2))}))
    with pytest.raises(EnvError, match="keys of a Dict space must be text"):
        shows(Dict({"a": Dict({3: Discrete(2)})}))
    with pytest.raises(EnvError, match=r"is Dict\(\), which has no parts"):
        shows(Dict())


def test_observations_can_be_left_out(shows):
    """So that a text is neither read nor warned of."""
    space = Dict(
        {"image": Box(0, 255, (9, 9, 3), np.uint8), "mission": Text(9), "direction": Discrete(4)}
    )
    value = {"image": np.zeros((9, 9, 3), np.uint8), "mission": "go", "direction": 2}
    env = shows(space, value, gym={"keys": "image|direction"})
    assert set(env.obs_space) == {"image", "direction"} and "mission" not in env.reset()
    for keys, expected in (
        ("image|(", "no regular expression"),
        ("pixels", "no observation matches env.gym.keys 'pixels'"),
    ):
        with pytest.raises(EnvError, match=re.escape(expected)):
            shows(space, value, gym={"keys": keys})


@pytest.mark.parametrize(
    "space",
    [
        Box(-1, 1, (0,)),
        Box(-1, 1, (3, 0)),
        Box(0, 255, (0, 9, 3), np.uint8),
        Box(0, 1, (2, 0), np.bool_),
    ],
)
def test_empty_observations_are_refused(space, shows):
    with pytest.raises(EnvError, match=r"^observation '\w+' is .* empty "):
        shows(space)


@pytest.mark.parametrize(
    "space",
    [Discrete(LARGEST + 1), Box(-1, 1, (LARGEST + 1,)), Box(-1, 1, (2**11, 2**10), np.int64)],
)
def test_observations_that_no_network_takes_are_refused(space, shows):
    with pytest.raises(EnvError, match=rf"of which a vector can have {LARGEST}"):
        shows(space)


@pytest.mark.parametrize("key", [*sorted(RESERVED), "log_x", "carry.deter"])
def test_reserved_names_are_refused(key, shows):
    with pytest.raises(EnvError, match=f"observation '{key}' has a reserved name: rename it"):
        shows(Dict({key: Box(-1, 1, (2,)), "v": Box(-1, 1, (3,))}))


def test_what_episodes_and_updates_hold_is_reserved(tmp_path):
    """The list is right: whatever the loop adds to the observations of a row,
    of a file or of the losses is in it.
    """
    import models
    import tools
    from hidreamer.carries import PREFIX
    from hidreamer.episodes import save_episode
    from hidreamer.objectives import OBJECTIVES
    from hidreamer.replay import STORED

    rows = {
        "x": np.zeros((3, 2), FLOAT),
        "prev_action": np.zeros((3, 2), FLOAT),
        "reward": np.zeros(3, FLOAT),
    }
    rows |= {key: np.zeros(3, bool) for key in ("is_first", "is_last", "is_terminal")}
    save_episode(tmp_path / "x.npz", rows)
    with np.load(tmp_path / "x.npz") as file:
        assert {*file.files, *rows} - {"x"} <= RESERVED
    for kind, options in (("rssm", {}), ("hrvq", {"dynamics.hrvq.posterior": "nearest"})):
        config = tools.load_config(["gym", "debug"], {"dynamics.type": kind} | options)
        agent = models.Agent({"x": Box(-1, 1, (2,))}, Discrete(2), 2, config)
        agent.make_optimizers()
        agent.update(
            agent.tensors({key: value[None] for key, value in rows.items() if key != "is_last"})
        )
        losses = {
            name.removesuffix("_loss") for name in agent.metric_names if name.endswith("_loss")
        }
        assert "x" in losses and losses - {"x"} <= RESERVED
    assert {*OBJECTIVES, "harmony", STORED} - {"decoder"} <= RESERVED and PREFIX in PREFIXES


def one_hots(sizes, indices):
    return np.concatenate([np.eye(n, dtype=FLOAT)[i] for n, i in zip(sizes, indices, strict=True)])


ACTIONS = {  # name -> space, sizes of the choices, indices, the environment's action
    "bits": (MultiBinary(3), [2, 2, 2], [1, 0, 1], np.int8([1, 0, 1])),
    "bits of rank 2": (MultiBinary((2, 2)), [2] * 4, [0, 0, 1, 0], np.int8([[0, 0], [1, 0]])),
    "integers": (
        Box(np.array([-2, 0]), np.array([2, 9]), dtype=np.int64),
        [5, 10],
        [0, 9],
        np.int64([-2, 9]),
    ),
    "bytes": (Box(0, 255, (1,), np.uint8), [256], [255], np.uint8([255])),
    "bools": (Box(0, 1, (2,), np.bool_), [2, 2], [1, 0], np.array([True, False])),
    "tuple": (
        Tuple([Discrete(3, start=4), MultiBinary(2)]),
        [3, 2, 2],
        [2, 1, 0],
        (6, np.int8([1, 0])),
    ),
    "dict": (
        Dict(b=Discrete(2), a=MultiDiscrete([2, 3])),
        [2, 3, 2],
        [1, 2, 0],
        {"a": np.int64([1, 2]), "b": 0},
    ),
    "nested": (
        Dict(a=Tuple([Discrete(2), Dict(b=Discrete(3))])),
        [2, 3],
        [1, 1],
        {"a": (1, {"b": 1})},
    ),
}


def equal(ours, theirs):
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return np.array_equal(ours, theirs) and np.asarray(ours).dtype == np.asarray(theirs).dtype


@pytest.mark.parametrize("name", ACTIONS)
def test_choices_are_flattened(name):
    space, sizes, indices, action = ACTIONS[name]
    if name == "dict":  # Gymnasium keeps the order that it was given or sorts: both are right
        keys = list(space.spaces)
        sizes, indices = ([2, 3, 2], [1, 2, 0]) if keys == ["a", "b"] else ([2, 2, 3], [0, 1, 2])
        action = {key: action[key] for key in keys}
    agent, width, decode = action_codec(space)
    assert isinstance(agent, MultiDiscrete) and agent.nvec.tolist() == sizes and width == sum(sizes)
    chosen = decode(one_hots(sizes, indices))
    assert equal(chosen, action) and space.contains(chosen)
    rng = np.random.default_rng(0)
    assert all(
        space.contains(decode(one_hots(sizes, [rng.integers(n) for n in sizes]))) for _ in range(20)
    )


def test_boxes_in_a_dict_are_one_box():
    space = Dict(a=Box(-2, 2, (2,)), b=Tuple([Box(0, 10, (1, 1)), Box(-np.inf, np.inf, (1,))]))
    agent, width, decode = action_codec(space)
    assert (
        width == 4
        and agent.low.tolist() == [-1, -1, -1, -np.inf]
        and agent.high.tolist() == [1, 1, 1, np.inf]
    )
    action = decode(np.array([1, -1, 0, 7], FLOAT))
    assert action["a"].tolist() == [2, -2] and [x.tolist() for x in action["b"]] == [[[5]], [7]]
    assert space.contains(action)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (Dict(a=Discrete(2), b=Box(-1, 1, (2,))), "all choices or all numbers"),
        (Tuple([Box(-1, 1, (2,)), MultiBinary(2)]), "all choices or all numbers"),
        (Tuple([]), "all choices or all numbers"),
        (Text(3), "is not supported: only Discrete"),
        (Sequence(Discrete(2)), "is not supported: only Discrete"),
        (Dict(a=Text(3)), "is not supported: only Discrete"),
        (Box(-1, 1, (0,)), "is 0 numbers for the agent"),
        (Discrete(10**9), f"1 to {MOST_ACTIONS}"),
        (Box(-(2**63), 2**63 - 1, (2,), np.int64), f"1 to {MOST_ACTIONS}"),
        (Box(np.full((20, 20), -1.0, FLOAT), np.arange(400, dtype=FLOAT).reshape(20, 20)), ""),
    ],
)
def test_actions_that_no_actor_takes_are_one_line(space, expected):
    if not expected:  # its bounds print on many lines
        space = Dict(a=space, b=Discrete(2))
    with pytest.raises(EnvError) as caught:
        action_codec(space)
    line = str(caught.value)
    assert (
        expected in line
        and "\n" not in line
        and len(line) < 500
        and "docs/own_environment.md" in line
    )
