"""What a run tells: scalars and videos on the disk, a live line on the screen."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Logger:
    """Scalars go under the same names to metrics.jsonl, TensorBoard and, with ``wandb_config``, Weights & Biases.

    ``size`` is how much of metrics.jsonl a checkpoint vouches for: what came after it is cut off on continuing.
    """

    def __init__(self, logdir: Path, step: int, size: int, wandb_config: Mapping[str, Any] | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.logdir = logdir
        path = logdir / "metrics.jsonl"
        self.file = open(path, "r+" if path.exists() else "w+")  # noqa: SIM115 - open as long as the run
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)
        self.board = SummaryWriter(str(logdir), purge_step=step or None, max_queue=1000)
        self.wandb = None
        if wandb_config is not None:
            import wandb

            name, mode = logdir.name, os.environ.get("WANDB_MODE", "offline")
            self.wandb = wandb.init(
                project="hidreamer", name=name, mode=mode, dir=str(logdir), config=dict(wandb_config)
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        json.dump({"step": step, **values}, self.file)
        self.file.write("\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int = 15) -> None:
        """frames (T,H,W,3) uint8 -> LOGDIR/videos/STEP-NAME.mp4, and an animated picture in TensorBoard."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        path = self.logdir / "videos" / f"{step:09d}-{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        height, width = frames.shape[1:3]
        even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))  # the codec wants even sides
        iio.imwrite(path, even, plugin="pyav", codec="libx264", fps=fps)
        gif = iio.imwrite("<bytes>", frames[:300], extension=".gif", duration=1000 / fps, loop=0)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self.board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Video(str(path))}, step=step)

    def flush(self) -> int:
        """-> size of metrics.jsonl, all of it on the disk."""
        self.file.flush()
        self.board.flush()
        return self.file.tell()

    def close(self) -> None:
        self.flush()
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


class Rates:
    """Frames and updates per second since the last call."""

    def __init__(self, frames: int = 0, updates: int = 0):
        self.last = (time.monotonic(), frames, updates)

    def __call__(self, frames: int, updates: int) -> tuple[float, float]:
        (then, f, u), self.last = self.last, (time.monotonic(), frames, updates)
        took = max(self.last[0] - then, 1e-9)
        return (frames - f) / took, (updates - u) / took


def peak_mb(device: torch.device) -> float:
    """The most memory that this process ever held: of the GPU if that is its device, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # Linux's getrusage would count what the parent held when it started this process
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Screen:
    """A live bar on a terminal; elsewhere a line a minute."""

    def __init__(self, total: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self.total, self.shown, self.rates = total, time.monotonic(), Rates()
        text = "{task.fields[rates]} {task.fields[losses]} return {task.fields[score]} left"
        columns = [TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"), BarColumn(20), TextColumn(text)]
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=total, rates="", losses="", score="-")

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def due(self) -> bool:
        return time.monotonic() - self.shown > (60.0 if self.bar.disable else 0.5)

    def update(self, step: int, updates: int, losses: Mapping[str, float], score: float | None) -> None:
        self.shown = time.monotonic()
        frames, ups = self.rates(step, updates)
        shown = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        rates, score = f"{frames:.0f} frames/s {ups:.2f} updates/s", "-" if score is None else f"{score:.1f}"
        self.bar.update(self.task, completed=step, rates=rates, losses=shown, score=score)
        if self.bar.disable:
            self.line(f"[{step}/{self.total}] {rates} {shown} return {score}")


def picture(rows: list[torch.Tensor], error: bool) -> np.ndarray:
    """Images or grids (B,T,H,W,C) in [0, 1], truth first -> frames (T, H rows, B W, 3) uint8, one above the other.

    With ``error`` the difference of the second and the first comes third.
    """
    if error:
        rows = [*rows[:2], (rows[1] - rows[0] + 1.0) / 2.0, *rows[2:]]
    x = torch.cat(rows, 2).cpu()  # (B, T, H rows, W, C)
    channels = x.shape[-1]
    if channels == 1:
        x = x.expand(*x.shape[:-1], 3)
    elif channels != 3:  # planes of a board, each in a colour of its own
        hue = torch.arange(channels).unsqueeze(1) * (2.0 * torch.pi / channels) + torch.tensor([0.0, 2.1, 4.2])
        x = x @ (0.5 + 0.5 * torch.cos(hue))
    scale = max(1, 128 // x.shape[3])
    frames = x.permute(1, 2, 0, 3, 4).flatten(2, 3).clamp(0.0, 1.0)  # (T, H rows, B W, 3)
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return (255.0 * frames).round().byte().numpy()
