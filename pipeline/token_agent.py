"""The online agent on a world model of tokens: actor and critic learn in its dreams.

Shapes: B sequences, N dreams of H steps, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

import models
import networks
from hidreamer import carries
from hidreamer.behavior import Behavior, Replayed, Trajectory
from hidreamer.dynamics.base import start_steps
from hidreamer.losses import Surrogate, clipped_gain
from hidreamer.returns import ReturnNorm
from hidreamer.update import Seen, begin
from pipeline.token_model import TokenWorldModel
from tools import Config, ConfigError


class FirstFeatures(nn.Module):
    """A network of the first ``size`` features only: of the codes, without the memory."""

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Any:
        return self.net(x[..., : self.size])

    def noise(self) -> Any:
        """As of ``networks.Actor``."""
        return self.net.noise()


class PPO(Behavior):
    """``Behavior`` whose actor maximises PPO's clipped surrogate; everything else is shared."""

    def __init__(self, actor: nn.Module, critic: nn.Module, config: Any):
        super().__init__(actor, critic, config, backprop=False)
        self.clip = config.pipeline.policy.clip
        # every pass over a dream moves the running range: together as far as one of REINFORCE
        self.norm = ReturnNorm(self.norm.rate / config.pipeline.policy.epochs)

    def imagine(
        self, model: Any, start: Any, terminal: Tensor, generator: torch.Generator | None = None
    ) -> Trajectory:
        traj = super().imagine(model, start, terminal, generator)
        with torch.no_grad():
            log_prob = self.actor(traj.x[:, :-1]).log_prob(traj.action[:, :-1])  # (N, H)
        return traj._replace(log_prob=log_prob)

    def surrogate(self, traj: Trajectory) -> Surrogate:
        return lambda log_prob, adv: clipped_gain(log_prob, traj.log_prob, adv, self.clip)


class TokenAgent(models.Agent):
    """``models.Agent`` on a ``TokenWorldModel``, which is frozen unless ``policy.finetune``.

    Raises ConfigError where windows are too short for ``imag.starts``.
    """

    def __init__(self, model: TokenWorldModel, act_space: spaces.Space, config: Config):
        nn.Module.__init__(self)
        self.block, self.config = config.pipeline.policy, config
        try:
            carries.check(model.dynamics, config)
            start_steps(self.block.length, config.imag.starts)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.act_dim, self.world_model = model.dynamics.act_dim, model
        self.behavior = self._make_behavior(act_space)
        self.explorer, self.metric_names, self.captured_act = None, (), None
        if not self.block.finetune:
            model.requires_grad_(False)
        self.passes = self.block.epochs if self.block.algorithm == "ppo" else 1

    def _make_behavior(self, act_space: spaces.Space) -> Behavior:
        config, dynamics = self.config, self.world_model.dynamics
        size = dynamics.feat_dim if self.block.memory else dynamics.stoch_dim
        actor = networks.Actor(size, act_space, **config.actor.net)
        critic = networks.make_head("twohot", size, **config.critic.net)
        if not self.block.memory:  # features are the codes, then the memory
            actor, critic = FirstFeatures(actor, size), FirstFeatures(critic, size)
        if self.block.algorithm == "ppo":
            return PPO(actor, critic, config)
        return Behavior(actor, critic, config, backprop=False)

    def trained(self) -> dict[str, dict[str, nn.Module]]:
        modules = super().trained()
        if not self.block.finetune:
            del modules["model"]
        else:
            del modules["model"]["encoder"]  # what it makes of images is stored as tokens
        return modules

    @torch.no_grad()
    def plain_act(
        self,
        state: models.ActState,
        obs: models.Batch,
        mode: str,
        generator: torch.Generator | None,
    ) -> models.ActState:
        """As of ``models.Agent``, through ``TokenWorldModel.observe``, which stacks the images."""
        carry, post = self.follow(state, obs, generator)
        feat = post.feat.map(lambda x: x[:, 0])
        return models.ActState(carry, self.choose(feat, mode, generator))

    def update(self, batch: models.Batch, generator: torch.Generator | None = None) -> Tensor:
        """As of ``models.Agent``, on windows of tokens (B,T,.)."""
        if self.block.finetune:
            self.world_model.train()
            found = super().update(batch, generator)
            self.world_model.eval()
            return found
        with torch.no_grad(), self.autocast():
            obs = networks.preprocess(batch)
            seen = Seen(obs, *self.world_model.observe(obs, generator=generator))
            start, terminal, _ = begin(self, seen)
        extrinsic = lambda traj, rew: rew
        metrics = self.update_behavior("", start, terminal, extrinsic, generator)
        self.behavior.update_slow()
        self.metric_names = tuple(metrics)
        return torch.stack([metric.float() for metric in metrics.values()])

    def update_behavior(
        self,
        prefix: str,
        start: Any,
        terminal: Tensor,
        reward: Callable,
        generator: torch.Generator | None = None,
        replayed: Replayed | None = None,
        model_loss: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As ``Agent.update_behavior``, with ``passes`` updates on each imagined batch (PPO)."""
        assert replayed is None and model_loss is None  # ``check_config`` refuses what needs them
        behavior = self.behavior
        with self.autocast(), torch.no_grad():
            traj = behavior.imagine(self.world_model, start, terminal, generator)
            rew = reward(traj, self.world_model.reward(traj.x).mode())
        for _ in range(self.passes):
            with self.autocast():
                actor_loss, critic_loss, metrics = behavior.losses(traj, rew)
            steps = self.step("actor", actor_loss) | self.step("critic", critic_loss)
        return metrics | steps
