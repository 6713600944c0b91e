"""The matrix of jobs: what runs, what is done, what failed. One state machine, whatever starts the
processes.

waiting -> running -> done | waiting again, once -> failed; a signal makes stopped of all that is
not over.
What is done is read from the jobs' own checkpoints, so the same command again continues where the
last one ended.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from comparison.backends import Handle
from comparison.runs import metrics

ATTEMPTS = 2
LINES = 15  # of a failed job's log that are shown
ORDER = ("running", "failed", "stopped", "waiting", "done")
COLOURS = {
    "running": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "waiting": "dim",
    "done": "green",
}


@dataclass
class Job:
    """One process to run to its end. ``unit``: what its steps count, "frames" or "updates"."""

    name: str
    command: list[str]
    folder: Path
    steps: int
    finished: Callable[[], bool]
    note: dict[str, Any]
    unit: str = "frames"
    watched: Path | None = None  # whose log says how far it is, if not ``folder``
    state: str = "waiting"
    attempts: int = 0
    handle: Handle | None = None
    reason: str = ""  # of the last failure
    # step, rate and return that were last logged
    seen: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def look(self) -> None:
        """Read how far the job is."""
        names = {f"perf/{self.unit}_per_s": "rate", "train_return": "return"}
        for record in metrics(self.watched or self.folder, last=65536):
            self.seen["step"] = record["step"]
            # the speed of acting at random does not predict the rest
            training = record.get("perf/updates_per_s", 1.0) > 0.0
            found = {short: record.get(name) for name, short in names.items() if training}
            self.seen |= {short: value for short, value in found.items() if value is not None}

    def left(self) -> float | None:
        """Seconds, at the rate that was last logged."""
        rate = self.seen.get("rate", 0.0)
        return max(0.0, self.steps - self.seen["step"]) / rate if rate else None

    def last_lines(self) -> str:
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-LINES:])


class Matrix:
    """Brings jobs to their ends on a backend, and shows how it goes."""

    def __init__(self, jobs: list[Job], backend: Any, console: Console):
        self.jobs, self.backend, self.console = jobs, backend, console
        self.signals: list[int] = []  # received and not yet passed on
        self.signum = 0  # the last one that was passed on
        self.looked = self.reported = time.monotonic()

    def run(self) -> int:
        """-> the signal that stopped it, or 0."""
        for job in self.jobs:
            job.look()
            if job.finished():
                self._enter(job, "done")
        with self._listening(), self._screen():
            try:
                while any(job.state in ("waiting", "running") for job in self.jobs):
                    self._on_signal()
                    self._collect()
                    self._start()
                    self._look()
                    time.sleep(0.1)
            except BaseException:  # a job that cannot be started, a reader that left
                self._stop()
                raise
        return self.signum

    def _stop(self) -> None:
        """Have no job outlive the matrix: each saves, and ends."""
        left = [job.handle for job in self.jobs if job.state == "running" and job.handle]
        for handle in left:
            handle.stop(signal.SIGTERM)
        while any(handle.poll() is None for handle in left):
            time.sleep(0.1)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP are noted and passed on by the loop."""
        note = lambda signum, frame: self.signals.append(signum)
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not with nohup
            kinds.append(signal.SIGHUP)
        old = {signum: signal.signal(signum, note) for signum in kinds}
        try:
            yield
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)

    def _on_signal(self) -> None:
        while self.signals:
            self.signum = self.signals.pop(0)
            for job in self.jobs:
                if job.state == "running":
                    job.handle.stop(self.signum)
                elif job.state == "waiting":
                    self._enter(job, "stopped")

    def _collect(self) -> None:
        for job in self.jobs:
            status = job.handle.poll() if job.state == "running" else None
            if status is None:
                continue
            job.handle = None
            job.look()
            done = status == 0 and job.finished()
            if done or self.signum:
                self._enter(job, "done" if done else "stopped")
                continue
            killed = (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exit status {status}"
            )
            job.reason = (
                killed
                if status
                else "it ended well, but its last checkpoint is not that of a finished run"
            )
            self._enter(job, "waiting" if job.attempts < ATTEMPTS else "failed", job.reason)

    def _start(self) -> None:
        free = self.backend.slots - sum(job.state == "running" for job in self.jobs)
        for job in [job for job in self.jobs if job.state == "waiting"]:
            if free < 1:
                break
            job.handle = self.backend.start(job)
            if job.handle is not None:  # otherwise another runner has it: ask again
                free -= 1
                job.attempts += 1
                self._enter(job, "running")

    def _look(self) -> None:
        """Every two seconds see how far the running jobs are; without a terminal report it every
        minute.
        """
        now = time.monotonic()
        if now - self.looked < 2.0:
            return
        self.looked = now
        running = [job for job in self.jobs if job.state == "running"]
        for job in running:
            job.look()
        if not self.console.is_terminal and now - self.reported > 60.0:
            self.reported = now
            for job in running:
                self.console.print(f"{job.name}: {'  '.join(cells(job)[2:])}", markup=False)

    # ------------------------------------------------------------ telling

    def _enter(self, job: Job, state: str, why: str = "") -> None:
        job.state = state
        if not self.console.is_terminal:
            self.console.print(f"{job.name}: {state}{f' ({why})' if why else ''}", markup=False)

    def _screen(self) -> contextlib.AbstractContextManager:
        if not self.console.is_terminal:
            return contextlib.nullcontext()
        return Live(get_renderable=self.table, console=self.console, refresh_per_second=2)

    def table(self) -> Table:
        """Running jobs first; where the screen is too low for all, the finished ones fall off."""
        counts = Counter(job.state for job in self.jobs)
        title = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        left = [job.left() for job in self.jobs if job.state == "running"]
        if left and None not in left and counts["waiting"] == 0:
            title += f", about {clock(max(left))} left"
        table = Table(title=title, title_justify="left", expand=False)
        for name in ("run", "state", "step", f"{self.jobs[0].unit}/s", "last return", "left"):
            table.add_column(
                name, justify="left" if name in ("run", "state") else "right", no_wrap=True
            )
        for job in sorted(self.jobs, key=lambda job: ORDER.index(job.state))[
            : max(5, self.console.height - 6)
        ]:
            table.add_row(*cells(job), style=COLOURS[job.state])
        return table


def cells(job: Job) -> list[str]:
    """Name, state, step of steps, rate, last return, time left."""
    seen = job.seen
    state = job.state + (f", attempt {job.attempts}" if job.attempts > 1 else "")
    show = lambda key, form: form.format(seen[key]) if key in seen else "-"
    left = job.left() if job.state == "running" else None
    step, left = f"{seen.get('step', 0):,.0f} / {job.steps:,}", "-" if left is None else clock(left)
    return [job.name, state, step, show("rate", "{:,.1f}"), show("return", "{:,.2f}"), left]


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
