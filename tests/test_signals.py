"""How a command ends: its exit status and its one line."""

import errno
import signal

import pytest

from hidreamer.checkpoint import FolderError
from signals import Stop, guarded
from tools import ConfigError


class Broken(Exception):
    """A failure of the command's own."""


def ending(error):
    def work(signals):
        raise error

    return guarded(work, (Broken,), "; the same command continues", ", or fewer seeds")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ConfigError("no such key"), 2, "error: no such key\n"),
        (FolderError("in use"), 2, "error: in use\n"),
        (Broken("a metric became nan"), 1, "error: a metric became nan\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2, "file/x"),
        (FileExistsError(errno.EEXIST, "File exists", "file"), 2, "file"),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 1, "file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk is full"),
        (MemoryError("8 GiB"), 1, "env.count, or fewer seeds"),
    ],
)
def test_what_stops_a_command_is_one_line(error, status, line, capsys):
    assert ending(error) == status
    out, err = capsys.readouterr()
    assert line in err and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_a_fault_of_the_program_is_shown_whole():
    for error in (RuntimeError("shapes differ"), ValueError("?"), BrokenPipeError()):
        with pytest.raises(type(error)):
            ending(error)


def test_a_signal_is_named(capsys):
    assert ending(Stop(signal.SIGTERM)) == 128 + signal.SIGTERM
    assert capsys.readouterr().out == "stopped by SIGTERM; the same command continues\n"
    assert guarded(lambda signals: 7, (), "") == 7
