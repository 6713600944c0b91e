"""Losses as free functions of distributions and tensors.

Shapes: N imagined trajectories of H steps, A action. Entry t of an (N, H+1) tensor belongs to state
t, the first of which is the replayed one that the trajectory starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hidreamer.returns import lambda_return


class Policy(Protocol):
    """What ``imag_loss`` needs of the actor's distribution in (N, H) states: (N, H) each."""

    def log_prob(self, x: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...


class Value(Protocol):
    """What ``imag_loss`` needs of the critic's distribution in (N, H) states."""

    def log_prob(self, *targets: Tensor) -> Tensor: ...


class ImagLoss(NamedTuple):
    """Of each imagined state but the last one, not yet averaged."""

    actor: Tensor  # (N, H)
    critic: Tensor  # (N, H)
    returns: Tensor  # (N, H) what the critic is trained on
    metrics: dict[str, Tensor]  # each (), without gradient


Surrogate = Callable[[Tensor, Tensor], Tensor]


def reinforce_gain(log_prob: Tensor, adv: Tensor) -> Tensor:
    """What REINFORCE maximises, of actions' log-probabilities and advantages, (N, H) each."""
    return log_prob * adv


def clipped_gain(log_prob: Tensor, before: Tensor, adv: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), (N, H).

    before (N, H): the log-probabilities when the actions were drawn. clip: how far the ratio may
    move an advantage's weight away from 1.
    """
    ratio = (log_prob - before).exp()
    return torch.minimum(ratio * adv, ratio.clamp(1.0 - clip, 1.0 + clip) * adv)


def imag_loss(
    action: Tensor,
    disc: Tensor,
    rew: Tensor,
    value: Tensor,
    policy: Policy,
    value_dist: Value,
    slow_value: Tensor,
    scale: Callable[[Tensor], Tensor],
    *,
    discount: float,
    lam: float,
    entropy: float,
    reinforce: bool,
    surrogate: Surrogate = reinforce_gain,
) -> ImagLoss:
    """Actor and critic loss of imagined trajectories (Hafner et al. 2023, eq. 7-12).

    action (N,H+1,A) taken in each state; rew (N,H+1) for arriving in it; disc (N,H+1), ``discount``
    times the probability that the episode continues after it; value (N,H+1), the critic's. policy
    and value_dist are the outputs of actor and critic in the first H states, whose features have no
    gradient; slow_value (N,H) is the slow critic's, towards which the critic is regularised. scale:
    takes the returns (N,H) and gives what advantages are divided by, ().

    reinforce: the actor's gradient is that of its actions' log-probabilities, by ``surrogate``;
    otherwise it is that of the returns, which must then depend on the actions.
    """
    shapes = action.shape[:2], disc.shape, rew.shape, value.shape
    assert len(set(shapes)) == 1, shapes
    returns = lambda_return(rew, value, disc, lam)  # (N, H)
    # A state counts as much as the episode is likely to have reached it; nothing counts after a
    # terminal start.
    alive = disc.detach() / discount  # (N, H+1)
    weight = torch.cat([alive[:, :1], disc[:, 1:-1].detach()], 1).cumprod(1)  # (N, H)

    denominator = scale(returns)
    adv = (returns - value[:, :-1]) / denominator  # (N, H)
    policy_entropy = policy.entropy()  # (N, H)
    gain = adv  # (N, H)
    if reinforce:
        gain = surrogate(policy.log_prob(action[:, :-1].detach()), adv.detach())
    actor = -(weight * (gain + entropy * policy_entropy))
    critic = -(weight * value_dist.log_prob(returns.detach(), slow_value))
    metrics = {
        "actor_entropy": policy_entropy.mean(),
        "imag_reward": rew[:, 1:].mean(),
        "imag_return": returns.mean(),
        "imag_value": value.mean(),
        "imag_cont": alive[:, 1:].mean(),
        "return_scale": denominator,
        "adv_std": adv.std(),
    }
    return ImagLoss(actor, critic, returns, {name: x.detach() for name, x in metrics.items()})


def scaled(loss: Tensor, scale: float) -> Tensor:
    """``loss`` times its weight; a weight of 1 costs nothing."""
    return loss if scale == 1.0 else scale * loss
