"""The recurrent scan that ``rssm``, ``hrssm`` and ``hrvq`` with memory gru share.

Shapes: B sequences, T steps, N = B * n imagined ones, H imagined steps, E embedding, A action,
D deter, Z stoch, S variables of K classes in a level.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import (
    Dynamics,
    Feat,
    Joined,
    KLConfig,
    Level,
    Losses,
    Metrics,
    Policy,
    Post,
    kl_losses,
    none_starts,
    stack_steps,
    start_steps,
    unroll,
)
from hidreamer.dynamics.sampler import Noise, Sampler, dream_noise, policy_and_noise
from hidreamer.dynamics.scan import scan
from hidreamer.dynamics.scan_steps import (
    BeforeSteps,
    CellWeights,
    StepInputs,
    after_steps,
    backward_step,
    before_steps,
    forward_step,
)
from hidreamer.gradients import Tensors
from hidreamer.nets import Block, SplitBlock, make_core
from hidreamer.precision import casts_early, side_by_side


class Carry(NamedTuple):
    """State of a recurrent dynamics."""

    deter: Tensor  # (B, D)
    stoch: Tensor  # (B, Z)


class Recurrent(Dynamics):
    """What the recurrent latent states share: cell, learned initial state, scan.

    They add how a state is sampled: ``prior_step``, ``post_step``, ``priors``; and, for a faster
    scan, what ``scan_steps.ScanDynamics`` asks for. reads: how many numbers of stoch, the first
    ones, go into the memory; 0 means all. sees_memory: whether the posterior does. ``cell``,
    ``norm`` and ``act`` are names of ``nets.CELLS`` (or "block_gru", of ``blocks``), ``NORMS`` and
    ``ACTIVATIONS``; ``prior_layers`` are the hidden layers of the prior.
    """

    former_names: ClassVar = {"start": "initial_deter"}
    carry_type: ClassVar = Carry

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        deter: int,
        hidden: int,
        stoch_dim: int,
        kl_config: KLConfig,
        *,
        reads: int = 0,
        sees_memory: bool = True,
        cell: str = "gru",
        blocks: int = 8,
        prior_layers: int = 1,
        norm: str = "layer",
        act: str = "silu",
    ):
        super().__init__()
        self.deter_dim, self.stoch_dim = deter, stoch_dim
        self.embed_dim, self.act_dim, self.kl_config = embed_dim, act_dim, kl_config
        names = {"norm": norm, "act": act}
        self.reads = reads or stoch_dim
        sizes = self.reads, act_dim, hidden, deter
        self.img_in, self.cell = make_core(cell, *sizes, blocks=blocks, **names)
        self.img_out = Block(deter, hidden, **names)
        if prior_layers > 1:
            more = (Block(hidden, hidden, **names) for _ in range(prior_layers - 1))
            self.img_out = nn.Sequential(self.img_out, *more)
        if sees_memory:
            self.obs_out = Block(deter + embed_dim, hidden, **names)
        self.initial_deter = nn.Parameter(torch.zeros(deter))  # before tanh

        known = (cell, prior_layers, norm, act) == ("gru", 1, "layer", "silu")
        self.has_scan = known and hasattr(self, "post_forward")

    def action_weights(self) -> Tensor:
        return self.img_in.last_weights(self.act_dim)

    def prior_step(self, deter: Tensor, noise: Noise) -> Tensor:
        """Memory (N,D) -> an imagined stoch (N,Z)."""
        raise NotImplementedError

    def post_step(
        self, deter: Tensor, v: Tensor, noise: Noise
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Memory (B,D), hidden of memory and embedding (B,hidden).

        -> stoch (B,Z), posterior logits per level (B,S,K).
        """
        raise NotImplementedError

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, ...]:
        """(B,T,D), (B,T,Z) -> prior logits per level (B,T,S,K) given the posterior's coarser."""
        raise NotImplementedError

    def noise(
        self, steps: int, like: Tensor, sample: bool, generator: torch.Generator | None
    ) -> list[Noise]:
        """What each of so many steps of ``len(like)`` states needs to be sampled."""
        if not sample:
            return [(None,) * len(self.shapes)] * steps
        levels = (level.unbind(0) for level in self.noises(steps, like, generator))
        return list(zip(*levels, strict=True))

    def noises(self, steps: int, like: Tensor, generator: torch.Generator | None) -> Tensors:
        """The same by level, (T,N,S,1): all at once, not a call for each step and level."""
        sizes = [len(like) * variables for variables, _ in self.shapes]
        parts = dists.uniform((steps, sum(sizes)), like, generator).split(sizes, 1)
        return tuple(part.view(steps, len(like), -1, 1) for part in parts)

    def sample_stoch(self, logit: Tensor, noise: Tensor | None) -> Tensor:
        """One level's logits (...,S,K), noise (...,S,1) -> one-hots (...,S*K), or the mode."""
        probs = dists.unimix_probs(logit, self.kl_config.unimix)
        return dists.sample_onehot(probs, noise).flatten(-2)

    def initial(self, batch: int) -> Carry:
        return Carry(*(x.expand(batch, -1) for x in self.initial_state()))

    def initial_state(self) -> tuple[Tensor, Tensor]:
        """(1,D), (1,Z)."""
        # The memory is learned; the state is the prior's mode there, a constant, so that no loss
        # of the posterior reaches the prior through it.
        deter = torch.tanh(self.initial_deter).unsqueeze(0)
        mode = self.noise(1, deter, False, None)[0]
        with torch.no_grad():
            return deter, self.prior_step(deter, mode)

    def observe(
        self,
        carry: Carry,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Post]:
        carry, feat, post = self._observe(carry, embed, prev_action, is_first, sample, generator)
        return carry, Post(feat, tuple(map(Level, post, self.priors(*feat))))

    def observe_features(
        self,
        carry: Carry,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Feat]:
        return self._observe(carry, embed, prev_action, is_first, True, generator)[:2]

    def _observe(
        self,
        carry: Carry,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool,
        generator: torch.Generator | None,
    ) -> tuple[Carry, Feat, list[Tensor]]:
        """``observe`` without priors. -> carry, features (B,T,.), posterior logits (B,T,S,K)."""
        self.check_steps(carry, prev_action, is_first)
        assert embed.shape == (*is_first.shape, self.embed_dim), embed.shape
        # All that does not wait for the recurrence is done for T steps at once: what actions and
        # embeddings add to the two input layers, and where episodes start.
        img_in = self.img_in.split([self.reads, self.act_dim])
        obs_out = self.obs_out.split([self.deter_dim, self.embed_dim])
        length = is_first.shape[1]
        acts = length == 1 and not torch.is_grad_enabled()
        first, keep = None, None
        if not (acts and none_starts(is_first)):
            first = self.initial(len(embed))
            keep = (~is_first).to(first.deter.dtype).unsqueeze(-1)  # (B, T, 1)
            prev_action = prev_action * keep
        action = img_in.project(1, prev_action)  # (B, T, hidden)
        embed = obs_out.project(1, embed)  # (B, T, hidden)
        if self.has_scan and not acts:
            noises = self.noises(length, carry.deter, generator) if sample else ()
            given = (x.transpose(0, 1) for x in (keep, action, embed))  # (T, B, .)
            steps = StepInputs(*first[:2], *given, noises)
            found = scan(self, CellWeights.of(self, img_in, obs_out), steps, carry[:2])
            deter, stoch, logits = found  # (T, B, .)
            last = Carry(deter[-1], stoch[-1])
            feat = Feat(deter.transpose(0, 1), stoch.transpose(0, 1))  # (B, T, .)
            post = [logit.transpose(0, 1) for logit in logits]  # (B, T, S, K) each
        else:
            noises, resets = self.noise(length, carry.deter, sample, generator), [None] * length
            if first is not None:
                starts = (x.unsqueeze(1) * (1.0 - keep) for x in first[:2])  # (B, T, .)
                resets = list(zip(*(x.unbind(1) for x in (keep, *starts)), strict=True))
            steps = resets, action.unbind(1), embed.unbind(1), noises
            last, feat, post = self._observe_steps(carry, steps, img_in, obs_out)
        return last, feat, post

    @property
    def eps(self) -> float:
        """Of the norms."""
        return self.cell.norm.eps

    @property
    def unimix(self) -> float:
        """Share of the uniform distribution in what is sampled."""
        return self.kl_config.unimix

    def post_reads(self, weights: Tensors) -> Tensors:
        """None of the posterior's weights multiply the memory (see ``scan_steps.ScanDynamics``)."""
        return ()

    def scan_forward(self, weights: Tensors, *step: Any) -> tuple:
        return forward_step(self, weights, *step)

    def scan_before(self, weights: Tensors, *all_steps: Any) -> BeforeSteps:
        return before_steps(self, weights, *all_steps)

    def scan_backward(self, weights: Tensors, *step: Any) -> tuple:
        return backward_step(self, weights, *step)

    def scan_after(self, weights: Tensors, *all_steps: Any) -> tuple:
        return after_steps(self, weights, *all_steps)

    def _observe_steps(
        self, carry: Carry, steps: Sequence, img_in: SplitBlock, obs_out: SplitBlock
    ) -> tuple[Carry, Feat, list[Tensor]]:
        """For other cells, norms and activations than ``scan`` knows, for a state without one, and
        for acting. steps: reset, action, embed, noise of ``observe_step``, of each.
        """
        deters, stochs, logits = [], [], []
        deter, stoch = carry[:2]
        for step in zip(*steps, strict=True):
            deter, stoch, logit = self.observe_step(deter, stoch, *step, img_in, obs_out)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        feat = Feat(stack_steps(deters), stack_steps(stochs))  # (B, T, .)
        post = [stack_steps(level) for level in zip(*logits, strict=True)]  # (B, T, S, K) each
        return Carry(deter, stoch), feat, post

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        reset: tuple[Tensor, Tensor, Tensor] | None,
        action: Tensor,
        embed: Tensor,
        noise: Noise,
        img_in: SplitBlock,
        obs_out: SplitBlock,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One step: (B,.) each, action and embed as ``project`` products (B,hidden).

        reset: keep, deter0, stoch0. The rows of a starting episode have keep 0 and carry deter0,
        stoch0 instead, which are 0 in the other rows. None where no episode starts.

        -> deter (B,D), stoch (B,Z), posterior logits per level (B,S,K).
        """
        if reset is not None:
            keep, deter0, stoch0 = reset
            deter = torch.addcmul(deter0, deter, keep)  # (B, D)
            stoch = torch.addcmul(stoch0, stoch, keep)  # (B, Z)
        deter = self.cell(img_in(0, stoch[..., : self.reads], action), deter)
        v = obs_out(0, deter, embed)  # (B, hidden)
        return deter, *self.post_step(deter, v, noise)

    def imagined_stoch(self, deter: Tensor, stoch: Tensor, noise: Noise) -> Tensor:
        """The new memory (N,D), the stoch (N,Z) before -> an imagined stoch (N,Z)."""
        return self.prior_step(deter, noise)

    def imagine_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """(N,D), (N,Z), action (N,A) -> the next deter (N,D), stoch (N,Z)."""
        read = stoch[..., : self.reads]
        deter = self.cell(self.img_in(torch.cat([read, action], -1)), deter)
        return deter, self.imagined_stoch(deter, stoch, noise)

    def dream_action(
        self, sampler: Sampler, deter: Tensor, stoch: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A state (N,.) -> its features x (N,F), what the memory reads of it and of the action
        (N, reads + A), the action (N,A).

        Side by side already, so that what computes them also puts them there.
        """
        x = torch.cat([stoch, deter], -1)
        of_actor = side_by_side(stoch, deter) if casts_early(x.device) else x
        action = sampler.given(of_actor, noise)
        return x, side_by_side(stoch[..., : self.reads], action), action

    def dream_step(
        self, sampler: Sampler, x: Tensor, read: Tensor, state_noise: Noise, action_noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x and read: of ``dream_action``, which this returns of the next state."""
        stoch, deter = x.split([self.stoch_dim, self.deter_dim], -1)
        deter = self.cell(self.img_in(read), deter)
        stoch = self.imagined_stoch(deter, stoch, state_noise)
        return self.dream_action(sampler, deter, stoch, action_noise)

    def _noise_shapes(self, carry: Carry) -> list[tuple[int, ...]]:
        """Of what one step of each level of N states is drawn from."""
        return [(len(carry.deter), variables, 1) for variables, _ in self.shapes]

    def _dream(
        self,
        carry: Carry,
        sampler: Sampler,
        horizon: int,
        sample: bool,
        generator: torch.Generator | None,
    ) -> tuple[Carry, Feat, Tensor]:
        """``imagine``, each step compiled as one with the action that is taken after it."""
        deter, stoch = carry[:2]
        draws = self._noise_shapes(carry), deter, sample, generator
        noises = dream_noise(sampler, horizon, *draws)
        x, read, action = self.dream_action(sampler, deter, stoch, noises[0].action)
        xs, actions = [x], [action]
        for now, then in itertools.pairwise(noises):
            x, read, action = self.dream_step(sampler, x, read, now.state, then.action)
            xs.append(x)
            actions.append(action)
        feat = Joined.of(stack_steps(xs), self.stoch_dim)
        return Carry(*(part[:, -1] for part in feat)), feat, stack_steps(actions)

    def compile_steps(self) -> None:
        self.observe_step = torch.compile(self.observe_step)
        for name in ("scan_forward", "scan_before", "scan_backward", "scan_after"):
            setattr(self, name, torch.compile(getattr(self, name)))
        self.imagine_step = torch.compile(self.imagine_step)
        self.initial_state = torch.compile(self.initial_state)
        self.priors = torch.compile(self.priors)
        self.dream_action = torch.compile(self.dream_action)
        self.dream_step = torch.compile(self.dream_step)
        self.loss = torch.compile(self.loss)

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        self.check_levels(post)
        return kl_losses(post.levels, self.kl_config)

    @property
    def level_dims(self) -> tuple[int, ...]:
        return tuple(variables * classes for variables, classes in self.shapes)

    def classes(self, post: Post) -> tuple[Tensor, ...]:
        levels = zip(post.feat.stoch.split(self.level_dims, -1), self.shapes, strict=True)
        return tuple(onehot.unflatten(-1, shape).argmax(-1) for onehot, shape in levels)

    def prior_logits(self, carry: Carry) -> tuple[Tensor, ...]:
        deter, stoch = (x.unsqueeze(1) for x in carry[:2])  # (B, 1, .)
        return tuple(logit[:, 0] for logit in self.priors(deter, stoch))

    def starts(self, carry: Carry, post: Post, n: int) -> Carry:
        self.check_feat(post.feat)
        where = start_steps(post.feat.deter.shape[1], n)
        return Carry(*(x[:, where].flatten(0, 1).detach() for x in post.feat))  # (B * n, .)

    def imagine(
        self,
        carry: Carry,
        actor: Policy | Tensor,
        horizon: int,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Feat, Tensor]:
        self.check_imagined(carry, actor, horizon)
        if isinstance(actor, Sampler):
            return self._dream(carry, actor, horizon, sample, generator)
        draws = self._noise_shapes(carry), carry.deter, sample, generator
        actor, noise = policy_and_noise(actor, horizon, *draws)
        step = lambda feat, action: Feat(*self.imagine_step(*feat, action, noise()))
        last, feat, action = unroll(step, self.feat(carry), actor, horizon)
        return Carry(*last), feat, action
