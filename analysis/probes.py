"""What a world model's features know of an Atari console's memory: ridge regressions on bytes of
its RAM.

Recorded episodes have no RAM. Without sticky actions the emulator is deterministic, so an
episode's actions are played again, and its RAM is taken where every picture comes out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ale_py
import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.factors import BYTES
from envs import make_env
from envs.base import resize
from hidreamer import checkpoint
from hidreamer.checkpoint import READ_ERRORS
from hidreamer.replay import Rows
from tools import Config

EPISODES = 20  # training episodes that regressions are fitted on, of all ages of a run
STEPS = 2000  # steps of them, unless asked otherwise
ALPHAS = np.logspace(-1.0, 7.0, 17)  # the last ones leave of any features nothing but the mean
FOLDS = 5  # of training episodes, by which the penalty is chosen
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
    what = hashlib.sha256(str(path.resolve()).encode())
    for key in ("image", "prev_action"):  # another episode may have come to lie there
        what.update(np.ascontiguousarray(rows[key]))
    file = folder / f"{what.hexdigest()[:16]}.npy"
    try:
        found = np.load(file)
    except READ_ERRORS:
        found = recover(rows, config)
        found = np.zeros((0, 128), np.uint8) if found is None else found
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_array(file, found)
    return found if len(found) == len(rows["reward"]) else None


def pixels(batch: Rows) -> np.ndarray:
    return batch["image"].reshape(-1, np.prod(batch["image"].shape[2:])) / np.float32(255.0)


class Squares(NamedTuple):
    """Of a byte: sums of squares over the steps of each held-out episode that count, (held,)."""

    error: np.ndarray  # of the probe
    about: np.ndarray  # about the mean of the steps that it was fitted on: what that mean would err
    steps: np.ndarray  # how many there are
    variance: float  # of the steps that it was fitted on; NaN where the byte never changes

    @property
    def shares(self) -> np.ndarray:
        """(held,): mean squared errors as shares of the variance in training; NaN without steps."""
        return self.error / np.where(self.steps > 0, self.steps, np.nan) / self.variance

    @property
    def r2(self) -> float:
        """Of all steps together, about the training mean: 0 is what that mean does.

        With the variance in training for a unit it would not be: of a byte that hardly varies on
        the held-out episodes (a score) any constant would explain much. NaN where there is nothing
        to explain, in training or on the held-out episodes.
        """
        together = Squares(*(x.sum(keepdims=True) for x in self[:3]), self.variance)
        return float(together.each[0])

    @property
    def each(self) -> np.ndarray:
        """(held,): ``r2`` of each episode alone."""
        about = np.where((self.about > 0.0) & np.isfinite(self.variance), self.about, np.nan)
        return 1.0 - self.error / about


def squares(
    encoders: Mapping[str, Encode],
    train: list[Rows],
    held: list[Rows | None],
    names: Mapping[str, int],
    steps: int = STEPS,
) -> dict[str, dict[str, Squares]]:
    """{encoder: {byte: Squares}} of linear probes.

    encoders: {name: chunks (n, T, ...) -> features (n * T, .)}. train, held: episodes as chunks
    (n, T, ...) with "ram" (n, T, 128) uint8, steps in their order; of a held one that is None
    nothing counts. names: {name of a byte: its index}. steps: of ``train`` that are fitted on, at
    most.
    """
    parts = [x["ram"].reshape(-1, 128) for x in train]
    ram, episode = np.concatenate(parts), np.repeat(np.arange(len(parts)), list(map(len, parts)))
    picks = np.sort(np.random.default_rng(0).permutation(len(ram))[:steps])
    out: dict[str, dict[str, Squares]] = {}
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
            scaler = StandardScaler().fit(x[use].astype(float))
            scaled, fold = scaler.transform(x[use].astype(float)), folds(episode[picks][use])
            ridge = make_pipeline(scaler, Ridge(penalties(scaled, y, fold)))
            ridge.fit(x[use].astype(float), y)
            sums = []
            for feat, chunk in zip(features, held, strict=True):
                sums.append(sums_of(ridge, feat, chunk, columns, group is balls, y.mean(0)))
            error, about, count = np.moveaxis(np.stack(sums), 0, -1)  # (columns, held) each
            variance = np.where(y.var(0) > 0.0, y.var(0), np.nan)
            by = zip(error, about, count, variance.tolist(), strict=True)
            out[who] |= {name: Squares(*one) for name, one in zip(group, by, strict=True)}
    return out


def folds(episode: np.ndarray) -> np.ndarray:
    """(N,) of steps by the number of their episode (N,): whole episodes; stretches of a single
    one.
    """
    found, index = np.unique(episode, return_inverse=True)
    if len(found) == 1:
        return np.arange(len(episode)) * FOLDS // len(episode)
    return index % FOLDS


def penalties(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(Y,): that of ALPHAS with which a ridge regression of features (N, F) on y (N, Y) does best
    on the folds (N,) that it was not fitted on.

    Leaving out single steps instead, whose neighbours stay, asks for far too little: the more
    features (pixels), the worse is then what is read on other episodes.
    """
    error = np.zeros((len(ALPHAS), y.shape[1]))
    for k in np.unique(fold):
        fit, out = fold != k, fold == k
        mean, centre = x[fit].mean(0), y[fit].mean(0)
        a, b, target = x[fit] - mean, x[out] - mean, y[fit] - centre
        if len(a) > a.shape[1]:  # along the axes of the features, or of the steps: what is fewer
            scale, axes = np.linalg.eigh(a.T @ a)
            side, product = b @ axes, axes.T @ (a.T @ target)
        else:
            scale, axes = np.linalg.eigh(a @ a.T)
            side, product = b @ a.T @ axes, axes.T @ target
        scale = np.maximum(scale, 0.0)[:, None]
        for i, alpha in enumerate(ALPHAS):
            error[i] += np.square(side @ (product / (scale + alpha)) + centre - y[out]).sum(0)
    return ALPHAS[error.argmin(0)]


def valid_steps(ram: np.ndarray, columns: list[int], balls: bool) -> np.ndarray:
    """(N,) of RAM (N, 128): whether the bytes in ``columns`` mean something at a step."""
    return (ram[:, columns] > 0).all(-1) | (not balls)


def sums_of(
    ridge: Any,
    feat: np.ndarray | None,
    chunk: Rows | None,
    columns: list[int],
    balls: bool,
    mean: np.ndarray,
) -> np.ndarray:
    """(3, columns) of an episode: squared errors, squares about ``mean``, steps that count."""
    if chunk is None:
        return np.zeros((3, len(columns)))
    ram = chunk["ram"].reshape(-1, 128)
    use = valid_steps(ram, columns, balls)
    if not use.any():
        return np.zeros((3, len(columns)))
    truth = ram[use][:, columns].astype(float)
    error = ridge.predict(feat[use]).reshape(truth.shape) - truth
    sums = [np.square(x).sum(0) for x in (error, truth - mean)]
    return np.stack([*sums, np.full(len(columns), use.sum())])


def compare(found: Mapping[str, Mapping[str, Squares]]) -> dict[str, np.ndarray]:
    """{"model/RAM BYTE", "baseline/RAM BYTE": (held,)}: ``Squares.shares`` of what ``squares``
    found; the baseline is the best of the other encoders.
    """
    shares = {who: {name: x.shares for name, x in by.items()} for who, by in found.items()}
    others = [by for who, by in shares.items() if who != "model"]
    mean = lambda x: np.nanmean(x) if np.isfinite(x).any() else np.inf
    out = {}
    for name, own in shares["model"].items():
        out[f"model/RAM {name}"] = own
        out[f"baseline/RAM {name}"] = min((by[name] for by in others), key=mean)
    return out
