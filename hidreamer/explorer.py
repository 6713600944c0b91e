"""Plan2Explore (Sekar et al. 2020): an ensemble whose disagreement is an intrinsic reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hidreamer.dynamics.base import Post
from hidreamer.losses import mean_where
from hidreamer.nets import MLP


class Explorer(nn.Module):
    """An ensemble that predicts the next state; an actor-critic is rewarded where it disagrees.

    With dreamerv3-torch's targets and log-disagreement. Unlike there, the first state of an episode
    is not predicted from the last one of the episode before.
    """

    def __init__(self, model: Any, act_dim: int, config, behavior: Callable[[], nn.Module]):
        """model: ``WorldModel``. config: the block ``expl``. behavior: makes the actor-critic."""
        super().__init__()
        self.config = config
        sizes = {
            "embed": model.encoder.dim,
            "stoch": model.dynamics.stoch_dim,
            "deter": model.dynamics.deter_dim,
            "feat": model.feat_dim,
        }
        inputs = sizes["feat"] + (act_dim if config.action_cond else 0)
        shape = inputs, config.layers, config.units, sizes[config.target]
        self.ensemble = nn.ModuleList(MLP(*shape) for _ in range(config.models))
        self.behavior = behavior()

    def _predict(self, x: Tensor, action: Tensor) -> Tensor:
        """Features (N,T,F) and the actions (N,T,A) taken in them -> predictions (M,N,T,size)."""
        x = torch.cat([x, action], -1) if self.config.action_cond else x
        return batched(self.ensemble, x)

    def loss(self, post: Post, embed: Tensor, prev_action: Tensor, is_first: Tensor) -> Tensor:
        """Squared error of the next step's target within an episode, ().

        embed: (B,T,E). The action between two steps is the later one's prev_action (B,T,A).
        is_first: (B,T) bool.
        """
        targets = {"embed": embed, "feat": post.feat.cat(), **post.feat._asdict()}
        target = targets[self.config.target].detach()[:, 1:]
        pred = self._predict(post.feat.cat().detach()[:, :-1], prev_action[:, 1:])
        error = 0.5 * (pred - target).square().sum(-1).mean(0)  # (B, T-1)
        return mean_where(error, ~is_first[:, 1:])

    def reward(self, traj: Any, extrinsic: Tensor) -> Tensor:
        """Reward for arriving in each state of a ``Trajectory``, (N, H+1).

        The bonus is the disagreement of the ensemble on the next state. Conditioned on the action,
        it belongs to taking that, and is the reward of the step after.
        """
        steps = (x.transpose(0, 1) for x in (traj.x, traj.action))  # as they lie in memory
        bonus = self._predict(*steps).std(0).mean(-1).t()  # (N, H+1)
        bonus = bonus.clamp(min=1e-8).log() if self.config.log else bonus
        if self.config.action_cond:
            bonus = torch.cat([torch.zeros_like(bonus[:, :1]), bonus[:, :-1]], 1)
        return self.config.intr_scale * bonus + self.config.extr_scale * extrinsic


def batched(nets: nn.ModuleList, x: Tensor) -> Tensor:
    """M equal perceptrons of one x (.., F), as one product a layer -> (M, .., out)."""
    shape, x = x.shape[:-1], x.flatten(0, -2)  # (R, F)
    x = x.expand(len(nets), -1, -1)
    for blocks in zip(*(net.blocks for net in nets), strict=True):
        x = batched_linear([block.linear for block in blocks], x)  # (M, R, units)
        size, eps = x.shape[-1:], blocks[0].norm.eps
        weight = torch.stack([block.norm.weight for block in blocks]).unsqueeze(1)  # (M, 1, units)
        bias = torch.stack([block.norm.bias for block in blocks]).unsqueeze(1)
        x = blocks[0].act(torch.addcmul(bias, nn.functional.layer_norm(x, size, eps=eps), weight))
    return batched_linear([net.out for net in nets], x).unflatten(1, shape)


def batched_linear(layers: list[nn.Linear], x: Tensor) -> Tensor:
    """x (M, R, in) -> (M, R, out), each with its own layer."""
    weight = torch.stack([layer.weight for layer in layers]).transpose(1, 2)  # (M, in, out)
    if layers[0].bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(torch.stack([layer.bias for layer in layers]).unsqueeze(1), x, weight)
