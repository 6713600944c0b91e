"""Arguments of the library: each becomes what is needed, or one line says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from hidreamer.checkpoint import FolderError
from hidreamer.episodes import EpisodeError, load_episode


def whole(name: str, value: Any, least: int, error: type[Exception] = ValueError) -> int:
    """An integer argument of at least ``least``, and of 64 bits, as tensors and random generators
    take them. Raises ``error`` for everything else.
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_whole and least <= value < 2**63:
        return int(value)
    raise error(
        f"{name} is {value!r}; it must be a whole number, at least {least} and less than 2**63"
    )


def random(value: Any, device: torch.device) -> None:
    """Raises ValueError unless ``value`` is a generator of ``device``, or None."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        kind = type(value).__name__
        raise ValueError(f"generator is a {kind}; it must be a torch.Generator(agent.device)")
    if value.device.type != device.type:
        raise ValueError(f"generator is of {value.device}, the agent is on {device}")


def levels(value: Any, coarse: Sequence[str]) -> list[str]:
    """``levels`` of ``LoadedAgent.decode`` as names in ``coarse``, the levels up to each but the
    last; "all" for that. Raises ValueError.
    """
    if isinstance(value, bool):
        return list(coarse) if value else []
    known: dict[int | str, str] = {}
    for i, name in enumerate([*coarse, "all"]):
        both = "+".join(f"L{j}" for j in range(i + 1))
        known |= dict.fromkeys((i, f"L{i}", both, name), name)
    wanted = value if isinstance(value, list | tuple) else [value]
    for one in wanted:
        whole = isinstance(one, int | np.integer) and not isinstance(one, bool)
        if not (whole or isinstance(one, str)) or one not in known:
            some = ", ".join(repr(key) for key in known)
            raise ValueError(f"levels is {value!r}; it can be True, False, or some of {some}")
    chosen = {known[one] for one in wanted}
    return [name for name in [*coarse, "all"] if name in chosen]


def array(name: str, value: Any) -> np.ndarray:
    """Numbers or flags as an array. Raises ValueError."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    try:
        x = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        x = np.asarray(None)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} is a {type(value).__name__}, and no array of numbers")
    return x


def cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``x`` as ``dtype`` (uint8, bool or float32), where that loses nothing. Raises ValueError,
    which begins with ``name``.
    """
    if x.dtype == dtype or not x.size:
        found = x.astype(dtype, copy=False)
    elif dtype == np.uint8:
        if x.dtype.kind == "f" or x.min() < 0 or x.max() > 255:
            raise ValueError(f"{name} is {x.dtype}, not uint8 of 0 to 255")
        found = x.astype(dtype)
    elif dtype == np.bool_:
        if ((x != 0) & (x != 1)).any():
            raise ValueError(f"{name} has values besides 0 and 1")
        found = x.astype(dtype)
    else:
        found = x.astype(dtype)
    if dtype == np.float32 and not np.isfinite(found).all():
        raise ValueError(f"{name} is not finite: it has NaN or infinite values")
    return found


def rows(
    episode: Mapping[str, Any] | str | os.PathLike, spaces: Mapping[str, Box], act_dim: int
) -> dict[str, np.ndarray]:
    """An episode, or the path of one, as {key: (T, ...)} of observations in ``spaces``,
    ``prev_action`` (T,A) and ``is_first`` (T,). Raises ValueError, FolderError.
    """
    if isinstance(episode, str | os.PathLike):
        try:
            episode = load_episode(Path(episode))
        except EpisodeError as error:
            raise FolderError(f"{episode} is no episode: {error}") from None
    if not isinstance(episode, Mapping):
        kind = type(episode).__name__
        raise ValueError(f"an episode is a dict of arrays, or the path of a file, not a {kind}")
    episode = dict(episode)
    if "prev_action" not in episode and "action" in episode:
        episode["prev_action"] = episode["action"]
    if "prev_action" not in episode:
        raise ValueError("the episode has no prev_action, the action that led to each step")
    expected = {key: (space.shape, space.dtype) for key, space in spaces.items()}
    expected["prev_action"] = ((act_dim,), np.dtype(np.float32))
    if "is_first" in episode:
        expected["is_first"] = ((), np.dtype(bool))
    found = {}
    for key, (shape, dtype) in expected.items():
        if key not in episode:
            seen = ", ".join(spaces)
            raise ValueError(f"the episode has no {key}; this agent sees {seen}")
        x = array(f"{key} of the episode", episode[key])
        if x.ndim != 1 + len(shape) or x.shape[1:] != shape:
            wanted = ", ".join(map(str, ("T", *shape)))
            raise ValueError(f"{key} of the episode is {x.shape}, not ({wanted})")
        found[key] = cast(f"{key} of the episode", x, dtype)
    lengths = {key: len(x) for key, x in found.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ValueError(f"the arrays of the episode have different numbers of steps: {listed}")
    steps = lengths["prev_action"]
    if not steps:
        raise ValueError("the episode has no steps")
    found["is_first"] = found.get("is_first", np.zeros(steps, bool)).copy()
    found["is_first"][0] = True
    return found
