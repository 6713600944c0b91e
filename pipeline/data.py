"""A game's recorded episodes, one after another, held-out ones apart.

Shapes: N rows of all episodes, A the game's actions, H x W x C an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from envs import make_env
from hidreamer.episodes import EpisodeError, load_episode, named_rows
from hidreamer.replay import Spec, row_spec
from pipeline import manifest
from pipeline.manifest import InputError
from tools import Config

RAM = ((128,), np.dtype(np.uint8))  # the console's memory, in every recorded row


class Space(NamedTuple):
    """What an environment of a game shows and takes."""

    task: str
    spec: Spec  # of a recorded row
    actions: int


def space(config: Config, game: str) -> Space:
    """Raises EnvError for a game that there is not."""
    env = make_env(f"atari_{game}", config.env.tree(), 0)
    spec = row_spec(env.obs_space, env.act_dim) | {"ram": RAM}
    env.close()
    return Space(f"atari_{game}", spec, env.act_dim)


def held_out(count: int, share: float) -> np.ndarray:
    """(count,) bool: which of a game's episodes are held out, evenly spaced.

    At least one, and never all. Raises ValueError where there are fewer than two.
    """
    if count < 2:
        raise ValueError("a game needs two episodes at least, so that one can be held out")
    number = min(max(round(count * share), 1), count - 1)
    out = np.zeros(count, bool)
    out[((np.arange(number) + 0.5) * count / number).astype(int)] = True
    return out


class Recording:
    """All rows of one game, in memory once: stacks are put together when they are asked for."""

    def __init__(self, game: str, rows: dict[str, np.ndarray], held_share: float):
        self.game = game
        self.image, self.action = rows["image"], rows["prev_action"]  # (N, H, W, C), (N, A)
        self.reward, self.ram = rows["reward"], rows["ram"]  # (N,), (N, 128)
        self.is_first, self.is_last = rows["is_first"], rows["is_last"]  # (N,)
        self.is_terminal = rows["is_terminal"]
        self.episode = self.is_first.cumsum() - 1  # (N,)
        starts = np.flatnonzero(self.is_first)
        self.start = starts[self.episode]  # (N,) the first row of a row's episode
        self.held = held_out(len(starts), held_share)[self.episode]  # (N,) bool

    def __len__(self) -> int:
        return len(self.reward)

    def stacks(self, rows: np.ndarray, count: int) -> np.ndarray:
        """The ``count`` last images of rows (M,), oldest first -> (M, count * C, H, W).

        Before an episode's start its first image is repeated.
        """
        index = rows[:, None] - np.arange(count)[::-1]  # (M, count)
        images = self.image[np.maximum(index, self.start[rows][:, None])]  # (M, count, H, W, C)
        return np.ascontiguousarray(images.transpose(0, 1, 4, 2, 3)).reshape(
            len(rows), -1, *images.shape[2:4]
        )

    def pairs(self, distance: int, held: bool) -> np.ndarray:
        """The rows whose episode goes on for ``distance`` more, (M,): no pair crosses an end."""
        if distance >= len(self):
            return np.zeros(0, int)
        same = self.episode[distance:] == self.episode[:-distance]
        return np.flatnonzero(same & (self.held[:-distance] == held))

    def windows(self, length: int, held: bool) -> np.ndarray:
        """The first rows (M,) of all runs of ``length`` rows within one episode."""
        if length > len(self):
            return np.zeros(0, int)
        last = self.episode[length - 1 :]
        first = slice(0, len(self) - length + 1)
        return np.flatnonzero((self.episode[first] == last) & (self.held[first] == held))

    def rows(self, held: bool) -> np.ndarray:
        """All rows (M,) of one side of the split."""
        return np.flatnonzero(self.held == held)

    def episodes(self, held: bool) -> list[slice]:
        """The rows of each episode of one side of the split."""
        starts = np.flatnonzero(self.is_first)
        ends = [*starts[1:], len(self)]
        both = zip(starts, ends, strict=True)
        return [slice(int(a), int(b)) for a, b in both if self.held[a] == held]

    def longest(self, held: bool) -> int:
        """Steps of the longest episode of one side of the split."""
        return max(part.stop - part.start for part in self.episodes(held))


def folder(root: Path, game: str) -> Path:
    """Where a game's episodes lie, as in the folder of a run of ``dreamer.py``."""
    return root / "collect" / game / "train_eps"


def load(root: Path, config: Config, game: str) -> Recording:
    """What ``collect`` recorded of a game. Raises InputError."""
    here, spec = folder(root, game), space(config, game).spec
    stage = root / "collect"
    outputs = (manifest.read(stage) or {"outputs": {}})["outputs"]
    own = {path for path in map(stage.joinpath, outputs) if path.parent == here}
    if strangers := sorted(set(here.glob("*.npz")) - own):
        raise InputError(f"{strangers[0]} is none of the recorded episodes: move it away")
    episodes = []
    for path in sorted(own):
        try:
            episodes.append(load_episode(path, spec, named_rows(path)))
        except EpisodeError as error:
            raise InputError(f"{path} cannot be used: {error}") from None
    if len(episodes) < 2:
        raise InputError(
            f"{here} holds {len(episodes)} episodes, and two are needed, so that one can be held"
            " out: raise pipeline.collect.steps, or lower env.time_limit"
        )
    rows = {}
    for key in spec:
        rows[key] = np.concatenate([episode[key] for episode in episodes])
    return Recording(game, rows, config.pipeline.held_out)


def load_all(root: Path, config: Config) -> list[Recording]:
    """Of every game of the config, in its order. Raises InputError."""
    return [load(root, config, game) for game in config.pipeline.games]
