"""Losses as free functions of distributions and tensors.

Shapes: N imagined trajectories of H steps, A action. Entry t of an (N, H+1) tensor belongs to state
t, the first of which is the replayed one that the trajectory starts from. What networks read of
them and put out lies step by step, (H+1,N,.), so that the first H states need no copy. B replayed
sequences of T steps, U numbers of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hidreamer.distributions import at_least_float32
from hidreamer.returns import lambda_return


class Policy(Protocol):
    """What ``imag_loss`` needs of the actor's distribution in (H, N) states: (H, N) each."""

    def log_prob(self, x: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...


class Value(Protocol):
    """What ``imag_loss`` needs of the critic's distribution in (H, N) states."""

    def log_prob(self, *targets: Tensor) -> Tensor: ...


class ImagLoss(NamedTuple):
    """Of all imagined states but the last ones."""

    actor: Tensor  # (), a mean
    critic: Tensor  # ()
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


class Targets(NamedTuple):
    """What imagined trajectories say of each of their states but the last one."""

    returns: Tensor  # (N, H)
    weight: Tensor  # (N, H) how much a state counts
    adv: Tensor  # (N, H) the advantage of the action taken in it
    metrics: dict[str, Tensor]  # each (), without gradient


def discounts(
    head: Callable[[Tensor], Any], x: Tensor, terminal: Tensor, discount: float
) -> Tensor:
    """``discount`` times the probability that the episode continues after each state, (N,H+1).

    head: features -> distribution of the continue flag; x (H+1,N,F), of which the first state is
    replayed, and ``terminal`` (N,) or not.
    """
    cont = torch.cat([1.0 - terminal.unsqueeze(0), head(x[1:]).mean()])  # (H+1, N)
    return discount * cont.t()


def head_mode(head: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """What a head says of x (..., F)."""
    return head(x).mode()


def dist_mode(dist: Any) -> Tensor:
    return dist.mode()


def imag_targets(
    disc: Tensor,
    rew: Tensor,
    value: Tensor,
    scale: Callable[[Tensor], Tensor],
    discount: float,
    lam: float,
) -> Targets:
    """The arguments are those of ``imag_loss``."""
    returns = lambda_return(rew, value, disc, lam)  # (N, H)
    # A state counts by the discounted probability that the episode goes on up to and through it;
    # nothing counts after a terminal start.
    alive = disc.detach() / discount  # (N, H+1)
    weight = torch.cat([alive[:, :1], disc[:, 1:-1].detach()], 1).cumprod(1)  # (N, H)
    denominator = scale(returns)
    adv = (returns - value[:, :-1]) / denominator  # (N, H)
    metrics = {
        "imag_reward": rew[:, 1:].mean(),
        "imag_return": returns.mean(),
        "imag_value": value.mean(),
        "imag_cont": alive[:, 1:].mean(),
        "return_scale": denominator,
        "adv_std": adv.std(correction=min(1, adv.numel() - 1)),  # that of a single one is 0
    }
    return Targets(returns, weight, adv, {name: x.detach() for name, x in metrics.items()})


def actor_loss(
    targets: Targets,
    action: Tensor,
    policy: Policy,
    entropy: float,
    reinforce: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """-> the actor's loss () and its entropy (). The arguments are those of ``imag_loss``."""
    policy_entropy = policy.entropy().t()  # (N, H)
    gain = targets.adv  # (N, H)
    if reinforce:
        log_prob = policy.log_prob(action[:, :-1].detach().transpose(0, 1)).t()  # (N, H)
        gain = surrogate(log_prob, targets.adv.detach())
    loss = -(targets.weight * (gain + entropy * policy_entropy))
    return loss.mean(), policy_entropy.mean().detach()


def critic_loss(targets: Targets, value_dist: Value, slow_value: Tensor) -> Tensor:
    """-> (). The arguments are those of ``imag_loss``."""
    of_value = value_dist.log_prob(targets.returns.detach().t(), slow_value)  # (H, N)
    return -(targets.weight.t() * of_value).mean()


class Parts(NamedTuple):
    """Of ``imag_loss`` and what it is given, compiled or not. Actor and critic have one each, as
    their gradients are taken one after the other.
    """

    discounts: Callable[..., Tensor] = discounts
    head_mode: Callable[..., Tensor] = head_mode
    dist_mode: Callable[..., Tensor] = dist_mode
    targets: Callable[..., Targets] = imag_targets
    actor: Callable[..., tuple[Tensor, Tensor]] = actor_loss
    critic: Callable[..., Tensor] = critic_loss

    def compiled(self) -> Parts:
        return Parts(*map(torch.compile, self))


PARTS = Parts()


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
    parts: Parts = PARTS,
) -> ImagLoss:
    """Actor and critic loss of imagined trajectories (Hafner et al. 2023, eq. 7-12).

    action (N,H+1,A) taken in each state; rew (N,H+1) for arriving in it; disc (N,H+1), ``discount``
    times the probability that the episode continues after it; value (N,H+1), the critic's. policy
    and value_dist (H,N) are the outputs of actor and critic in the first H states, whose features
    have no gradient; slow_value (H,N) is the slow critic's, towards which the critic is
    regularised. scale: takes the returns (N,H) and gives what advantages are divided by, ().

    reinforce: the actor's gradient is that of its actions' log-probabilities, by ``surrogate``;
    otherwise it is that of the returns, which must then depend on the actions.
    """
    shapes = action.shape[:2], disc.shape, rew.shape, value.shape
    assert len(set(shapes)) == 1, shapes
    targets = parts.targets(disc, rew, value, scale, discount, lam)
    actor, policy_entropy = parts.actor(targets, action, policy, entropy, reinforce, surrogate)
    critic = parts.critic(targets, value_dist, slow_value)
    metrics = {"actor_entropy": policy_entropy} | targets.metrics
    return ImagLoss(actor, critic, targets.returns, metrics)


def scaled(loss: Tensor, scale: float) -> Tensor:
    """``loss`` times its weight; a weight of 1 costs nothing."""
    return loss if scale == 1.0 else scale * loss


# ---------------------------------------------------------------- of replayed steps


def one_episode(is_first: Tensor, steps: int) -> Tensor:
    """(B, T - steps) bool: whether the action before step t, step t and step t + ``steps`` are of
    one episode. is_first: (B,T) bool.
    """
    length = is_first.shape[1] - steps
    episode = is_first.long().cumsum(1)  # (B, T)
    return ~is_first[:, :length] & (episode[:, :length] == episode[:, steps:])


def mean_where(x: Tensor, valid: Tensor) -> Tensor:
    """The mean of ``x`` where ``valid`` (bool, same shape), (); 0 where it nowhere is."""
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def replay_returns(
    rew: Tensor, terminal: Tensor, ends: Tensor, boot: Tensor, discount: float, lam: float
) -> Tensor:
    """Lambda-returns of replayed steps 0 .. T-2 (Hafner et al. 2024, replay critic loss), (B, T-1).

        R_t = rew_{t+1} + disc_{t+1} ((1 - lam_{t+1}) boot_{t+1} + lam_{t+1} R_{t+1})
        R_{T-1} = boot_{T-1}

    with disc = ``discount`` where the episode goes on and 0 at a ``terminal`` step, lam = ``lam``
    but 0 at the ``ends`` of episodes, terminal or cut. boot: values of all steps. All (B,T). The
    return of an episode's last step is of another episode: it is not to be used.
    """
    disc, lam = discount * (1.0 - terminal), lam * (1.0 - ends)
    last, returns = boot[:, -1], []
    for t in reversed(range(1, rew.shape[1])):
        ahead = torch.lerp(boot[:, t], last, lam[:, t])
        last = rew[:, t] + disc[:, t] * ahead
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def contrastive_loss(
    queries: list[Tensor], keys: Tensor, is_first: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE over batch and time (van den Oord et al. 2018): which of all B * T observations is
    the one k steps on?

    queries: for k = 0, 1, .. (B,T-k,U), what step t predicts of step t + k; keys (B,T,U) of all
    observations. The score of a pair is its product over sqrt(U). Pairs across the end of an
    episode do not count, also those whose query is an episode's first step: it was predicted from
    the episode before. Lag k has the weight ``decay`` ** k, all together 1.

    -> loss (), and the share of right guesses at each lag (K,), without gradient.
    """
    batch, length = is_first.shape
    flat = keys.flatten(0, 1)  # (B * T, U)
    index = torch.arange(batch * length, device=keys.device).view(batch, length)
    weights = [decay**k for k in range(len(queries))]
    loss, right = 0.0, []
    for k, query in enumerate(queries):
        scores = query.flatten(0, 1) @ flat.t()  # (B * (T-k), B * T)
        scores = at_least_float32(scores) * keys.shape[-1] ** -0.5
        positive, valid = index[:, k:].flatten(), one_episode(is_first, k).flatten()
        nats = F.cross_entropy(scores, positive, reduction="none")
        loss = loss + weights[k] / sum(weights) * mean_where(nats, valid)
        right.append(mean_where((scores.detach().argmax(1) == positive).float(), valid))
    return loss, torch.stack(right)


def redundancy_loss(x: Tensor, y: Tensor, valid: Tensor, weight: float) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, eq. 1): the correlation of every number of x with its own
    of y shall be 1, with all others of y 0.

    x, y: (R,U), of which the ``valid`` (R,) bool rows count. weight: of the others' squares. -> (),
    summed over the (U,U) correlations. A number that never changes has the correlation 0.
    """
    x, y = (standardised(at_least_float32(z), valid) for z in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        corr = x.t() @ y / valid.sum().clamp(min=1)  # (U, U)
    own = corr.diagonal()
    others = corr.square().sum() - own.square().sum()
    return (own - 1.0).square().sum() + weight * others


def standardised(x: Tensor, valid: Tensor) -> Tensor:
    """Every column of (R,U) with mean 0 and deviation 1 over the ``valid`` rows; others are 0."""
    mask, count = valid.unsqueeze(1), valid.sum().clamp(min=1)
    x = torch.where(mask, x, 0.0)
    x = torch.where(mask, x - x.sum(0) / count, 0.0)
    return x * torch.rsqrt(x.square().sum(0) / count + 1e-8)


def balanced(loss: Tensor, log_sigma: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """A loss divided by its learned scale, and what keeps the scale from growing (HarmonyDream, Ma
    et al. 2024, eq. 6): L / sigma and ``weight`` * ln(1 + sigma). log_sigma: ().
    """
    return loss * torch.exp(-log_sigma), weight * F.softplus(log_sigma)
