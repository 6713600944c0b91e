"""Many environments stepped together, in this process or in one process each, with the same results."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import numpy as np

from envs.base import ActionError, Env, EnvError, plain

CRASHES = 5  # of one environment, without a good step in between, until we give up
PATIENCE = 5.0  # seconds for a worker to close its environment
# A plain child, not multiprocessing's: that one would import the parent's main module, and torch with it.
WORKER = "import sys; fd, *sys.path = sys.argv[1:]; from envs.vector import serve; serve(int(fd))"


class Crash(Exception):
    """An environment raised, or its process died. The message is the cause, in one line."""


class Envs:
    """`count` environments of one kind, made by `make(index, restart_number)`.

    obs_space, act_space, act_dim, log_keys, repeat: as of one `Env`. restarts: how many were replaced so far.
    With `parallel`, `make` is pickled by cloudpickle and each environment lives in a process of its own.

    An environment that raises or whose process dies is replaced by `make(index, its number of restarts so far)`, with a
    RuntimeWarning. Its episode is closed as truncated: for this step it returns its previous observation, reward 0.
    Raises EnvError where an environment cannot be built, or crashes 5 times without a good step in between.
    """

    def __init__(self, make: Callable[[int, int], Env], count: int, parallel: bool):
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        self.count = count
        self.restarts = 0
        self._start = _Outside if parallel else _Inside
        self._make = cloudpickle.dumps(make) if parallel else make
        self._replaced = [0] * count
        self._crashes = [0] * count  # since the last good step
        self._outputs: list[dict[str, Any] | None] = [None] * count  # the last of each; None: not started
        self._workers: list[_Inside | _Outside] = []
        self._finalizer = weakref.finalize(self, _close, self._workers)  # also at the interpreter's exit
        try:
            for index in range(count):
                self._workers.append(self._start(self._make, index, 0))
            for index, born in enumerate([worker.answer() for worker in self._workers]):
                if isinstance(born, Crash):
                    raise EnvError(f"environment {index} cannot be built: {born}") from born
                if isinstance(born, Exception):
                    raise born
        except BaseException:
            self.close()
            raise
        self.obs_space, self.act_space, self.act_dim, self.log_keys, self.repeat = born

    def step(self, action: np.ndarray | None) -> dict[str, np.ndarray]:
        """Steps all; an environment that has not started or was at is_last is reset instead, its action ignored.

        action: float32 (count, A); None only where all are to be reset, as at the first call.
        -> the keys of `Env.step`, each stacked to (count, ...).
        Raises ValueError for an invalid action; environments with a valid one may have taken their step by then.
        """
        resets = [output is None or bool(output["is_last"]) for output in self._outputs]
        if action is None and not all(resets):
            raise ValueError("an action is needed: environments are in mid-episode")
        if action is not None and np.shape(action) != (self.count, self.act_dim):
            raise ValueError(f"actions have shape {(self.count, self.act_dim)}, not {np.shape(action)}")
        for index, worker in enumerate(self._workers):
            worker.send("reset") if resets[index] else worker.send("step", action[index])
        replies = [worker.answer() for worker in self._workers]  # all, before any is judged: none may stay in its pipe
        self._outputs = [self._settle(index, reply, resets[index]) for index, reply in enumerate(replies)]
        return {key: np.stack([output[key] for output in self._outputs]) for key in self._outputs[0]}

    def state(self) -> list[dict[str, Any] | None]:
        """What `load_state` needs to go on exactly from here; None for an environment that cannot tell."""
        for worker in self._workers:
            worker.send("get_state")
        states = []
        for index, reply in enumerate([worker.answer() for worker in self._workers]):
            if isinstance(reply, Exception):  # if its process is dead, the next step replaces it
                warnings.warn(f"environment {index} could not save its state: {reply}", RuntimeWarning, stacklevel=2)
                reply = None
            states.append(None if reply is None else {"env": reply, "output": plain(self._outputs[index])})
        return states

    def load_state(self, states: list[dict[str, Any] | None]) -> np.ndarray:
        """-> bool (count,): which environments go on from their state. The others start anew at the next step."""
        if len(states) != self.count:
            raise ValueError(f"{len(states)} states for {self.count} environments")
        given = [(index, worker) for index, worker in enumerate(self._workers) if states[index] is not None]
        for index, worker in given:
            worker.send("set_state", states[index]["env"])
        self._outputs = [None] * self.count
        restored = np.zeros(self.count, bool)
        for index, reply in [(index, worker.answer()) for index, worker in given]:
            if not isinstance(reply, Exception):
                self._outputs[index] = plain(states[index]["output"])
                restored[index] = True
        return restored

    def render(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3): environment `index` now. Raises EnvError where it cannot be drawn."""
        self._workers[index].send("render")
        reply = self._workers[index].answer()
        if isinstance(reply, Exception):
            raise reply if isinstance(reply, EnvError) else EnvError(f"environment {index} cannot be drawn: {reply}")
        return reply

    def close(self) -> None:
        """Ends all environments and their processes. Garbage collection and the interpreter's exit do so as well."""
        self._finalizer()

    def _settle(self, index: int, reply: Any, reset: bool) -> dict[str, Any]:
        """The output to hand out for this reply to a step or a reset, replacing the environment if it crashed."""
        while isinstance(reply, Crash):
            self._replace(index, reply)
            if not reset:
                nothing = dict.fromkeys((*self.log_keys, "reward"), np.float32(0))
                end = {"is_first": False, "is_last": True, "is_terminal": False}
                return {**self._outputs[index], **nothing, **end}
            self._workers[index].send("reset")
            reply = self._workers[index].answer()
        if isinstance(reply, Exception):
            raise reply
        if not reset:
            self._crashes[index] = 0
        return reply

    def _replace(self, index: int, cause: Exception) -> None:
        while isinstance(cause, Crash):
            self._crashes[index] += 1
            if self._crashes[index] == CRASHES:
                raise EnvError(f"environment {index} crashed {CRASHES} times without a good step: {cause}") from cause
            self.restarts += 1
            self._replaced[index] += 1
            warnings.warn(f"environment {index} crashed and is replaced: {cause}", RuntimeWarning, stacklevel=4)
            _close([self._workers[index]])
            self._workers[index] = self._start(self._make, index, self._replaced[index])
            cause = self._workers[index].answer()
        if isinstance(cause, Exception):
            raise cause


class _Inside:
    """An environment in this process. Calls are sent, then answered; the first answer is that of its construction."""

    def __init__(self, make: Callable[[int, int], Env], index: int, restart: int):
        self._env: Env | None = None
        self._task = lambda: self._build(make, index, restart)

    def send(self, method: str, *args: Any) -> None:
        self._task = lambda: getattr(self._env, method)(*args)

    def answer(self) -> Any:
        """The value, or the exception, never raised: EnvError and ActionError as they are, all others as a Crash."""
        try:
            return self._task()
        except (EnvError, ActionError) as error:
            return error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}:{place.lineno}"
            crash = Crash(f"{type(error).__name__}: {' '.join(str(error).split())} ({where})")
            crash.__cause__ = error
            return crash

    def hang_up(self) -> None:
        pass

    def close(self) -> None:
        if self._env is not None:
            with contextlib.suppress(Exception):  # a broken environment may not close either
                self._env.close()

    def _build(self, make: Callable[[int, int], Env], index: int, restart: int) -> tuple:
        env = self._env = make(index, restart)
        return env.obs_space, env.act_space, env.act_dim, env.log_keys, env.repeat


class _Outside:
    """The same in a process of its own, at the other end of a pipe."""

    def __init__(self, make: bytes, index: int, restart: int):
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C, and one group with all it starts
        )
        theirs.close()
        self.send(make, index, restart)

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead: `answer` will tell
            self._pipe.send(message)

    def answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            return Crash(f"its process {self._fate()}")

    def hang_up(self) -> None:
        self._pipe.close()  # for the worker this is the end

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what it leaves behind: Doom is a process of its own
        self._process.wait()

    def _fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(PATIENCE)
            return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return "closed its pipe"


def serve(fd: int) -> None:
    """The worker: answers calls from the pipe `fd` until the parent hangs up or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.set_inheritable(fd, False)  # a child of the environment must not hold the pipe open when we die
    pipe = Connection(fd)
    with contextlib.suppress(EOFError, OSError):
        make, index, restart = pipe.recv()
        with contextlib.closing(_Inside(lambda *names: cloudpickle.loads(make)(*names), index, restart)) as host:
            while True:
                pipe.send(host.answer())
                host.send(*pipe.recv())


def _close(workers: list[_Inside | _Outside]) -> None:
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.close()
