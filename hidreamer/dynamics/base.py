"""The one interface of a latent state, the recurrent scan that ``rssm`` and ``hrssm`` share, and the KL losses.

Shapes: B sequences, T steps, N = B * n imagined ones, H imagined steps, E embedding, A action, D deter, Z stoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.nets import Block, GRUCell


class Feat(NamedTuple):
    """The only thing that heads, actor and critic read."""

    deter: Tensor  # (..., D) memory: what the sequence model carries into this step
    stoch: Tensor  # (..., Z) the state of this step, levels concatenated coarse -> fine

    def cat(self) -> Tensor:
        """(..., Z + D), stoch first, as upstream orders it."""
        return torch.cat(self[::-1], -1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Feat:
        return Feat(*map(fn, self))


class Level(NamedTuple):
    """One level of the state, as logits before unimix."""

    post: Tensor  # (B, T, S, K) given the observation
    prior: Tensor  # (B, T, S, K) given all before it and the coarser levels of its own step


class Post(NamedTuple):
    """What ``observe`` found."""

    feat: Feat  # (B, T, .)
    levels: tuple[Level, ...]  # coarse -> fine
    aux: Any = None  # what only the dynamics' own ``loss`` and ``starts`` read


class Balance(NamedTuple):
    """How the KL is weighted (Hafner et al. 2023, eq. 5)."""

    dyn: float  # weight of KL(sg(post) || prior), which trains the prior
    rep: float  # weight of KL(post || sg(prior)), which trains the posterior and the encoder
    free: float  # nats below which neither has a gradient, for the whole state: L levels get 1/L each
    unimix: float  # share of the uniform distribution in every categorical


Policy = Callable[[Feat], Tensor]


def start_steps(length: int, n: int) -> slice:
    """Which replayed steps imagination starts from: ``n`` of ``length`` (0: all), evenly spaced, with the last."""
    if not 0 <= n <= length:
        raise ValueError(f"imag.starts is {n}; a sequence has {length} steps to imagine from")
    stride = length // n if n else 1
    first = length - 1 - (n - 1) * stride if n else 0
    return slice(first, length, stride)


def kl_losses(
    levels: tuple[Level, ...], balance: Balance, weights: list[float] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Balanced KL with free nats per level; ``weights`` scale how much each level's prior is trained.

    -> {"dyn", "rep"}: weighted, clipped, summed over levels, (B, T) each, ``rep`` only where it has a weight; and
    metrics: per level the unclipped nats and both entropies, ().
    """
    losses, metrics = {"dyn": 0.0} | ({"rep": 0.0} if balance.rep else {}), {}
    free = balance.free / len(levels)
    for i, level in enumerate(levels):
        post, prior = (dists.mix(logit, balance.unimix) for logit in level)  # (B, T, S, K)
        dyn = dists.kl(post.detach(), prior)  # (B, T)
        losses["dyn"] = losses["dyn"] + balance.dyn * (weights[i] if weights else 1.0) * dyn.clamp(min=free)
        if balance.rep:
            losses["rep"] = losses["rep"] + balance.rep * dists.kl(post, prior.detach()).clamp(min=free)
        metrics[f"kl_{i}"] = dyn.detach().mean()
        metrics[f"post_ent_{i}"] = dists.entropy(post.detach()).mean()
        metrics[f"prior_ent_{i}"] = dists.entropy(prior.detach()).mean()
    return losses, metrics


class Dynamics(nn.Module):
    """A latent state and how it moves. Carries are NamedTuples of tensors, batch first, opaque, never mutated.

    ``sample=False`` takes the mode wherever a sample would be drawn.
    """

    deter_dim: int
    stoch_dim: int
    shapes: tuple[tuple[int, int], ...]  # (variables, classes) of each level, coarse -> fine
    former_names: Mapping[str, str] = {}  # of parameters in older checkpoints: {former: now}
    places: int = 0  # positions that the encoder's map of images must have; 0 where that does not matter

    @property
    def bits(self) -> float:
        """What the state of one step can hold at most."""
        return sum(variables * math.log2(classes) for variables, classes in self.shapes)

    @property
    def feat_dim(self) -> int:
        return self.deter_dim + self.stoch_dim

    def initial(self, batch: int) -> Any:
        """The carry before an episode's first observation."""
        raise NotImplementedError

    def observe(
        self, carry: Any, embed: Tensor, prev_action: Tensor, is_first: Tensor, sample: bool = True
    ) -> tuple[Any, Post]:
        """Follow real observations: embed (B,T,E), prev_action (B,T,A) that led to each, is_first (B,T) bool.

        -> (carry after the last step, Post). Where ``is_first``, carry and action are those of an episode's start.
        """
        raise NotImplementedError

    def loss(self, post: Post) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """-> ({name: weighted loss (B,T)}, {name: metric ()})."""
        raise NotImplementedError

    def starts(self, carry: Any, post: Post, n: int) -> Any:
        """Detached carry of B * n imagination starts, sequence by sequence: the steps of ``start_steps``.

        ``carry`` and ``post`` are what ``observe`` returned.
        """
        raise NotImplementedError

    def feat(self, carry: Any) -> Feat:
        """The state that a carry is at, (B,.)."""
        return Feat(carry.deter, carry.stoch)

    def partial(self, feat: Feat) -> dict[str, Feat]:
        """What coarse levels alone say, {name: feat with the finer levels replaced}, coarsest first."""
        return {}

    def decoded(self, post: Post) -> Feat:
        """The features (B,T,.) that the decoder is trained on."""
        return post.feat

    def learn(self, post: Post) -> None:
        """What is learnt otherwise than by gradient: called once per training update, after the optimiser's step."""

    def adopt(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of another kind of state, translated so that they compute the same here. Raises ValueError."""
        return params

    def compile_steps(self) -> None:
        """Compile what runs once per step: small pieces compile in seconds, an unrolled loop in minutes."""
        raise NotImplementedError

    def imagine(
        self, carry: Any, actor: Policy | Tensor, horizon: int, sample: bool = True
    ) -> tuple[Any, Feat, Tensor]:
        """Continue any carry for H >= 1 steps in imagination, with a policy or with given actions (N,H,A).

        Any carry will do: of ``initial``, ``observe``, ``starts``, or ``imagine`` itself. H1 steps and then H2 from
        the carry that they led to equal H1 + H2 steps.

        -> carry after the last step; Feat (N,H+1,.), the given carry's own first; actions (N,H+1,A), the action taken
        *in* each state (given actions: the last one is zero).
        """
        raise NotImplementedError


class Carry(NamedTuple):
    """State of a recurrent dynamics."""

    deter: Tensor  # (B, D)
    stoch: Tensor  # (B, Z)


class Recurrent(Dynamics):
    """What ``rssm`` and ``hrssm`` share: GRU, learned initial state, scan. They add how a state is drawn:

    - ``prior_step(deter, sample)`` (N,D) -> stoch (N,Z);
    - ``post_step(deter, v, sample)`` (B,D), (B,hidden) -> stoch (B,Z), posterior logits per level (B,S_l,K_l);
    - ``priors(deter, stoch)`` (B,T,D), (B,T,Z) -> prior logits per level, given the *posterior's* coarser levels.
    """

    def __init__(self, embed_dim: int, act_dim: int, deter: int, hidden: int, stoch_dim: int, balance: Balance):
        super().__init__()
        self.deter_dim, self.stoch_dim, self.act_dim, self.balance = deter, stoch_dim, act_dim, balance
        self.img_in = Block(stoch_dim + act_dim, hidden)
        self.cell = GRUCell(hidden, deter)
        self.img_out = Block(deter, hidden)
        self.obs_out = Block(deter + embed_dim, hidden)
        self.start = nn.Parameter(torch.zeros(deter))

    def prior_step(self, deter: Tensor, sample: bool) -> Tensor:
        raise NotImplementedError

    def post_step(self, deter: Tensor, v: Tensor, sample: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def initial(self, batch: int) -> Carry:
        # The memory is learned; the state is the prior's mode there, a constant, so that no loss of the posterior
        # reaches the prior through it.
        deter = torch.tanh(self.start).unsqueeze(0)  # (1, D)
        return Carry(*(x.expand(batch, -1) for x in (deter, self.prior_step(deter, sample=False).detach())))

    def observe(
        self, carry: Carry, embed: Tensor, prev_action: Tensor, is_first: Tensor, sample: bool = True
    ) -> tuple[Carry, Post]:
        # All that does not wait for the recurrence is done for T steps at once: what actions and embeddings
        # add to the two input layers, and where episodes start.
        in_stoch, in_action = self.img_in.linear.weight.split([self.stoch_dim, self.act_dim], 1)
        out_deter, out_embed = self.obs_out.linear.weight.split([self.deter_dim, embed.shape[-1]], 1)
        keep = (~is_first).to(embed.dtype).unsqueeze(-1)  # (B, T, 1)
        fresh = Carry(*(x.unsqueeze(1) * (1.0 - keep) for x in self.initial(len(embed))))  # (B, T, .)
        action = (prev_action * keep) @ in_action.t()  # (B, T, hidden)
        embed = embed @ out_embed.t()  # (B, T, hidden)
        deters, stochs, logits = [], [], []
        deter, stoch = carry
        for inputs in zip(*(x.unbind(1) for x in (keep, *fresh, action, embed)), strict=True):
            deter, stoch, logit = self.observe_step(deter, stoch, *inputs, in_stoch, out_deter, sample)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        feat = Feat(torch.stack(deters, 1), torch.stack(stochs, 1))  # (B, T, .)
        post = [torch.stack(level, 1) for level in zip(*logits, strict=True)]  # (B, T, S, K) each
        prior = self.priors(*feat)
        return Carry(deter, stoch), Post(feat, tuple(map(Level, post, prior)))

    def observe_step(self, deter, stoch, keep, deter0, stoch0, action, embed, in_stoch, out_deter, sample):
        """One step of the scan. The rows of a starting episode have keep 0 and carry deter0, stoch0 instead."""
        deter = torch.addcmul(deter0, deter, keep)  # (B, D)
        stoch = torch.addcmul(stoch0, stoch, keep)  # (B, Z)
        x = self.img_in.finish(torch.addmm(action, stoch, in_stoch.t()))  # (B, hidden)
        deter = self.cell(x, deter)
        v = self.obs_out.finish(torch.addmm(embed, deter, out_deter.t()))  # (B, hidden)
        return deter, *self.post_step(deter, v, sample)

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
        deter = self.cell(self.img_in(torch.cat([stoch, action], -1)), deter)  # (N, D)
        return deter, self.prior_step(deter, sample)

    def compile_steps(self) -> None:
        self.observe_step, self.imagine_step = map(torch.compile, (self.observe_step, self.imagine_step))

    def loss(self, post: Post) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return kl_losses(post.levels, self.balance)

    def starts(self, carry: Carry, post: Post, n: int) -> Carry:
        where = start_steps(post.feat.deter.shape[1], n)
        return Carry(*(x[:, where].flatten(0, 1).detach() for x in post.feat))  # (B*n, .)

    def imagine(
        self, carry: Carry, actor: Policy | Tensor, horizon: int, sample: bool = True
    ) -> tuple[Carry, Feat, Tensor]:
        given = isinstance(actor, Tensor)
        deter, stoch = carry
        feats, actions = [Feat(deter, stoch)], []
        for t in range(horizon):
            action = actor[:, t] if given else actor(feats[-1])  # (N, A)
            deter, stoch = self.imagine_step(deter, stoch, action, sample)
            feats.append(Feat(deter, stoch))
            actions.append(action)
        actions.append(torch.zeros_like(actions[-1]) if given else actor(feats[-1]))
        feat = Feat(*(torch.stack(x, 1) for x in zip(*feats, strict=True)))  # (N, H+1, .)
        return Carry(deter, stoch), feat, torch.stack(actions, 1)
