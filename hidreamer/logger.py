"""What a run records: scalars and videos on the disk, a live line on the screen."""

from __future__ import annotations

import contextvars
import errno
import json
import math
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# What a run can do without, and what a user may do where it fails.
RENDER, VIDEO = "drawing the environment", "video"
TENSORBOARD, WANDB, TRACKIO = "TensorBoard", "Weights & Biases", "Trackio"
SERVICES = {"wandb": WANDB, "trackio": TRACKIO}  # by the module, which is also the extra
REMEDIES = {
    RENDER: "--video false does not try",
    VIDEO: "--video false does not try",
    TENSORBOARD: "metrics.jsonl has the same scalars",
    WANDB: "--logger tensorboard does without",
    TRACKIO: "--logger tensorboard does without",
}

UNITS = {"model": " nats", "critic": " nats"}  # of losses on the screen; the actor's has none


class BestEffort:
    """Runs what must not end a training: pictures and copies of the log.

    The first error of a kind becomes one RuntimeWarning, and that kind is ``off`` from then on.
    """

    def __init__(self):
        self.off: set[str] = set()

    def __call__(self, kind: str, act: Callable[..., Any], *args: Any) -> None:
        """``act(*args)``, unless ``kind`` (a key of REMEDIES) is off."""
        if kind not in self.off:
            try:
                act(*args)
            except Exception as error:  # a renderer, a codec or a service may raise anything
                self.failed(kind, error)

    def failed(self, kind: str, error: Exception) -> None:
        """Switch ``kind`` off because of ``error``."""
        if kind not in self.off:
            self.off.add(kind)
            cause = " ".join(str(error).split()) or type(error).__name__
            text = f"{kind} failed and is off from now on ({REMEDIES[kind]}): {cause}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


class Logger:
    """Scalars go under the same names to metrics.jsonl, TensorBoard and, if asked for, a service:
    Weights & Biases or Trackio.

    metrics.jsonl is standard JSON, one object a line: a value that is NaN or infinite is written
    as null. It is the record of a run, so that what goes wrong with it is raised (OSError). The
    others are copies, see ``BestEffort``.

    step, size: where the run continues, and how much of metrics.jsonl its checkpoint vouches for;
    what came after that is cut off, and hidden in TensorBoard. config: the run's. service: a key
    of SERVICES; any other name means none. wandb_id: of the service's run to continue; a new one is
    made for None, and ``Logger.wandb_id`` is what the next checkpoint should hold.
    """

    def __init__(
        self,
        logdir: Path,
        step: int,
        size: int,
        config: Mapping[str, Any] | None = None,
        wandb_id: str | None = None,
        service: str = "wandb",
    ):
        self.logdir = logdir
        path = logdir / "metrics.jsonl"
        mode = "r+" if path.exists() else "w+"
        self.file = open(path, mode, encoding="utf-8")  # noqa: SIM115
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)
        self.best_effort = BestEffort()
        self.board: EventFile | None = None
        self.service, self.module = SERVICES.get(service, ""), service
        self.run: Any = None  # of the service
        self.wandb_id = wandb_id
        self.best_effort(TENSORBOARD, self._open_board, step)
        if config is not None and self.service:
            self.best_effort(self.service, self._open_service, config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name. Raises OSError where metrics.jsonl cannot be written."""
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step} | record, allow_nan=False, default=float) + "\n")
        if self.board:
            self.best_effort(TENSORBOARD, self.board.scalars, step, values)
        if self.run:
            self.best_effort(self.service, self._log_service, step, dict(values))

    def video(self, step: int, name: str, frames: Iterable[np.ndarray], fps: int = 15) -> None:
        """Pictures as ``stack`` takes them -> LOGDIR/videos/STEP-NAME.mp4, and an animation in
        TensorBoard.

        No pictures make no video.
        """
        self.best_effort(VIDEO, self._video, step, name, frames, fps)

    def flush(self) -> int:
        """-> size of metrics.jsonl, all of it handed to the system. Raises OSError."""
        self.file.flush()
        if self.board:
            self.best_effort(TENSORBOARD, self.board.flush)
        return self.file.tell()

    def close(self) -> None:
        """Close everything, also where metrics.jsonl cannot be written any more, which raises
        OSError.
        """
        try:
            self.file.close()
        finally:
            if self.board:
                self.best_effort(TENSORBOARD, self.board.close)
            if self.run:
                self.best_effort(self.service, self.run.finish)

    def _open_board(self, step: int) -> None:
        self.board = EventFile(self.logdir, step)

    def _open_service(self, config: Mapping[str, Any]) -> None:
        module = service_module(self.module)
        self.wandb_id = self.wandb_id or uuid.uuid4().hex[:8]
        parts = (config["task"], config["dynamics"]["type"], config["seed"])
        name = "-".join(map(str, parts))
        settings: dict[str, Any] = {"project": "hidreamer", "resume": "allow"}
        settings["config"] = dict(config)
        if self.module == "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            settings |= {"name": name, "id": self.wandb_id, "mode": mode, "dir": str(self.logdir)}
            settings |= {"reinit": "create_new"}  # beside those of other seeds in this process
        else:  # its runs are continued by name
            settings |= {"name": f"{name}-{self.wandb_id}", "embed": False}
            settings |= {"auto_log_gpu": False, "auto_log_cpu": False}
        # In a context of its own: Trackio ends the run that the present one knows of.
        self.run = contextvars.Context().run(module.init, **settings)

    def _log_service(self, step: int, values: dict[str, Any]) -> None:
        if self.module == "trackio":  # its SQLite holds no NaN
            values = {name: x for name, x in values.items() if math.isfinite(x)}
        self.run.log(values, step=step)

    def _video(self, step: int, name: str, frames: Iterable[np.ndarray], fps: int) -> None:
        movie = stack(frames)
        if not len(movie):
            return
        path = self.logdir / "videos" / f"{step:09d}-{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, movie, fps)
        if self.board:
            self.best_effort(TENSORBOARD, self.board.video, step, name, movie[:300], fps)
        if self.run:
            self.best_effort(self.service, self._service_video, step, name, path)

    def _service_video(self, step: int, name: str, path: Path) -> None:
        module = service_module(self.module)
        self.run.log({name: module.Video(str(path))}, step=step)


def write_video(path: Path, movie: np.ndarray, fps: int = 15) -> None:
    """movie (T,H,W,3) uint8 -> an H.264 video at ``path``, whole or not at all. Raises OSError and
    what the codec raises.
    """
    height, width = movie.shape[1:3]
    # the codec needs even sides
    even = np.pad(movie, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    # In memory: a codec that cannot write its file says so in a traceback of its own, and leaves
    # half a video.
    data = iio.imwrite("<bytes>", even, extension=".mp4", plugin="pyav", codec="libx264", fps=fps)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def service_module(name: str) -> Any:
    """The module of a service, a key of SERVICES. Raises ImportError."""
    if name == "wandb":
        import wandb

        return wandb
    import trackio

    return trackio


def stack(frames: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures (H,W), (H,W,1), (H,W,3) or (H,W,4) -> (T,H,W,3) uint8 of the largest H and W; what
    is left is black.

    (0,0,0,3) for no pictures. The fourth channel, opacity, is ignored. Raises ValueError for any
    other shape.
    """
    pictures = []
    for frame in frames:
        frame = np.asarray(frame)
        picture = frame[..., None] if frame.ndim == 2 else frame
        if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
            raise ValueError(
                f"a picture has shape {frame.shape}, not (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
            )
        pictures.append(picture[..., :3])
    height = max((picture.shape[0] for picture in pictures), default=0)
    width = max((picture.shape[1] for picture in pictures), default=0)
    movie = np.zeros((len(pictures), height, width, 3), np.uint8)
    for canvas, picture in zip(movie, pictures, strict=True):
        canvas[: picture.shape[0], : picture.shape[1]] = picture
    return movie


class EventFile:
    """TensorBoard's file of events. Events from before a continuation at ``step`` stay visible,
    later ones do not.

    Written in the calling thread by TensorBoard's own record writer. torch's SummaryWriter has a
    thread, whose errors are tracebacks on the screen, and loads TensorFlow with its messages where
    that is installed.
    """

    def __init__(self, logdir: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.Event, self.Summary = Event, Summary
        # TensorBoard reads the files of a folder in the order of names
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self.writer = RecordWriter(open(logdir / name, "wb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        if step:
            # What has this step itself is in the checkpoint.
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        parts = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self.Summary(value=parts))

    def video(self, step: int, name: str, movie: np.ndarray, fps: int) -> None:
        """movie: (T,H,W,3) uint8, shown as an animated picture."""
        data = iio.imwrite("<bytes>", movie, extension=".gif", duration=1000 / fps, loop=0)
        height, width = movie.shape[1:3]
        image = self.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=data
        )
        self._write(
            step=step, summary=self.Summary(value=[self.Summary.Value(tag=name, image=image)])
        )

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def _write(self, **content: Any) -> None:
        self.writer.write(self.Event(wall_time=time.time(), **content).SerializeToString())


class Rates:
    """Frames and updates per second since the last call.

    cpu_s: CPU seconds of this process, all threads together, between the last two calls.
    state: of ``state()`` in a process that ended between two calls; what was done there since the
    first of them belongs to the second.
    """

    def __init__(self, frames: int = 0, updates: int = 0, state: Mapping[str, float] | None = None):
        begun = state or {"frames": frames, "updates": updates, "wall_s": 0.0, "cpu_s": 0.0}
        self.last = (time.monotonic() - begun["wall_s"], begun["frames"], begun["updates"])
        self._cpu, self.cpu_s = time.process_time() - begun["cpu_s"], 0.0

    def state(self) -> dict[str, float]:
        """The last call's frames and updates, and the seconds since then."""
        then, frames, updates = self.last
        seconds = {"wall_s": time.monotonic() - then, "cpu_s": time.process_time() - self._cpu}
        return {"frames": frames, "updates": updates, **seconds}

    def __call__(self, frames: int, updates: int) -> tuple[float, float]:
        (then, f, u), self.last = self.last, (time.monotonic(), frames, updates)
        took = max(self.last[0] - then, 1e-9)
        now = time.process_time()
        self.cpu_s, self._cpu = now - self._cpu, now
        return (frames - f) / took, (updates - u) / took


class Terminal(Console):
    """One that is gone, as after a lost connection, is to its program what a closed pipe is."""

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
            self.on_broken_pipe()


class Screen:
    """A live bar on a terminal; elsewhere a line a minute, and the last one when the ``with``
    block ends.

    text: what stands behind the bar, before the time left, in rich's format.
    """

    TEXT = "{task.fields[rates]} {task.fields[losses]} return {task.fields[score]} left"

    def __init__(self, total: int, text: str = TEXT):
        self.console = Terminal(highlight=False, soft_wrap=True)
        self.total, self.shown, self.rates = total, time.monotonic(), Rates()
        # not shown yet
        self.latest: tuple[int, int, Mapping[str, float], float | None] | None = None
        columns = [
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(20),
            TextColumn(text),
        ]
        self.bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, rates="", losses="", score="-")

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.latest:
            self._show(*self.latest)
        self.bar.stop()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def due(self) -> bool:
        """Whether what is shown is old: half a second on a terminal, a minute elsewhere."""
        return time.monotonic() - self.shown > (60.0 if self.bar.disable else 0.5)

    def update(
        self, step: int, updates: int, losses: Mapping[str, float], score: float | None
    ) -> None:
        """The state of the run. It is shown if that is ``due``; otherwise it waits for the next
        update or the end.
        """
        self.latest = step, updates, losses, score
        if self.due():
            self._show(*self.latest)

    def _show(
        self, step: int, updates: int, losses: Mapping[str, float], score: float | None
    ) -> None:
        self.shown, self.latest = time.monotonic(), None
        frames, ups = self.rates(step, updates)
        parts = [f"{name} {x:.2f}{UNITS.get(name, '')}" for name, x in losses.items()]
        shown = "loss: " + ", ".join(parts) if parts else ""
        rates = f"{frames:.0f} frames/s {ups:.2f} updates/s"
        last = "-" if score is None else f"{score:.1f} points"
        self.bar.update(self.task, completed=step, rates=rates, losses=shown, score=last)
        if self.bar.disable:
            self.line(f"[{step}/{self.total}] {rates} {shown} return {last}")
