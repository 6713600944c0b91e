"""What trains the world model besides its dynamics' own loss: one small class each.

Another objective is another class with ``loss``, a line in ``OBJECTIVES`` and a weight in
``configs.yaml`` (docs/objectives.md). The loss functions themselves are in ``losses``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Dynamics, Feat, Post
from hidreamer.losses import balanced, contrastive_loss, redundancy_loss
from hidreamer.nets import MLP, linear
from hidreamer.views import make_view

Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]  # (B, T) each
Metrics = dict[str, Tensor]  # () each, without gradient


class Objective(Protocol):
    """What trains the world model besides the dynamics' own loss."""

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        """post of (B,T), embed (B,T,E), preprocessed obs -> losses (B,T) by name, metrics."""
        ...


def nll(head: nn.Module, x: Tensor, target: Any) -> Any:
    """Minus the log-likelihood of ``target`` (B,T,...) where ``head`` reads features x (B,T,F).

    -> (B,T); of a head that gives a dict of distributions, for a dict of targets, a dict of them.
    """
    found = head(x)
    if isinstance(found, dict):
        return {key: -dist.log_prob(target[key]) for key, dist in found.items()}
    return -found.log_prob(target)


class NLL(nn.Module):
    """``nll`` as a module without parameters, which is compiled as one with the head."""

    def forward(self, *args: Any) -> Any:
        return nll(*args)


class Reconstruction:
    """The likelihood of each observation, given the features that the dynamics trains its decoder
    on.
    """

    def __init__(self, decoder: nn.Module, nll: Callable, dynamics: Dynamics):
        self.decoder, self.nll, self.dynamics = decoder, nll, dynamics

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        x = self.dynamics.decoder_features(post, generator).cat()
        return self.nll(self.decoder, x, obs), {}


def probe_loss(decoder: nn.Module, feat: Feat, obs: Batch) -> Losses:
    """Reconstruction from stopped features (B,T,.): it trains the decoder alone. -> (B,T) each."""
    return nll(decoder, feat.cat().detach(), obs)


class Reward:
    """The likelihood of the reward for arriving in a state."""

    def __init__(self, head: nn.Module, nll: Callable):
        self.head, self.nll = head, nll

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        return {"reward": self.nll(self.head, post.feat.cat(), obs["reward"])}, {}


class Continue:
    """The likelihood that the episode continues, or ends, after a state."""

    def __init__(self, head: nn.Module, nll: Callable):
        self.head, self.nll = head, nll

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        return {"cont": self.nll(self.head, post.feat.cat(), 1.0 - obs["is_terminal"])}, {}


class ActionConditionedCPC(nn.Module):
    """AC-CPC (TWISTER, Burchi and Timofte 2025): from the prior of step t and the actions after it,
    recognise the embeddings of steps t, t + 1 .. among all of the batch.

    The prior of step t is what the state of step t - 1 and the action taken there say of it, so
    that these are 1, 2 .. ``steps`` steps on. It is the memory and a draw of the coarsest level:
    finer levels' priors know the coarser ones of their own step. Unlike TWISTER's, the perceptrons
    of all lags share their weights but for the actions and a bias, and scores are divided by the
    root of their numbers, ``units``.

    augment: how the observations to recognise are changed, see ``views.make_view``. unimix: of the
    draw.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        encoder: nn.Module,
        unimix: float,
        *,
        steps: int,
        units: int,
        decay: float,
        augment: str,
    ):
        super().__init__()
        variables, classes = dynamics.shapes[0]
        self.unimix, self.decay = unimix, decay
        self.encoder = (encoder,)  # not a part of this module
        self.view = make_view(augment, encoder)
        self.state = linear(dynamics.deter_dim + variables * classes, units)
        actions = (linear(dynamics.act_dim, units, bias=False) for _ in range(steps - 1))
        self.actions = nn.ModuleList(actions)
        self.lag = nn.Parameter(torch.zeros(steps, units))
        self.query = MLP(units, 1, units, units)
        self.key = MLP(dynamics.embed_dim, 1, units, units)

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        if self.view is not None:
            embed = self.encoder[0](self.view(obs, generator))
        probs = dists.unimix_probs(post.levels[0].prior, self.unimix)  # (B, T, S, K)
        noise = dists.uniform((*probs.shape[:-1], 1), probs, generator)
        drawn = dists.sample_onehot(probs, noise).flatten(-2)  # (B, T, S * K)
        x = self.state(torch.cat([post.feat.deter, drawn], -1))  # (B, T, U)
        is_first = obs["is_first"].bool()
        queries, length = [], is_first.shape[1]
        for k in range(min(len(self.lag), length)):
            x = x[:, : length - k]
            if k:  # taken in step t + k - 1
                x = x + self.actions[k - 1](obs["prev_action"][:, k:])
            queries.append(self.query(x + self.lag[k]))  # (B, T - k, U)
        loss, right = contrastive_loss(queries, self.key(embed), is_first, self.decay)
        metrics = {"ac_cpc_accuracy_1": right[0], "ac_cpc_accuracy_last": right[-1]}
        return {"ac_cpc": loss.expand(is_first.shape)}, metrics


class Barlow(nn.Module):
    """R2-Dreamer (Morihira et al. 2026): features tell what the encoder saw, with nothing decoded.

    A linear layer of the features is to correlate, number by number, with the embedding, which has
    no gradient of its own: the encoder learns through the features.

    redundancy: weight of the correlations with other numbers.
    """

    def __init__(self, feat_dim: int, embed_dim: int, *, redundancy: float):
        super().__init__()
        self.redundancy = redundancy
        self.project = linear(feat_dim, embed_dim, bias=False)

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        x, y = self.project(post.feat.cat()).flatten(0, 1), embed.detach().flatten(0, 1)
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        loss = redundancy_loss(x, y, every, self.redundancy)
        return {"barlow": loss.expand(embed.shape[:2])}, {}


class NextEmbed(nn.Module):
    """NE-Dreamer (Bredis et al. 2026): from a state and the action taken there, predict what the
    encoder sees next, which has no gradient of its own.

    A perceptron predicts, not a transformer as theirs: memory has seen the steps before. As in
    ``Barlow``, correlations are compared and not distances, which constant embeddings would make
    zero.

    redundancy: weight of the correlations with other numbers.
    """

    def __init__(
        self,
        feat_dim: int,
        embed_dim: int,
        act_dim: int,
        *,
        layers: int,
        units: int,
        redundancy: float,
    ):
        super().__init__()
        self.redundancy = redundancy
        self.predict = MLP(feat_dim + act_dim, layers, units, embed_dim)

    def loss(
        self, post: Post, embed: Tensor, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Losses, Metrics]:
        action = obs["prev_action"][:, 1:]  # taken in the step before
        x = self.predict(torch.cat([post.feat.cat()[:, :-1], action], -1))  # (B, T - 1, E)
        valid = ~obs["is_first"][:, 1:].bool()
        rows = (z.flatten(0, 1) for z in (x, embed[:, 1:].detach(), valid))
        loss = redundancy_loss(*rows, self.redundancy)
        return {"next_embed": loss.expand(embed.shape[:2])}, {}


class Harmony(nn.Module):
    """HarmonyDream (Ma et al. 2024): how much observations, rewards and dynamics count is learned.

    The losses of each group are divided by a scale sigma. Observations are reconstruction and all
    that replaces it; the continue loss is in no group, as in their code.

    weight: of ln(1 + sigma), 1 in the paper.
    """

    groups = ("observation", "reward", "dynamics")

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight
        self.log_sigma = nn.Parameter(torch.zeros(len(self.groups)))

    def balance(self, losses: Losses, group_of: Mapping[str, str]) -> tuple[Losses, Metrics]:
        """losses: weighted, (B,T) by name; group_of: {name of a loss: its group} -> the same, the
        regulariser as "harmony", and the factors 1 / sigma.
        """
        out, metrics, penalty = dict(losses), {}, 0.0
        for group, log_sigma in zip(self.groups, self.log_sigma, strict=True):
            metrics[f"harmony_{group}"] = torch.exp(-log_sigma.detach())
            names = [name for name in losses if group_of.get(name) == group]
            for name in names:
                out[name], regulariser = balanced(losses[name], log_sigma, self.weight)
            penalty = penalty + (regulariser if names else 0.0 * log_sigma)
        first = next(iter(losses.values()))
        return out | {"harmony": penalty.expand(first.shape)}, metrics


def _ac_cpc(model: Any, config: Any) -> Objective:
    parts = model.dynamics, model.encoder, config.dynamics.unimix
    settings = dict(config.model.ac_cpc)
    settings["units"] = settings["units"] or config.reward.units
    return ActionConditionedCPC(*parts, **settings)


def _next_embed(model: Any, config: Any) -> Objective:
    sizes = model.feat_dim, model.encoder.dim, model.dynamics.act_dim
    return NextEmbed(*sizes, **config.model.next_embed)


# {name in ``model.losses``: what makes it of a world model and a config of all keys}. The model has
# encoder, dynamics, decoder, reward, cont, nll, feat_dim.
OBJECTIVES: dict[str, Callable[[Any, Any], Objective]] = {
    "decoder": lambda model, config: Reconstruction(model.decoder, model.nll, model.dynamics),
    "reward": lambda model, config: Reward(model.reward, model.nll),
    "cont": lambda model, config: Continue(model.cont, model.nll),
    "ac_cpc": _ac_cpc,
    "barlow": lambda m, config: Barlow(m.feat_dim, m.encoder.dim, **config.model.barlow),
    "next_embed": _next_embed,
}


def make_objectives(model: Any, config: Any) -> dict[str, Objective]:
    """Those that have a weight in ``config.model.losses``; those with parameters are modules.

    Raises ValueError, one line, where there is none or one without a key for its weight, or for
    what the observations do not allow.
    """
    weights = config.model.losses
    for name in OBJECTIVES:
        if name not in weights:
            raise ValueError(
                f"the objective {name!r} has no weight: add {name} to model.losses in configs.yaml"
            )
    if not any(weights[name] for name in OBJECTIVES):
        raise ValueError(
            "model.losses has no objective, so that states would tell nothing of what is seen: give"
            " one a weight, such as --model.losses.decoder 1"
        )
    return {name: make(model, config) for name, make in OBJECTIVES.items() if weights[name]}
