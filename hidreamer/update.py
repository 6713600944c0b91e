"""The one update: world model, behaviors, and what else an agent trains, on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hidreamer.dynamics.base import Post, start_steps
from hidreamer.metrics import prefixed
from hidreamer.objectives import probe_loss

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]  # each (), without gradient


class Seen(NamedTuple):
    """What an update keeps of the model's pass over a batch."""

    obs: Batch  # preprocessed
    carry: Any
    post: Post
    embed: Tensor  # (B, T, E)


def train_step(agent: Any, obs: Batch, generator: torch.Generator | None) -> Metrics:
    """One step of every optimiser of an ``Agent``. obs: preprocessed (B,T,...). -> metrics.

    Between two steps lie functions of tensors alone, which ``agent.each`` calls.
    """
    model = agent.world_model
    loss, metrics, seen = agent.each(partial(model_loss, agent, generator), obs)
    metrics |= agent.step("model", loss)
    start, terminal = agent.each(partial(after_gradient, agent, generator), seen)
    if model.probed:
        loss, found = agent.each(partial(decoder_loss, agent), seen)
        metrics |= found | agent.step("probe", loss)
    extrinsic = lambda traj, rew: rew
    metrics |= agent.update_behavior("", start, terminal, extrinsic, generator)
    if agent.explorer:
        loss = agent.each(partial(ensemble_loss, agent), seen)
        metrics |= {"expl_model_loss": loss.detach()} | agent.step("expl_model", loss)
        bonus = agent.explorer.reward
        metrics |= agent.update_behavior("expl_", start, terminal, bonus, generator)
    if agent.config.optim == "joint":
        metrics |= prefixed("joint_", agent.optimizers["joint"].apply())
    for behavior in agent.behaviors().values():
        behavior.update_slow()
    return metrics


def model_loss(
    agent: Any, generator: torch.Generator | None, obs: Batch
) -> tuple[Tensor, Metrics, Seen]:
    """-> the model's loss (), metrics, what the rest of the update needs."""
    with agent.autocast():
        losses, carry, post, embed, metrics = agent.world_model.loss(obs, generator)
    loss = sum(losses.values()).mean()
    named = {f"{name}_loss": value.detach().mean() for name, value in losses.items()}
    return loss, named | {"model_loss": loss.detach()} | metrics, Seen(obs, carry, post, embed)


@torch.no_grad()
def after_gradient(agent: Any, generator: torch.Generator | None, seen: Seen) -> tuple[Any, Tensor]:
    """Codebooks move. -> N starts of imagination, and terminal (N,)."""
    dynamics, starts = agent.world_model.dynamics, agent.config.imag.starts
    dynamics.update_codebook(seen.post, generator)
    terminal = seen.obs["is_terminal"][:, start_steps(seen.embed.shape[1], starts)].flatten()
    return dynamics.starts(seen.carry, seen.post, starts), terminal


def decoder_loss(agent: Any, seen: Seen) -> tuple[Tensor, Metrics]:
    """For the decoder of a model that learns nothing from it."""
    with agent.autocast():
        losses = probe_loss(agent.world_model.decoder, seen.post.feat, seen.obs)
    metrics = {f"probe_{key}_loss": loss.detach().mean() for key, loss in losses.items()}
    return sum(losses.values()).mean(), metrics


def ensemble_loss(agent: Any, seen: Seen) -> Tensor:
    with agent.autocast():
        return agent.explorer.loss(seen.post, seen.embed, seen.obs["prev_action"])


def behavior_losses(
    agent: Any,
    prefix: str,
    reward: Callable,
    generator: torch.Generator | None,
    start: Any,
    terminal: Tensor,
) -> tuple[Tensor, Tensor, Metrics]:
    """Of one behavior on trajectories from N starts, terminal (N,): the actor's (), the critic's,
    metrics. ``reward``: as of ``Agent.update_behavior``.
    """
    behavior, model = agent.behaviors()[prefix], agent.world_model
    with agent.autocast():
        traj = behavior.imagine(model, start, terminal, generator)
        with torch.set_grad_enabled(behavior.backprop):
            rew = reward(traj, model.reward(traj.x).mode())
        return behavior.losses(traj, rew)
