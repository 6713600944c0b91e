"""Gymnasium's observation spaces, read as what the networks know: images, grids and vectors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

from envs.base import check_finite, resize
from envs.errors import EnvError, one_line

SMALLEST = 8  # pixels of a picture's shorter side; below, numbers on a board
LONG = 1024  # numbers from which an array that is read as a vector is worth a warning
LARGEST = 2**20  # numbers of a vector
SLACK = 1e-3  # how far, as a share of its range, a float picture may leave its bounds

Reader = Callable[[Any], np.ndarray]


class Leaf(NamedTuple):
    """A part of an observation that has no parts: where it is in the Dicts and Tuples around it,
    from the outside in, and its space.
    """

    path: tuple[str | int, ...]
    space: gymnasium.Space


def leaves(space: gymnasium.Space) -> dict[str, Leaf]:
    """{name: leaf}: of a Dict, a Tuple, or one within another, `a`, `0`, `a/b`, `a/0`; a space
    without parts has its kind for a name. Raises EnvError for two leaves of one name.
    """
    if not isinstance(space, Dict | Tuple):
        return {kind(space): Leaf((), space)}
    if not any(_parts((), space)):
        raise EnvError(f"the observation is {one_line(space)}, which has no parts")
    found: dict[str, Leaf] = {}
    for leaf in _parts((), space):
        name = "/".join(map(str, leaf.path))
        if name in found:
            raise EnvError(
                f"two observations are called {name!r}: rename one (docs/own_environment.md)"
            )
        found[name] = leaf
    return found


def _parts(path: tuple, space: gymnasium.Space) -> Iterator[Leaf]:
    if isinstance(space, Dict):
        parts = space.spaces.items()
        if nameless := [key for key in space.spaces if not isinstance(key, str) or not key]:
            raise EnvError(
                f"observation {nameless[0]!r} has no name: the keys of a Dict space must be text"
            )
    elif isinstance(space, Tuple):
        parts = enumerate(space.spaces)
    else:
        yield Leaf(path, space)
        return
    for key, part in parts:
        yield from _parts((*path, key), part)


def at(path: Sequence[str | int], value: Any) -> Any:
    """The part of an observation that `path` leads to. Raises EnvError where there is none."""
    for depth, key in enumerate(path):
        here = f"observation {'/'.join(map(str, path[:depth]))!r}" if depth else "the observation"
        if isinstance(key, int):
            if isinstance(value, np.ndarray) and value.ndim:  # as Gymnasium does
                value = tuple(value)
            if not isinstance(value, tuple | list) or key >= len(value):
                raise EnvError(f"{here} must be a tuple as its space is, not {count(value)}")
        elif not isinstance(value, Mapping):
            raise EnvError(f"{here} must be a dict as its space is, not {count(value)}")
        elif key not in value:
            raise EnvError(f"{here} lacks {key!r}, which its space has")
        value = value[key]
    return value


def count(value: Any) -> str:
    """What something is that should be something else."""
    return f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"


class Layout(NamedTuple):
    """How an array becomes a picture (H, W, C): transposed to `axes`, then reshaped to `shape`."""

    axes: tuple[int, ...]
    shape: tuple[int, int, int]


def layout(space: gymnasium.Space) -> Layout | None:
    """Where height, width and channels of a picture are; None for a space that is none.

    A picture is a Box with bounds [0, 255], or [0, 1] if of floats, of shape (H, W), (H, W, C),
    (C, H, W), or a stack of N of these, (N, H, W, C) or (N, C, H, W), whose C is at most 4. Height
    and width are 8 or more, and channels fewer than both; the channels of a stack come frame by
    frame.
    """
    if not isinstance(space, Box) or space.dtype.kind not in "iuf":
        return None
    tops = (1, 255) if space.dtype.kind == "f" else (255,)
    if not (space.low == 0).all() or not any((space.high == top).all() for top in tops):
        return None
    orders = {2: ["hw"], 3: ["hwc", "chw"], 4: ["nhwc", "nchw"]}.get(len(space.shape), [])
    for order in orders:
        sizes = dict(zip(order, space.shape, strict=True))
        side, channels = min(sizes["h"], sizes["w"]), sizes.get("c", 1)
        if side >= SMALLEST and channels < side and (channels <= 4 or "n" not in sizes):
            axes = tuple(order.index(letter) for letter in "hwnc" if letter in order)
            return Layout(axes, (sizes["h"], sizes["w"], sizes.get("n", 1) * channels))
    return None


def kind(space: gymnasium.Space) -> str:
    """What a space is read as: image, grid or vector."""
    if layout(space):
        return "image"
    board = isinstance(space, Box) and space.dtype == np.bool_ and len(space.shape) in (2, 3)
    return "grid" if board else "vector"


def readable(space: gymnasium.Space) -> bool:
    """Whether `reader` knows the type of space."""
    return isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete)


def is_text(space: gymnasium.Space) -> bool:
    """Whether its values are words: Gymnasium's Text, or a space of its own such as MiniGrid's."""
    return isinstance(space, Text) or space.dtype == np.dtype(str)


def reader(key: str, space: gymnasium.Space, size: tuple[int, int]) -> tuple[Box, Reader]:
    """-> the agent's space of one readable leaf, and the function from the environment's value to
    the agent's.

    size: height and width that pictures get. The function raises EnvError, naming `key`, for a
    value that is not of the space, and BadValue for a NaN in a picture; vectors it leaves to `Env`
    to check. Raises EnvError for a space without entries, or too large.
    """
    width = gymnasium.spaces.flatdim(space)
    if width == 0:
        raise EnvError(
            f"observation {key!r} is {one_line(space)}, which is empty (docs/own_environment.md)"
        )
    if found := layout(space):
        box = Box(0, 255, (*size, found.shape[2]), np.uint8)
        return box, functools.partial(_read_picture, key, space, found, size)
    if kind(space) == "grid":
        box = Box(0, 1, (*space.shape, 1)[:3], np.bool_)
        return box, functools.partial(_read_grid, key, space)
    if width > LARGEST:
        raise EnvError(
            f"observation {key!r} is {one_line(space)}, {width} numbers, of which a vector can have"
            f" {LARGEST}: make it smaller in a wrapper (docs/own_environment.md)"
        )
    if width >= LONG and len(space.shape) > 1:
        warnings.warn(
            f"observation {key!r} is {one_line(space)}, by its bounds or shape no picture: read as"
            f" a vector of {width} numbers (docs/own_environment.md)",
            RuntimeWarning,
            stacklevel=2,
        )
    box = Box(-np.inf, np.inf, (width,))
    if isinstance(space, Discrete):
        return box, functools.partial(_read_choice, key, space)
    if isinstance(space, MultiDiscrete):
        return box, functools.partial(_read_choices, key, space)
    return box, functools.partial(_read_vector, key, space)


def _read_picture(
    key: str, space: Box, found: Layout, size: tuple[int, int], value: Any
) -> np.ndarray:
    """-> uint8 (*size, C)"""
    array = _array(key, space, value)
    top = float(space.high.flat[0])
    if array.dtype != np.uint8 or top != 255:
        if array.dtype.kind == "b" or (array.dtype.kind == "f" and space.dtype.kind != "f"):
            raise EnvError(
                f"observation {key!r} is {array.dtype}, its space says {space.dtype}: return"
                f" {space.dtype}, or declare the space as floats, Box(0, 1, shape, np.float32)"
            )
        low, high = array.min(), array.max()
        check_finite(f"observation {key!r}", np.array([low, high]))  # a NaN is both
        if low < -SLACK * top or high > top + SLACK * top:
            raise EnvError(
                f"observation {key!r} has values in [{low}, {high}], its space says [0, {top:g}]"
            )
        array = np.rint(np.clip(array, 0, top) * (255 / top)).astype(np.uint8)
    return resize(array.transpose(found.axes).reshape(found.shape), size)


def _read_grid(key: str, space: Box, value: Any) -> np.ndarray:
    """-> bool (H, W, C)"""
    array = _array(key, space, value)
    if array.dtype != np.bool_:
        raise EnvError(f"observation {key!r} is {array.dtype}, its space says bool")
    return array.reshape((*space.shape, 1)[:3])


def _read_choice(key: str, space: Discrete, value: Any) -> np.ndarray:
    """-> one-hot (n,)"""
    array = np.asarray(value)
    if (
        array.size != 1
        or array.dtype.kind not in "biu"  # True and False are 1 and 0, as for Gymnasium
        or not 0 <= int(array.item()) - space.start < space.n
    ):
        raise EnvError(f"observation {key!r} is {one_line(repr(value))}, its space says {space}")
    one_hot = np.zeros(space.n, np.float32)
    one_hot[int(array.item()) - space.start] = 1
    return one_hot


def _read_choices(key: str, space: MultiDiscrete, value: Any) -> np.ndarray:
    """-> one-hots side by side (sum(nvec),)"""
    array = _array(key, space, value)
    chosen, sizes = (array - space.start).ravel(), space.nvec.ravel()
    if array.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= sizes).any():
        raise EnvError(
            f"observation {key!r} is {one_line(array, 80)}, its space says {one_line(space)}"
        )
    one_hots = np.zeros(sizes.sum(), np.float32)
    one_hots[np.cumsum(sizes) - sizes + chosen] = 1
    return one_hots


def _read_vector(key: str, space: Box | MultiBinary, value: Any) -> np.ndarray:
    """-> numbers (N,), not yet float32: it is `Env` that casts and checks."""
    array = _array(key, space, value)
    if isinstance(space, MultiBinary) and not ((array == 0) | (array == 1)).all():
        raise EnvError(f"observation {key!r} is {one_line(array)}, its space says {space}")
    return array.ravel()


def _array(key: str, space: gymnasium.Space, value: Any) -> np.ndarray:
    """The value as an array of numbers of the space's shape. Raises EnvError."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # lists of unequal lengths
        array = np.empty((), object)
    if array.dtype.kind not in "biuf":
        raise EnvError(
            f"observation {key!r} is {one_line(repr(value))}, its space says {one_line(space)}"
        )
    if array.shape != space.shape:
        raise EnvError(f"observation {key!r} has shape {array.shape}, its space says {space.shape}")
    return array
