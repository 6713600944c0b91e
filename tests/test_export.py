"""An agent as a folder for a model hub: what is in it, what damage does to it, a hub's layout."""

import json
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small_runs import short

import hidreamer
from conftest import ROOT
from hidreamer.checkpoint import FolderError
from library import source
from tools import ConfigError

CASES = [("rssm", "image"), ("hrssm", "grid"), ("hrvq", "multi"), ("rssm", "continuous")]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return hidreamer.export(trained("hrvq", "vector"), tmp_path_factory.mktemp("out") / "agent")


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of an export, to change."""
    (tmp_path / "copy").mkdir()
    for path in exported.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def refused(folder):
    """The one line that loading raises."""
    with pytest.raises((FolderError, ConfigError)) as error:
        hidreamer.load(folder)
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400, text
    return text


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_export_is_the_agent(case, trained, tmp_path):
    """Also without the environment, whose spaces it holds."""
    folder = trained(*case)
    out = hidreamer.export(folder, tmp_path / "agent")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "config.yaml", "model.safetensors"]
    )
    run, again = hidreamer.load(folder), hidreamer.load(out)
    params = again.model.state_dict()
    assert params.keys() == run.model.state_dict().keys()
    assert all(torch.equal(x, params[name]) for name, x in run.model.state_dict().items())
    assert (again.obs_space, again.action_space) == (run.obs_space, run.action_space)
    assert again.facts == run.facts and again.config.task == f"dummy_{case[1]}"
    assert again.recorded() == []
    twice = hidreamer.export(out, tmp_path / "again")
    assert (twice / "README.md").read_text() == (out / "README.md").read_text()
    assert hidreamer.export(folder, out) == out  # in its place


def test_no_environment_is_built_of_an_export(copy, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("an environment was built")

    monkeypatch.setattr(source, "env_for_spaces", never)
    hidreamer.load(copy)


def test_the_card(exported, trained):
    text = (exported / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    facts = YAML(typ="safe").load(front)
    assert facts["license"] == "mit" and facts["library_name"] == "hidreamer"
    assert "dummy_vector" in facts["tags"] and "hrvq" in facts["tags"]
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"]["type"] == "dummy_vector"
    agent = hidreamer.load(trained("hrvq", "vector"))
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == agent.facts["scores"]
    for fact in ("| environment frames | 120 |", "| seed | 0 |", agent.facts["commit"], "| MIT |"):
        assert fact in body
    assert str(exported.parent) not in text + (exported / "config.yaml").read_text()


def test_what_is_no_folder_or_no_export_is_one_line(trained, tmp_path):
    run = trained("hrvq", "multi")
    (tmp_path / "file").write_text("")
    for act, says in (
        (lambda: hidreamer.export(run, tmp_path / "file"), "is a file: name a folder"),
        (lambda: hidreamer.export(run, None), "a folder is needed, not NoneType"),
        (lambda: hidreamer.export(run, "/proc/agent"), "cannot be written .*: name another folder"),
        (lambda: hidreamer.push(run, "ORG/NAME"), "is no export: make one with hidreamer.export"),
        (lambda: hidreamer.push(tmp_path / "x", "ORG/NAME"), "there is no folder"),
        (lambda: hidreamer.push(None, "ORG/NAME"), "a folder is needed, not NoneType"),
    ):
        with pytest.raises(FolderError, match=says) as error:
            act()
        assert "\n" not in str(error.value)


def test_a_name_on_the_hub_is_a_text(exported):
    with pytest.raises(ValueError, match="the name on the hub is None: write ORG/NAME"):
        hidreamer.push(exported, None)


def test_a_folder_of_somebody_else_is_left_alone(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match=r"thesis\.tex and is no export"):
        hidreamer.export(trained("hrvq", "vector"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    save_file({"x": torch.zeros(2)}, tmp_path / source.WEIGHTS, {"format": "pt"})  # another model's
    before = (tmp_path / source.WEIGHTS).read_bytes()
    with pytest.raises(FolderError, match="and is no export"):
        hidreamer.export(trained("hrvq", "vector"), tmp_path)
    assert (tmp_path / source.WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_export_that_fails_leaves_the_one_before_and_can_be_repeated(
    trained, copy, tmp_path, monkeypatch
):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for folder in (copy, tmp_path / "new"):
        with pytest.raises(OSError, match="cannot be written: No space"):
            hidreamer.export(trained("rssm", "image"), folder)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    monkeypatch.undo()
    hidreamer.export(trained("rssm", "image"), tmp_path / "new")
    assert hidreamer.load(tmp_path / "new").config.dynamics.type == "rssm"


def test_a_config_of_another_run_is_refused(copy, exported):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_bytes(text.replace("\n", "\r\n").encode())
    hidreamer.load(copy)  # ends of lines are no difference
    (copy / "config.yaml").write_text(text.replace("seed: ", "seed: 1"))
    assert "not the one that was exported" in refused(copy)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([3, 4], start=[1, 0]),
        spaces.MultiBinary(3),
        spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Dict(a=spaces.Tuple([spaces.Discrete(2), spaces.Box(-1.0, 1.0, (2, 2))])),
        spaces.Dict(steer=spaces.Discrete(3), gas=spaces.Discrete(2)),  # in an order of their own
    ],
    ids=str,
)
def test_spaces_come_back(space):
    again = source.decode_space(json.loads(json.dumps(source.encode_space(space))))
    assert again == space and again.dtype == space.dtype
    assert str(again) == str(space)  # == of Dicts knows no order, which actions have
    with pytest.raises(TypeError, match="Text spaces cannot be exported"):
        source.encode_space(gymnasium.spaces.Text(3))


# ---------------------------------------------------------------- damage


@pytest.mark.slow
def test_random_damage_is_one_line(copy):
    """120 files: bytes changed, cut off, inserted, anywhere. safetensors alone would not notice
    most of them.
    """
    path, rng = copy / "model.safetensors", np.random.default_rng(0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    said = set()
    for i in range(120):
        data = bytearray(whole)
        end = header if i % 2 else len(data)  # half of them in the header
        at = int(rng.integers(end))
        kind = rng.integers(4)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            data[at : at + 16] = rng.bytes(len(data[at : at + 16]))
        if data == whole:
            continue
        path.write_bytes(data)
        said.add(refused(copy).split(": ")[-1][:40])
    assert len(said) > 3  # not all of them for the same reason
    path.write_bytes(whole)
    hidreamer.load(copy)


BIAS = "world_model.reward.out.bias"


def rewritten(folder, change):
    """The weights with ``change(params, metadata)``, signed anew: no accident, another version."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    params = load_file(path)
    change(params, metadata)
    metadata.pop("sha256")
    save_file(params, path, metadata | {"sha256": source.digest(params, metadata)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, m: p.update({BIAS: torch.zeros(3)}), f"{BIAS} is (255,) here and (3,) there"),
        (lambda p, m: [p.pop(name) for name in list(p) if "actor" in name], "nothing there"),
        (lambda p, m: m.update(format="hidreamer 9"), "format 'hidreamer 9', not 'hidreamer 1'"),
        (lambda p, m: m.update(facts="["), "no spaces"),
        (lambda p, m: m.update(action_space='{"Discrete": [9, 0]}'), "another config"),
        (lambda p, m: m.update(action_space='{"Ring": []}'), "there is no space 'Ring'"),
        (lambda p, m: m.update(action_space="[]"), "no spaces"),
    ],
)
def test_weights_of_another_version_are_one_line(change, says, copy):
    rewritten(copy, lambda params, metadata: None)
    hidreamer.load(copy)
    rewritten(copy, change)
    assert says in refused(copy)


def test_a_foreign_safetensors_file_is_one_line(copy):
    save_file({"x": torch.zeros(2)}, copy / "model.safetensors")
    assert "is no export of this program" in refused(copy)
    (copy / "config.yaml").unlink()
    assert "config.yaml" in refused(copy)


# ---------------------------------------------------------------- the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """-> the environment of a process that knows our hub alone, and the hub's folder."""
    pytest.importorskip("huggingface_hub")
    root = tmp_path_factory.mktemp("hub")
    words = [sys.executable, ROOT / "tests" / "hub.py", root]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        port = process.stdout.readline().strip()
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(root.parent / "cache"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        yield env, root
        process.terminate()


def python(env, script):
    words = [sys.executable, "-c", f"import hidreamer\n{script}"]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


def test_push_and_load(hub, exported):
    env, root = hub
    push = f"hidreamer.push({str(exported)!r}, 'hf:me/agent')"
    script = """
for name in ("hf:me/agent", "hf:me/agent@main"):
    agent = hidreamer.load(name)
    print(agent.facts["task"], agent.facts["step"], hidreamer.DreamEnv.__name__)
"""
    done = python(env, push + script)
    assert done.stdout.splitlines() == ["dummy_vector 120 DreamEnv"] * 2, done.stderr
    for path in exported.iterdir():
        assert (root / "me" / "agent" / path.name).read_bytes() == path.read_bytes()
    # what was loaded once is there without the hub, in the hub's own layout
    cached = root.parent / "cache" / "hub" / "models--me--agent" / "snapshots"
    assert len(list(cached.glob("*/model.safetensors"))) == 1
    done = python(env | {"HF_HUB_OFFLINE": "1"}, script)
    assert done.stdout.splitlines() == ["dummy_vector 120 DreamEnv"] * 2, done.stderr


def test_what_the_hub_refuses_is_one_line(hub, exported):
    env, root = hub
    (root / "me" / "poem").mkdir(parents=True)
    (root / "me" / "poem" / "README.md").write_text("roses")
    script = """
def one_line(act, *args):
    try:
        act(*args)
    except Exception as error:
        assert type(error).__name__ == "FolderError", repr(error)
        print(error)

"""
    script += "one_line(hidreamer.load, 'hf:nobody/nothing')\n"
    script += "one_line(hidreamer.load, 'hf:me/poem')\n"
    script += f"one_line(hidreamer.push, {str(exported)!r}, 'me/refused')\n"
    done = python(env, script)
    lines = done.stdout.splitlines()
    assert "hf:nobody/nothing cannot be downloaded" in lines[0], done.stdout + done.stderr
    assert "hf:me/poem holds no model.safetensors" in lines[1]
    assert "me/refused cannot be uploaded: 403" in lines[2] and len(lines) == 3


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hub\]'"):
        hidreamer.load("hf:me/agent")


def test_a_run_that_is_not_finished_can_be_exported(tmp_path):
    assert short(tmp_path / "run", "rssm", "vector") == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "starts.jsonl").write_text('{"commit": "abc"}\n{"comm')
    out = hidreamer.export(tmp_path / "run", tmp_path / "out")
    text = (out / "README.md").read_text()
    assert "| scores | none were logged |" in text and "| commit | abc |" in text
