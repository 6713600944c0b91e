"""The one update: world model, behaviors, and what else an agent trains, on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hidreamer.behavior import Replayed
from hidreamer.dynamics.base import Post, start_steps
from hidreamer.metrics import prefixed
from hidreamer.objectives import probe_loss

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]  # each (), without gradient


def train_step(agent: Any, obs: Batch, generator: torch.Generator | None) -> Metrics:
    """One step of every optimiser of an ``Agent``. obs: preprocessed (B,T,...). -> metrics."""
    model, critic = agent.world_model, agent.config.critic
    with agent.autocast():
        losses, carry, post, embed, mets = model.loss(obs, generator)
    loss = sum(losses.values()).mean()
    metrics = {f"{name}_loss": value.detach().mean() for name, value in losses.items()}
    metrics |= {"model_loss": loss.detach()} | mets
    # Where the critic's loss of replayed steps trains the model as well, the model's step waits for
    # the dreams that it needs.
    waits = critic.replay_loss > 0 and critic.replay_grad
    if not waits:
        metrics |= agent.step("model", loss)
        model.dynamics.update_codebook(post, generator)
    if model.probed:
        metrics |= probe_step(agent, post, obs)

    chosen = start_steps(embed.shape[1], agent.config.imag.starts)
    terminal = obs["is_terminal"][:, chosen].flatten()
    with torch.no_grad():
        start = model.dynamics.starts(carry, post, agent.config.imag.starts)
    replayed = None
    if critic.replay_loss:
        steps = obs["reward"], obs["is_first"].bool(), obs["is_terminal"]
        replayed = Replayed(post.feat.cat(), *steps, chosen)
    extrinsic = lambda traj, rew: rew
    args = start, terminal, extrinsic, generator, replayed
    metrics |= agent.update_behavior("", *args, model_loss=loss if waits else None)
    if waits:
        model.dynamics.update_codebook(post, generator)
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


def step_together(agent: Any, losses: Mapping[str, Tensor]) -> Metrics:
    """Train what each of {optimiser: loss ()} is to train, where losses share parts of a graph.

    All gradients are taken before the first step changes the weights.
    """
    own = {name: agent.optimizers[name] for name in losses if name in agent.optimizers}
    *others, last = losses
    for name in (*others, last):
        if name in own:
            own[name].gather(losses[name], retain=name != last)
        else:
            agent.gather_joint(name, losses[name], retain=name != last)
    metrics = {}
    for name, optimizer in own.items():
        metrics |= prefixed(f"{name}_", optimizer.apply())
    return metrics


def probe_step(agent: Any, post: Post, obs: Batch) -> Metrics:
    """Train the decoder of a model that learns nothing from it."""
    with agent.autocast():
        losses = probe_loss(agent.world_model.decoder, post.feat, obs)
    metrics = {f"probe_{key}_loss": loss.detach().mean() for key, loss in losses.items()}
    return metrics | agent.step("probe", sum(losses.values()).mean())
