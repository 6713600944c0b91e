"""hidreamer.load: the door from any folder, and folders that hold no agent."""

import json
import subprocess
import sys

import pytest
from small_runs import latest

import hidreamer
from analysis import loading as analysis
from comparison import runs
from conftest import ROOT
from envs import EnvError
from hidreamer.checkpoint import FolderError, load_checkpoint, save_checkpoint
from library import source
from tools import ConfigError


def python(folder, script):
    """Run it there, with this project on the path behind that folder."""
    words = [sys.executable, "-c", script]
    done = subprocess.run(
        words, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_door_works_from_anywhere(trained, tmp_path):
    script = f"""
import sys, hidreamer
assert "models" not in sys.modules and "library" not in sys.modules  # until it is asked for
assert "load" in dir(hidreamer)
agent = hidreamer.load({str(trained("hrssm", "grid"))!r})
print(type(agent).__name__, agent.facts["task"], agent.facts["step"])
try:
    hidreamer.lode
except AttributeError as error:
    print(error)
"""
    assert python(tmp_path, script) == [
        "LoadedAgent dummy_grid 120",
        "module 'hidreamer' has no attribute 'lode'",
    ]


def test_modules_of_the_user_stay_the_users(trained, tmp_path):
    """``tools`` and ``envs`` are common names: what a user has under them is left alone, whether it
    is imported before or after an agent is loaded, and does the agent no harm.
    """
    for name in ("tools", "models", "envs", "library"):
        (tmp_path / f"{name}.py").write_text(f"name = 'my {name}'")
    script = f"""
import sys
import tools
path = list(sys.path)
import gymnasium, hidreamer
agent = hidreamer.load({str(trained("hrvq", "multi"))!r})
latents = agent.encode(agent.collect(seed=0))
agent.decode(agent.dream(latents), levels=True)
env = gymnasium.make("hidreamer/Dream-v0", logdir=agent)
assert type(env.unwrapped) is hidreamer.DreamEnv
env.step(env.reset(seed=0) and env.action_space.sample())
hidreamer.export(agent.folder, "out")
for error, act in ((hidreamer.ConfigError, dict(device="x")), (hidreamer.FolderError, {{}})):
    try:
        hidreamer.load("nowhere" if not act else "out", **act)
    except error as found:
        print(found)
import envs, models, library
print(tools.name, envs.name, models.name, library.name, sys.path == path)
"""
    assert python(tmp_path, script) == [
        "device is 'x'; it can be auto, cpu, cuda",
        "there is no folder nowhere: name that of a run or of an export",
        "my tools my envs my models my library True",
    ]


def test_facts(trained):
    folder = trained("rssm", "image")
    facts = hidreamer.load(folder).facts
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    returns = [line["eval_return"] for line in logged if "eval_return" in line]
    assert (facts["task"], facts["seed"], facts["step"]) == ("dummy_image", 0, 120)
    assert facts["scores"]["eval_return"] == returns[-1] and facts["commit"]


def one_line(error, *says):
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in says), error


def test_folders_without_an_agent_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "latest.pt").write_text("")
    for path, says in (
        (tmp_path, "holds no agent"),
        (tmp_path / "x", "there is no folder"),
        (tmp_path / "file", "is a file: name the folder"),
        (tmp_path / "runs", f"such as {tmp_path / 'runs' / 'a'}"),
        (tmp_path / "runs" / "a" / "checkpoints", f"such as {tmp_path / 'runs' / 'a'}"),
        (None, "a folder is needed, not NoneType"),
        (3, "not int"),
        ("", "not ''"),
    ):
        with pytest.raises(FolderError) as error:
            hidreamer.load(path)
        one_line(error, says)


def test_another_version_is_one_line(tiny):
    config = tiny / "config.yaml"
    text = config.read_text()
    config.write_text(text + "\nfuture: 3\n")
    with pytest.raises(ConfigError) as error:
        hidreamer.load(tiny)
    one_line(error, "config.yaml is of another version", "'future'")
    config.write_text(text.replace("deter: 16", "deter: 18"))
    with pytest.raises(ConfigError) as error:
        hidreamer.load(tiny)
    one_line(error, "the weights in", "of another config than", "is (", "here and (")
    config.write_text(text.replace("task: dummy_vector", "task: dummy_vektor"))
    with pytest.raises(EnvError) as error:
        hidreamer.load(tiny)
    one_line(error, "dummy_vektor".removeprefix("dummy_"), "nearest")
    config.write_text("[1")
    with pytest.raises(ConfigError) as error:
        hidreamer.load(tiny)
    one_line(error, "is no config of a run")


def test_a_damaged_checkpoint_is_passed_over(tiny):
    latest_path = tiny / "checkpoints" / "latest.pt"
    before = latest(tiny)["step"]
    latest_path.write_bytes(latest_path.read_bytes()[:-300])
    says = r"latest\.pt is damaged.*; reading .*previous\.pt"
    with pytest.warns(RuntimeWarning, match=says) as said:
        step = hidreamer.load(tiny).facts["step"]
    assert step < before and f"at step {step} instead" in str(said[0].message)
    (found,) = runs.find([tiny])
    with pytest.warns(RuntimeWarning, match=says):
        analysis.load(found)
    (tiny / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(FolderError) as error:
        hidreamer.load(tiny)
    one_line(error, "latest.pt")


def test_a_checkpoint_of_something_else_is_one_line(tiny):
    path = tiny / "checkpoints" / "latest.pt"
    state = load_checkpoint(path)
    for agent, says in (({}, "no parameters"), ({"params": {"x": 3}}, "of another version")):
        save_checkpoint(path, state | {"agent": agent})
        (tiny / "checkpoints" / "previous.pt").unlink()
        with pytest.raises((FolderError, ConfigError)) as error:
            hidreamer.load(tiny)
        one_line(error, says)


def test_a_device_that_is_not_there(trained):
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        hidreamer.load(trained("rssm", "image"), device="tpu")


def test_the_commit_is_the_last_one(tmp_path):
    (tmp_path / source.STARTS).write_text('{"commit": "a"}\n{"commit": "b"}\n{}\n')
    assert source.last_commit(tmp_path) == "b"
