"""What trains the world model besides its dynamics' own loss: one small class each.

Another objective is another class with ``loss``, and a line in ``models.WorldModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from hidreamer.dynamics.base import Dynamics, Post

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What trains the world model besides the dynamics' own loss."""

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """post of (B,T), embed (B,T,E), preprocessed obs -> losses (B,T) by name."""
        ...


class Reconstruction:
    """The likelihood of each observation, given the features that the dynamics trains its decoder
    on.
    """

    def __init__(self, decoder: nn.Module, dynamics: Dynamics):
        self.decoder, self.dynamics = decoder, dynamics

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        dists = self.decoder(self.dynamics.decoder_features(post, generator).cat())
        return {key: -dist.log_prob(obs[key]) for key, dist in dists.items()}


class Reward:
    """The likelihood of the reward for arriving in a state."""

    def __init__(self, head: nn.Module):
        self.head = head

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return {"reward": -self.head(post.feat.cat()).log_prob(obs["reward"])}


class Continue:
    """The likelihood that the episode continues, or ends, after a state."""

    def __init__(self, head: nn.Module):
        self.head = head

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return {"cont": -self.head(post.feat.cat()).log_prob(1.0 - obs["is_terminal"])}
