"""The demo: what it ends with, and what it says where nothing was learned."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest

import demo
import tools
from hidreamer import app

DEBUG = ["--configs", "debug", "--task", "minatar_breakout", "--steps", "60", "--eval_every", "60"]
DEBUG += ["--eval_episodes", "4", "--env.count", "4", "--env.action_repeat", "1"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """-> a demo's folder, and what it printed."""
    logdir = tmp_path_factory.mktemp("demo") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert demo.main([*DEBUG, "--logdir", str(logdir)]) == 0
    return logdir, out.getvalue()


def test_it_ends_with_numbers_pictures_and_three_commands(shown):
    import imageio.v3 as iio

    logdir, out = shown
    found = json.loads((logdir / "demo.json").read_text())
    assert len(found["returns"]) == len(found["random_returns"]) == 4
    mean = sum(found["returns"]) / 4
    assert re.search(rf"return now: +{mean:.2f} points an episode", out)
    assert "random play:" in out and "minatar_breakout after 6" in out
    paths = [Path(path) for path in re.findall(rf"{logdir}\S+\.(?:mp4|png)", out)]
    names = {path.name.split("-")[-1] for path in paths}
    assert {"beside_random.mp4", "open_loop.mp4", "learning_curve.png", "agent.mp4"} <= names
    assert all(path.stat().st_size > 500 for path in paths)
    film = iio.imread(logdir / "videos" / "beside_random.mp4", plugin="pyav")
    assert film.shape[:2] == (demo.FILM, 160 + demo.CAPTION) and film.shape[2] == 2 * 160 + 8
    after = out.split("next:")[1].splitlines()[1:]
    first = re.search(r"first, in each terminal: \. (.+)", out)
    assert bool(first) == bool(app.activation())
    assert len(after) == 3 and all("python" in line and "#" in line for line in after)
    # The same command again trains nothing, and shows the same.
    assert demo.main([*DEBUG, "--logdir", str(logdir)]) == 0
    assert json.loads((logdir / "demo.json").read_text())["returns"] == found["returns"]


def test_a_demo_without_arguments_is_breakout_in_its_own_folder():
    words, logdir = demo.arguments([])
    args = tools.parse(words)
    assert args.presets == ["demo"] and logdir == Path("runs/demo")
    assert tools.load_config(args.presets, args.overrides).task == "minatar_breakout"
    words, logdir = demo.arguments(["--configs", "demo_atari", "tiny_dreamerv3", "--steps", "9"])
    assert logdir == Path("runs/demo_atari")
    config = tools.load_config(tools.parse(words).presets, tools.parse(words).overrides)
    assert (config.task, config.steps) == ("atari_pong", 9)


@pytest.mark.parametrize(
    ("now", "random", "says"),
    [
        ([3.0, 4.0, 5.0, 4.0], [0.0, 1.0, 0.0, 1.0], "8.0 times the return of random play"),
        ([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], "not better than random play"),
        ([-10.0, -11.0, -12.0], [-21.0, -20.0, -21.0], "9.67 points better than random play"),
        ([3.0], [0.0], "3.00 points better than random play"),
    ],
)
def test_the_verdict(now, random, says):
    lines = demo.verdict(now, random)
    assert says in lines[-1] and lines[0].startswith("return now:")


@pytest.mark.parametrize(
    "words", [["--resume", "x"], ["--capacity", "debug"], ["stray"], ["--seeds", "2"]]
)
def test_wrong_arguments_are_one_line(words, capsys):
    assert demo.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_help(capsys):
    assert demo.main(["--help"]) == 0
    assert "python demo.py" in capsys.readouterr().out


def test_without_matplotlib_everything_else_is_there(shown, tmp_path, capsys, monkeypatch):
    def missing(*args):
        raise ImportError("matplotlib")

    monkeypatch.setattr(demo, "draw_curve", missing)
    logdir = shutil.copytree(shown[0], tmp_path / "run")
    assert demo.main([*DEBUG, "--logdir", str(logdir)]) == 0
    out = capsys.readouterr().out
    assert "no learning curve without matplotlib: pip install -e '.[compare]'" in out
    assert "beside_random.mp4" in out


def test_what_makes_python_this_one(tmp_path, monkeypatch):
    """After ``make demo`` nothing is activated, and "python" may be another one, or none."""
    script = tmp_path / "an env" / "bin" / "activate"
    script.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "an env"))
    assert app.activation() == ""  # no virtual environment
    script.touch()
    monkeypatch.setenv("PATH", "")
    assert app.activation() == f". '{script}'"
    monkeypatch.chdir(tmp_path)
    assert app.activation() == ". 'an env/bin/activate'"
    python = script.with_name("python")
    python.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert app.activation() == ""
