"""What only a GPU can show; ``benchmarks/gpu_check.py`` runs this file, and measures."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tools
from conftest import ROOT
from hidreamer.dynamics import TYPES
from hidreamer.mask import KINDS

sys.path.insert(0, str(ROOT / "benchmarks"))
import beside
import equality
import gpu_check
import population_clock
import populations

CUDA = torch.device("cuda")
POSTERIORS = [f"hrvq {name}" for name in ("sampled", "nearest", "frozen", "fsq")]
STATES = ["rssm", "hrssm", *POSTERIORS]


def settings(state):
    kind, _, posterior = state.partition(" ")
    more = {"dynamics.hrvq.posterior": posterior} if posterior else {}
    return {"dynamics.type": kind} | more


def test_every_state_is_here():
    assert {settings(state)["dynamics.type"] for state in STATES} == set(TYPES)


@pytest.mark.gpu
@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("act", equality.ACTIONS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("state", STATES)
def test_replays_equal_eager_updates(state, precision, act, explore):
    """Calls 4 to 8 are replays of the graph: they compute what eager updates do."""
    over = settings(state) | {"precision": precision, "act": act}
    over |= {"expl.behavior": "plan2explore"} if explore else {}
    found = equality.replay_equals_eager(CUDA, **over)
    assert len(found["metrics"]) == equality.UPDATES


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("mask", KINDS)
def test_replays_equal_eager_updates_with_every_mask(mask, precision):
    over = {"dynamics.type": "hrvq", "dynamics.hrvq.mask": mask, "precision": precision}
    equality.replay_equals_eager(CUDA, **over)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("ffn", ["level", "moe"])
def test_replays_equal_eager_updates_with_experts(ffn, precision):
    over = {"dynamics.type": "hrvq", "dynamics.hrvq.ffn": ffn, "precision": precision}
    equality.replay_equals_eager(CUDA, **over)


@pytest.mark.gpu
@pytest.mark.parametrize("state", STATES)
def test_compiled_updates_equal_eager_ones(state):
    equality.compiled_equals_eager(CUDA, **settings(state))


KINDS_OF_MEMBERS = {state: settings(state) for state in STATES}
for memory in ("stacked", "gru"):
    KINDS_OF_MEMBERS[f"hrvq {memory}"] = {"dynamics.type": "hrvq", "dynamics.hrvq.memory": memory}


@pytest.mark.gpu
@pytest.mark.parametrize("state", KINDS_OF_MEMBERS)
def test_replays_of_a_population_equal_its_members_alone(state):
    equality.population_equals_alone(CUDA, precision="float32", **KINDS_OF_MEMBERS[state])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_replays_of_a_population_equal_its_eager_updates(kind, precision):
    """Where rounding makes members differ from single runs."""
    over = {"dynamics.type": kind, "precision": precision}
    equality.population_replays_equal_eager(CUDA, **over)


def test_the_comparison_sees_members_that_are_mixed_up(monkeypatch):
    monkeypatch.setattr(equality, "SMALL", {"vector": equality.SMALL["vector"]})
    over = {"dynamics.type": "rssm", "model.lr": 1e-3}
    found = equality.population_equals_alone(torch.device("cpu"), **over)
    assert len(found["member 1, metrics"]) == 6
    equality.population_replays_equal_eager(torch.device("cpu"), **over)
    update = equality.Stack.update
    mixed = lambda self, batch, generator=None: update(self, batch).flip(-1)
    monkeypatch.setattr(equality.Stack, "update", mixed)
    with pytest.raises(equality.Wrong, match="metrics"):
        equality.population_equals_alone(torch.device("cpu"), **over)


def test_the_checks_of_a_population_see_what_is_wrong(monkeypatch):
    monkeypatch.setattr(equality, "SMALL", {"vector": equality.SMALL["vector"]})
    cpu, over = torch.device("cpu"), {"dynamics.type": "rssm"}
    assert "cannot record" in populations.without_graphs(cpu, **over)["line"]
    with monkeypatch.context() as patch, pytest.raises(equality.Wrong, match="difference"):
        patch.setattr(populations.capture.RandomState, "restore", lambda self: None)
        populations.without_graphs(cpu, **over)
    with monkeypatch.context() as patch, pytest.raises(equality.Wrong, match="with 0 lines"):
        patch.setattr(populations.Broken, "__call__", lambda self, batch: self.fn(batch))
        populations.without_graphs(cpu, **over)
    act, calls = populations.Stack.act, []

    def mixed(self, state, obs, mode):
        calls.append(self)
        new = act(self, state, obs, mode)
        return new._replace(action=new.action.flip(0)) if self is calls[0] else new

    monkeypatch.setattr(populations.Stack, "act", mixed)
    with pytest.raises(equality.Wrong, match="difference"):
        populations.recorded_acting(cpu, **over)


def test_minutes_are_extrapolated_from_all_that_a_run_does():
    values = {"steps": 50_000, "eval_every": 10_000, "checkpoint_every": 5_000}
    config = tools.load_config([], values)
    measured = {"frames_per_s": 8_000.0, "save_s": 2.0, "evaluation_s": 1.5, "until_ready_s": 20.0}
    found = population_clock.extrapolated(config, 16, measured)
    assert found["extrapolated_minutes_of_training"] == round(100 / 60, 2)
    assert found["extrapolated_minutes"] == round((20 + 100 + 5 * 16 * 1.5 + 10 * 2) / 60, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_a_resumed_run_draws_what_it_would_have_drawn(kind, device):
    """On CUDA from the generator that graphs draw from, first in calls that precede a recording."""
    equality.resume_equals_going_on(torch.device(device), **{"dynamics.type": kind})


def test_another_state_of_the_generator_is_seen(monkeypatch):
    made = equality.seeded

    def other(agent):
        generator = made(agent)
        ignore = lambda state: None
        return SimpleNamespace(get_state=generator.get_state, set_state=ignore, own=generator)

    monkeypatch.setattr(equality, "seeded", other)
    captured = equality.captured
    monkeypatch.setattr(equality, "captured", lambda agent, seeded: captured(agent, seeded.own))
    with pytest.raises(equality.Wrong):
        equality.resume_equals_going_on(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("check", [equality.log_ndtr, equality.attention])
def test_functions_that_only_cuda_has_so(check):
    check(CUDA)


# ---------------------------------------------------------------- on any machine


class Recorded:
    """Like ``Captured`` on a CPU: from the 4th call on it computes with inputs of its own."""

    def __init__(self, agent, generator, fault=""):
        self.agent, self.generator, self.fault, self.calls = agent, generator, fault, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= 3:
            return self.agent.update(batch, self.generator)
        if self.calls == 4:
            self.inputs = {key: x.clone() for key, x in batch.items()}
        for key, x in batch.items():
            if self.fault != "old inputs":
                self.inputs[key].copy_(x)
        if self.calls > 4 and self.fault == "nothing runs":
            return self.out
        if self.fault == "old weights":
            kept = self.agent.save_state()
            kept = {key: {name: x.clone() for name, x in kept[key].items()} for key in ["params"]}
        self.out = self.agent.update(self.inputs, self.generator)
        if self.fault == "old weights":
            self.agent.load_state_dict(kept["params"])
        if self.fault == "same draws":
            self.generator.manual_seed(2)
        return self.out


@pytest.mark.parametrize("fault", ["", "old inputs", "nothing runs", "old weights", "same draws"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_comparison_sees_replays_that_are_wrong(kind, fault):
    make = functools.partial(
        equality.small_agent, torch.device("cpu"), **{"dynamics.type": kind, "model.lr": 1e-3}
    )
    found = equality.compare(make, functools.partial(Recorded, fault=fault))
    assert max(found.metrics[:3]) == 0.0  # the calls before are ordinary ones
    if fault:
        with pytest.raises(equality.Wrong, match="metrics"):
            found.check()
    else:
        assert max(found.metrics) == 0.0 == found.weights
        assert len(found.check()["metrics"]) == equality.UPDATES


def test_nothing_finite_is_not_equal():
    with pytest.raises(equality.Wrong):
        equality.Difference([0.0, float("nan")], 0.0, "model_loss").check()
    with pytest.raises(equality.Wrong):
        equality.Difference([0.0], float("nan"), "model_loss").check()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_beside_times_a_dream_from_every_replayed_state(device):
    one = beside.ours(tools.load_config(["debug"], {"dynamics.type": "hrvq"}), torch.device(device))
    for _ in range(5):  # on CUDA the first calls only warm up
        metrics, x = one.update(), one.dream()
    assert one.counts["host_reads"] == 0 < one.counts["kernels"] and metrics.isfinite().all()
    assert x.shape[:2] == (2 * 8, one.horizon + 1) and x[:, 1:].std(0).mean() > 0.0


# What the device machine lacks (`GPU_DAY.md`), and the extras that no GPU needs.
ABSENT = (
    "av",
    "pygame",
    "rliable",
    "seaborn",
    "pandas",
    "scipy",
    "matplotlib",
    "jinja2",
    "sklearn",
)
ABSENT += (
    "ray",
    "submitit",
    "wandb",
    "vector_quantize_pytorch",
    "dm_control",
    "crafter",
    "minigrid",
    "popgym",
    "vizdoom",
)
BLOCK = f"""
import functools
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {ABSENT} else find(name, path, target)

PathFinder.find_spec = functools.partial(find_spec)
"""


def without_extras(folder):
    """The environment of a Python that finds none of ABSENT: it reads this file when it starts."""
    (folder / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


FEW = ("copies", "replay = eager, hrvq", "captured bfloat16, tiny_hdreamer", "training")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_items_run_on_a_cpu_without_any_extra(every, tmp_path):
    """Also the whole command and the collection of all tests for GPUs, as on the device machine.
    Of what is compiled, which only traces here, one state each: test_compile.py has the others.
    """
    words = [sys.executable, "benchmarks/gpu_check.py", "--dry", "--out", str(tmp_path / "out")]
    items = gpu_check.items(torch.device("cpu"), tmp_path, True, float)
    names = [item.name for item in items if not item.name.startswith("compiled")]
    names += ["compiled = eager, hrvq", "compiled tf32, tiny_hdreamer"]
    names = names if every else [*FEW, "pytest -m gpu"]
    words += ["--only", *names]
    env = without_extras(tmp_path)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=550)
    errors = tmp_path / "out" / "errors.txt"
    assert done.returncode == 0, errors.read_text() if errors.exists() else done.stderr
    lines = [json.loads(x) for x in (tmp_path / "out" / "lines.jsonl").read_text().splitlines()]
    found = {line["item"]: line for line in lines}
    assert {"machine", *names} <= set(found) and len(lines) == len(found) > (30 if every else 5)
    assert not every or set(found) == {"machine", *names}
    table = done.stdout[done.stdout.rindex("\nmachine ") :]
    assert all(name in table for name in found)
    assert found["training"]["updates_per_s"] > 0
    if every:
        assert found["whole runs of a population"]["P=2 frames_per_s"] > 0
    assert "tests collected" in found["pytest -m gpu"]["last"][0]
    assert all("update_ms" in line for name, line in found.items() if name.startswith("captured"))


def test_all_tests_are_collected_where_the_extras_are_missing(tmp_path):
    """As a lent machine's `pytest -m gpu` does: those that need them are left out."""
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu"]
    env = without_extras(tmp_path)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "tests/test_gpu.py::" in done.stdout, done.stdout[-2000:]


def test_what_fails_is_told_and_the_next_item_begins(tmp_path, capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("no kernel image")

    def wrong(device):
        return equality.checked({"value": 1.0}, 1e-3)

    monkeypatch.setattr(gpu_check, "log_ndtr", broken)
    monkeypatch.setattr(gpu_check, "attention", wrong)
    words = ["--dry", "--out", str(tmp_path), "--only"]
    compiler = torch.compile
    try:
        assert gpu_check.main([*words, "log_ndtr"]) == 1
        assert "no kernel image" in (tmp_path / "errors.txt").read_text()
        assert gpu_check.main([*words, "attention"]) == 1
        assert gpu_check.main([*words, "copies"]) == 0
    finally:
        torch.compile = compiler
    assert not (tmp_path / "errors.txt").exists()  # of the last call
    out = capsys.readouterr().out
    assert '"failed": "RuntimeError: no kernel image"' in out and '"wrong": ' in out


def test_it_stops_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.provenance, "provenance", dict)
    assert gpu_check.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    lines = [json.loads(x) for x in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(lines) > 25 and all(line["skipped"] == "time" for line in lines[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_one_line_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
