"""The one update: world model, behaviors, and what else an agent trains, on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hidreamer.dynamics.base import Post, start_steps
from hidreamer.metrics import prefixed
from hidreamer.objectives import probe_loss

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]  # each (), without gradient


def train_step(agent: Any, obs: Batch, generator: torch.Generator | None) -> Metrics:
    """One step of every optimiser of an ``Agent``. obs: preprocessed (B,T,...). -> metrics."""
    model = agent.world_model
    with agent.autocast():
        losses, carry, post, embed, mets = model.loss(obs, generator)
    loss = sum(losses.values()).mean()
    metrics = {f"{name}_loss": value.detach().mean() for name, value in losses.items()}
    metrics |= {"model_loss": loss.detach()} | mets | agent.step("model", loss)
    model.dynamics.update_codebook(post, generator)
    if model.probed:
        metrics |= probe_step(agent, post, obs)

    starts = agent.config.imag.starts
    terminal = obs["is_terminal"][:, start_steps(embed.shape[1], starts)].flatten()
    with torch.no_grad():
        start = model.dynamics.starts(carry, post, starts)
    extrinsic = lambda traj, rew: rew
    metrics |= agent.update_behavior("", start, terminal, extrinsic, generator)
    if agent.explorer:
        with agent.autocast():
            loss = agent.explorer.loss(post, embed, obs["prev_action"])
        metrics |= {"expl_model_loss": loss.detach()} | agent.step("expl_model", loss)
        bonus = agent.explorer.reward
        metrics |= agent.update_behavior("expl_", start, terminal, bonus, generator)
    if agent.config.optim == "joint":
        metrics |= prefixed("joint_", agent.optimizers["joint"].apply())
    for behavior in agent.behaviors().values():
        behavior.update_slow()
    return metrics


def probe_step(agent: Any, post: Post, obs: Batch) -> Metrics:
    """Train the decoder of a model that learns nothing from it."""
    with agent.autocast():
        losses = probe_loss(agent.world_model.decoder, post.feat, obs)
    metrics = {f"probe_{key}_loss": loss.detach().mean() for key, loss in losses.items()}
    return metrics | agent.step("probe", sum(losses.values()).mean())
