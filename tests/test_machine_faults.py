"""The machine fails: output that nobody reads, closed streams, files unreadable for now."""

import errno
import io
import os
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from small_runs import one_line, run

import run_state
from hidreamer import app, process
from hidreamer.checkpoint import UnreadError, find_checkpoint, load_checkpoint
from hidreamer.episodes import load_episode
from hidreamer.logger import Screen
from signals import Signals, Stop


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """``app.run`` sets them for a process of its own."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


class Broken(io.StringIO):
    """A stream whose other end is gone."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


# ---------------------------------------------------------------- streams


def test_no_file_takes_the_number_of_a_closed_stream():
    """The line that a signal brings went into metrics.jsonl."""
    kept = os.dup(0)
    os.close(0)
    try:
        app.safe_streams()
        assert os.path.samestat(os.fstat(0), os.stat(os.devnull)) and os.get_inheritable(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_an_encoding_that_lacks_a_letter_ends_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert app.run(lambda argv: print("ünï") or 0) == 0
    assert out.buffer.getvalue() == b"\\xfcn\\xef\n"


def test_a_warning_that_nobody_reads_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    app.plain_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a copy of the log failed", RuntimeWarning, stacklevel=1)


def test_a_terminal_that_is_gone_is_as_a_closed_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EIO))
    screen, left = Screen(10), []
    screen.console.on_broken_pipe = lambda: left.append(setattr(screen.console, "quiet", True))
    screen.line("a line")
    screen.line("another")
    assert len(left) == 1


def test_ctrl_c_is_one_line_of_every_command(capsys):
    def pressed(argv):
        raise KeyboardInterrupt

    assert app.run(pressed) == 130
    assert capsys.readouterr().err == "stopped\n"
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # while modules are loaded
    assert capsys.readouterr().err == "stopped\n"


# ---------------------------------------------------------------- signals


def test_a_closed_terminal_is_a_signal_to_save():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Stop) as stop, Signals() as signals:
            signals.defer()
            for _ in range(2):  # the kernel's and the shell's
                os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
        assert stop.value.signum == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:  # under nohup
            signals.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------- files that may be whole

LACKS = {
    "memory": (MemoryError(), "memory is full"),
    "memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    "files": (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    "rights": (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
}


@pytest.mark.parametrize("kind", LACKS)
def test_a_checkpoint_that_cannot_be_read_for_now_is_not_given_up(kind, made, monkeypatch):
    error, hint = LACKS[kind]
    once = iter([error])

    def load(*args, whole=torch.load, **kwargs):
        for problem in once:
            raise problem
        return whole(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UnreadError, match=f"latest.pt.*{hint}"):
        find_checkpoint(made / "checkpoints", run_state.FIELDS)
    assert find_checkpoint(made / "checkpoints", run_state.FIELDS)[0]["step"] == 60


def test_neither_are_its_rows_nor_an_episode(tiny, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    episode = next((tiny / "train_eps").iterdir())
    before = {path.name: path.read_bytes() for path in (tiny / "checkpoints").iterdir()}
    monkeypatch.setattr(np, "load", load)
    with pytest.raises(OSError, match="Too many open files"):
        load_episode(episode)
    assert run(tiny, "--steps", 80, "--checkpoint_every", 45) == 2
    one_line(capsys, "running-", "Too many open files")
    assert {path.name: path.read_bytes() for path in (tiny / "checkpoints").iterdir()} == before


def test_a_disk_that_fails_is_damage(made, monkeypatch):
    def load(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(Exception, match="Input/output error") as error:
        load_checkpoint(made / "checkpoints" / "latest.pt")
    assert not isinstance(error.value, UnreadError)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOMEM, "in another --logdir"),
        (errno.EFBIG, "a limit"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EACCES, "allow that"),
    ],
)
def test_what_ran_out_names_its_remedy(number, hint):
    assert hint in process.resource(OSError(number, os.strerror(number)))
