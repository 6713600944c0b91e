"""The one update: world model, behaviors, and what else an agent trains, on one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hidreamer import carries
from hidreamer.behavior import Replayed, by_step
from hidreamer.dynamics.base import Post, start_steps
from hidreamer.metrics import prefixed
from hidreamer.objectives import probe_loss
from hidreamer.precision import cast_weights

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
    model, critic = agent.world_model, agent.config.critic
    loss, metrics, seen = agent.each(partial(model_loss, agent, generator), obs)
    if agent.config.replay.write_back:
        agent.carries = agent.each(partial(found_carries, agent), seen)
    # Where the critic's loss of replayed steps trains the model as well, the model's step waits for
    # the dreams that it needs.
    waits = critic.replay_loss > 0 and critic.replay_grad
    if not waits:
        metrics |= agent.step("model", loss)
        agent.each(partial(move_codebook, agent, generator), seen)
    if model.probed:
        metrics |= probe_step(agent, seen.post, obs)

    start, terminal, replayed = agent.each(partial(begin, agent), seen)
    extrinsic = lambda traj, rew: rew
    args = start, terminal, extrinsic, generator, replayed
    metrics |= agent.update_behavior("", *args, model_loss=loss if waits else None)
    if waits:
        agent.each(partial(move_codebook, agent, generator), seen)
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


def train_model(agent: Any, obs: Batch) -> Tensor:
    """One step of the world model alone, also where ``optim: joint`` would step all at once.

    obs: preprocessed (B,T,...). -> the model's loss (), detached.
    """
    loss, _, seen = model_loss(agent, None, obs)
    agent.step("model", loss)
    if agent.config.optim == "joint":
        agent.optimizers["joint"].apply()
    move_codebook(agent, None, seen)
    if agent.world_model.probed:
        probe_step(agent, seen.post, obs)
    return loss.detach()


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


def model_loss(
    agent: Any, generator: torch.Generator | None, obs: Batch
) -> tuple[Tensor, Metrics, Seen]:
    """-> the model's loss (), metrics, what the rest of the update needs."""
    with agent.autocast(), cast_weights(agent.world_model, trained=True):
        losses, carry, post, embed, metrics = agent.world_model.loss(obs, generator)
    means = torch.stack(list(losses.values())).mean((1, 2))  # (losses,)
    loss = means.sum()
    named = {f"{n}_loss": x for n, x in zip(losses, means.detach().unbind(), strict=True)}
    return loss, named | {"model_loss": loss.detach()} | metrics, Seen(obs, carry, post, embed)


def found_carries(agent: Any, seen: Seen) -> dict[str, Tensor]:
    return carries.found(agent.world_model.dynamics, seen.carry, seen.post)


def move_codebook(agent: Any, generator: torch.Generator | None, seen: Seen) -> None:
    agent.world_model.dynamics.update_codebook(seen.post, generator)


def begin(agent: Any, seen: Seen) -> tuple[Any, Tensor, Replayed | None]:
    """-> N starts of imagination, terminal (N,), what the critic learns from replayed steps."""
    obs, starts = seen.obs, agent.config.imag.starts
    chosen = start_steps(seen.embed.shape[1], starts)
    terminal = obs["is_terminal"][:, chosen].flatten()  # (N,)
    with torch.no_grad():
        start = agent.world_model.dynamics.starts(seen.carry, seen.post, starts)
    replayed = None
    if agent.config.critic.replay_loss:
        steps = obs["reward"], obs["is_first"].bool(), obs["is_terminal"]
        replayed = Replayed(seen.post.feat.cat(), *steps, chosen)
    return start, terminal, replayed


def probe_step(agent: Any, post: Post, obs: Batch) -> Metrics:
    """Train the decoder of a model that learns nothing from it."""
    loss, metrics = agent.each(partial(decoder_loss, agent), post, obs)
    return metrics | agent.step("probe", loss)


def decoder_loss(agent: Any, post: Post, obs: Batch) -> tuple[Tensor, Metrics]:
    with agent.autocast():
        losses = probe_loss(agent.world_model.decoder, post.feat, obs)
    metrics = {f"probe_{key}_loss": loss.detach().mean() for key, loss in losses.items()}
    return sum(losses.values()).mean(), metrics


def ensemble_loss(agent: Any, seen: Seen) -> Tensor:
    with agent.autocast():
        steps = seen.obs["prev_action"], seen.obs["is_first"].bool()
        return agent.explorer.loss(seen.post, seen.embed, *steps)


def behavior_losses(
    agent: Any,
    prefix: str,
    reward: Callable,
    generator: torch.Generator | None,
    start: Any,
    terminal: Tensor,
    replayed: Replayed | None,
) -> tuple[Tensor, Tensor, Metrics]:
    """Of one behavior on trajectories from N starts, terminal (N,): the actor's (), the critic's,
    metrics. ``reward``: as of ``Agent.update_behavior``.
    """
    behavior, model = agent.behaviors()[prefix], agent.world_model
    casts = contextlib.ExitStack()
    with agent.autocast(), casts:
        for module in (behavior.actor, behavior.critic):  # one each, as their losses are
            casts.enter_context(cast_weights(module, trained=True))
        with torch.no_grad():
            fixed = model.dynamics, model.reward, model.cont, behavior.slow
            casts.enter_context(cast_weights(*fixed))
        traj = behavior.imagine(model, start, terminal, generator)
        with torch.set_grad_enabled(behavior.backprop):
            found = behavior.loss_parts.head_mode(model.reward, by_step(traj.x))  # (H+1, N)
            rew = reward(traj, found.t())
        return behavior.losses(traj, rew, replayed)
