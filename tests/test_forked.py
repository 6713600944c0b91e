"""Commands as copies of the process: what they find open, and how they end."""

import os
import signal
import subprocess
import sys

import pytest

import forked
from conftest import ROOT

CLOSING = """
import os, socket, forked
file, one = open("lock", "w"), socket.socket()
fds = [*os.pipe(), file.fileno(), one.fileno()]
forked.close_ours()
for fd in fds:
    try:
        os.fstat(fd)
        print("open")
    except OSError:
        print("closed")
os._exit(0)
"""


def test_a_copy_closes_pipes_and_files_and_leaves_libraries_their_sockets(tmp_path):
    """pygame ends its process where the sockets of its joysticks are gone. In a process of its own:
    where Ray was loaded before, ``forked`` copies nothing.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-u", "-c", CLOSING]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
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
