"""Python commands as copies of this process, which has loaded torch and read the presets: that
takes a new one five seconds. Signals, output and exit statuses are those of any process; tests of
how Python starts or ends do without this.
"""

import contextlib
import os
import runpy
import stat
import subprocess
import sys
import traceback
import warnings

Popen = subprocess.Popen  # which a test may replace by ``popen``
threads = []  # names what began some
QUIET = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning


def popen(command, *, env=None, **keys):
    """Like subprocess.Popen, which it is for all but [..., python, SCRIPT or -m or -c, ...], and
    where threads have begun that do not go with a copy: Ray's, or another device's autograd.
    """
    if sys.executable not in command or "ray" in sys.modules or threads:
        return Popen(command, env=env, **keys)
    import torch._dynamo  # noqa: F401 - as every optimizer does, in two seconds

    words = command[command.index(sys.executable) + 1 :]
    become_it = lambda: become(words, os.environ if env is None else env)
    return Popen(command, preexec_fn=become_it, **keys)


def run(command, timeout=120, **keys):
    """Like subprocess.run, of which it captures the output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with popen(command, **pipes, **keys) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def close_ours():
    """Close pipes, of which Popen waits for one, and files, with their locks. The rest belongs to
    libraries, which fail without it: udev's sockets under pygame abort the process that closes.
    """
    for fd in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the listing's own, which has ended
            if fd > 2 and stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFIFO, stat.S_IFREG):
                os.close(fd)


def become(words, env):
    """Run a Python command line in this process, which ends with it."""
    close_ours()
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
    for key in os.environ.keys() - env.keys():
        del os.environ[key]
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    subprocess.Popen = Popen
    warnings.resetwarnings()
    for category in QUIET:  # as Python starts
        warnings.simplefilter("ignore", category)
    status = 1
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
