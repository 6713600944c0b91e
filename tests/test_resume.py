"""A run that was killed goes on exactly as one that was not: the same metrics, bit for bit."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_runs import records

import dreamer
import forked
from conftest import ROOT
from hidreamer import checkpoint
from hidreamer.checkpoint import CheckpointError

DEBUG = [
    "--log_every",
    "25",
    "--eval_every",
    "100000",
    "--eval_episodes",
    "0",
    "--checkpoint_every",
    "60",
]
# What each environment needs to be quick here, and its number of steps.
RUNS = {
    "minatar": (["--configs", "minatar", "debug", "--env.count", "2", *DEBUG], 300),
    "tokens": (
        [
            "--configs",
            "minatar",
            "debug",
            "--dynamics.type",
            "hrvq",
            "--dynamics.hrvq.posterior",
            "nearest",
            *DEBUG,
        ],
        120,
    ),
    "classic": (
        [
            *("--configs", "gym", "debug", "--env.count", "2", "--env.parallel", "true", *DEBUG),
            *("--replay.online", "true", "--replay.write_back", "true"),
        ],
        300,
    ),
    "atari": (["--configs", "atari100k", "debug", "--env.atari.sticky", "0.25", *DEBUG], 800),
}


def arguments(kind, logdir, *extra, steps=None):
    args, usual = RUNS[kind]
    return [*args, "--steps", str(steps or usual), "--logdir", str(logdir), *extra]


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(kind, logdir, *extra, steps=None):
    """Nobody kills this one: in this process, which has loaded torch already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = dreamer.main(arguments(kind, logdir, *extra, steps=steps))
    return Ended(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "whole"
            result = run(kind, made[kind])
            assert result.returncode == 0, result.stderr
        return made[kind]

    return make


def kill_when(kind, logdir, ready, signum=signal.SIGKILL, start=forked.popen):
    """Start the run and send it ``signum`` once ``ready()``. -> its exit status and output."""
    command = [sys.executable, str(ROOT / "dreamer.py"), *arguments(kind, logdir)]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signum)
    out = process.communicate(timeout=60)[0]
    return process.returncode, out


def length(logdir):
    path = logdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    "kind",
    ["tokens", "classic", *(pytest.param(x, marks=pytest.mark.slow) for x in ("atari", "minatar"))],
)
def test_killed_runs_go_on_exactly(kind, whole, tmp_path):
    expected = records(whole(kind))
    assert any("model_loss" in record for record in expected[len(expected) // 2 :])
    killed = 0
    for part in (0.35, 0.7):
        status, out = kill_when(
            kind,
            tmp_path / "run",
            lambda part=part: length(tmp_path / "run") > part * len(expected),
        )
        assert status in (0, -signal.SIGKILL), out
        killed += status == -signal.SIGKILL
    assert killed, "the run was over before it could be killed"
    result = run(kind, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "run") == expected
    ours, theirs = (
        sorted(p.name for p in (d / "train_eps").iterdir()) for d in (tmp_path / "run", whole(kind))
    )
    assert ours == theirs
    a, b = (
        torch.load(d / "checkpoints" / "latest.pt", weights_only=True)
        for d in (tmp_path / "run", whole(kind))
    )
    assert all(torch.equal(x, b["agent"]["params"][key]) for key, x in a["agent"]["params"].items())


def test_another_seed_logs_something_else(whole, tmp_path):
    """The comparison above would notice a difference."""
    result = run("minatar", tmp_path / "run", "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "run") != records(whole("minatar"))


@pytest.mark.parametrize(
    ("signum", "start"), [(signal.SIGTERM, subprocess.Popen), (signal.SIGINT, forked.popen)]
)
def test_a_signal_saves_first(signum, start, whole, tmp_path):
    expected = records(whole("minatar"))
    half = lambda: length(tmp_path / "run") > len(expected) / 2
    status, out = kill_when("minatar", tmp_path / "run", half, signum, start)
    assert status == 128 + signum, out
    assert "Traceback" not in out and signal.Signals(signum).name in out
    state = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert state["step"] > 60 and str(state["step"]) in out
    assert run("minatar", tmp_path / "run").returncode == 0
    assert records(tmp_path / "run") == expected


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run, to be continued for longer."""
    shutil.copytree(whole("minatar"), tmp_path / "run")
    return tmp_path / "run"


def longer(logdir, *extra):
    return run("minatar", logdir, *extra, steps=420)


@pytest.fixture(scope="module")
def expected_longer(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(whole("minatar"), folder)
    assert longer(folder).returncode == 0
    assert records(folder)[-1]["step"] > records(whole("minatar"))[-1]["step"]
    return records(folder)


def test_a_damaged_checkpoint_falls_back_to_the_previous(finished, expected_longer):
    latest = finished / "checkpoints" / "latest.pt"
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 0xFF  # one flipped byte, in the middle of the weights
    latest.write_bytes(data)
    result = longer(finished)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert (
        "latest.pt" in result.stdout
        and "continuing from" in result.stdout
        and "previous.pt" in result.stdout
    )
    assert records(finished) == expected_longer


def test_two_damaged_checkpoints_are_one_line(finished):
    for name in ("latest.pt", "previous.pt"):
        (finished / "checkpoints" / name).write_bytes(b"PK\x03\x04 nonsense")
    result = longer(finished)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "move" in result.stderr


def test_a_damaged_episode_is_skipped(finished):
    victim = sorted((finished / "train_eps").glob("*.npz"))[3]
    victim.write_bytes(victim.read_bytes()[:50])
    result = longer(finished)
    assert result.returncode == 0 and victim.name in result.stdout


def test_another_config_is_refused_and_nothing_is_lost(finished):
    before = (finished / "checkpoints" / "latest.pt").read_bytes()
    result = longer(finished, "--actor.lr", "1")
    assert result.returncode == 2 and "actor.lr" in result.stderr and result.stderr.count("\n") == 1
    assert (finished / "checkpoints" / "latest.pt").read_bytes() == before


def test_another_versions_weights_are_refused_in_one_line(finished):
    """The same config, but a checkpoint that lacks a part which this code has."""
    path = finished / "checkpoints" / "latest.pt"
    state = torch.load(path, weights_only=True)
    del state["agent"]["params"]["world_model.reward.out.bias"]
    torch.save(state, path)
    result = longer(finished)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "another version" in result.stderr and "world_model.reward.out.bias" in result.stderr


def test_a_finished_run_stays_as_it_is(finished):
    before = records(finished)
    result = run("minatar", finished)
    assert result.returncode == 0 and records(finished) == before


@pytest.mark.parametrize("name", ["checkpoints/latest.pt.tmp", "config.yaml.tmp"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(finished, name):
    """/dev/full answers every write with "no space left on device"."""
    before = (finished / "checkpoints" / "latest.pt").read_bytes()
    (finished / name).unlink(missing_ok=True)
    (finished / name).symlink_to("/dev/full")
    result = longer(finished)
    assert (
        result.returncode == 1
        and "disk is full" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert (finished / "checkpoints" / "latest.pt").read_bytes() == before
    assert not list((finished / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("looked_at_once", [True, False])
def test_a_nan_names_itself(finished, looked_at_once, monkeypatch, capsys):
    """Also where nobody looks until the NaN has spread from the reward head
    to every other metric.
    """
    path = finished / "checkpoints" / "latest.pt"
    state = torch.load(path, weights_only=True)
    state["agent"]["params"]["world_model.reward.out.bias"][0] = float("nan")
    torch.save(state, path)
    before = path.read_bytes()
    monkeypatch.setattr(dreamer.Screen, "due", lambda self: looked_at_once)
    assert dreamer.main(arguments("minatar", finished, steps=600)) == 1
    error = capsys.readouterr().err
    assert (
        "reward_loss" in error
        and "step" in error
        and "latest.pt" in error
        and error.count("\n") == 1
    )
    assert path.read_bytes() == before


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_checkpoint_never_executes_code(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = finished / "checkpoints" / "latest.pt"
    torch.save({"config": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"latest\.pt"):
        checkpoint.load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_writes_are_atomic(tmp_path):
    """A crash while writing leaves the old file, and the previous one is kept on success."""
    path = tmp_path / "latest.pt"
    checkpoint.save_checkpoint(path, {"x": np.arange(3)})
    checkpoint.save_checkpoint(path, {"x": np.arange(4)})
    assert checkpoint.load_checkpoint(tmp_path / "previous.pt")["x"].tolist() == [0, 1, 2]

    def crash(file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_file(path, crash)
    assert checkpoint.load_checkpoint(path)["x"].tolist() == [0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.pt", "previous.pt"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_the_checkpoint_before_is_kept_where_there_are_no_hard_links(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "latest.pt"
    for size in (3, 4, 5):
        checkpoint.save_checkpoint(path, {"x": np.arange(size)})
    sizes = {
        name: len(checkpoint.load_checkpoint(tmp_path / name)["x"]) for name in os.listdir(tmp_path)
    }
    assert sizes == {"latest.pt": 5, "previous.pt": 4}
