"""A world model's predictions of episodes that it was not trained on, beside a baseline's without
a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import networks
from hidreamer import distributions as dists
from hidreamer.replay import Rows
from models import WorldModel

CONTEXT = 5  # observed steps before the open loop
# Steps of the open loop after which a prediction is judged, as far as a chunk reaches.
HORIZONS = (1, 5, 15, 30)
CHUNKS = 8  # pieces of an episode that are looked at, at most
BASELINE = "without a model"  # its name in reports
NOTE = (
    "Squared errors of pixels in [0, 1], of binary planes and of symlog vectors, and nats a step."
    " Moving: where the truth differs from the step before. Without a model: the mean observation"
    f" of the training episodes, the last one seen (of {CONTEXT}) for the open loop, and the"
    " frequencies of rewards and ends."
)


class Prediction(NamedTuple):
    """Of chunks of B sequences of T steps. Images and grids in [0, 1]."""

    reconstruction: dict[str, Tensor]  # (B, T, ...) each step, given it
    open_loop: dict[str, Tensor]  # (B, T, ...) from step CONTEXT on, given those before
    reward: dists.TwoHot  # (B, T)
    cont: dists.Bernoulli  # (B, T)


def chunks(rows: Rows, length: int) -> Rows:
    """Pieces (n, T, ...) of an episode, evenly spaced, together all of it if they can; each begins
    as in training.
    """
    total = len(rows["reward"])
    size = min(length, total)
    starts = np.linspace(0, total - size, min(CHUNKS, math.ceil(total / size))).round().astype(int)
    out = {}
    for key, x in rows.items():
        out[key] = np.stack([x[i : i + size] for i in starts])
    out["is_first"][:, 0] = True
    return out


@torch.no_grad()
def predict(model: WorldModel, batch: Mapping[str, Tensor]) -> Prediction:
    """A world model's prediction. batch: raw, (B, T, ...)."""
    _, post, _ = model.observe(networks.preprocess(batch))
    x = post.feat.cat()
    open_loop = model.open_loop(batch, CONTEXT)[1] if batch["reward"].shape[1] > CONTEXT else {}
    cont = model.cont(x).undiscounted()
    return Prediction(model.decode(post.feat)[0], open_loop, model.reward(x), cont)


class Baseline:
    """Predicts from averages of the training rows (N, ...) alone.

    bins: those of the models' rewards, a name of ``distributions.TWO_HOTS``.
    """

    def __init__(self, rows: Rows, keys: list[str], bins: str = "symlog"):
        self.two_hot = dists.TWO_HOTS[bins]
        self.means = {}
        for key in keys:
            scale = 255.0 if rows[key].dtype == np.uint8 else 1.0
            self.means[key] = rows[key].mean(0) / scale
        reward = torch.from_numpy(rows["reward"])
        logit = torch.zeros(dists.BINS, requires_grad=True)
        # The gradient of a two-hot likelihood is its target minus the softmax: the mean target,
        # without coding it anew.
        self.two_hot(logit.expand(len(reward), -1)).log_prob(reward).mean().backward()
        self.reward = (logit.grad + 1.0 / dists.BINS).clamp(min=1e-8).log()
        ends = float(rows["is_terminal"].sum())
        self.cont = torch.tensor(math.log((len(reward) - ends + 1.0) / (ends + 1.0)))

    def predict(self, truth: Mapping[str, Tensor]) -> Prediction:
        """truth: (B, T, ...), images in [0, 1]."""
        any_key = next(iter(truth.values()))
        shape = any_key.shape[:2]
        mean, last = {}, {}
        for key, x in truth.items():
            mean[key] = torch.from_numpy(self.means[key]).to(x).expand_as(x)
            if shape[1] > CONTEXT:
                last[key] = x[:, CONTEXT - 1 : CONTEXT].expand_as(x)
        reward = self.reward.to(any_key).expand(*shape, -1)
        cont = self.cont.to(any_key).expand(shape)
        return Prediction(mean, last, self.two_hot(reward), dists.Bernoulli(cont))


# ---------------------------------------------------------------- judging


def horizons(length: int) -> list[int]:
    """Those that chunks of ``length`` steps allow."""
    return sorted({min(h, length - CONTEXT) for h in HORIZONS if length > CONTEXT})


def score(
    predicted: Prediction, truth: Mapping[str, Tensor], batch: Mapping[str, Tensor], length: int
) -> dict[str, float]:
    """Means over an episode's chunks; NaN where it is too short, or nothing moves."""
    out = {}
    every = slice(1, None)  # the first step has nothing to have moved from
    out["reconstruction"], moving = errors(predicted.reconstruction, truth, every)
    out |= {} if moving is None else {"reconstruction, moving": moving}
    for h in horizons(length):
        at = slice(CONTEXT - 1 + h, CONTEXT + h)
        reaches = batch["reward"].shape[1] >= CONTEXT + h
        error, moving = errors(predicted.open_loop, truth, at) if reaches else (math.nan, math.nan)
        out[f"open loop, {h}"] = error
        if "reconstruction, moving" in out:
            out[f"open loop, {h}, moving"] = moving
    out["reward log-likelihood"] = predicted.reward.log_prob(batch["reward"]).mean().item()
    out["continue log-likelihood"] = (
        predicted.cont.log_prob(1.0 - batch["is_terminal"].float()).mean().item()
    )
    return out


def errors(
    predicted: Mapping[str, Tensor], truth: Mapping[str, Tensor], at: slice
) -> tuple[float, float | None]:
    """Squared error at some steps, mean over all keys; and over moving pixels, None if nothing has
    pixels.
    """
    total, moving, count = [], 0.0, 0
    pixels = [key for key, x in truth.items() if x.ndim == 5]
    for key, x in truth.items():
        a, b = (
            (predicted[key], x)
            if key in pixels
            else (dists.symlog(predicted[key]), dists.symlog(x))
        )
        error = (a - b).square()
        total.append(error[:, at].mean().item())
        if key in pixels:
            moved = torch.zeros_like(x[..., :1], dtype=torch.bool)  # (B, T, H, W, 1)
            moved[:, 1:] = (x[:, 1:] != x[:, :-1]).any(-1, keepdim=True)
            mask = moved.expand_as(x)[:, at]
            moving, count = moving + error[:, at][mask].sum().item(), count + mask.sum().item()
    return float(np.mean(total)), (moving / count if count else math.nan) if pixels else None
