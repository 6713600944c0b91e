"""What a world model's features know of an Atari console's memory: ridge regressions on bytes of
its RAM.

Recorded episodes have no RAM. Without sticky actions the emulator is deterministic, so an
episode's actions are played again, and its RAM is taken where every picture comes out the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ale_py
import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.factors import BYTES
from envs import make_env
from envs.base import resize
from hidreamer import checkpoint
from hidreamer.checkpoint import READ_ERRORS
from hidreamer.replay import Rows
from tools import Config

EPISODES = 20  # training episodes that regressions are fitted on
STEPS = 2000  # steps of them
ALPHAS = np.logspace(-1.0, 5.0, 13)
NOTE = (
    "RAM: share of a byte's variance that a ridge regression on the features leaves unexplained,"
    " fitted on training episodes; without a model: the better one of raw pixels and the untrained"
    " world model's features."
)

Encode = Callable[[Rows], np.ndarray]  # chunks (n, T, ...) -> features (n T, F)


def possible(config: Config) -> bool:
    return config.task in BYTES and config.env.atari.sticky == 0.0


def recover(rows: Rows, config: Config) -> np.ndarray | None:
    """(T, 128): the console's memory at each row; None where no number of no-ops leads to the same
    pictures.
    """
    atari = config.env.atari.tree()
    env = make_env(config.task, config.env.tree() | {"atari": atari | {"noops": 0}}, 0)
    env.reset()
    ale = env.suite.ale
    screen = ale.getScreenGrayscale if atari["grayscale"] else ale.getScreenRGB
    for _ in range(atari["noops"] + 1):
        if np.array_equal(resize(screen(), tuple(config.env.size)), rows["image"][0]):
            start = env.get_state()
            if (found := play(env, rows)) is not None:
                return found
            env.set_state(start)
        ale.act(ale_py.Action.NOOP)
    return None


def play(env: Any, rows: Rows) -> np.ndarray | None:
    """(T, 128): the memory along an episode's actions; None where a picture differs."""
    found = [env.suite.ram()]
    for action, image in zip(rows["prev_action"][1:], rows["image"][1:], strict=True):
        if not np.array_equal(env.step(action)["image"], image):
            return None
        found.append(env.suite.ram())
    return np.stack(found)


def cached(path: Path, rows: Rows, config: Config, folder: Path) -> np.ndarray | None:
    """``recover``, which is done once for all the jobs that share ``folder``."""
    file = folder / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.npy"
    try:
        found = np.load(file)
    except READ_ERRORS:
        found = recover(rows, config)
        found = np.zeros((0, 128), np.uint8) if found is None else found
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_file(file, functools.partial(save, found=found))
    return found if len(found) == len(rows["reward"]) else None


def save(path: Path, found: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, found)


def pixels(batch: Rows) -> np.ndarray:
    return batch["image"].reshape(-1, np.prod(batch["image"].shape[2:])) / np.float32(255.0)


def errors(
    encoders: Mapping[str, Encode],
    train: list[Rows],
    held: list[Rows | None],
    names: Mapping[str, int],
) -> dict[str, dict[str, np.ndarray]]:
    """{encoder: {byte: (held,)}}: mean squared errors of linear probes, as shares of the variance.

    encoders: {name: chunks (n, T, ...) -> features (n * T, .)}. train, held: episodes as chunks
    (n, T, ...) with "ram" (n, T, 128) uint8. names: {name of a byte: its index}.
    NaN where an episode is None, a ball is never in play, or a byte never changes.
    """
    ram = np.concatenate([x["ram"].reshape(-1, 128) for x in train])
    picks = np.random.default_rng(0).permutation(len(ram))[:STEPS]
    out: dict[str, dict[str, np.ndarray]] = {}
    balls = {name: byte for name, byte in names.items() if name.startswith("ball")}
    others = {name: byte for name, byte in names.items() if name not in balls}
    for who, encode in encoders.items():
        # What never changes in training, but for rounding, must not become a feature.
        x = np.concatenate([encode(chunk).round(4) for chunk in train])[picks]
        features = [None if chunk is None else encode(chunk).round(4) for chunk in held]
        out[who] = {}
        # Which steps count differs, so each has a regression of its own.
        for group in (balls, others):
            columns = list(group.values())
            use = valid_steps(ram[picks], columns, group is balls)
            if not columns or use.sum() < 2:
                continue
            y = ram[picks][use][:, columns].astype(float)
            ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, alpha_per_target=True))
            ridge.fit(x[use], y)
            errors = []
            for feat, chunk in zip(features, held, strict=True):
                errors.append(mean_errors(ridge, feat, chunk, columns, group is balls))
            variance = np.where(y.var(0) > 0.0, y.var(0), np.nan)
            out[who] |= dict(zip(group, (np.stack(errors) / variance).T, strict=True))
    return out


def valid_steps(ram: np.ndarray, columns: list[int], balls: bool) -> np.ndarray:
    """(N,) of RAM (N, 128): whether the bytes in ``columns`` mean something at a step."""
    return (ram[:, columns] > 0).all(-1) | (not balls)


def mean_errors(
    ridge: Any, feat: np.ndarray | None, chunk: Rows | None, columns: list[int], balls: bool
) -> np.ndarray:
    """(columns,): mean squared errors over the valid steps of an episode, NaN without any."""
    if chunk is None:
        return np.full(len(columns), np.nan)
    ram = chunk["ram"].reshape(-1, 128)
    use = valid_steps(ram, columns, balls)
    if not use.any():
        return np.full(len(columns), np.nan)
    error = ridge.predict(feat[use]).reshape(-1, len(columns)) - ram[use][:, columns]
    return np.square(error).mean(0)


def compare(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{"model/RAM BYTE", "baseline/RAM BYTE": (held,)} of what ``errors`` found; the baseline is
    the best of the other encoders.
    """
    others = [by for who, by in found.items() if who != "model"]
    mean = lambda x: np.nanmean(x) if np.isfinite(x).any() else np.inf
    out = {}
    for name, shares in found["model"].items():
        out[f"model/RAM {name}"] = shares
        out[f"baseline/RAM {name}"] = min((by[name] for by in others), key=mean)
    return out
