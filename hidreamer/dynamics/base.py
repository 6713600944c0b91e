"""The one interface of a latent state, and the KL losses.

Shapes: B sequences, T steps, N = B * n imagined ones, H imagined steps, E embedding, A action,
D deter, Z stoch, S variables of K classes in a level. Feat (N,.) is one whose tensors are (N,D) and
(N,Z).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.precision import is_mapped


class Feat(NamedTuple):
    """The only thing that heads, actor and critic read."""

    deter: Tensor  # (..., D) memory: what the sequence model carries into this step
    stoch: Tensor  # (..., Z) the state of this step, levels concatenated coarse -> fine

    def cat(self) -> Tensor:
        """(..., Z + D), stoch first, as upstream orders it."""
        return torch.cat(self[::-1], -1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Feat:
        """``fn`` of both."""
        return Feat(*map(fn, self))


class Joined(Feat):
    """Features that lie side by side in one tensor, ``x`` (..., Z + D)."""

    @classmethod
    def of(cls, x: Tensor, stoch_dim: int) -> Joined:
        """x: as ``Feat.cat`` has it."""
        self = cls(x[..., stoch_dim:], x[..., :stoch_dim])
        self.x = x
        return self

    def cat(self) -> Tensor:
        return self.x

    def _replace(self, **parts: Tensor) -> Feat:
        return Feat(*self)._replace(**parts)


class Level(NamedTuple):
    """One level of the state, as logits before unimix."""

    post: Tensor  # (B, T, S, K) given the observation
    prior: Tensor  # (B, T, S, K) given all before it and the coarser levels of its own step


class Post(NamedTuple):
    """What ``observe`` found."""

    feat: Feat  # (B, T, .)
    levels: tuple[Level, ...]  # coarse -> fine
    aux: Any = None  # what only the dynamics itself reads


class KLConfig(NamedTuple):
    """How the KL is weighted (Hafner et al. 2023, eq. 5)."""

    dyn: float  # weight of KL(sg(post) || prior), which trains the prior
    rep: float  # weight of KL(post || sg(prior)), which trains the posterior and the encoder
    free_nats: float  # of the whole state: each of L levels is clipped at 1/L of them from below
    unimix: float  # share of the uniform distribution in every categorical


Policy = Callable[[Feat], Tensor]
Losses = dict[str, Tensor]  # (B, T) each
Metrics = dict[str, Tensor]  # () each


def start_steps(length: int, n: int) -> slice:
    """Which of ``length`` replayed steps imagination starts from: ``n`` of them (0: all).

    They are a whole stride apart, length // n, and the last step is among them. Raises ValueError
    where ``n`` is too large.
    """
    if not 0 <= n <= length:
        raise ValueError(f"imag.starts is {n}; a sequence has {length} steps to imagine from")
    stride = length // n if n else 1
    first = length - 1 - (n - 1) * stride if n else 0
    return slice(first, length, stride)


def unroll(
    step: Callable[[Feat, Tensor], Feat], feat: Feat, actor: Policy | Tensor, horizon: int
) -> tuple[Feat, Feat, Tensor]:
    """H steps of imagination from ``feat`` (N,.): the loop of ``Dynamics.imagine``.

    step: (state, the action (N,A) taken in it) -> the next state. -> the last state (N,.), all
    states (N,H+1,.), actions (N,H+1,A).
    """
    given, size = isinstance(actor, Tensor), feat.stoch.shape[-1]
    feats, actions = [Joined.of(feat.cat(), size)], []
    for t in range(horizon):
        actions.append(actor[:, t] if given else actor(feats[-1]))
        feat = step(feats[-1], actions[-1])
        feats.append(Joined.of(feat.cat(), size))
    actions.append(torch.zeros_like(actions[-1]) if given else actor(feats[-1]))
    whole = Joined.of(stack_steps([feat.cat() for feat in feats]), size)
    return feat, whole, stack_steps(actions)


def none_starts(is_first: Tensor) -> bool:
    """Whether the host knows that no episode starts at these steps (bool) without waiting for a
    device: their tensor lies in its own memory.
    """
    mine = is_first.device.type == "cpu" and not is_mapped(is_first)
    return mine and not is_first.numpy().any()


def stack_steps(steps: Sequence[Tensor]) -> Tensor:
    """T tensors (N,.) -> (N,T,.), which lies step by step in memory; one alone is not copied."""
    if len(steps) == 1:
        return steps[0].unsqueeze(1)
    return torch.stack(list(steps)).transpose(0, 1)


def kl_losses(
    levels: tuple[Level, ...], config: KLConfig, weights: list[float] | None = None
) -> tuple[Losses, Metrics]:
    """Balanced KL with free nats per level; ``weights`` are those of the levels in ``dyn``.

    -> {"dyn", "rep"}: weighted, clipped, summed over levels, (B, T) each, ``rep`` only where it
    has a weight; and metrics: per level the unclipped nats and both entropies, ().
    """
    losses, metrics = {"dyn": 0.0}, {}
    if config.rep:
        losses["rep"] = 0.0
    free = config.free_nats / len(levels)
    for i, level in enumerate(levels):
        post, prior = (dists.unimix_probs(logit, config.unimix) for logit in level)  # (B, T, S, K)
        dyn = dists.kl(post.detach(), prior)  # (B, T)
        dyn_scale = config.dyn * (weights[i] if weights else 1.0)
        losses["dyn"] = losses["dyn"] + dyn_scale * dyn.clamp(min=free)
        if config.rep:
            rep = dists.kl(post, prior.detach())  # (B, T)
            losses["rep"] = losses["rep"] + config.rep * rep.clamp(min=free)
        metrics[f"kl_{i}"] = dyn.detach().mean()
        metrics[f"post_ent_{i}"] = dists.entropy(post.detach()).mean()
        metrics[f"prior_ent_{i}"] = dists.entropy(prior.detach()).mean()
    return losses, metrics


class Dynamics(nn.Module):
    """A latent state and how it moves.

    Carries are NamedTuples, opaque and never changed but by what they put off (``RolloutCarry``
    computes its sequences when first asked). ``sample=False`` takes each distribution's mode
    instead of sampling. ``generator`` is where random numbers come from, None being torch's
    default one.
    """

    deter_dim: int
    stoch_dim: int
    embed_dim: int
    act_dim: int
    shapes: tuple[tuple[int, int], ...]  # (variables, classes) of each level, coarse -> fine
    level_dims: tuple[int, ...]  # numbers of each level in stoch, coarse -> fine; their sum is Z
    former_names: Mapping[str, str] = {}  # of parameters in older checkpoints: {former: now}
    carry_type: type | None = None  # of carries of one fixed size that replay can hold; None: grow
    map_positions: int = 0  # positions required of the encoder's feature map; 0: any

    @property
    def bits(self) -> float:
        """What the state of one step can hold at most."""
        return sum(variables * math.log2(classes) for variables, classes in self.shapes)

    @property
    def feat_dim(self) -> int:
        """D + Z."""
        return self.deter_dim + self.stoch_dim

    def action_weights(self) -> Tensor:
        """(out, A), a view: what an action is multiplied with where it enters."""
        raise NotImplementedError

    def initial(self, batch: int) -> Any:
        """The carry of ``batch`` sequences before an episode's first observation."""
        raise NotImplementedError

    def observe(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Post]:
        """Follow real observations.

        embed: (B,T,E); prev_action: (B,T,A), the action that led to each; is_first: (B,T) bool,
        where carry and action are replaced by those of an episode's start.

        -> the carry after the last step, and what was found at each.
        """
        raise NotImplementedError

    def observe_features(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Feat]:
        """``observe`` for acting, which needs no logits: the carry and features (B,T,.) alone."""
        carry, post = self.observe(carry, embed, prev_action, is_first, True, generator)
        return carry, post.feat

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        """-> ({name: weighted loss (B,T)}, {name: metric ()})."""
        raise NotImplementedError

    def starts(self, carry: Any, post: Post, n: int) -> Any:
        """Detached carry of B * n starts of imagination, by sequence: the steps of ``start_steps``.

        ``carry`` and ``post`` are what ``observe`` returned.
        """
        raise NotImplementedError

    def feat(self, carry: Any) -> Feat:
        """The state that a carry is at, (B,.)."""
        return Feat(carry.deter, carry.stoch)

    def fixed_size(self, carry: Any) -> Any:
        """The same carry of ``observe``, in a size that does not depend on the steps before."""
        return carry

    def select(self, carry: Any, index: Tensor) -> Any:
        """The rows ``index`` (M,) int64 of any carry of N: a carry of M, in that order."""
        return type(carry)(*(x[index] for x in carry))

    def join(self, carries: Sequence[Any]) -> Any:
        """Carries of N1, N2 .. rows as one of all these rows. ``initial`` is none of them: each has
        observed or imagined a step.
        """
        return type(carries[0])(*(torch.cat(x) for x in zip(*carries, strict=True)))

    def classes(self, post: Post) -> tuple[Tensor, ...]:
        """Which class of every variable was drawn, by level (B,T,S) int64."""
        raise NotImplementedError

    def prior_logits(self, carry: Any) -> tuple[Tensor, ...]:
        """What the state of a carry of ``imagine`` was drawn from, by level (N,S,K)."""
        raise NotImplementedError

    def coarse_features(
        self, feat: Feat, generator: torch.Generator | None = None
    ) -> dict[str, Feat]:
        """Of features (..., .), coarsest first: {name: the same without the finer levels}.

        These are sampled again given the coarser ones, or zero.
        """
        return {}

    def decoder_features(self, post: Post, generator: torch.Generator | None = None) -> Feat:
        """The features (B,T,.) that the decoder is trained on."""
        return post.feat

    def update_codebook(self, post: Post, generator: torch.Generator | None = None) -> None:
        """Update what is not trained by gradient.

        Called once per training update, when the gradients of the model's loss have been taken.
        """

    def convert_state_dict(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of another kind of state, translated so that they compute the same here.

        Parameters of this kind are returned as they are. Raises ValueError where that is
        impossible.
        """
        return params

    def compile_steps(self) -> None:
        """Compile what runs once per step: small pieces take seconds, an unrolled loop minutes.
        Nothing, if a latent state does not say what.
        """

    def imagine(
        self,
        carry: Any,
        actor: Policy | Tensor,
        horizon: int,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Feat, Tensor]:
        """Continue any carry for H >= 1 steps in imagination.

        carry: of ``initial``, ``observe``, ``starts``, or ``imagine`` itself: H1 steps and then H2
        from the carry that they led to equal H1 + H2 steps. actor: what samples actions (N,A) in
        states (N,.), or the actions (N,H,A) themselves. A ``Sampler`` is compiled with the step
        around it.

        -> carry after the last step; Feat (N,H+1,.), the given carry's own first; actions
        (N,H+1,A), the one taken *in* each state (of given actions the last one is zero).
        """
        raise NotImplementedError

    # ------------------------------------------------------------ shapes, checked by its methods

    def check_steps(self, carry: Any, prev_action: Tensor, is_first: Tensor) -> None:
        """The arguments of ``observe`` and its like fit together: (B,T,A), (B,T) bool."""
        batch = len(self.feat(carry).deter)
        assert is_first.ndim == 2 and is_first.dtype == torch.bool, (is_first.shape, is_first.dtype)
        assert len(is_first) == batch, f"is_first {is_first.shape}, carry of {batch}"
        shape = *is_first.shape, self.act_dim
        assert prev_action.shape == shape, f"prev_action {prev_action.shape}, not {shape}"

    def check_levels(self, post: Post) -> None:
        """The logits that ``observe`` found have this state's sizes, (B,T,S,K)."""
        assert len(post.levels) == len(self.shapes), len(post.levels)
        steps = post.levels[0].post.shape[:-2]  # (B, T)
        assert len(steps) == 2, steps
        for level, shape in zip(post.levels, self.shapes, strict=True):
            for logit in level:
                assert logit.shape == (*steps, *shape), (logit.shape, steps, shape)

    def check_feat(self, feat: Feat) -> None:
        """Features (B,T,.) of this state's sizes."""
        steps = feat.deter.shape[:-1]
        assert len(steps) == 2, steps
        assert feat.deter.shape == (*steps, self.deter_dim), feat.deter.shape
        assert feat.stoch.shape == (*steps, self.stoch_dim), feat.stoch.shape

    def check_imagined(self, carry: Any, actor: Policy | Tensor, horizon: int) -> None:
        """The arguments of ``imagine``: at least one step, and an action (N,A) for each."""
        assert horizon >= 1, horizon
        if isinstance(actor, Tensor):
            count = len(self.feat(carry).deter)
            assert actor.ndim == 3 and actor.shape[::2] == (count, self.act_dim), actor.shape
            assert actor.shape[1] >= horizon, f"{actor.shape[1]} actions for {horizon} steps"
