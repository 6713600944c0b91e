"""Actor and critic, trained on imagined trajectories."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer.dynamics.sampler import Sampler, sample_action
from hidreamer.losses import (
    PARTS,
    Surrogate,
    imag_loss,
    reinforce_gain,
    replay_returns,
    scaled,
)
from hidreamer.precision import cast_weights
from hidreamer.returns import ReturnNorm

Metrics = dict[str, Tensor]  # each ()


def by_step(x: Tensor) -> Tensor:
    """(N, H+1, ...) -> (H+1, N, ...): how dreams lie in memory."""
    return x.transpose(0, 1)


class Trajectory(NamedTuple):
    """Imagined states and what the agent makes of them; entry 0 is the replayed state before."""

    x: Tensor  # (N, H+1, F) features
    action: Tensor  # (N, H+1, A) taken in each state
    disc: Tensor  # (N, H+1) gamma times the probability that the episode continues after it
    log_prob: Tensor | None = None  # (N, H) of the actions when they were taken, for PPO alone


class Replayed(NamedTuple):
    """What the critic learns from replayed steps (B,T)."""

    x: Tensor  # (B, T, F) features
    reward: Tensor  # for arriving
    is_first: Tensor  # bool
    terminal: Tensor
    starts: slice  # of T, the steps that dreams began from


class Behavior(nn.Module):
    """Actor and critic, trained on imagined trajectories.

    ``backprop``: the actor's gradient goes through the dynamics to the returns; otherwise it is
    REINFORCE's.
    """

    loss_parts = PARTS  # compiled or not
    sample_action = staticmethod(sample_action)  # as well

    def __init__(self, actor: nn.Module, critic: nn.Module, config, backprop: bool):
        super().__init__()
        self.actor, self.critic = actor, critic
        self.slow = copy.deepcopy(critic).requires_grad_(False)
        self.norm = ReturnNorm()
        self.imag, self.slow_rate = config.imag, config.critic.slow_rate
        self.replay_weight, self.replay_grad = config.critic.replay_loss, config.critic.replay_grad
        self.entropy, self.scales = config.actor.entropy, config.loss_scales
        self.backprop = backprop

    def compile_parts(self) -> None:
        self.actor.compile()
        self.critic.compile()
        self.sample_action = torch.compile(self.sample_action)
        self.loss_parts = self.loss_parts.compiled()

    def imagine(
        self, model: Any, start: Any, terminal: Tensor, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Imagine H steps from N starts; terminal (N,): which of them ended their episode.

        REINFORCE needs no gradient through the trajectory, so none is recorded for it.
        """
        grad, horizon = torch.set_grad_enabled(self.backprop), self.imag.horizon
        with grad, cast_weights(model.dynamics, self.actor, model.cont):
            sampler = Sampler(self.actor, generator, *self.actor.noise(), self.sample_action)
            _, feat, action = model.dynamics.imagine(start, sampler, horizon, generator=generator)
            x, discount = feat.cat(), self.imag.discount
            disc = self.loss_parts.discounts(model.cont, by_step(x), terminal, discount)
            return Trajectory(x, action, disc)

    def surrogate(self, traj: Trajectory) -> Surrogate:
        """What the actor maximises on ``traj``."""
        return reinforce_gain

    def losses(
        self, traj: Trajectory, rew: Tensor, replayed: Replayed | None = None
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Weighted actor and critic loss, () each. rew: (N, H+1), for arriving in each state.

        With ``replayed`` the critic learns from these steps as well.
        """
        x, parts = by_step(traj.x), self.loss_parts
        fixed = x.detach()  # (H+1, N, F)
        value_dist = self.critic(fixed)
        # Backpropagating through the dynamics, returns depend on the features; for REINFORCE they
        # are constants.
        if self.backprop:
            value = parts.head_mode(self.critic, x)
        else:
            with torch.no_grad():
                value = parts.dist_mode(value_dist)
        loss = imag_loss(
            traj.action,
            traj.disc,
            rew,
            value.t(),
            policy=self.actor(fixed[:-1]),
            value_dist=value_dist[:-1],
            slow_value=parts.head_mode(self.slow, fixed[:-1]),
            scale=self.norm,
            discount=self.imag.discount,
            lam=self.imag.lam,
            entropy=self.entropy,
            reinforce=not self.backprop,
            surrogate=self.surrogate(traj),
            parts=parts,
        )
        actor_loss = scaled(loss.actor, self.scales.actor)
        critic_loss = scaled(loss.critic, self.scales.critic)
        metrics = {"actor_loss": actor_loss.detach(), "critic_loss": critic_loss.detach()}
        if replayed is not None:
            replay_loss = self.replay_weight * self.replay_loss(replayed, loss.returns[:, 0])
            replay_loss = scaled(replay_loss, self.scales.critic)
            metrics["replay_critic_loss"] = replay_loss.detach()
            critic_loss = critic_loss + replay_loss
        return actor_loss, critic_loss, metrics | loss.metrics

    def replay_loss(self, replayed: Replayed, imagined: Tensor) -> Tensor:
        """The critic's loss on returns of replayed steps, (), a mean over B x (T - 1) steps.

        imagined (N,): the returns of the dreams from ``replayed.starts``, by sequence, which stand
        for what follows a step; at other steps that is the critic's value. The last step of an
        episode, which nothing follows, does not count.
        """
        x = replayed.x if self.replay_grad else replayed.x.detach()  # (B, T, F)
        length = x.shape[1]
        ends = torch.zeros_like(replayed.is_first)
        ends[:, :-1] = replayed.is_first[:, 1:]  # (B, T); unknown of the last one, and unused
        dist = self.critic(x)
        with torch.no_grad():
            boot = dist.mode()  # (B, T)
            boot[:, replayed.starts] = imagined.view(len(boot), -1).to(boot.dtype)
            settings = {"discount": self.imag.discount, "lam": self.imag.lam}
            where = replayed.terminal, ends.to(boot.dtype), boot
            returns = replay_returns(replayed.reward, *where, **settings)  # (B, T - 1)
            pad = torch.cat([returns, torch.zeros_like(returns[:, :1])], 1)  # (B, T)
            slow = self.loss_parts.head_mode(self.slow, x)  # (B, T)
        counts = ~ends & (torch.arange(length, device=x.device) < length - 1)
        return torch.where(counts, -dist.log_prob(pad, slow), 0.0)[:, :-1].mean()

    @torch.no_grad()
    def update_slow(self) -> None:
        slow, fast = (list(critic.parameters()) for critic in (self.slow, self.critic))
        torch._foreach_lerp_(slow, fast, self.slow_rate)
