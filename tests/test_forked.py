"""Commands as copies of the process: what they find open, and how they end."""

import os
import signal
import socket
import sys

import pytest

import forked

OPEN = """
import os, sys
for fd in map(int, sys.argv[1:]):
    try:
        os.fstat(fd)
        print("open")
    except OSError:
        print("closed")
"""


def test_a_copy_closes_pipes_and_files_and_leaves_libraries_their_sockets(tmp_path):
    """pygame ends its process where the sockets of its joysticks are gone."""
    ends = os.pipe()
    with socket.socket() as one, open(tmp_path / "lock", "w") as file:
        fds = [*ends, file.fileno(), one.fileno()]
        result = forked.run([sys.executable, "-c", OPEN, *map(str, fds)])
    for end in ends:
        os.close(end)
    assert result.stdout.split() == ["closed"] * 3 + ["open"], result.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_copy_ends_as_a_process_does(code, status):
    result = forked.run([sys.executable, "-c", code])
    assert result.returncode == status and ("ZeroDivision" in result.stderr) == (code == "1 / 0")
