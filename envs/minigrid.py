"""MiniGrid and BabyAI: what the agent sees of a grid world, as planes, and its mission."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import zlib
from typing import Any

import gymnasium
import minigrid  # registers all ids
import numpy as np
from gymnasium.spaces import Box
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.wrappers import FullyObsWrapper

from envs.errors import EnvError, one_line, unknown
from envs.gym import Gym
from envs.spaces import Leaf, Reader

__all__ = ["MiniGrid", "minigrid"]

PLANES = (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX))
FULL_PLANES = (*PLANES[:2], 4)  # where the whole grid is seen, the agent's state is its direction
FAMILIES = ("MiniGrid", "BabyAI")  # how the names of ids begin
MISSION = 128  # numbers of a mission
TILE = 12  # pixels of a rendered cell


class MiniGrid(Gym):
    """One id of MiniGrid or BabyAI, or one registered elsewhere that observes as they do.

    Observations: `grid` bool (7, 7, 20), the codes of the agent's view as one-hot planes, 11 of
    objects, 6 of colours, 3 of states (4 of the whole grid, under `FullyObsWrapper`: the agent's is
    its direction); `direction` one-hot (4,); `mission` (128,), how often the mission has each word
    and each pair of neighbouring words, by their hash (`bag_of_words`).
    name: an id, or one without family and version: `MemoryS7`, `GoToObj`. States are exact.
    """

    suite = "minigrid"
    pickled = True

    def __init__(
        self, name: str, size: tuple[int, int], repeat: int, kwargs: str = "", keys: str = ".*"
    ):
        super().__init__(full_id(name), size, repeat, kwargs, keys)
        self._env.unwrapped.tile_size = TILE

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        with contextlib.redirect_stdout(io.StringIO()):  # BabyAI prints what it drew in vain
            try:
                return super().reset(seed=seed)
            except FileNotFoundError as error:  # of WFC tasks: pip does not bring their patterns
                raise EnvError(
                    f"{self._name} needs {error.filename}, which pip does not bring: install"
                    " minigrid in editable mode from a checkout of its repository"
                ) from error

    def set_state(self, state: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().set_state(state)

    def _leaves(self, space: gymnasium.Space) -> dict[str, Leaf]:
        known = isinstance(space, gymnasium.spaces.Dict) and {"image", "mission"} <= space.keys()
        if not known or len(space["image"].shape) != 3 or space["image"].shape[2] != 3:
            raise self._mistake(
                f"its observation is {one_line(space)}, not the codes that MiniGrid observes:"
                " try it as a task of gym_"
            )
        return {{"image": "grid"}.get(key, key): Leaf((key,), leaf) for key, leaf in space.items()}

    def _reader(
        self, key: str, space: gymnasium.Space, size: tuple[int, int]
    ) -> tuple[Box, Reader]:
        if key == "grid":
            counts = FULL_PLANES if self._sees_all else PLANES
            read = functools.partial(planes, counts=counts)
            return Box(0, 1, (*space.shape[:2], sum(counts)), np.bool_), read
        if key == "mission":
            return Box(0, np.inf, (MISSION,)), bag_of_words
        return super()._reader(key, space, size)

    @property
    def _sees_all(self) -> bool:
        env = self._env
        while isinstance(env, gymnasium.Wrapper) and not isinstance(env, FullyObsWrapper):
            env = env.env
        return isinstance(env, FullyObsWrapper)

    def _readable(self, key: str, space: gymnasium.Space) -> bool:
        return key == "mission" or super()._readable(key, space)


def full_id(name: str) -> str:
    """The registered id of `name`; `MODULE:ID` as it is. Raises EnvError for an unknown one."""
    for family in FAMILIES:
        for form in (f"{family}-{name}-v0", f"{family}-{name}"):
            if form in gymnasium.registry:
                return form
    if ":" in name or name in gymnasium.registry:
        return name
    known = [key for key in gymnasium.registry if key.startswith(FAMILIES)]
    short = [key.partition("-")[2].removesuffix("-v0") for key in known]
    raise unknown("MiniGrid or BabyAI task", name, known if name.startswith(FAMILIES) else short)


def planes(codes: Any, counts: tuple[int, int, int] = PLANES) -> np.ndarray:
    """uint8 (W, H, 3) codes of object, colour and state -> bool (H, W, P), P the sum of ``counts``.

    MiniGrid's first axis is x: transposed, the agent stands in the middle of the lowest row and
    looks up. Raises EnvError for codes that MiniGrid does not have.
    """
    codes = np.asarray(codes).swapaxes(0, 1)
    found = []
    for i, count in enumerate(counts):
        if codes[..., i].max() >= count:
            raise EnvError(
                f"observation 'grid' has the code {codes[..., i].max()} in its channel {i}, which"
                f" has {count} codes"
            )
        found.append(np.eye(count, dtype=np.bool_)[codes[..., i]])
    return np.concatenate(found, axis=-1)


def bag_of_words(text: Any) -> np.ndarray:
    """Counts of words and of neighbouring pairs, each at the place that its CRC-32 gives it:
    float32 (128,).

    Pairs tell the red ball and the blue key from the blue ball and the red key.
    """
    words = str(text).lower().replace(",", " ,").split()
    counts = np.zeros(MISSION, np.float32)
    for piece in (*words, *(" ".join(pair) for pair in itertools.pairwise(words))):
        counts[zlib.crc32(piece.encode()) % MISSION] += 1
    return counts
