"""Environments of users: the page in docs runs as it stands,
and the usual mistakes get one line.
"""

import itertools
import os
import re
import sys
import textwrap

import gymnasium
import numpy as np
import pytest
from test_envs import build, one_hot, play

import dreamer
import forked
import tools
from conftest import ROOT
from envs import EnvError, crashes, open_env
from envs.base import RESERVED, picture
from envs.errors import ActionError

PAGE = (ROOT / "docs" / "own_environment.md").read_text()
CATCH, LETTERS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUICK = ["--steps", "60", "--replay.prefill", "30", "--eval_every", "60"]
NAMES = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """-> a function from source to the name of a module that holds it;
    ids registered by it are forgotten.
    """
    before = dict(gymnasium.registry)
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(source):
        name = f"own_environment_{next(NAMES)}"
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    yield write
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def train(folder, *args, path=None):
    command = [
        sys.executable,
        str(ROOT / "dreamer.py"),
        "--configs",
        "gym",
        "debug",
        "--logdir",
        str(folder),
        *args,
    ]
    variables = os.environ | {"PYTHONPATH": str(path)} if path else os.environ
    return forked.run(command, cwd="/", env=variables)


def test_the_example_of_the_page_trains(tmp_path):
    """With videos; then with arguments for the constructor, in processes of its own."""
    assert len(CATCH.splitlines()) <= 40
    (tmp_path / "catch.py").write_text(CATCH)
    done = train(tmp_path / "run", "--task", "gym_catch:Catch-v0", *QUICK, path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "run" / "videos").glob("*-agent.mp4"))
    kwargs = [
        "--env.gym.kwargs",
        "{width: 7, height: 10}",
        "--video",
        "false",
        "--env.count",
        "2",
        "--env.parallel",
        "true",
    ]
    done = train(tmp_path / "wide", "--task", "gym_catch:Catch-v0", *QUICK, *kwargs, path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(next((tmp_path / "wide" / "train_eps").glob("*.npz"))) as file:
        assert file["grid"].shape[1:] == (10, 7, 2)


def test_the_wrapper_of_the_page_makes_text_readable(module):
    env = build(f"gym_{module(LETTERS)}:Letters-v0")
    outputs = play(env, 45)
    assert (
        env.obs_space["vector"].shape == (4,) and sum(output["is_last"] for output in outputs) == 2
    )
    assert 0 < sum(output["reward"] for output in outputs) < 40


def test_the_page_names_what_the_code_refuses():
    names = re.search(r"losses use are refused: `(.*?)`", PAGE, re.DOTALL)[1].split()
    assert set(names) == RESERVED


HEAD = """
    import gymnasium as gym, numpy as np

    class Own(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
        tries = 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}
"""
REGISTER = """
    gym.register("Own-v0", Own, max_episode_steps=LIMIT)
"""


def own(more, limit=9):
    """An environment with some methods replaced; `more` is the body of a subclass."""
    body = textwrap.indent(textwrap.dedent(more), " " * 8)
    return f"{HEAD}\n    class Own(Own):\n{body}\n{REGISTER.replace('LIMIT', str(limit))}"


MISTAKES = {  # name -> body of the class, a part of the line
    "reset of the old API": (
        "def reset(self, *, seed=None, options=None): return np.zeros(2)",
        "reset must return (",
    ),
    "reset that returns a pair": (
        "def reset(self, *, seed=None, options=None): return 0.0, 0.0",
        "not 2 values",
    ),
    "reset without seed": (
        "def reset(self): return np.zeros(2), {}",
        "reset must have the arguments",
    ),
    "reset without options": (
        "def reset(self, seed=None): return np.zeros(2), {}",
        "reset must have the arguments",
    ),
    "step of the old API": (
        "def step(self, action): return np.zeros(2), 1.0, False, {}",
        "step must return (",
    ),
    "step that returns nothing": ("def step(self, action): pass", "step must return"),
    "reward of two": (
        "def step(self, a): return np.zeros(2), np.ones(2), False, False, {}",
        "reward must be one",
    ),
    "reward of None": (
        "def step(self, a): return np.zeros(2), None, False, False, {}",
        "reward must be one number",
    ),
    "terminated by object": (
        "def step(self, a): return np.zeros(2), 1, [], False, {}",
        "terminated must be one",
    ),
    "truncated by text": (
        "def step(self, a): return np.zeros(2), 1, False, 'no', {}",
        "truncated must be one number",
    ),
    "observation of another shape": (
        "def step(self, a): return np.zeros(3), 1, False, False, {}",
        "has shape (3,)",
    ),
}


@pytest.mark.parametrize(
    "limit", [None, 9]
)  # with a limit Gymnasium's own wrapper meets the mistake first
@pytest.mark.parametrize("name", MISTAKES)
def test_usual_mistakes_are_one_line(name, limit, module):
    body, expected = MISTAKES[name]
    env = build(f"gym_{(task := module(own(body, limit)))}:Own-v0")
    with pytest.raises(EnvError) as caught:
        env.reset(), env.step(one_hot(env, 0))
    line = str(caught.value)
    assert (
        expected in line
        and line.startswith(f"gym_{task}:Own-v0: ")
        and "docs/own_environment.md" in line
        and "\n" not in line
    )


def test_a_mistake_ends_a_run_at_once(module, tmp_path, capsys, recwarn):
    """No environment is built anew for what no restart could fix."""
    task = f"gym_{module(own(MISTAKES['step of the old API'][0]))}:Own-v0"
    run = ["--configs", "gym", "debug", "--task", task, "--logdir", str(tmp_path / "run")]
    assert dreamer.main(run) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {task}: step must return") and error.count("\n") == 1
    assert not [warning for warning in recwarn if "replaced" in str(warning.message)]


@pytest.mark.parametrize(
    "reward", ["np.ones(1)", "np.ones((1, 1), 'f')", "np.int64(1)", "True", "np.array(1.0)"]
)
def test_rewards_and_ends_of_numpy_are_taken(reward, module):
    body = (
        f"def step(self, a): return [0.0, 0.0], {reward}, np.array([False]), np.bool_(True), {{}}"
    )
    env = build(f"gym_{module(own(body))}:Own-v0")
    env.reset()
    output = env.step(one_hot(env, 0))
    assert output["reward"] == 1 and output["is_last"] is True and output["is_terminal"] is False


def test_other_exceptions_are_left_to_the_restarts(module):
    """What may go away, a game's server for example, is no mistake of the author's."""
    env = build(f"gym_{module(own('def step(self, a): raise ValueError(*[1, 2])'))}:Own-v0")
    env.reset()
    with pytest.raises(ValueError, match="1, 2"):
        env.step(one_hot(env, 0))


SOURCES = {  # name -> source, options, a part of the line
    "not registered": (HEAD, {}, "unknown Gymnasium id 'Own-v0'"),
    "another version": (own("pass").replace("Own-v0", "Own-v1"), {}, "Please use `Own-v1`"),
    "needs a package": (
        "import no_such_package",
        {},
        "needs the package 'no_such_package': install it",
    ),
    "does not compile": ("def f(:", {}, "cannot be imported: SyntaxError"),
    "fails when imported": ("1 / 0", {}, "cannot be imported: ZeroDivisionError"),
    "no argument": (
        own("def __init__(self, size=3): pass"),
        {"kwargs": "{sise: 5}"},
        "argument 'sise'",
    ),
    "missing argument": (
        own("def __init__(self, size): pass"),
        {},
        "missing 1 required positional argument: 'size'",
    ),
    "no YAML": (
        own("pass"),
        {"kwargs": "{size: 5"},
        "env.gym.kwargs is '{size: 5', which is no YAML",
    ),
    "no mapping": (
        own("pass"),
        {"kwargs": "[5]"},
        "env.gym.kwargs is '[5]'; it must be names and values",
    ),
    "no names": (own("pass"), {"kwargs": "{5: 6}"}, "it must be names and values"),
    "no space": (
        own("observation_space = None"),
        {},
        "must be a space of gymnasium.spaces, not None",
    ),
    "no action space": (
        own("action_space = 2"),
        {},
        "action_space must be a space of gymnasium.spaces, not 2",
    ),
    "no Env": (
        "import gymnasium as gym\ngym.register('Own-v0', lambda **k: 5)",
        {},
        "must inherit from",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_cannot_be_built_is_one_line(name, module):
    source, options, expected = SOURCES[name]
    with pytest.raises(EnvError) as caught:
        build(f"gym_{module(source)}:Own-v0", gym=options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_is_not_there_names_the_path(tmp_path, capsys):
    for name in ("no_such_module", "no_such_package.module"):
        assert (
            dreamer.main(
                [
                    "--configs",
                    "debug",
                    "--task",
                    f"gym_{name}:Own-v0",
                    "--logdir",
                    str(tmp_path / "x"),
                ]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert error.startswith(f"error: there is no module '{name}'") and error.count("\n") == 1
        assert "PYTHONPATH=FOLDER python dreamer.py" in error
    assert not (tmp_path / "x").exists()


def test_a_constructor_that_raises_is_one_line_and_status_2(module, tmp_path, capsys):
    task = f"gym_{module(own('def __init__(self): raise OSError(chr(10).join(dir()))'))}:Own-v0"
    assert (
        dreamer.main(["--configs", "gym", "debug", "--task", task, "--logdir", str(tmp_path / "x")])
        == 2
    )
    error = capsys.readouterr().err
    assert "OSError" in error and "own_environment_" in error and error.count("\n") == 1


def test_kwargs_reach_the_constructor(module):
    source = own("""
        def __init__(self, size=1, names=(), render_mode=None):
            self.got = (size, names, render_mode)
    """)
    task = f"gym_{module(source)}:Own-v0"
    got = lambda kwargs: build(task, gym={"kwargs": kwargs}).suite._env.unwrapped.got
    assert got("") == got("  ") == (1, (), "rgb_array")
    assert (
        got("{size: 5, names: [a, b]}")
        == got('{"size": 5, "names": ["a", "b"]}')
        == (5, ["a", "b"], "rgb_array")
    )
    assert got("render_mode: human_like")[2] == "human_like"
    limited = build(task, gym={"kwargs": "{max_episode_steps: 3}"})
    assert [output["is_last"] for output in play(limited, 5)] == [False, False, False, True, False]


WRAPPED = {  # what is registered -> whether its state can be told
    "CartPoleEnv": True,
    "lambda **k: FrameStackObservation(CartPoleEnv(**k), 4)": False,
    "lambda **k: StickyAction(CartPoleEnv(**k), 0.5)": False,
    "lambda **k: TimeLimit(CartPoleEnv(**k), 5)": False,  # a second clock
}


@pytest.mark.parametrize("entry", WRAPPED)
def test_a_wrapper_that_may_remember_leaves_no_state(entry, module):
    """Else a continued run would go on with the frames of another episode."""
    source = f"""
        import gymnasium
        from gymnasium.envs.classic_control import CartPoleEnv
        from gymnasium.wrappers import FrameStackObservation, StickyAction, TimeLimit
        gymnasium.register("Own-v0", {entry}, max_episode_steps=9)
    """
    env = build(f"gym_{module(source)}:Own-v0")
    play(env, 4)
    assert (env.get_state() is not None) == WRAPPED[entry]


# ---------------------------------------------------------------------------------------- rendering

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
FRAMES = {  # name -> what render returns, the picture
    "RGB": (RGB, RGB),
    "a list": (RGB.tolist(), RGB),
    "RGBA": (np.dstack([RGB, RGB[..., :1]]), RGB),
    "grey": (RGB[..., 0], np.dstack([RGB[..., 0]] * 3)),
    "one channel": (RGB[..., :1], np.dstack([RGB[..., 0]] * 3)),
    "float [0, 1]": (RGB / 255, RGB),
    "float [0, 255]": (RGB.astype(np.float64), RGB),
    "int64": (RGB.astype(np.int64), RGB),
    "bool": (RGB > 99, (RGB > 99) * np.uint8(255)),
}
NO_FRAMES = {
    "None": (None, "a NoneType"),
    "list of frames": ([RGB, RGB], "a list"),
    "text": ("|  |", "a str"),
    "two channels": (RGB[..., :2], "shape (6, 5, 2)"),
    "channels first": (RGB.transpose(2, 0, 1), "shape (3, 6, 5)"),
    "empty": (RGB[:0], "shape (0, 5, 3)"),
    "frames of two sizes": ([RGB, RGB[:3]], "a list"),
    "negative": (RGB - 300.0, "numbers in ["),
    "NaN": (np.full((4, 4, 3), np.nan), "numbers in [nan"),
    "beyond": (RGB * 2.0, "numbers in ["),
}


@pytest.mark.parametrize("name", FRAMES)
def test_renders_become_uint8_rgb(name):
    frame, seen = FRAMES[name]
    image = picture(frame)
    assert image.dtype == np.uint8 and np.array_equal(image, seen)


@pytest.mark.parametrize("name", NO_FRAMES)
def test_what_is_no_picture_is_one_line_that_names_the_way_out(name, module, monkeypatch):
    frame, expected = NO_FRAMES[name]
    env = build(f"gym_{module(own('pass'))}:Own-v0")
    env.reset()
    monkeypatch.setattr(type(env.suite._env.unwrapped), "render", lambda self: frame)
    with pytest.raises(EnvError) as caught:
        env.render()
    line = str(caught.value)
    assert (
        expected in line
        and "cannot be drawn" in line
        and "--video false" in line
        and "\n" not in line
    )


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("no\ndisplay")])
def test_a_render_that_fails_is_one_line(error, module):
    env = build(f"gym_{module(own('def render(self): raise self.fault'))}:Own-v0")
    env.reset()
    env.suite._env.unwrapped.fault = error
    expected = rf"Own-v0 cannot be drawn: {type(error).__name__}.*; --video false does without$"
    with pytest.raises(EnvError, match=expected):
        env.render()


def test_what_an_environment_raises_is_one_line_where_it_is_not_restarted(module):
    """In the library and the analysis there is nothing to go on with (in a run: `envs.vector`)."""
    fails = "def reset(self, *, seed=None, options=None): raise RuntimeError('simulator lost')"
    name = f"gym_{module(own(fails))}:Own-v0"
    env = open_env(name, tools.load_config([], {"task": name}).env.tree(), 0)
    lost = pytest.raises(EnvError, match=r"x failed: RuntimeError simulator lost")
    with lost as caught, crashes("x failed"):
        env.reset()
    assert "\n" not in str(caught.value)
    with pytest.raises(ActionError), crashes("x"):
        raise ActionError("the caller's")
    broken = f"gym_{module(own('def __init__(self): raise RuntimeError(chr(10))'))}:Own-v0"
    with pytest.raises(EnvError, match="cannot be built: RuntimeError"):
        open_env(broken, tools.load_config([], {"task": broken}).env.tree(), 0)
