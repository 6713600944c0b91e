"""The folder of a run: one process in it, nothing overwritten,
and whatever is no checkpoint is one line.
"""

import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from small_runs import TINY, latest, one_line, records, run

import dreamer
import training
from conftest import ROOT
from hidreamer import checkpoint


def test_recorded_episodes_without_a_checkpoint_are_kept(tiny, capsys):
    shutil.rmtree(tiny / "checkpoints")
    before = {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    for _ in range(2):
        assert run(tiny, "--steps", 10) == 2
        one_line(capsys, "train_eps", "metrics.jsonl", "--logdir", "checkpoints")
    assert {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()} == before
    (tiny / "metrics.jsonl").unlink()
    assert run(tiny, "--steps", 10) == 2
    count = len(list((tiny / "train_eps").glob("*.npz")))
    one_line(capsys, f"{count} episode")
    assert len(list((tiny / "train_eps").glob("*.npz"))) == count


def test_a_run_that_starts_from_another_and_is_killed_goes_on(tiny, tmp_path, monkeypatch):
    """Killed while it copies the other's episodes: nothing is refused, nothing is there twice."""
    args = ["--steps", 60, "--resume", tiny]
    assert run(tmp_path / "whole", *args) == 0
    original = training.Episodes.load

    def crash(self, replay, paths):
        original(self, replay, paths[:2])
        raise ZeroDivisionError

    monkeypatch.setattr(training.Episodes, "load", crash)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "new", *args)
    assert list((tmp_path / "new" / "train_eps").glob("*.npz"))
    monkeypatch.undo()
    assert run(tmp_path / "new", *args) == 0
    assert records(tmp_path / "new") == records(tmp_path / "whole")
    ours, theirs = (
        sorted(p.name for p in (tmp_path / d / "train_eps").iterdir()) for d in ("new", "whole")
    )
    assert ours == theirs


def test_a_second_process_is_refused(tmp_path, capsys):
    with checkpoint.locked(tmp_path / "run"):
        assert run(tmp_path / "run", "--steps", 10) == 2
        one_line(capsys, "in use", str(os.getpid()), "--logdir")
    assert not (tmp_path / "run").exists()  # it was made for nothing
    assert run(tmp_path / "run", "--steps", 10) == 0
    assert not (tmp_path / "run" / "lock").exists()


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path; from hidreamer.checkpoint import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(checkpoint.FolderError, match=f"process {process.pid} on "):
            checkpoint.locked(tmp_path / "run").__enter__()
        process.kill()
    with checkpoint.locked(tmp_path / "run"):
        pass


def test_a_locked_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Its holder ended between opening and locking: the next process would open another file."""
    flock, once = checkpoint.fcntl.flock, []

    def race(file, how):
        if not once:
            once.append((tmp_path / "lock").unlink())
        return flock(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "flock", race)
    with (
        checkpoint.locked(tmp_path),
        pytest.raises(checkpoint.FolderError),
        checkpoint.locked(tmp_path),
    ):
        pass


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match="without locks"), checkpoint.locked(tmp_path):
        pass


def test_folders_that_cannot_be_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for logdir in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        "/proc/none/such",
        f"{tmp_path}/{'x' * 300}",
    ):
        assert run(logdir, "--steps", 10) == 2
        one_line(capsys, "--logdir", str(logdir))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("method", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_is_one_line(method, tmp_path, capsys, monkeypatch):
    """Planted, since nothing stops root, as whom tests may run."""

    def closed(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(checkpoint.Path, "mkdir", closed) if method == "mkdir" else None
    monkeypatch.setattr(checkpoint, "open", closed, raising=False) if method == "open" else None
    assert run(tmp_path / "run", "--steps", 10) == 2
    one_line(capsys, "Read-only file system", "--logdir")


@pytest.mark.parametrize("name", ["with spaces and 'quotes'", "ünïcode-日本"])
def test_names_of_folders(name, tmp_path, capsys):
    assert run(tmp_path / name, "--steps", 20) == 0
    words = shlex.split(capsys.readouterr().out.split("continue:")[1])
    assert dreamer.main(words[2:]) == 0 and latest(tmp_path / name)["step"] >= 40
    assert dreamer.main(["--resume", str(tmp_path / name), "--steps", "60"]) == 0


def test_a_log_that_lost_its_end_has_a_gap_and_no_nonsense(tiny, capsys):
    log = tiny / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 0
    assert "metrics.jsonl" in capsys.readouterr().out
    assert b"\0" not in log.read_bytes() and records(tiny)[-1]["step"] == 80
    log.unlink()
    assert run(tiny, "--steps", 100, "--checkpoint_every", 45) == 0
    assert records(tiny)[-1]["step"] == 100


def test_half_a_line_of_a_start_spoils_no_other(tmp_path):
    from hidreamer.provenance import note_start

    (tmp_path / "starts.jsonl").write_text('{"a": 1}\n{"b": ')
    note_start(tmp_path, {"c": 2})
    note_start(tmp_path, {"d": 3})
    assert (tmp_path / "starts.jsonl").read_text() == '{"a": 1}\n{"b": \n{"c": 2}\n{"d": 3}\n'


# ---------------------------------------------------------------- checkpoints that are none


def replace(path, value):
    torch.save(value, path)


def half_copied(path):
    (path.parent / torch.load(path, weights_only=True)["running_file"]).unlink(missing_ok=True)


def as_folder(path):
    path.unlink()
    path.mkdir()


def edited(**changes):
    def edit(path):
        state = torch.load(path, weights_only=True)
        for key, value in changes.items():
            state.pop(key, None) if value is None else state.update({key: value})
        torch.save(state, path)

    return edit


FOREIGN = {
    "a state_dict": lambda path: replace(path, torch.nn.Linear(2, 2).state_dict()),
    "a list": lambda path: replace(path, [1, 2]),
    "a tensor": lambda path: replace(path, torch.zeros(3)),
    "code": lambda path: replace(path, {"config": print}),
    "a folder": as_folder,
    "text": lambda path: path.write_text("not a checkpoint"),
    "nothing": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its rows": half_copied,
    "a field less": edited(agent=None),
    "no rows named": edited(running_file=None),
    "a part of another type": edited(config=3),
    "a log's size that is none": edited(log_size="9"),
    "a version that is none": edited(format="x"),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def test_going_back_to_the_previous_checkpoint_is_asked_for(tiny, capsys):
    """Its name alone would be read as the run's, which goes on from the latest."""
    folder = tiny / "checkpoints"
    assert dreamer.main(["--resume", str(folder / "previous.pt"), "--steps", "80"]) == 2
    one_line(capsys, "previous.pt", "latest.pt", "move")
    (folder / "latest.pt").rename(tiny / "away.pt")
    assert dreamer.main(["--resume", str(folder / "previous.pt"), "--steps", "60"]) == 0
    assert "at step 45" in capsys.readouterr().out


def test_a_run_whose_checkpoint_lacks_a_module_does_not_start_it_afresh(tiny, capsys):
    def without_decoder(state):
        names = [name for name in state["params"] if name.startswith("world_model.decoder.")]
        assert names and [state["params"].pop(name) for name in names]
        return state

    path = tiny / "checkpoints" / "latest.pt"
    agent = without_decoder(checkpoint.load_checkpoint(path)["agent"])
    edited(agent=agent)(path)
    assert run(tiny, "--steps", 80) == 2
    one_line(capsys, "of another version", "world_model.decoder", "is not in the checkpoint")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_one_line_of_ours(kind, tiny, capsys):
    folder = tiny / "checkpoints"
    FOREIGN[kind](folder / "latest.pt")
    if kind == "a folder":  # no checkpoint could take its place
        assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 2
        one_line(capsys, "latest.pt", "move")
        return
    assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 0
    assert "continuing from" in capsys.readouterr().out  # the previous one
    assert (
        checkpoint.load_checkpoint(folder / "previous.pt")["step"] >= 45
    )  # and it stays as whole as it was
    for name in ("latest.pt", "previous.pt"):
        FOREIGN[kind](folder / name)
    episodes = sorted((tiny / "train_eps").iterdir())
    assert run(tiny, "--steps", 100, "--checkpoint_every", 45) == 2
    err = one_line(capsys, "latest.pt", "previous.pt", "move")
    assert not any(word in err for word in ("PyTorch", "Weights only", "zip file", "weights_only"))
    assert sorted((tiny / "train_eps").iterdir()) == episodes
    if kind in ("without its rows", "no rows named") or "a part" in kind or "a log's" in kind:
        return  # weights can be had from these
    assert (
        dreamer.main(["--resume", str(folder / "latest.pt"), "--logdir", str(tiny / "new"), *TINY])
        == 2
    )
    one_line(capsys, "checkpoint")


def test_a_checkpoint_of_a_newer_version_says_so(tiny, capsys):
    for name in ("latest.pt", "previous.pt"):
        edited(format=checkpoint.FORMAT + 1)(tiny / "checkpoints" / name)
    assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 2
    one_line(capsys, "newer version", "update")


def test_a_checkpoint_whose_parts_are_of_other_kinds_is_one_line(tiny, capsys):
    path = tiny / "checkpoints" / "latest.pt"
    whole = path.read_bytes()
    state = checkpoint.load_checkpoint(path)
    counters, obs, act = state["counters"], state["obs"], state["act"]
    for wrong in (
        {"counters": {}},
        {"counters": counters | {"step": float("nan")}},
        {"counters": counters | {"updates": -5}},
        {"counters": counters | {"pending_updates": "many"}},
        {"log_size": -5},
        {"agent": {"params": 3}},
        {"counters": counters | {"summed": 3}, "metric_names": ["one"]},
        {"act": [1]},
        {"act": [*act[:-1], torch.zeros(3, 3)]},
        {"obs": obs | {"vector": torch.zeros(7, 9)}},
    ):
        edited(**wrong)(path)
        assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 2
        one_line(capsys, "checkpoint" if "agent" not in wrong else "")
        path.write_bytes(whole)
    assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 0


def test_two_checkpoints_of_one_step_share_no_part(tmp_path, capsys):
    """As at the end of a run whose last step is one of ``checkpoint_every``."""
    assert run(tmp_path, "--steps", 40, "--checkpoint_every", 20) == 0
    folder = tmp_path / "checkpoints"
    states = [checkpoint.load_checkpoint(folder / f"{x}.pt") for x in ("latest", "previous")]
    assert [state["step"] for state in states] == [40, 40]
    half_copied(folder / "latest.pt")
    assert run(tmp_path, "--steps", 50, "--checkpoint_every", 20) == 0
    assert "continuing from" in capsys.readouterr().out and latest(tmp_path)["step"] == 50


def test_a_lost_latest_checkpoint_is_told(tiny, capsys):
    (tiny / "checkpoints" / "latest.pt").unlink()
    assert dreamer.main(["--resume", str(tiny), "--steps", "80"]) == 0
    assert "there is no checkpoint" in capsys.readouterr().out and latest(tiny)["step"] == 80


def test_damaged_bytes_are_seen_or_harmless(tiny):
    """Never anything but the state that was saved, or a CheckpointError."""
    rng = np.random.default_rng(0)
    for name in ("latest.pt", "previous.pt"):
        path = tiny / "checkpoints" / name
        data, state = path.read_bytes(), checkpoint.load_checkpoint(path)
        for at in [*rng.integers(len(data), size=30), *range(len(data) - 40, len(data), 4)]:
            for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
                path.write_bytes(damaged)
                try:
                    found = checkpoint.load_checkpoint(path)
                except checkpoint.CheckpointError as error:
                    assert str(path) in str(error) and "\n" not in str(error)
                    continue
                assert found.keys() == state.keys() and found["counters"] == state["counters"]
                params = state["agent"]["params"]
                assert all(
                    torch.equal(x, params[key]) for key, x in found["agent"]["params"].items()
                )
        path.write_bytes(data)


CONFIGS = {
    "an unknown key": (lambda tree: tree | {"acotr": {"lr": 1}}, "acotr.lr"),
    "a wrong type": (lambda tree: tree | {"steps": "soon"}, "steps"),
    "a key that is a group": (lambda tree: tree | {"env": 3}, "env"),
    "nothing where a number is": (lambda tree: tree | {"steps": None}, "steps"),
    "a list": (lambda tree: [1, 2], "no keys"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_edited_by_hand_is_one_line(kind, tiny, capsys):
    change, hint = CONFIGS[kind]
    path = tiny / "config.yaml"
    with open(path, encoding="utf-8") as file:
        tree = YAML(typ="safe").load(file)
    with open(path, "w", encoding="utf-8") as file:
        YAML().dump(change(tree), file)
    assert dreamer.main(["--resume", str(tiny)]) == 2
    one_line(capsys, str(path), hint, "--configs")


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00\x01", b"a: [1", b"", b"\x00", b"&a {b: *a}", b"text"]
)
def test_a_config_that_is_none_is_one_line(data, tiny, capsys):
    (tiny / "config.yaml").write_bytes(data)
    assert dreamer.main(["--resume", str(tiny)]) == 2
    one_line(capsys, "config.yaml", "--configs")
