"""Actor and critic, trained on imagined trajectories."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer.distributions import TwoHot
from hidreamer.dynamics.base import Feat
from hidreamer.losses import imag_loss, reinforce_gain, scaled
from hidreamer.precision import cast_weights
from hidreamer.returns import ReturnNorm

Metrics = dict[str, Tensor]  # each ()


class Trajectory(NamedTuple):
    """Imagined states and what the agent makes of them; entry 0 is the replayed state before."""

    feat: Feat  # (N, H+1, .)
    x: Tensor  # (N, H+1, F) the same, concatenated
    action: Tensor  # (N, H+1, A) taken in each state
    disc: Tensor  # (N, H+1) gamma times the probability that the episode continues after it


class Behavior(nn.Module):
    """Actor and critic, trained on imagined trajectories.

    ``backprop``: the actor's gradient goes through the dynamics to the returns; otherwise it is
    REINFORCE's.
    """

    def __init__(self, actor: nn.Module, critic: nn.Module, config, backprop: bool):
        super().__init__()
        self.actor, self.critic = actor, critic
        self.slow = copy.deepcopy(critic).requires_grad_(False)
        self.norm = ReturnNorm()
        self.imag, self.slow_rate = config.imag, config.critic.slow_rate
        self.entropy, self.scales = config.actor.entropy, config.loss_scales
        self.backprop = backprop

    def imagine(
        self, model: Any, start: Any, terminal: Tensor, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Imagine H steps from N starts; terminal (N,): which of them ended their episode.

        REINFORCE needs no gradient through the trajectory, so none is recorded for it.
        """
        grad, horizon = torch.set_grad_enabled(self.backprop), self.imag.horizon
        with grad, cast_weights(model.dynamics, self.actor):
            policy = functools.partial(self.policy, generator=generator)
            _, feat, action = model.dynamics.imagine(start, policy, horizon, generator=generator)
            x = feat.cat()
            cont = torch.cat([1.0 - terminal.unsqueeze(1), model.cont(x[:, 1:]).mean()], 1)
            return Trajectory(feat, x, action, self.imag.discount * cont)

    def policy(self, feat: Feat, generator: torch.Generator | None) -> Tensor:
        """Actions (N,A) sampled in imagined states (N,.)."""
        return self.actor(feat.cat().detach()).sample(generator)

    def surrogate(self, log_prob: Tensor, adv: Tensor) -> Tensor:
        """What the actor maximises, of its actions' log-probabilities and advantages, (N, H)."""
        return reinforce_gain(log_prob, adv)

    def losses(self, traj: Trajectory, rew: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        """Weighted actor and critic loss, () each. rew: (N, H+1), for arriving in each state."""
        x = traj.x.detach()
        value_dist = self.critic(x[:, :-1])
        # Backpropagating through the dynamics, returns depend on the features; for REINFORCE they
        # are constants.
        value = self.critic(traj.x).mode() if self.backprop else self._values(value_dist, x)
        loss = imag_loss(
            traj.action,
            traj.disc,
            rew,
            value,
            policy=self.actor(x[:, :-1]),
            value_dist=value_dist,
            slow_value=self.slow(x[:, :-1]).mode(),
            scale=self.norm,
            discount=self.imag.discount,
            lam=self.imag.lam,
            entropy=self.entropy,
            reinforce=not self.backprop,
            surrogate=self.surrogate,
        )
        actor_loss = scaled(loss.actor.mean(), self.scales.actor)
        critic_loss = scaled(loss.critic.mean(), self.scales.critic)
        metrics = {"actor_loss": actor_loss.detach(), "critic_loss": critic_loss.detach()}
        return actor_loss, critic_loss, metrics | loss.metrics

    @torch.no_grad()
    def _values(self, known: TwoHot, x: Tensor) -> Tensor:
        """(N, H+1) values: those of ``known`` (N, H), and the last state's."""
        return torch.cat([known.mode(), self.critic(x[:, -1:]).mode()], 1)

    @torch.no_grad()
    def update_slow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, self.slow_rate)
