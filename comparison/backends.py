"""Three ways to start a job and wait for it: processes of this machine, a Ray cluster, Slurm.

A backend has ``slots``, how many jobs it takes at once, and ``start(job)``, which gives a handle
with ``poll()`` (the exit status, None while it runs) and ``stop(signum)``, or None where the job
is running already. Ray and Slurm need the job's folder on a disk that all nodes share.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from hidreamer import app
from hidreamer.app import ROOT, python_path
from hidreamer.provenance import note_start
from tools import ConfigError

# Slurm's warning goes to all processes of a job; the command must not die of it.
SHIELD = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh"]


class Handle(Protocol):
    """A job that a backend has started."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self, signum: int) -> None:
        """Pass a signal on to it, without waiting."""


class Process:
    """A command on the machine where this object lives; its output is appended to ``log``.

    The log is locked as long as the command runs, so that no two runners ever write to one folder:
    the lock belongs to the command itself and outlives a runner that was killed. Each start is
    noted in ``folder``.
    """

    def __init__(
        self, command: list[str], folder: Path, log: Path, note: dict[str, Any], env: dict[str, str]
    ):
        self.command, self.folder, self.log, self.note, self.env = command, folder, log, note, env
        self.popen: subprocess.Popen | None = None
        self.signals: deque[int] = deque()  # that came and the command has not got yet

    def start(self) -> bool:
        """False if another process holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            note_start(self.folder, self.note | {"environment": self.env})
            log.write(f"$ {shlex.join(self.command)}\n".encode())
            log.flush()
            # The command runs in ROOT: folders of modules are named as seen from here.
            env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()} | self.env
            # A session of its own: Ctrl-C in a terminal must reach the command through us, once.
            command = [*SHIELD, *self.command]
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        self._pass_on()
        return True

    def poll(self) -> int | None:
        return self.popen.poll()

    def stop(self, signum: int) -> None:
        self.signals.append(signum)
        self._pass_on()

    def _pass_on(self) -> None:
        """Each signal once, also one that comes, in another thread, while the command is being
        started.
        """
        while self.popen is not None and self.signals:
            with contextlib.suppress(IndexError):  # the other thread was first
                signum = self.signals.popleft()
                if self.popen.poll() is None:
                    self.popen.send_signal(signum)

    def run(self) -> int:
        """Start, as soon as no other runner runs this, and wait. -> exit status."""
        while not self.start():
            if self.signals:
                return 128 + self.signals[-1]
            time.sleep(1.0)
        return self.popen.wait()

    def __call__(self) -> int:
        """What submitit calls; it cancels with an interrupt."""
        try:
            return self.run()
        except KeyboardInterrupt:
            self.stop(signal.SIGTERM)
            return self.popen.wait() if self.popen else 128 + signal.SIGINT

    def checkpoint(self) -> Any:
        """What submitit calls before a preemption or at the end of its time: the job is queued
        again and continues.
        """
        import submitit

        self.stop(signal.SIGTERM)
        if self.popen is not None:
            self.popen.wait()
        return submitit.helpers.DelayedSubmission(
            Process(self.command, self.folder, self.log, self.note, self.env)
        )


# ---------------------------------------------------------------- this machine


class Local:
    """Jobs share the cores, and the GPUs unless the device is the CPU: ``per_gpu`` on each."""

    def __init__(self, jobs: int, device: str, per_gpu: int):
        cores = len(os.sched_getaffinity(0))
        self.gpus = visible_gpus() if device != "cpu" else []
        on_gpus = len(self.gpus) * per_gpu
        slots = jobs or on_gpus or max(1, cores // 2)
        self.slots = min(slots, on_gpus) if on_gpus else slots
        self.threads = max(1, cores // self.slots)
        self.running: list[tuple[str, Process]] = []

    def start(self, job: Any) -> Process | None:
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        self.running = [(gpu, process) for gpu, process in self.running if process.poll() is None]
        if self.gpus:
            load = Counter(gpu for gpu, _ in self.running)
            env["CUDA_VISIBLE_DEVICES"] = min(self.gpus, key=lambda gpu: load[gpu])
        process = Process(job.command, job.folder, job.log, job.note, env)
        if not process.start():
            return None
        self.running.append((env.get("CUDA_VISIBLE_DEVICES", ""), process))
        return process


def visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(i) for i in range(torch.cuda.device_count())]
        if named is None
        else [x for x in named.split(",") if x]
    )


# ---------------------------------------------------------------- clusters


def extra(name: str, load: Callable[[], Any]) -> Any:
    """An optional package. Raises ConfigError, naming the extra that brings it."""
    try:
        return load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--backend {name} needs its extra: {app.install_line(name)} ({error})"
        ) from None


class Remote:
    """A job elsewhere: ``ready`` is whether it is over, ``result`` gives its status or raises,
    ``stop`` ends it.
    """

    def __init__(
        self,
        ready: Callable[[], bool],
        result: Callable[[], int],
        stop: Callable[[int], Any],
        log: Path,
    ):
        self.ready, self.result, self.stop, self.log = ready, result, stop, log

    def poll(self) -> int | None:
        if not self.ready():
            return None
        try:
            return self.result()
        except Exception as error:  # whatever a cluster makes of a lost node or a cancelled job
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}\n")
            return 1


class Ray:
    """The cluster of RAY_ADDRESS, or one that is running here, or a new one of this machine.

    Each job is an actor with the given resources (``num_cpus``, ``num_gpus``, ``memory``, ...).
    """

    def __init__(self, jobs: int, device: str, per_gpu: int, resources: Mapping[str, Any]):
        self.ray = extra("ray", lambda: __import__("ray"))
        environment = {"env_vars": {"PYTHONPATH": python_path()}}
        quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
        self.ray.init(runtime_env=environment, ignore_reinit_error=True, **quiet)
        self.slots = jobs or sys.maxsize
        gpus = self.ray.cluster_resources().get("GPU", 0) and device != "cpu"
        self.options = {"num_cpus": 1, "num_gpus": 1.0 / per_gpu if gpus else 0} | dict(resources)
        # Two calls at a time: one waits for the run, the other passes a signal on.
        self.actor = self.ray.remote(max_concurrency=2)(Process)

    def start(self, job: Any) -> Remote:
        actor = self.actor.options(**self.options).remote(
            job.command, job.folder, job.log, job.note, {}
        )
        status = actor.run.remote()
        ready = lambda: bool(self.ray.wait([status], timeout=0)[0])
        return Remote(
            ready, lambda: self.ray.get(status), lambda signum: actor.stop.remote(signum), job.log
        )


class Slurm:
    """Jobs of a Slurm cluster through submitit; on a machine without Slurm submitit runs them
    there.

    resources: what submitit's ``update_parameters`` takes (``slurm_partition``, ``timeout_min``,
    ...).
    """

    def __init__(self, jobs: int, device: str, resources: Mapping[str, Any], folder: Path):
        submitit = extra("slurm", lambda: __import__("submitit"))
        self.slots = jobs or sys.maxsize
        self.executor = submitit.AutoExecutor(folder)
        os.environ["PYTHONPATH"] = python_path()
        # submitit's own limit is 5 minutes.
        known = {
            "timeout_min": 24 * 60,
            "gpus_per_node": int(device == "cuda"),
            "name": "hidreamer",
        }
        try:
            self.executor.update_parameters(**known | dict(resources))
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"--resources: {str(error).splitlines()[0]}") from None

    def start(self, job: Any) -> Remote:
        submitted = self.executor.submit(Process(job.command, job.folder, job.log, job.note, {}))
        return Remote(
            submitted.done, submitted.result, lambda signum: submitted.cancel(check=False), job.log
        )
