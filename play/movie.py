"""A session as an mp4: its pictures side by side, with its numbers below."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imageio.v3 as iio
import numpy as np

from envs.errors import one_line
from play.session import Session, View

SIDE, GAP, LINE = 192, 8, 22  # pixels: of a picture, between them, of a line of text
INK, PAPER, QUIET = (235, 237, 242), (24, 26, 32), (150, 156, 168)
FPS = 15


def compose(view: View, action: str = "", hand: bool = False) -> np.ndarray:
    """One frame (H,W,3) uint8, of the same size at every step.

    action: the name of the last one. hand: whether the user acts.
    """
    boxes = []
    for title, frame in view.pictures.values():
        box = np.full((SIDE + LINE, SIDE, 3), PAPER, np.uint8)
        box[LINE:] = fit(frame)
        write(box, title, 0, QUIET)
        boxes.append(box)
    gap = np.full((SIDE + LINE, GAP, 3), PAPER, np.uint8)
    parts = [gap]
    for box in boxes:
        parts += [box, gap]
    top = np.concatenate(parts, 1)
    below = np.full((2 * LINE + GAP, top.shape[1], 3), PAPER, np.uint8)
    numbers = view.numbers
    first = f"step {numbers['step']:.0f}  return {numbers['total']:.2f}  reward"
    first += f" {numbers['reward']:.2f} ({numbers['predicted_reward']:.2f} predicted)"
    first += f"  value {numbers['value']:.2f}  continue {numbers['cont']:.2f}"
    entropy = "  ".join(f"{level.name} {level.prior:.1f}" for level in view.levels)
    second = f"entropy {entropy} nats  {'hand' if hand else 'agent'}: {action}"
    write(below, first, 0, INK, GAP)
    write(below, second, 1, INK, GAP)
    out = np.concatenate([top, below])
    return np.pad(out, ((0, out.shape[0] % 2), (0, out.shape[1] % 2), (0, 0)))  # for the codec


def fit(frame: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, 3): scaled as large as fits, in the middle."""
    scale = SIDE / max(frame.shape[:2])
    height, width = (max(1, round(scale * x)) for x in frame.shape[:2])
    kind = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    scaled = cv2.resize(frame, (width, height), interpolation=kind)
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    out[top : top + height, left : left + width] = scaled
    return out


def write(canvas: np.ndarray, text: str, line: int, ink: tuple, left: int = 0) -> None:
    place = (left, LINE * line + 16)
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, ink, 1, cv2.LINE_AA)


class Movie:
    """An mp4 that grows frame by frame, and is there under its name once it is whole.

    Raises OSError where its folder cannot be written.
    """

    def __init__(self, path: Path, fps: int = FPS):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.frames = path, 0
        self.temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.mp4")
        self.temporary.touch()  # the codec's own complaint would be a traceback
        self.file: Any = iio.imopen(self.temporary, "w", plugin="pyav")
        self.file.init_video_stream("libx264", fps=fps)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises OSError for what the codec raises, an EOFError among others on a full disk."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(one_line(error) or type(error).__name__) from error

    def add(self, frame: np.ndarray) -> None:
        """Raises OSError."""
        with self._writing():
            self.file.write_frame(frame)
        self.frames += 1

    def close(self) -> None:
        """Raises OSError, with the unfinished file removed."""
        try:
            with self._writing():
                self.file.close()
            if self.frames:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close what could not be written, and leave nothing of it."""
        self.frames = 0
        with contextlib.suppress(Exception):  # whatever a codec raises
            self.close()


class Film(NamedTuple):
    """What was recorded."""

    frames: int
    returns: list[float]  # of the episodes, or dreams, that ended in it
    rewards: float  # the sum of all of its rewards, predicted ones in a dream

    def line(self, dream: bool) -> str:
        """What a reader may conclude: an episode that did not end has no return."""
        kind = "dream" if dream else "episode"
        ended = f"no {kind} ended"
        if count := len(self.returns):
            shown = ", ".join(f"{x:.2f}" for x in self.returns)
            ended = f"{count} {kind}{'s' * (count > 1)} ended, return{'s' * (count > 1)} {shown}"
        which = "predicted rewards" if dream else "rewards"
        return f"{self.frames} frames, sum of {which} {self.rewards:.2f}, {ended}"


def record(session: Session, path: Path, frames: int) -> Film:
    """A session without a page, a step a frame. Raises OSError, with nothing left behind."""
    movie, returns, rewards = Movie(path), [], 0.0
    try:
        for frame in range(frames):
            if frame:
                before = session.now
                session.step()
                now = session.now
                if now.step > before.step:  # not where it began anew, or the environment failed
                    rewards += now.reward
                    returns += [now.total] if now.over else []
            movie.add(compose(session.view(), session.now.action, session.hand))
    except OSError:  # of the disk; what was played until something else stopped it is kept
        movie.discard()
        raise
    except BaseException:
        movie.close()
        raise
    movie.close()
    return Film(frames, returns, rewards)
