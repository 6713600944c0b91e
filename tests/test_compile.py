"""An update that cannot be compiled or recorded is done without, as if nothing had been tried."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_agent import EVERYTHING, make

import dreamer
import models
from conftest import ROOT
from hidreamer import capture, evaluation
from hidreamer.dynamics import TYPES

sys.path.insert(0, str(ROOT / "benchmarks"))
from compiled import kernels


def updates(agent, batch, update, count=6):
    torch.manual_seed(1)
    return torch.stack([update(batch).clone() for _ in range(count)])


def break_actor(agent):
    """Compile as usual, as far as anyone can see;
    the actor fails when the world model has had its step already.
    """

    def broken(*args):
        torch.rand(5)
        raise RuntimeError("no compiler\nand many more lines")

    agent.world_model.encoder.forward = agent.world_model.encoder.forward
    agent.behavior.actor.forward = broken


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_after_a_failed_compilation_all_is_as_without(kind):
    settings = {"dynamics.type": kind, "dynamics.hrvq.posterior": "nearest"}
    if kind == "rssm":  # what the model's loss has gathered by then belongs to no step
        settings["optim"] = "joint"
    eager, batch = make(EVERYTHING, **settings)
    agent, _ = make(EVERYTHING, **settings)
    agent.load_state_dict(eager.state_dict())
    fast = capture.FastUpdate(agent, lambda: break_actor(agent), capture=False)
    with pytest.warns(
        RuntimeWarning, match=r"cannot compile .*--compile off.*: no compiler$"
    ) as seen:
        found = updates(agent, batch, fast)
    assert len(seen) == 1
    assert torch.equal(found, updates(eager, batch, eager.update))
    assert all(torch.equal(x, eager.state_dict()[key]) for key, x in agent.state_dict().items())
    assert "forward" not in vars(agent.behavior.actor) and "forward" not in vars(
        agent.world_model.encoder
    )
    assert agent.act(
        agent.initial(2),
        {key: x[:, 0] for key, x in batch.items() if key in (*EVERYTHING, "is_first")},
    )


class FailingCapture:
    """Like ``Captured`` on a CPU, whose recording breaks off after the update ran."""

    def __init__(self, fn, generator):
        self.fn, self.calls = fn, 0

    def __call__(self, batch):
        self.calls += 1
        out = self.fn(batch)
        if self.calls > capture.WARMUP:
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            except RuntimeError:
                raise RuntimeError("something failed before") from None
        return out


def test_after_a_failed_recording_all_is_as_without(monkeypatch):
    monkeypatch.setattr(capture, "Captured", FailingCapture)
    eager, batch = make()
    agent, _ = make()
    agent.load_state_dict(eager.state_dict())
    fast = capture.FastUpdate(agent, lambda: None, capture=True)
    with pytest.warns(
        RuntimeWarning, match=r"cannot record .*without \(slower\).*not permitted when stream"
    ) as seen:
        found = updates(agent, batch, fast)
    assert len(seen) == 1 and torch.equal(found, updates(eager, batch, eager.update))
    assert fast.compiled and not fast.capture


def test_an_error_of_the_update_itself_is_not_hidden():
    agent, batch = make()
    del batch["reward"]
    fast = capture.FastUpdate(agent, lambda: None, capture=False)
    with pytest.warns(RuntimeWarning, match="reward"), pytest.raises(KeyError, match="reward"):
        fast(batch)


class CountingCapture(FailingCapture):
    """Like ``Captured`` on a CPU, where all is well."""

    def __call__(self, batch):
        self.calls += 1
        return self.fn(batch)


def test_without_compilation_the_update_is_still_recorded(monkeypatch):
    monkeypatch.setattr(capture, "Captured", CountingCapture)
    agent, batch = make()
    monkeypatch.setattr(models.Agent, "_compile", None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    lines = []
    fast = agent.make_update("off", report=lines.append)
    monkeypatch.undo()
    assert fast.capture and fast.compile is None and fast(batch).isfinite().all()
    assert fast.run.calls == 1 and not lines
    for compiled in ("off", "auto"):  # on a CPU
        assert agent.make_update(compiled).func == agent.update


def test_compilation_is_announced_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    agent, batch = make()
    lines = []
    fast = capture.FastUpdate(agent, lambda: None, capture=False, report=lines.append)
    with warnings.catch_warnings(record=True) as seen:
        fast(batch), fast(batch)
        warnings.warn("\nOnline softmax is disabled on the fly since ...", stacklevel=1)
        warnings.warn("TensorFloat32 tensor cores for x available but not enabled", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else"]
    assert len(lines) == 1 and "minute" in lines[0]
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir() and folder.is_relative_to(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    capture.prepare_compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    capture.prepare_compiler()  # no such folder can be made
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_works_is_not_copied_again(monkeypatch):
    agent, batch = make()
    fast = capture.FastUpdate(agent, lambda: None, capture=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(batch)
        monkeypatch.setattr(capture, "Snapshot", None)
        fast(batch)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["rssm", "hrvq", pytest.param("hrssm", marks=pytest.mark.slow)])
def test_a_run_compiles_every_piece_it_needs_and_then_no_more(kind, precision, monkeypatch):
    """In the order of a run, which acts first. Past its limit torch would give up a piece."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
    over = {"dynamics.type": kind, "precision": precision, "imag.horizon": 3}
    agent, batch = make(EVERYTHING, batch=4, **over)
    rows = {key: x.numpy() for key, x in batch.items()}

    def act(count, mode):
        state = agent.initial(count)
        for t in range(6):
            obs = {key: batch[key][:count, t] for key in (*EVERYTHING, "is_first")}
            state = agent.act(state, obs, mode)
        agent.decode_state(obs, state)

    def run():
        act(1, "train"), act(3, "train")
        agent.update(batch), agent.update(batch)
        act(3, "greedy")
        evaluation.open_loop(agent, rows, levels=True)
        act(1, "train"), agent.update(batch)

    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
            agent._compile()
            run()
            compiled = len(graphs)
            assert compiled > 15
            run()
            assert len(graphs) == compiled
    finally:
        torch._dynamo.reset()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "precision", "bound"),
    [
        ("rssm", "tf32", 572),
        pytest.param("rssm", "bfloat16", 625, marks=SLOW),
        pytest.param("hrssm", "tf32", 731, marks=SLOW),
        pytest.param("hrvq", "tf32", 1095, marks=SLOW),
    ],
)
def test_few_kernels_are_left_when_parts_are_compiled(kind, precision, bound):
    """Of debug's update, as the compiler plans them; uncompiled rssm's are 1,031 and 1,327."""
    found = kernels(["debug"], precision=precision, **{"dynamics.type": kind})
    assert 0.9 * bound < found["kernels"] <= bound, found


def test_without_a_compiler_a_run_is_one_line_and_the_same(tmp_path, capsys):
    words = [
        "--configs",
        "debug",
        "--task",
        "dummy_vector",
        "--steps",
        "80",
        "--eval_every",
        "40",
        "--video",
        "false",
    ]
    env = {key: x for key, x in os.environ.items() if key != "CXX"}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words += ["--device", "cpu"]
    command = [sys.executable, str(ROOT / "dreamer.py"), *words, "--compile", "on"]
    command += ["--logdir", str(tmp_path / "on")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "C++" in done.stderr
    assert dreamer.main([*words, "--compile", "off", "--logdir", str(tmp_path / "off")]) == 0
    assert capsys.readouterr().err == ""
    found = []
    for compiled in ("on", "off"):
        lines = [
            json.loads(line)
            for line in (tmp_path / compiled / "metrics.jsonl").read_text().splitlines()
        ]
        found.append(
            [{key: x for key, x in line.items() if not key.startswith("perf/")} for line in lines]
        )
    assert found[0] == found[1] and any("model_loss" in line for line in found[0])
