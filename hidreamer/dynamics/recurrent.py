"""The recurrent scan that ``rssm`` and ``hrssm`` share.

Shapes: B sequences, T steps, N = B * n imagined ones, H imagined steps, E embedding, A action,
D deter, Z stoch, S variables of K classes in a level.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import (
    Dynamics,
    Feat,
    KLConfig,
    Level,
    Losses,
    Metrics,
    Policy,
    Post,
    kl_losses,
    start_steps,
    unroll,
)
from hidreamer.nets import Block, SplitBlock, make_cell

Noise = tuple[Tensor | None, ...]  # of every level, uniform (N,S,1); None takes the mode


class Carry(NamedTuple):
    """State of a recurrent dynamics."""

    deter: Tensor  # (B, D)
    stoch: Tensor  # (B, Z)


class Recurrent(Dynamics):
    """What ``rssm`` and ``hrssm`` share: cell, learned initial state, scan.

    They add how a state is sampled: ``prior_step``, ``post_step``, ``priors``. ``cell``, ``norm``
    and ``act`` are names of ``nets.CELLS``, ``NORMS`` and ``ACTIVATIONS``.
    """

    former_names: ClassVar = {"start": "initial_deter"}

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        deter: int,
        hidden: int,
        stoch_dim: int,
        kl_config: KLConfig,
        *,
        cell: str = "gru",
        norm: str = "layer",
        act: str = "silu",
    ):
        super().__init__()
        self.deter_dim, self.stoch_dim = deter, stoch_dim
        self.embed_dim, self.act_dim, self.kl_config = embed_dim, act_dim, kl_config
        self.img_in = Block(stoch_dim + act_dim, hidden, norm=norm, act=act)
        self.cell = make_cell(cell, hidden, deter, norm=norm)
        self.img_out = Block(deter, hidden, norm=norm, act=act)
        self.obs_out = Block(deter + embed_dim, hidden, norm=norm, act=act)
        self.initial_deter = nn.Parameter(torch.zeros(deter))  # before tanh

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
        """What each of so many steps of ``len(like)`` states needs to be sampled.

        All of it at once: per step, it would be a call to the generator for each level.
        """
        if not sample:
            return [(None,) * len(self.shapes)] * steps
        sizes = [len(like) * variables for variables, _ in self.shapes]
        parts = dists.uniform((steps, sum(sizes)), like, generator).split(sizes, 1)
        levels = []
        for part, (variables, _) in zip(parts, self.shapes, strict=True):
            levels.append(part.view(steps, len(like), variables, 1).unbind(0))  # (N, S, 1) each
        return list(zip(*levels, strict=True))

    def sample_stoch(self, logit: Tensor, noise: Tensor | None) -> Tensor:
        """One level's logits (...,S,K), noise (...,S,1) -> one-hots (...,S*K), or the mode."""
        probs = dists.unimix_probs(logit, self.kl_config.unimix)
        return dists.sample_onehot(probs, noise).flatten(-2)

    def initial(self, batch: int) -> Carry:
        # The memory is learned; the state is the prior's mode there, a constant, so that no loss
        # of the posterior reaches the prior through it.
        deter = torch.tanh(self.initial_deter).unsqueeze(0)  # (1, D)
        mode = self.noise(1, deter, False, None)[0]
        stoch = self.prior_step(deter, mode).detach()  # (1, Z)
        return Carry(deter.expand(batch, -1), stoch.expand(batch, -1))

    def observe(
        self,
        carry: Carry,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Post]:
        self.check_steps(carry, prev_action, is_first)
        assert embed.shape == (*is_first.shape, self.embed_dim), embed.shape
        # All that does not wait for the recurrence is done for T steps at once: what actions and
        # embeddings add to the two input layers, and where episodes start.
        img_in = self.img_in.split([self.stoch_dim, self.act_dim])
        obs_out = self.obs_out.split([self.deter_dim, self.embed_dim])
        keep = (~is_first).to(embed.dtype).unsqueeze(-1)  # (B, T, 1)
        first = self.initial(len(embed))
        deter0, stoch0 = (x.unsqueeze(1) * (1.0 - keep) for x in first)  # (B, T, .)
        action = img_in.project(1, prev_action * keep)  # (B, T, hidden)
        embed = obs_out.project(1, embed)  # (B, T, hidden)
        inputs = [x.unbind(1) for x in (keep, deter0, stoch0, action, embed)]
        deters, stochs, logits = [], [], []
        deter, stoch = carry
        noise = self.noise(is_first.shape[1], deter, sample, generator)
        for *step, drawn in zip(*inputs, noise, strict=True):
            deter, stoch, logit = self.observe_step(deter, stoch, *step, img_in, obs_out, drawn)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        feat = Feat(torch.stack(deters, 1), torch.stack(stochs, 1))  # (B, T, .)
        post = [torch.stack(level, 1) for level in zip(*logits, strict=True)]  # (B, T, S, K) each
        prior = self.priors(*feat)
        return Carry(deter, stoch), Post(feat, tuple(map(Level, post, prior)))

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        keep: Tensor,
        deter0: Tensor,
        stoch0: Tensor,
        action: Tensor,
        embed: Tensor,
        img_in: SplitBlock,
        obs_out: SplitBlock,
        noise: Noise,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One step of the scan: (B,.) each, action and embed as ``project`` products (B,hidden).

        The rows of a starting episode have keep 0 and carry deter0, stoch0 instead, which are 0 in
        the other rows.

        -> deter (B,D), stoch (B,Z), posterior logits per level (B,S,K).
        """
        deter = torch.addcmul(deter0, deter, keep)  # (B, D)
        stoch = torch.addcmul(stoch0, stoch, keep)  # (B, Z)
        deter = self.cell(img_in(0, stoch, action), deter)
        v = obs_out(0, deter, embed)  # (B, hidden)
        return deter, *self.post_step(deter, v, noise)

    def imagine_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """(N,D), (N,Z), action (N,A) -> the next deter (N,D), stoch (N,Z)."""
        deter = self.cell(self.img_in(torch.cat([stoch, action], -1)), deter)
        return deter, self.prior_step(deter, noise)

    def compile_steps(self) -> None:
        self.observe_step = torch.compile(self.observe_step)
        self.imagine_step = torch.compile(self.imagine_step)

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        self.check_levels(post)
        return kl_losses(post.levels, self.kl_config)

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

        def step(state: Feat, action: Tensor) -> Feat:
            noise = self.noise(1, state.deter, sample, generator)[0]
            return Feat(*self.imagine_step(*state, action, noise))

        last, feat, action = unroll(step, self.feat(carry), actor, horizon)
        return Carry(*last), feat, action
