"""What a world model holds at each step of an episode: memory, levels, codes, and predictions.

``L0`` is the coarsest level. A flat state (rssm) is one level.

Shapes: T steps of an episode, D deter, Z stoch, S variables of K classes in a level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Dynamics, Feat, Post
from models import WorldModel

HORIZONS = (0, 1, 5, 15)  # steps of the open loop after which features are read; 0: the posterior
CONTEXT = 5  # observed steps before an open loop
STILL = "before the dream"  # the state that an open loop begins from, as if it told of its end


class Latents(NamedTuple):
    """Of one episode."""

    embed: Tensor  # (T, E) of the encoder alone
    feat: dict[int, Feat]  # {horizon: (T, .)}, by the step that the features are about
    codes: dict[str, np.ndarray]  # {level: (T, S)} classes of the posterior's draw
    kl: np.ndarray  # (T, levels) nats between posterior and prior
    post_entropy: np.ndarray  # (T, levels) nats


def names(dynamics: Dynamics) -> list[str]:
    """Of the levels, coarse to fine."""
    return [f"L{i}" for i in range(len(dynamics.shapes))]


def parts(dynamics: Dynamics, feat: Feat) -> dict[str, Tensor]:
    """{name: (..., numbers)}: memory alone, each level alone, levels together, everything."""
    levels = feat.stoch.split(dynamics.level_dims, -1)
    out = {"deter": feat.deter}
    out |= dict(zip(names(dynamics), levels, strict=True))
    for i in range(1, len(levels)):
        out["+".join(names(dynamics)[: i + 1])] = torch.cat(levels[: i + 1], -1)
    return out | {"all": feat.cat()}


@torch.no_grad()
def read(model: WorldModel, obs: Mapping[str, Tensor], seed: int) -> Latents:
    """obs: a preprocessed episode (1, T, ...). States are sampled, as in training and acting."""
    dynamics, random = model.dynamics, generator(obs, seed)
    carry, post, embed = model.observe(obs, generator=random)
    kl, entropy = [], []
    for level in post.levels:
        after, before = (dists.unimix_probs(logit, dynamics.kl_config.unimix) for logit in level)
        kl.append(dists.kl(after, before)[0])
        entropy.append(dists.entropy(after)[0])
    feats = {0: post.feat.map(lambda x: x[0].float())}
    feats |= open_loop(model, carry, post, obs["prev_action"], random)
    codes = zip(names(dynamics), dynamics.classes(post), strict=True)
    codes = {name: x[0].cpu().numpy() for name, x in codes}
    numbers = lambda x: torch.stack(x, -1).float().cpu().numpy()
    return Latents(embed[0].float(), feats, codes, numbers(kl), numbers(entropy))


def generator(obs: Mapping[str, Tensor], seed: int) -> torch.Generator:
    """Random numbers of its own, where ``obs`` lie."""
    return torch.Generator(next(iter(obs.values())).device).manual_seed(seed)


def open_loop(
    model: WorldModel,
    carry: object,
    post: Post,
    action: Tensor,
    random: torch.Generator | None = None,
) -> dict[int, Feat]:
    """Imagine from every step with the actions (1, T, A) that were taken.

    -> {horizon: (T, .)}: row t is the prediction *of* step t, made ``horizon`` steps before it and
    no earlier than from step CONTEXT - 1; NaN where there is none.
    """
    dynamics, length, most = model.dynamics, action.shape[1], max(HORIZONS)
    if length <= CONTEXT:
        nothing = Feat(*(x[0].float() * math.nan for x in post.feat))
        return dict.fromkeys(HORIZONS[1:], nothing)
    start = dynamics.starts(carry, post, 0)
    padded = torch.cat([action[0], action.new_zeros(most, action.shape[-1])])  # (T + most, A)
    # A start at step t takes the actions that led to t + 1, t + 2, ...
    ahead = torch.stack([padded[1 + i : 1 + i + length] for i in range(most)], 1)  # (T, most, A)
    imagined = dynamics.imagine(start, ahead, most, generator=random)[1]  # (T, most + 1, .)
    out = {}
    for horizon in HORIZONS[1:]:
        out[horizon] = imagined.map(lambda x, h=horizon: moved(x[:, h].float(), h))
    return out


def moved(x: Tensor, horizon: int) -> Tensor:
    """Predictions (T, .) by the step that they were made at -> by the step that they are about."""
    out = torch.full_like(x, math.nan)
    first = CONTEXT - 1
    if len(x) > first + horizon:
        out[first + horizon :] = x[first : len(x) - horizon]
    return out


def resampled(
    dynamics: Dynamics, post: Post, levels: set[int], random: torch.Generator | None = None
) -> Feat:
    """Features (B, T, .) with these levels drawn anew from their priors, the others as they were.

    A finer level's prior is the one given the coarser levels that were observed.
    """
    parts = list(post.feat.stoch.split(dynamics.level_dims, -1))
    for i in levels:
        probs = dists.unimix_probs(post.levels[i].prior, dynamics.kl_config.unimix)
        noise = dists.uniform((*probs.shape[:-1], 1), probs, random)
        onehot = dists.sample_onehot(probs, noise)
        parts[i] = embedded(dynamics, i, onehot).to(parts[i].dtype)
    return post.feat._replace(stoch=torch.cat(parts, -1))


def embedded(dynamics: Dynamics, level: int, onehot: Tensor) -> Tensor:
    """One-hots (..., S, K) of a level as they stand in ``stoch``, (..., numbers)."""
    quantizer = getattr(dynamics, "quantizer", None)
    if quantizer is None:
        return onehot.flatten(-2)
    code = quantizer.decode(level, onehot).flatten(-2)
    return code * dynamics.code_shape[1] ** -0.5  # as the heads read them (Tokens._stoch)
