"""How much of "the ball is where it is" needs a model? A table of counts, without one.

    python benchmarks/counted.py RUN [RUN ...] [--out results/F.json]

Each RUN is the folder of a run on MinAtar Breakout, whose episodes are split as the world models'
are (analysis/offline.py). The table has, for the ball's last two cells, where it most often was
so many steps later on the training episodes: it sees no bricks, no paddle and no action. It is
judged on the same held-out chunks, after the same steps, as benchmarks/quantisers.py judges dreams.
What no two cells were counted for stays where it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np

import run_config
import tools
from analysis import heldout, offline
from envs import EnvError, env_for_spaces
from hidreamer.provenance import provenance
from hidreamer.replay import Rows, row_spec

TASK, BALL = "minatar_breakout", 1  # and the plane of its ball
CONTEXT, HORIZONS = 8, (1, 3, 7, 15)
LATE = 3.0  # points of an episode before a chunk of it: on Breakout it begins behind three bricks
PIECES = 384  # held-out chunks that are looked at, at most


class Table:
    """Counted on the grids of ``episodes``, (T, H, W, planes) each, for every one of ``horizons``:
    {horizon: (cells ** 2,)}, the likeliest cell after two cells.
    """

    def __init__(self, episodes: Iterable[np.ndarray], plane: int, horizons: Sequence[int]):
        grids = list(episodes)
        paths = [cells(grid, plane) for grid in grids]
        self.size = grids[0].shape[1] * grids[0].shape[2]
        self.guess: dict[int, np.ndarray] = {}
        for h in horizons:
            counts = np.zeros((self.size**2, self.size), np.int64)
            for path in paths:
                if len(path) > h + 1:
                    pair = self.size * path[:-1] + path[1:]
                    np.add.at(counts, (pair[:-h], path[h + 1 :]), 1)
            stays = np.arange(self.size**2) % self.size
            self.guess[h] = np.where(counts.any(1), counts.argmax(1), stays)

    def __call__(self, before: np.ndarray, now: np.ndarray, h: int) -> np.ndarray:
        """Where the thing will be ``h`` steps on, (N,), from its last two cells (N,)."""
        return self.guess[h][self.size * before + now]


def cells(grid: Any, plane: int) -> Any:
    """Where a plane of MinAtar's grids (..., H, W, planes), drawn or real, has its thing -> (...,).
    An array or a tensor, as ``grid`` is.
    """
    return grid[..., plane].reshape(*grid.shape[:-3], -1).argmax(-1)


def pieces(held: Iterable[Rows], length: int) -> tuple[Rows, np.ndarray, int]:
    """The held-out chunks of whole length that are judged, {key: (N, T, ...)}, which of them are
    late (N,), and of how many episodes they are. Raises ConfigError where there is none.
    """
    held = [rows | {"return": np.cumsum(rows["reward"]) - rows["reward"]} for rows in held]
    found = [heldout.chunks(rows, length) for rows in held if len(rows["reward"]) >= length]
    if not found:
        raise tools.ConfigError(
            f"no held-out episode has the {length} steps of a sequence: record longer ones"
        )
    rows = {key: np.concatenate([x[key] for x in found]) for key in found[0]}
    picks = np.random.default_rng(0).permutation(len(rows["reward"]))[:PIECES]
    rows = {key: x[picks] for key, x in rows.items()}
    return rows, rows.pop("return")[:, 0] >= LATE, len(found)


def judged(folder: Path) -> dict[str, Any]:
    """Shares of right guesses on a run's held-out chunks, beside those of the last cell. Raises
    ConfigError.
    """
    config = tools.load_config([], run_config.saved_config(folder))
    if config.task != TASK:
        raise tools.ConfigError(f"{folder} is a run on {config.task}: give one on {TASK}")
    env = env_for_spaces(config.task, config.env.tree())
    spec = row_spec(env.obs_space, env.act_dim)
    train, held = offline.split(offline.find([str(folder)]))
    episodes = offline.load(train, spec)
    table = Table((rows["grid"] for rows in episodes.values()), BALL, HORIZONS)
    rows, late, count = pieces(offline.load(held, spec).values(), config.replay.length)
    path = cells(rows["grid"], BALL)  # (N, T)
    out: dict[str, Any] = {"chunks": len(path), "late": int(late.sum()), "episodes": count}
    for h in HORIZONS:
        truth, last = path[:, CONTEXT - 1 + h], path[:, CONTEXT - 1]
        for name, guess in (
            ("counted", table(path[:, CONTEXT - 2], last, h)),
            ("last frame seen", last),
        ):
            right = guess == truth
            out[f"ball {h}, {name}"] = round(float(right.mean()), 4)
            if late.any():
                out[f"ball {h} late, {name}"] = round(float(right[late].mean()), 4)
    return out


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        found = {str(i): judged(folder) for i, folder in enumerate(args.runs)}
    except (tools.ConfigError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measure.write(provenance() | {"runs": found}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
