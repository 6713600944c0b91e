"""Runs whose replay lies on a disk, loses its files, does not fit,
or deletes what it no longer needs.
"""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small_runs import latest, one_line, records

import dreamer
import forked
from conftest import ROOT
from hidreamer import memory

ARGS = [
    "--configs",
    "debug",
    "--task",
    "dummy_vector",
    "--device",
    "cpu",
    "--eval_episodes",
    "0",
    "--video",
    "false",
]
ARGS += ["--env.count", "2", "--env.action_repeat", "1", "--replay.capacity", "100"]
ARGS += ["--log_every", "20", "--checkpoint_every", "60"]


def run(logdir, *more, steps=400):
    return dreamer.main([*ARGS, "--logdir", str(logdir), "--steps", str(steps), *map(str, more)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in memory that was never killed and keeps its episodes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_store_and_kept_files_may_change_and_change_nothing(store, whole, tmp_path):
    """Killed twice; before and after the rows lie elsewhere,
    and files that have left the replay are deleted.
    """
    expected, folder, killed = records(whole), tmp_path / "run", 0
    assert any("model_loss" in record for record in expected[: len(expected) // 3])
    for part in (0.4, 0.7):
        words = [
            sys.executable,
            str(ROOT / "dreamer.py"),
            *ARGS,
            "--logdir",
            str(folder),
            "--steps",
            "400",
        ]
        words += ["--replay.store", store, "--replay.keep_episodes", "false"]
        process = forked.popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log = folder / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_bytes().splitlines()) > part * len(expected):
                break
            time.sleep(0.002)
        process.kill()
        out = process.communicate(timeout=60)[0]
        assert process.returncode in (0, -signal.SIGKILL), out
        killed += process.returncode == -signal.SIGKILL
        store = {"disk": "memory", "memory": "disk"}[store]
    assert killed, "the run was over before it could be killed"
    assert run(folder, "--replay.store", store, "--replay.keep_episodes", "false") == 0
    assert records(folder) == expected
    kept, all_of_them = (len(list((d / "train_eps").glob("*.npz"))) for d in (folder, whole))
    assert kept < 14 < all_of_them  # the last two checkpoints need 100 rows each, of episodes of 21
    assert not [path for path in folder.rglob("*") if path.name.startswith(("replay-", "tmp"))]


def test_what_does_not_fit_is_one_line_before_anything_is_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda: memory.Capacity(3_900, 3_000))
    assert run(tmp_path / "run") == 2
    one_line(capsys, "replay.capacity", "replay.store disk")
    monkeypatch.setattr(memory, "available_memory", lambda: memory.Capacity(100_000, 2_900))
    assert run(tmp_path / "run", steps=60) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if line.startswith("replay:")]
    assert "60 steps" in line and "replay.capacity" in line


@pytest.mark.parametrize("lost", ["all", "some"])
def test_a_run_that_lost_episodes_says_so_in_one_line_and_refills(lost, finished, capsys):
    folder = finished / "train_eps"
    names = sorted(path.name for path in folder.iterdir())
    for name in names if lost == "all" else names[-8:]:
        (folder / name).unlink()
    if lost == "all":
        folder.rmdir()
    before = len(records(finished))
    assert run(finished, steps=700) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(lines) == 1 and "no such file" in lines[0]
    assert any("model_loss" in record for record in records(finished)[before:])


def test_unfinished_rows_of_another_kind_are_refused(finished, capsys):
    assert run(finished, steps=430) == 0  # in the middle of an episode
    path = finished / "checkpoints" / latest(finished)["running_file"]
    with np.load(path) as file:
        rows = dict(file)
    assert rows
    np.savez_compressed(path, **{key: x[:1] for key, x in rows.items()})
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(finished, steps=700) == 2
    one_line(capsys, path.name, "move")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_imported_episodes_fill_the_replay_up_to_its_capacity(finished, tmp_path, capsys):
    """Whatever the new run's own length, and however wrong the first of them is."""
    first = min((finished / "train_eps").iterdir())
    with np.load(first) as file:
        np.savez_compressed(first, **{key: x for key, x in file.items() if key != "vector"})
    assert run(tmp_path / "new", "--resume", finished, "--replay.capacity", 300, steps=40) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("skipped") for line in lines) == 1 and any(
        "300 steps of replay" in x for x in lines
    )
