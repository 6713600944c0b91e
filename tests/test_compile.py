"""An update that cannot be compiled or recorded is done without, as if nothing had been tried."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from test_agent import EVERYTHING, make

from conftest import ROOT
from hidreamer import capture
from hidreamer.dynamics import TYPES


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
    eager, batch = make(EVERYTHING, **{"dynamics.type": kind, "dynamics.hrvq.posterior": "nearest"})
    agent, _ = make(EVERYTHING, **{"dynamics.type": kind, "dynamics.hrvq.posterior": "nearest"})
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
        RuntimeWarning, match=r"cannot record .*--compile off.*not permitted when stream"
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


def test_what_works_is_not_copied_again(monkeypatch):
    agent, batch = make()
    fast = capture.FastUpdate(agent, lambda: None, capture=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(batch)
        monkeypatch.setattr(capture, "Snapshot", None)
        fast(batch)


def test_without_a_compiler_a_run_is_one_line_and_the_same(tmp_path):
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
    for compiled in ("on", "off"):
        command = [
            sys.executable,
            str(ROOT / "dreamer.py"),
            *words,
            "--device",
            "cpu",
            "--compile",
            compiled,
        ]
        command += ["--logdir", str(tmp_path / compiled)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == (compiled == "on") and ("C++" in done.stderr) == (
            compiled == "on"
        )
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
