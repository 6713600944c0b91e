"""One environment behind a pair of calls, `send` and `answer`: in this process or in one of its
own.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

# The module `signal` makes enums of all that passes, which takes longer than a step of a small
# game.
from _signal import getsignal as get_handler
from _signal import signal as set_handler
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from envs.base import ActionError, Env, EnvError

SLICE = 0.5  # seconds between two looks at whether to go on waiting
PATIENCE = 5.0  # seconds for environments to close
LONGEST = 500  # characters of an environment's own message
# A plain child, not multiprocessing's: that one would import the parent's main module, and torch
# with it.
WORKER = "import sys; fd, *sys.path = sys.argv[1:]; from envs.worker import serve; serve(int(fd))"
# Waits until the parent is gone, then ends the worker's process group, itself included. A process
# of its own, because the worker may hang by then in code that lets no thread of it run.
WATCHDOG = "read -r line; kill -KILL 0"


class Crash(Exception):
    """An environment raised, did not answer in time, or its process died. The message is the
    cause, in one line.

    error: (name of the exception's type, file:line), or None where nothing was raised. trace: its
    traceback.
    """

    error: tuple[str, str] | None = None
    trace: str = ""


class Shutdown:
    """Whether the program is to end: then nobody waits for an environment until `env.timeout`."""

    began, seconds = math.inf, math.inf  # as of `time.monotonic`

    @classmethod
    def begin(cls, seconds: float) -> None:
        """Give every call at most so many seconds, and one that runs now so many more."""
        cls.began, cls.seconds = time.monotonic(), seconds
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        if left > seconds and _Signals.timing:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    @classmethod
    def end(cls) -> None:
        cls.began = cls.seconds = math.inf

    @classmethod
    def deadline(cls, sent: float) -> float:
        """Of a call that was sent at ``sent``."""
        return max(cls.began, sent) + cls.seconds


class InProcess:
    """An environment in this process. Calls are sent, then answered; the first answer is that of
    its construction.

    A call that takes longer than `timeout` seconds (0: any time) is interrupted if this is the
    main thread and the call runs Python code. Code in C and other threads cannot be interrupted:
    where they may hang, use a process.
    """

    def __init__(
        self, make: Callable[[int, int], Env], index: int, restart: int, timeout: float = 0.0
    ):
        self._env: Env | None = None
        self._timeout = timeout
        self._task = lambda: self._build(make, index, restart)

    def send(self, method: str, *args: Any) -> None:
        self._task = lambda: getattr(self._env, method)(*args)

    def answer(self) -> Any:
        """The value, or the exception, never raised: EnvError and ActionError as they are, all
        others as a Crash.

        Also KeyboardInterrupt and SystemExit are an environment's own, unless the user did press
        Ctrl-C.
        """
        return _call(self._task, self._timeout)

    def disconnect(self) -> None:
        pass

    def close(self, deadline: float) -> None:
        """Ends the environment; gives up when `time.monotonic()` reaches `deadline`."""
        # a broken environment may not close either: its answer does not matter
        if self._env is not None:
            _call(self._env.close, max(deadline - time.monotonic(), 0.1))

    def _build(self, make: Callable[[int, int], Env], index: int, restart: int) -> tuple:
        env = self._env = make(index, restart)
        summary = getattr(getattr(env, "suite", None), "summary", None)
        return env.obs_space, env.act_space, env.act_dim, env.log_keys, env.repeat, summary


class Subprocess:
    """The same in a process of its own, at the other end of a pipe. A call that takes too long
    ends the process.
    """

    def __init__(self, make: bytes, index: int, restart: int, timeout: float = 0.0):
        self._timeout = timeout
        self._late = False
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
            # out of reach of the terminal's Ctrl-C, and one group with all it starts
            start_new_session=True,
        )
        theirs.close()
        self.send(make, index, restart)

    def send(self, *message: Any) -> None:
        self._sent = time.monotonic()
        with contextlib.suppress(OSError):  # it is dead, which `answer` reports
            self._pipe.send(message)

    def answer(self) -> Any:
        try:
            while (left := self._left()) > 0.0:
                if self._pipe.poll(min(left, SLICE)):
                    return self._pipe.recv()
            if self._pipe.poll():  # it was in time while others were waited for
                return self._pipe.recv()
        except (EOFError, OSError):
            return Crash(
                _late(self._timeout) if self._late else f"its process {self._exit_reason()}"
            )
        except Exception as error:  # what was sent cannot be unpickled here
            return _crash(error)
        self._late = True
        self._kill()
        return Crash(_late(self._timeout))

    def _left(self) -> float:
        deadline = self._sent + (self._timeout or math.inf)
        return min(deadline, Shutdown.deadline(self._sent)) - time.monotonic()

    def disconnect(self) -> None:
        self._pipe.close()  # for the worker this is the end

    def close(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0.0))
        self._kill()
        self._process.wait()
        self._process.stdin.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # also what it started: Doom is a process of its own
            os.killpg(self._process.pid, signal.SIGKILL)

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(PATIENCE)
            return (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
        return "closed its pipe"


def serve(fd: int) -> None:
    """The worker: answers calls from the pipe `fd` until the parent hangs up or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    # a child of the environment must not hold the pipe open when we die
    os.set_inheritable(fd, False)
    subprocess.Popen(
        ["/bin/sh", "-c", WATCHDOG], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # the watchdog alone waits for the end of our standard input
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pipe = Connection(fd)
    with contextlib.suppress(EOFError, OSError):
        make, index, restart = pipe.recv()
        host = InProcess(lambda *numbers: cloudpickle.loads(make)(*numbers), index, restart)
        try:
            while True:
                answer = host.answer()
                try:
                    pipe.send(answer)
                except OSError:
                    raise
                except Exception as error:  # what cannot be pickled
                    pipe.send(_crash(error))
                host.send(*pipe.recv())
        finally:
            host.close(time.monotonic() + PATIENCE)


def close(workers: list[InProcess | Subprocess]) -> None:
    """Ends all of them, within about PATIENCE seconds together."""
    for worker in workers:
        worker.disconnect()
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        worker.close(deadline)


def _call(task: Callable[[], Any], seconds: float) -> Any:
    """The value of `task`, or its exception as `InProcess.answer` describes it."""
    signals = _Signals(seconds)
    try:
        signals.install()
        try:
            value = task()
        finally:
            signals.running = False
    except (EnvError, ActionError) as error:
        value = error
    except (
        Exception,
        KeyboardInterrupt,
        SystemExit,
        GeneratorExit,
        _TimeUp,
    ) as error:  # others end the program, not a call
        value = Crash(_late(seconds)) if signals.late else _crash(error)
    finally:
        signals.restore()
    if signals.pressed:
        raise KeyboardInterrupt
    return value


class _TimeUp(BaseException):
    """No Exception: an environment that tries for ever to reach a server catches those."""


class _Signals:
    """Signal handlers for the time of one call in the main thread: a time limit, and whether the
    user interrupted.

    Whoever has a handler of its own for SIGINT, as a run has, gets no KeyboardInterrupt from the
    user: then all are the environment's. An alarm that somebody else has set waits until the call
    is over.
    """

    timing = False  # whether the alarm is that of a call

    def __init__(self, seconds: float):
        self.late = self.pressed = self.running = False
        self._seconds = seconds
        self._began = 0.0
        self._changed: list[tuple[int, Any]] = []
        # somebody else's: seconds left, and between repetitions
        self._alarm: tuple[float, float] | None = None

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            if get_handler(signal.SIGINT) is signal.default_int_handler:
                self._set(signal.SIGINT, self._press)
            # None: set by C, it could not be restored
            if self._seconds and get_handler(signal.SIGALRM) is not None:
                self._began = time.monotonic()
                self._alarm = signal.setitimer(signal.ITIMER_REAL, 0)
                self._set(signal.SIGALRM, self._expire)
                signal.setitimer(signal.ITIMER_REAL, self._seconds)
                _Signals.timing = True
        self.running = True

    def restore(self) -> None:
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _Signals.timing = False
        for signum, handler in self._changed:
            set_handler(signum, handler)
        if self._alarm is not None and self._alarm[0]:
            left = self._alarm[0] - (time.monotonic() - self._began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), self._alarm[1])

    def _set(self, signum: int, handler: Callable) -> None:
        self._changed.append((signum, set_handler(signum, handler)))

    def _press(self, *_: Any) -> None:
        self.pressed = True
        if self.running:
            raise KeyboardInterrupt

    def _expire(self, *_: Any) -> None:
        if self.running:
            self.late = True
            raise _TimeUp


def _late(seconds: float) -> str:
    if Shutdown.seconds < (seconds or math.inf):
        return f"no answer within {Shutdown.seconds:g} s of the signal to end"
    return f"no answer within {seconds:g} s (env.timeout)"


def _crash(error: BaseException) -> Crash:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}:{place.lineno}"
    text = " ".join(str(error).split())[:LONGEST]
    crash = Crash(f"{type(error).__name__}{': ' if text else ''}{text} ({where})")
    crash.error = (type(error).__name__, where)
    crash.trace = "".join(traceback.format_exception(error))
    crash.__cause__ = error
    return crash
