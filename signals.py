"""How a command ends: by a signal, or by an error, which becomes one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from envs import EnvError, worker
from hidreamer import process
from hidreamer.checkpoint import FolderError
from tools import ConfigError

# Of a file where a folder belongs, and the reverse: what the user can put right.
WRONG_PLACE = (IsADirectoryError, NotADirectoryError, FileExistsError)
GRACE = 10.0  # seconds that an environment may still take for its step when a signal has come


class Stop(BaseException):
    """A signal asked the program to end. No Exception, like KeyboardInterrupt: nobody may take it
    for a fault.
    """

    def __init__(self, signum: int):
        self.signum = signum


class Signals:
    """SIGTERM, SIGINT and, but for nohup, SIGHUP, in the ``with`` block, raise Stop: at once, or,
    after ``defer``, at the next ``check``.

    When one has come, a second Ctrl-C ends the process on the spot; a second of the others does
    not cut off what the first began.
    """

    def __init__(self):
        self.signum, self.deferred, self.before = 0, False, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            kinds = [signal.SIGTERM, signal.SIGINT]
            kinds += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)
            self.before = {signum: signal.signal(signum, self._on_signal) for signum in kinds}
        return self

    def __exit__(self, *error: Any) -> None:
        worker.Shutdown.end()
        for signum, handler in self.before.items():
            signal.signal(signum, handler or signal.SIG_DFL)

    def defer(self) -> None:
        self.deferred = True
        self.check()

    def check(self) -> None:
        if self.signum:
            raise Stop(self.signum)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.deferred and not self.signum:
            name = signal.Signals(signum).name
            text = f"{name}: ending after the running step; Ctrl-C ends at once\n"
            with contextlib.suppress(OSError):  # not print, which may be what was interrupted
                os.write(1, text.encode())
            worker.Shutdown.begin(GRACE)
        self.signum = signum
        for other in self.before:
            wait = self.deferred and other != signal.SIGINT
            signal.signal(other, signal.SIG_IGN if wait else signal.SIG_DFL)
        if not self.deferred:
            raise Stop(signum)


def guarded(
    work: Callable[[Signals], int],
    failures: tuple[type[Exception], ...],
    stopped: str,
    also: str = "",
) -> int:
    """-> exit status: that of ``work``, or, where something stops it, which becomes one line, 1 for
    ``failures`` and what ran out, 2 for what the user can put right, 128 + signal.

    stopped: what the line of a signal says after its name. also: as of ``process.resource``.
    """
    try:
        with Signals() as signals:
            return work(signals)
    except Stop as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}{stopped}")
        return 128 + stop.signum
    except (ConfigError, FolderError, EnvError) as error:
        status, message = 2, str(error)
    except failures as error:
        status, message = 1, str(error)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        status, message = 2 if isinstance(error, WRONG_PLACE) else 1, process.resource(error, also)
        if not message:
            raise
    print(f"error: {message}", file=sys.stderr)
    return status
