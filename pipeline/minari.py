"""Episodes from and to Minari data sets (the extra ``minari``).

A data set has the frames as observations, the game's own action ids, and the console's memory in
the infos, under ``ram``. One that was made elsewhere has it too, or cannot be read: the probes of
every later stage need it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from hidreamer import app, checkpoint
from hidreamer.checkpoint import FolderError
from pipeline.collect import Played
from pipeline.data import Recording, Space
from tools import ConfigError, user_path


def package() -> Any:
    """Raises ConfigError where the extra is not installed."""
    try:
        import minari
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Minari data sets need the package {error.name!r}: {app.install_line('minari')}"
        ) from error
    return minari


def episodes_of(name: str, space: Space) -> Iterator[Any]:
    """The episodes of a data set by its folder, or by its id among those that Minari keeps. Raises
    ConfigError, also where its actions are not those of ``space``.
    """
    minari, path = package(), user_path(name)
    try:
        inside = (path / "data").is_dir()
        found = minari.MinariDataset(path / "data") if inside else minari.load_dataset(name)
        refuse_other_actions(found.action_space, space, name)
        yield from found.iterate_episodes()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"pipeline.collect.from_minari: {name} is no Minari data set on this machine"
            f" ({reason}); `minari download {name}` fetches a public one"
        ) from None


def read(name: str, wanted: list[Space], steps: int) -> list[list[Played]]:
    """Episodes of at least ``steps`` steps for every space of ``wanted``, from NAME/GAME, or NAME
    itself where there is one game. The last one is cut. Raises ConfigError.
    """
    found = []
    for space in wanted:
        game = space.task.removeprefix("atari_")
        inside = user_path(name) / game
        source = str(inside) if inside.is_dir() else name
        if len(wanted) > 1 and source == name:
            raise ConfigError(f"pipeline.collect.from_minari: {name} has no data set {game}")
        episodes, total = [], 0
        for episode in episodes_of(source, space):
            if total >= steps:
                break
            played = converted(episode, space, source)
            if total + len(played.rows["reward"]) - 1 > steps:
                played = cut(played, steps - total)
            total += len(played.rows["reward"]) - 1
            episodes.append(played)
        if total < steps:
            raise ConfigError(
                f"{source} holds {total} steps, not {steps}: lower pipeline.collect.steps"
            )
        found.append(episodes)
    return found


def refuse_other_actions(theirs: Any, space: Space, source: str) -> None:
    """The same numbers are other actions in a set of 18. Raises ConfigError."""
    if getattr(theirs, "n", None) != space.actions or getattr(theirs, "start", 0):
        raise ConfigError(
            f"{source} has the actions {theirs}, and {space.task} {space.actions} of them: set"
            " env.atari.actions"
        )


def converted(episode: Any, space: Space, source: str) -> Played:
    """Raises ConfigError where the episode does not fit the config."""
    image, infos = np.asarray(episode.observations), episode.infos or {}
    shape, actions = space.spec["image"][0], np.asarray(episode.actions)
    if image.ndim == 3 and shape[-1] == 1:
        image = image[..., None]  # (T, H, W, 1)
    if image.dtype != np.uint8 or image.shape[1:] != shape:
        raise ConfigError(
            f"{source} shows {image.dtype} {image.shape[1:]}, not uint8 {shape}: set env.size and"
            " env.atari.grayscale"
        )
    if not len(actions) or not np.isfinite(episode.rewards).all():
        raise ConfigError(f"{source} has an episode without a step, or a reward that is no number")
    if actions.ndim != 1 or actions.min() < 0 or actions.max() >= space.actions:
        raise ConfigError(
            f"{source} has actions up to {actions.max()}, and {space.task} has {space.actions}:"
            " set env.atari.actions"
        )
    if "ram" not in infos or np.shape(infos["ram"]) != (len(image), 128):
        raise ConfigError(f"{source} has no 'ram' (T, 128) in its infos, which the probes need")
    count = len(image)
    first, last = np.arange(count) == 0, np.arange(count) == count - 1
    rows = {  # in the order of ``play``: the file is then the same, to the last bit
        "image": image,
        "reward": np.concatenate([[0.0], episode.rewards]).astype(np.float32),
        "is_first": first,
        "is_last": last,
        "is_terminal": last & bool(np.asarray(episode.terminations)[-1]),
        "prev_action": np.zeros((count, space.actions), np.float32),
        "ram": np.asarray(infos["ram"], np.uint8),
    }
    rows["prev_action"][np.arange(1, count), actions.astype(int)] = 1.0
    return Played(rows, float(rows["reward"].sum()))


def cut(played: Played, steps: int) -> Played:
    """The first ``steps`` steps, as a truncated episode."""
    rows = {key: x[: steps + 1].copy() for key, x in played.rows.items()}
    rows["is_last"][-1] = True
    return Played(rows, float(rows["reward"].sum()))


def refuse_existing(folder: Path, games: list[str]) -> None:
    """Before games are recorded. Raises FolderError where FOLDER/GAME is there already."""
    for target in (folder / game for game in games):
        if target.exists():
            raise FolderError(
                f"{target} is there already: choose another pipeline.collect.to_minari"
            )


def write(folder: Path, games: list[str], load: Callable[[str], Recording]) -> list[str]:
    """A data set FOLDER/GAME of every game that has none there, from what ``load`` has of it. ->
    lines about them.

    Raises ConfigError, FolderError.
    """
    minari = package()
    from minari.data_collector import EpisodeBuffer

    lines = []
    for game in games:
        target = folder / game
        if target.exists():
            lines.append(f"Minari data set {target} is there already and left as it is")
            continue
        recording, buffers = load(game), []
        bounds = [*np.flatnonzero(recording.is_first), len(recording)]
        for i, (a, b) in enumerate(itertools.pairwise(bounds)):
            buffers.append(
                EpisodeBuffer(
                    id=i,
                    observations=recording.image[a:b],
                    actions=recording.action[a + 1 : b].argmax(-1),
                    rewards=recording.reward[a + 1 : b].astype(float),
                    terminations=recording.is_terminal[a + 1 : b],
                    truncations=(recording.is_last & ~recording.is_terminal)[a + 1 : b],
                    infos={"ram": recording.ram[a:b]},
                )
            )
        shape = recording.image.shape[1:]
        minari_write(minari, target, buffers, shape, recording.action.shape[1])
        lines.append(f"Minari data set {target}: {len(buffers)} episodes")
    return lines


def minari_write(
    minari: Any, target: Path, buffers: list, shape: tuple[int, ...], actions: int
) -> None:
    """``create_dataset_from_buffers`` in ``target``, which is there once it is whole.

    Minari asks for a place by a variable only. Raises ConfigError, FolderError where another
    process writes it.
    """
    folder = target.with_name(target.name + ".tmp")
    made = folder / f"{target.name}-v0"
    with checkpoint.locked(folder):
        try:
            shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
            minari_create(minari, made, buffers, shape, actions)
            made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)  # a full disk has no room for half a data set
    with contextlib.suppress(OSError):
        folder.rmdir()


def minari_create(
    minari: Any, made: Path, buffers: list, shape: tuple[int, ...], actions: int
) -> None:
    """The data set ``made``, NAME-v0 as Minari has it. Raises ConfigError."""
    before, name = os.environ.get("MINARI_DATASETS_PATH"), made.name.removesuffix("-v0")
    os.environ["MINARI_DATASETS_PATH"] = str(made.parent.resolve())
    facts = {
        "observation_space": spaces.Box(0, 255, shape, np.uint8),
        "action_space": spaces.Discrete(actions),
        "algorithm_name": "hidreamer pipeline collect",
        "description": f"{name}: frames, actions, rewards; infos: the console's memory.",
        "jpeg_encoding": False,  # the default loses pixels
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about environments that it could not make itself
            minari.create_dataset_from_buffers(made.name, buffers, **facts)
    except ValueError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"pipeline.collect.to_minari: Minari cannot write {name} to {made.parent.parent}"
            f" ({reason})"
        ) from None
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
