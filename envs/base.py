"""The environment interface of the project, and what every suite is built from.

A suite is a `gymnasium.Env` (class `Suite`); the agent only ever meets the adapter `Env` around it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from envs.actions import action_codec
from envs.errors import ActionError, BadValue, EnvError, one_line, unknown

__all__ = [
    "ActionError",
    "BadValue",
    "Env",
    "EnvError",
    "Suite",
    "one_line",
    "plain",
    "resize",
    "unknown",
]

RESETS = 5  # in a row that give a NaN or infinity, until `env.invalid: truncate` gives up
RESERVED = {  # names that no observation may have
    *("reward", "is_first", "is_last", "is_terminal", "prev_action"),  # columns of the replay
    *("action", "discount", "logprob"),  # further entries of an episode's file
    *("file", "allow_pickle"),  # arguments of the function that writes it
    # losses, which observations stand among
    *("cont", "dyn", "rep", "commit", "balance", "model", "actor", "critic"),
    *("ac_cpc", "barlow", "next_embed", "harmony"),
    "stored",  # column of the replay beside those of PREFIXES
}
PREFIXES = ("log_", "carry.")  # with which none may begin


class Suite(gymnasium.Env):
    """A `gymnasium.Env` with a flat Dict observation space,
    and the two things that Gymnasium has no word for.

    A suite repeats actions itself, because only it knows what need not be drawn for a skipped
    frame: `step` is one agent step. `reset(seed=s)` starts all its randomness afresh. The info of
    a step holds every key of `log_keys`, and may hold `is_terminal`: no value after this step
    although the episode continues (a lost life). `render()` is RGB.
    """

    log_keys: tuple[str, ...] = ()

    def get_state(self) -> dict[str, Any] | None:
        """All that the future depends on, or None where the library cannot save it."""
        return None

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly from what `get_state` returned,
        in this object or in another of the same task.
        """
        raise EnvError(f"{type(self).__name__} cannot restore a state")


class Env:
    """One environment as the agent sees it.

    obs_space: name -> Box of one of three kinds: uint8 (H, W, C) image, bool (H, W, C) grid,
    float32 (N,) vector.
    act_space: Discrete, MultiDiscrete, or a flat Box, -1 and 1 wherever the environment's own
    bounds are finite.
    act_dim: width A of the action vector: n, sum(nvec) or the Box's dimension.
    log_keys: names `log_*` of float scalars in the output, to be summed over an episode.
    repeat: frames per agent step. suite: the Suite inside, for what only one suite offers (`ram`,
    `variables`).

    `step` and `reset` return all keys of obs_space and log_keys and reward (float32), is_first,
    is_last, is_terminal (bool). A real end is is_last and is_terminal; running out of time is
    is_last alone. After is_last, call `reset`.

    Every float in an output is finite. Where the suite gives another, as a float32, `invalid`
    decides: `stop` raises BadValue; `truncate` warns and closes the episode as truncated, with the
    observation before and reward 0, and `log_invalid`, one more log key, counts it. A reset that
    gives one is repeated, 5 times at most.
    task, index: the environment's name and its number among those of a run, for messages.
    """

    def __init__(
        self,
        suite: Suite,
        repeat: int,
        time_limit: int,
        seed: int,
        invalid: str = "stop",
        task: str = "",
        index: int | None = None,
    ):
        if invalid not in ("stop", "truncate"):
            raise unknown("env.invalid", invalid, ("stop", "truncate"))
        self.suite = suite
        self.repeat = repeat
        self._task = task or type(suite).__name__
        self._name = self._task if index is None else f"{self._task}, environment {index}"
        self._truncates = invalid == "truncate"
        self.log_keys = (*suite.log_keys, *(["log_invalid"] if self._truncates else []))
        self.obs_space = _checked(suite.observation_space)
        self.act_space, self.act_dim, self._decode = action_codec(suite.action_space)
        self._time_limit = time_limit
        self._frames = 0  # of this episode
        self._seed: int | None = seed  # until the first reset has used it
        self._obs: dict[str, np.ndarray] = {}  # the last observation

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """One agent step. action: float32 (A,): one-hot, one-hots side by side,
        or numbers (clipped to the bounds).

        Raises ActionError, a ValueError, for a wrong shape, a number that is not finite, and what
        is not one-hot; EnvError for a value of the suite of another shape or type than its space
        says; BadValue (see the class).
        """
        action = np.asarray(action, np.float32)
        if action.shape != (self.act_dim,) or not np.isfinite(action).all():
            raise ActionError(f"an action is {self.act_dim} finite numbers, not {action}")
        action = self._decode(action)
        self._frames += self.repeat
        try:
            obs, reward, terminated, truncated, info = self.suite.step(action)
            truncated = truncated or 0 < self._time_limit <= self._frames
            is_terminal = terminated or info.get("is_terminal", False)
            logs = {key: info[key] for key in self.suite.log_keys}
            return self._output(
                obs, logs, reward, is_last=terminated or truncated, is_terminal=is_terminal
            )
        except BadValue as error:
            self._note(
                error, f"step {self._frames // self.repeat} (frame {self._frames}) of its episode"
            )
        logs = dict.fromkeys(self.suite.log_keys, 0.0)
        return self._output(self._obs, logs, 0.0, is_last=True, invalid=1)

    def reset(self) -> dict[str, Any]:
        """Starts the next episode. The first call seeds the suite;
        the episodes after it follow from that seed.
        """
        self._frames = 0
        logs = dict.fromkeys(self.suite.log_keys, 0.0)
        for invalid in range(RESETS):
            seed, self._seed = self._seed, None
            try:
                return self._output(
                    self.suite.reset(seed=seed)[0], logs, 0.0, is_first=True, invalid=invalid
                )
            except BadValue as error:
                self._note(error, "the reset of an episode")
        raise BadValue(
            f"{self._name}: {RESETS} resets in a row gave a NaN or an infinity; fix the environment"
        )

    def render(self) -> np.ndarray:
        """uint8 (H, W, 3): the present moment, for videos.
        Raises EnvError where nothing can be drawn.
        """
        try:
            return picture(self.suite.render())
        except Exception as error:  # pygame, OpenGL, ...: whatever the environment draws with
            cause = str(error) if isinstance(error, EnvError) else f"{type(error).__name__} {error}"
            line = f"{self._task} cannot be drawn: {one_line(cause)}; --video false does without"
            raise EnvError(line) from error

    def get_state(self) -> dict[str, Any] | None:
        """Everything that later outputs depend on, as plain values (see `plain`);
        None where the suite cannot.
        """
        if self._seed is not None:
            return {"seed": self._seed}  # not started: nothing else to remember
        state = self.suite.get_state()
        if state is None:
            return None
        # `invalid: truncate`, also of a run that goes on with it, may need the last observation at
        # the next step
        moment = {"frames": self._frames, "obs": plain(self._obs)}
        return {"seed": None, "suite": plain(state), **moment}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues, bit for bit, where `get_state` was called,
        here or in another object of the same task.
        """
        if state["seed"] is None:
            self._frames, self._obs = state["frames"], plain(state.get("obs", {}))
            self.suite.set_state(plain(state["suite"]))
        self._seed = state["seed"]  # last: where that fails, the next reset still has a seed

    def close(self) -> None:
        self.suite.close()

    def _output(
        self, obs, logs, reward, is_first=False, is_last=False, is_terminal=False, invalid=0
    ) -> dict[str, Any]:
        """What `step` and `reset` return, of copies: suites may reuse their buffers.
        Raises BadValue, EnvError.
        """
        scalars = {
            **logs,
            **({"log_invalid": invalid} if self._truncates else {}),
            "reward": reward,
        }
        # a float64 that no float32 holds becomes an infinity, which is looked for
        with np.errstate(over="ignore"):
            output = {
                key: self._observation(key, space, obs[key])
                for key, space in self.obs_space.items()
            }
            scalars = {key: np.float32(value) for key, value in scalars.items()}
        for key, value in scalars.items():
            if not math.isfinite(value):
                check_finite(key, value)
        self._obs = output
        flags = {"is_first": is_first, "is_last": bool(is_last), "is_terminal": bool(is_terminal)}
        return {**output, **scalars, **flags}

    def _observation(self, key: str, space: Box, value: Any) -> np.ndarray:
        value = np.asarray(value)
        if value.shape != space.shape:
            raise EnvError(
                f"{self._name}: observation {key!r} has shape {value.shape}, "
                f"its space says {space.shape}"
            )
        if space.dtype != np.float32:
            if value.dtype != space.dtype:
                line = (
                    f"{self._name}: observation {key!r} is {value.dtype}, "
                    f"its space says {space.dtype}"
                )
                raise EnvError(line)
            return value.copy()
        if value.dtype.kind not in "biuf":
            raise EnvError(f"{self._name}: observation {key!r} is {value.dtype}, not numbers")
        value = value.astype(np.float32)
        check_finite(f"observation {key!r}", value)
        return value

    def _note(self, error: BadValue, when: str) -> None:
        """Warn of a NaN or infinity, or raise BadValue if it stops the run."""
        line = f"{self._name}, {when}: {error}"
        if not self._truncates:
            line += "; fix the environment, or end such episodes early by --env.invalid truncate"
            raise BadValue(line) from error
        warnings.warn(f"{line}; the episode is closed as truncated", RuntimeWarning, stacklevel=3)


def check_finite(name: str, value: np.ndarray | np.float32) -> None:
    """Raises BadValue, which names the first of them,
    where floats (any shape) hold a NaN or an infinity.
    """
    good = np.isfinite(value)
    if not good.all():
        at = np.argwhere(~good)[0]
        place = f"[{', '.join(map(str, at))}]" if len(at) else ""
        number = value[tuple(at)]
        raise BadValue(f"{name}{place} is {number}{'' if np.isnan(number) else ' (as float32)'}")


def _checked(space: Dict) -> dict[str, Box]:
    """The suite's observation spaces, once each is known to be an image, a grid or a vector."""
    for key, leaf in space.items():
        kind = (leaf.dtype.name, len(leaf.shape)) if isinstance(leaf, Box) else None
        if kind not in {("uint8", 3), ("bool", 3), ("float32", 1)}:
            raise EnvError(
                f"observation {key!r} is {one_line(leaf)}, which is no image, grid or vector"
            )
        if not isinstance(key, str) or not key:
            raise EnvError(
                f"observation {key!r} has no name: the keys of a Dict space must be text"
            )
        if key in RESERVED or key.startswith(PREFIXES):
            raise EnvError(
                f"observation {key!r} has a reserved name: rename it in the environment "
                "(docs/own_environment.md)"
            )
    return dict(space.items())


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) -> (*size, C) by averaging over pixel areas."""
    if image.shape[:2] == size:
        return image.reshape(*size, -1)
    image = np.ascontiguousarray(image.reshape(*image.shape[:2], -1))
    parts = []
    for first in range(0, image.shape[2], 4):  # OpenCV takes four channels at most
        part = cv2.resize(image[..., first : first + 4], size[::-1], interpolation=cv2.INTER_AREA)
        parts.append(part.reshape(*size, -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


def picture(frame: Any) -> np.ndarray:
    """What a `render` returned -> uint8 (H, W, 3): grey is repeated, alpha dropped,
    floats in [0, 1] are scaled.

    Raises EnvError for all that is no single picture.
    """
    try:
        array = np.asarray(frame)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim == 2:
        array = array[..., None]
    if frame is None or array.dtype.kind not in "biuf" or array.ndim != 3 or not array.size:
        what = (
            f"an array of shape {array.shape}"
            if isinstance(frame, np.ndarray)
            else f"a {type(frame).__name__}"
        )
        raise EnvError(f"render gave {what} where render_mode rgb_array means uint8 (H, W, 3)")
    if array.shape[2] not in (1, 3, 4):
        raise EnvError(
            f"render gave shape {array.shape} where render_mode rgb_array means uint8 (H, W, 3)"
        )
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # also for NaN
        raise EnvError(
            f"render gave numbers in [{low}, {high}] where render_mode rgb_array means uint8"
        )
    if array.dtype.kind == "f":
        array = np.rint(array * (255 if high <= 1 else 1))
    array = array[..., :3].astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def plain(value: Any) -> Any:
    """A deep copy made of None, bool, int, float, str, list, dict and np.ndarray only,
    as checkpoints want it.
    """
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray():
            return value.copy()
        case np.generic():
            return value.item()
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"no plain value: {value!r}")
