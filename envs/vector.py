"""Many environments stepped together, in this process or in one process each, with the same
results.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from envs.base import Env, EnvError, plain
from envs.worker import Crash, InProcess, Subprocess, close

# Crashes of one environment until we give up, without a whole episode or GOOD_STEPS of one between.
CRASHES = 5
GOOD_STEPS = 1000


class Envs:
    """`count` environments of one kind, made by `make(index, restart_number)`.

    obs_space, act_space, act_dim, log_keys, repeat: as of one `Env`. restarts: how many were
    replaced so far.
    With `parallel`, `make` is pickled by cloudpickle and each environment lives in a process of
    its own.

    An environment crashes when it raises, when its process dies, and when it does not answer
    within `timeout` seconds (0: it may take any time; `InProcess` says what cannot be interrupted
    without a process). It is then replaced by `make(index, its number of restarts so far)`, with a
    RuntimeWarning. Its episode is closed as truncated: for this step it returns its previous
    observation, reward 0. The traceback of each new error is appended to `error_log`.
    `crashed` (count,) says for which environments that was so in the last step.
    Raises EnvError where an environment cannot be built, and where it would crash for ever: without
    a whole episode or 1,000 steps in between, twice in a row with the same error at the same line
    and step of its episode, or 5 times with whatever.
    """

    def __init__(
        self,
        make: Callable[[int, int], Env],
        count: int,
        parallel: bool,
        timeout: float = 0.0,
        error_log: Path | None = None,
    ):
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        self.count = count
        self.restarts = 0
        self.crashed = np.zeros(count, bool)
        self._timeout, self._error_log = timeout, error_log
        self._start = Subprocess if parallel else InProcess
        self._make = cloudpickle.dumps(make) if parallel else make
        self._replaced = [0] * count
        self._ages = [0] * count  # steps of the episodes that they are in
        self._crashes = [0] * count  # since the last whole episode
        # that of the last crash since then, and the age at which it came
        self._errors: list[tuple[tuple[str, str], int] | None] = [None] * count
        self._logged: set[tuple[str, str]] = set()
        # the last of each; None: not started
        self._outputs: list[dict[str, Any] | None] = [None] * count
        self._resets: list[bool] = []  # which are reset in the step that was begun
        self._workers: list[InProcess | Subprocess] = []
        # also at the interpreter's exit
        self._finalizer = weakref.finalize(self, close, self._workers)
        try:
            for index in range(count):
                self._workers.append(self._start(self._make, index, 0, timeout))
            for index, born in enumerate([worker.answer() for worker in self._workers]):
                if isinstance(born, Crash):
                    raise EnvError(
                        f"environment {index} cannot be built: {born}{self._log(index, born)}"
                    ) from born
                if isinstance(born, Exception):
                    raise born
        except BaseException:
            self.close()
            raise
        self.obs_space, self.act_space, self.act_dim, self.log_keys, self.repeat, self._summary = (
            born
        )

    def step(self, action: np.ndarray | None) -> dict[str, np.ndarray]:
        """Steps all; an environment that has not started or was at is_last is reset instead, its
        action ignored.

        action: float32 (count, A); None only where all are to be reset, as at the first call.
        -> the keys of `Env.step`, each stacked to (count, ...).
        Raises ValueError for an invalid action; environments with a valid one may have taken their
        step by then.
        """
        self.send(action)
        return self.receive()

    def send(self, action: np.ndarray | None) -> None:
        """Begin a `step`, which `receive` ends: other environments may be stepped in between."""
        resets = [output is None or bool(output["is_last"]) for output in self._outputs]
        if action is None and not all(resets):
            raise ValueError("an action is needed: environments are in mid-episode")
        if action is not None and np.shape(action) != (self.count, self.act_dim):
            raise ValueError(
                f"actions have shape {(self.count, self.act_dim)}, not {np.shape(action)}"
            )
        for index, worker in enumerate(self._workers):
            worker.send("reset") if resets[index] else worker.send("step", action[index])
        self._resets = resets

    def receive(self) -> dict[str, np.ndarray]:
        """What `step` returns, of the step that `send` began."""
        resets = self._resets
        # All replies before any is examined: none may stay in its pipe.
        replies = [worker.answer() for worker in self._workers]
        for index, reset in enumerate(resets):
            self._ages[index] = 0 if reset else self._ages[index] + 1
            self.crashed[index] = not reset and isinstance(replies[index], Crash)
        self._outputs = [
            self._settle(index, reply, resets[index]) for index, reply in enumerate(replies)
        ]
        stacked = {}
        for key in self._outputs[0]:
            stacked[key] = np.stack([output[key] for output in self._outputs])
        return stacked

    def state(self) -> list[dict[str, Any] | None]:
        """What `load_state` needs to continue exactly from here; None for an environment that
        cannot save its state.
        """
        for worker in self._workers:
            worker.send("get_state")
        states = []
        for index, reply in enumerate([worker.answer() for worker in self._workers]):
            if isinstance(reply, Exception):  # if its process is dead, the next step replaces it
                warnings.warn(
                    f"environment {index} could not save its state: {reply}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                reply = None
            states.append(
                None if reply is None else {"env": reply, "output": plain(self._outputs[index])}
            )
        return states

    def load_state(self, states: list[dict[str, Any] | None]) -> np.ndarray:
        """-> bool (count,): which environments continue from their state. The others start anew at
        the next step.
        """
        if len(states) != self.count:
            raise ValueError(f"{len(states)} states for {self.count} environments")
        given = [
            (index, worker)
            for index, worker in enumerate(self._workers)
            if states[index] is not None
        ]
        for index, worker in given:
            worker.send("set_state", states[index]["env"])
        self._outputs = [None] * self.count
        restored = np.zeros(self.count, bool)
        for index, reply in [(index, worker.answer()) for index, worker in given]:
            if isinstance(reply, Exception):
                warnings.warn(
                    f"environment {index} could not be restored, and starts anew: {reply}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            self._outputs[index] = plain(states[index]["output"])
            restored[index] = True
        return restored

    def render(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3): environment `index` now. Raises EnvError where it cannot be drawn."""
        self._workers[index].send("render")
        reply = self._workers[index].answer()
        if isinstance(reply, Exception):
            raise (
                reply
                if isinstance(reply, EnvError)
                else EnvError(f"environment {index} cannot be drawn: {reply}")
            )
        return reply

    def summary(self, episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The suite's metrics of several episodes together, such as Crafter's score; most suites
        have none.

        episodes: for each the sums over it of all `log_keys`. -> names without a prefix, and their
        values.
        """
        return self._summary(episodes) if self._summary is not None and episodes else {}

    def close(self) -> None:
        """Ends all environments and their processes. Garbage collection and the interpreter's exit
        do so as well.
        """
        self._finalizer()

    def _settle(self, index: int, reply: Any, reset: bool) -> dict[str, Any]:
        """The output to hand out for this reply to a step or a reset, replacing the environment if
        it crashed.
        """
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
        if reply["is_last"] or self._ages[index] >= GOOD_STEPS:
            self._crashes[index], self._errors[index] = 0, None
        return reply

    def _replace(self, index: int, cause: Exception) -> None:
        while isinstance(cause, Crash):
            self._crashes[index] += 1
            error = None if cause.error is None else (cause.error, self._ages[index])
            why = ""
            if error is not None and error == self._errors[index]:
                why = "fails in the same way as before its restart"
            elif self._crashes[index] == CRASHES:
                why = f"crashed {CRASHES} times without a whole episode"
            self._errors[index] = error
            trace = self._log(index, cause)
            if why:
                raise EnvError(f"environment {index} {why}: {cause}{trace}") from cause
            self.restarts += 1
            self._replaced[index] += 1
            warnings.warn(
                f"environment {index} crashed and is replaced: {cause}",
                RuntimeWarning,
                stacklevel=4,
            )
            close([self._workers[index]])
            self._workers[index] = self._start(
                self._make, index, self._replaced[index], self._timeout
            )
            cause = self._workers[index].answer()
        if isinstance(cause, Exception):
            raise cause

    def _log(self, index: int, crash: Crash) -> str:
        """Keeps the traceback of an error that was not seen before. -> where it is, to end a
        message with.
        """
        if self._error_log is None or crash.error is None:
            return ""
        if crash.error not in self._logged:
            try:
                self._error_log.parent.mkdir(parents=True, exist_ok=True)
                with open(self._error_log, "a", encoding="utf-8") as file:
                    file.write(
                        f"environment {index}, restart {self._replaced[index]}\n{crash.trace}\n"
                    )
            except OSError:  # a full disk is no reason to stop for
                return ""
            self._logged.add(crash.error)
        return f"; traceback: {self._error_log}"
