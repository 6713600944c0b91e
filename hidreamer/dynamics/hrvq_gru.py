"""hrvq with ``memory: gru``: residual-VQ codes as the state, rssm's recurrence as the memory.

``posterior_sees: memory`` is rssm with other states: the posterior is the quantiser's, of v, the
hidden layer of memory and embedding. With ``frame`` it sees the embedding alone, as those of the
transformers do: codes are known before the recurrence, which then is the cell alone. The levels of
a step come from a depth network on u, the hidden layer of the memory.

Shapes: B sequences, T steps, N imagined states, L levels, G groups, K codes of d numbers, D deter,
Z stoch.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hidreamer.depth import Depth
from hidreamer.dynamics.base import Feat, KLConfig, Level, Policy, Post, start_steps
from hidreamer.dynamics.cell_scan import cell_scan
from hidreamer.dynamics.recurrent import Carry, Recurrent
from hidreamer.dynamics.residual_scan import ResidualScan
from hidreamer.dynamics.sampler import Noise
from hidreamer.dynamics.tokens import before_each
from hidreamer.gradients import Tensors
from hidreamer.precision import autocast_dtype, products_in
from hidreamer.quantizer import Codes


class TokenCarry(NamedTuple):
    """State of a recurrence over codes."""

    deter: Tensor  # (B, D)
    stoch: Tensor  # (B, Z)
    before: Tensor  # (B, Z) the state before, zero at an episode's start


class Aux(NamedTuple):
    """What ``loss``, ``starts`` and ``update_codebook`` need of a pass over (B, T)."""

    codes: Codes
    is_first: Tensor  # (B, T)
    before: Tensor  # (B, T, Z) the states before, zero at an episode's start


class RecurrentHRVQ(ResidualScan, Recurrent):
    """options: those of ``Tokens.make_codes``; those of the transformers are unused."""

    carry_type: ClassVar = TokenCarry

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        kl_config: KLConfig,
        *,
        deter: int,
        hidden: int,
        levels: int,
        groups: int,
        code_dim: int,
        chain: bool,
        memory_reads: str,
        depth_units: int,
        copy: bool,
        posterior: str,
        posterior_sees: str = "frame",
        cell: str = "gru",
        blocks: int = 8,
        prior_layers: int = 1,
        norm: str = "layer",
        act: str = "silu",
        **options: Any,
    ):
        names, sees_memory = {"norm": norm, "act": act}, posterior_sees == "memory"
        core = {"cell": cell, "blocks": blocks, "prior_layers": prior_layers} | names
        if sees_memory and (posterior != "sampled" or options["spatial"]):
            raise ValueError(
                "dynamics.hrvq.posterior_sees memory is for posterior sampled, without spatial:"
                " codes that are learned from frames, or places of one, need posterior_sees frame"
            )
        if copy and options["residual"] == "innovation":
            raise ValueError(
                "dynamics.hrvq.copy does not go with residual innovation, which takes off what the"
                " prior expects: choose one"
            )
        size = groups * code_dim
        sizes = embed_dim, act_dim, deter, hidden, levels * size, kl_config
        reads = size if memory_reads == "coarse" else 0
        Recurrent.__init__(self, *sizes, reads=reads, sees_memory=sees_memory, **core)
        own = ("residual", "noise", "commitment", "level_weights", "temperature", "codes")
        own = {key: options[key] for key in (*own, "level_dropout", "spatial")}
        own |= {"levels": levels, "groups": groups, "code_dim": code_dim, "chain": chain}
        own |= {"posterior": posterior, "posterior_sees": posterior_sees}
        self.make_codes(hidden if sees_memory else embed_dim, kl_config, **own)
        self.depth = Depth(hidden, size, levels, depth_units, chain, **names)
        self.make_priors(self.depth.widths, copy)

    # ------------------------------------------------------------ states, as Recurrent asks

    def imagined_stoch(self, deter: Tensor, stoch: Tensor, noise: Noise) -> Tensor:
        return self._sample_levels(deter, noise, self._last(stoch))

    def prior_step(self, deter: Tensor, noise: Noise) -> Tensor:
        return self._sample_levels(deter, noise, None)

    def _sample_levels(self, deter: Tensor, noise: Noise, last: Tensor | None) -> Tensor:
        """Memory (N,D), noise (N,G,1) by level -> an imagined stoch (N,Z)."""
        u, codes = self.img_out(deter), []
        for level in range(self.levels):
            logit = self._logit(level, self.depth(level, u, codes), last)  # (N, G, K)
            codes.append(self._draw(level, logit, noise[level], deter.dtype)[0])  # (N, G * d)
        return self._stoch(torch.cat(codes, -1))

    def post_step(self, deter: Tensor, v: Tensor, noise: Noise) -> tuple[Tensor, Tensors]:
        codes = self.quantizer.encode(
            self._project(v), noise=noise, residual=self.residual, expected=self._expected(deter)
        )
        return self._stoch(codes.code.flatten(-3)), codes.logit

    def _expected(self, deter: Tensor, dtype: torch.dtype | None = None) -> Any:
        """What ``Quantizer.encode`` asks for "innovation": the codes that the priors expect.

        dtype: what products are taken in where autocast is off, as it is in a scan; None leaves
        autocast as it is.
        """
        if self.residual != "innovation":
            return None
        cast = lambda: products_in(dtype, deter.device)
        with torch.no_grad(), cast():
            u = self.img_out(deter)

        @torch.no_grad()
        def expected(level: int, coarser: list[Tensor]) -> Tensor:
            with cast():
                logit = self._logit(level, self.depth(level, u, coarser))
                return self.quantizer.expected(level, logit)

        return expected

    def _priors(self, deter: Tensor, codes: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """(...,D), codes (..., L, G * d), states before (...,Z) -> logits by level (...,G,K)."""
        u, coarser, last = self.img_out(deter), codes.unbind(-2), self._last(before)
        found = []
        for level in range(self.levels):
            found.append(self._logit(level, self.depth(level, u, coarser), last))
        return tuple(found)

    def compile_steps(self) -> None:
        super().compile_steps()
        if not self.has_scan and not self.sees_memory:  # ``_memory`` calls it step by step
            self.cell.compile()

    # ------------------------------------------------------------ the interface

    def initial(self, batch: int) -> TokenCarry:
        carry = super().initial(batch)
        return TokenCarry(*carry, torch.zeros_like(carry.stoch))

    def observe(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[TokenCarry, Post]:
        if not self.sees_memory:
            codes = self.encode(embed, sample, generator)
            trained = torch.is_grad_enabled()
            return self.follow(carry, codes, prev_action, is_first, generator, trained)
        steps = prev_action, is_first
        last, feat, logits = self._observe(carry, embed, *steps, sample, generator)
        post = self._found(carry, feat, tuple(logits), is_first, generator)
        return TokenCarry(*last, post.aux.before[:, -1]), post

    def observe_features(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[TokenCarry, Feat]:
        steps = prev_action, is_first
        if self.sees_memory:
            feat = self._observe(carry, embed, *steps, True, generator)[1]
        else:
            stoch = self._stoch(self.encode(embed, True, generator).code.flatten(2))  # (B, T, Z)
            feat = Feat(self._memory(carry, stoch, *steps), stoch)
        before = before_each(feat.stoch, carry.stoch)[:, -1] * ~is_first[:, -1:]  # (B, Z)
        return TokenCarry(feat.deter[:, -1], feat.stoch[:, -1], before), feat

    def _found(
        self,
        carry: Carry,
        feat: Feat,
        post: tuple[Tensor, ...],
        is_first: Tensor,
        generator: torch.Generator | None,
    ) -> Post:
        code = self._codes(feat.stoch)  # (B, T, L, G * d)
        before = before_each(feat.stoch.detach(), carry.stoch) * ~is_first.unsqueeze(-1)
        by_group = code.detach().unflatten(-1, self.code_shape)  # (B, T, L, G, d)
        known = self._exchanged(by_group, generator).flatten(-2)
        priors = self._priors(feat.deter, known, before)
        with torch.no_grad():
            index = self.quantizer.index(by_group)
        aux = Aux(Codes(by_group, index, post, by_group), is_first, before)
        return Post(feat, tuple(map(Level, post, priors)), aux)

    def follow(
        self,
        carry: Any,
        codes: Codes,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
        trained: bool | None = None,
    ) -> tuple[TokenCarry, Post]:
        """What ``observe`` makes of codes (B,T,L,G,.) that are known: memories and priors.

        prev_action (B,T,A) and is_first (B,T) as of ``observe``. trained: whether codes have a
        gradient; None looks, which ``torch.func.vmap`` hides.
        """
        self.check_steps(carry, prev_action, is_first)
        stoch = self._stoch(codes.code.flatten(2))  # (B, T, Z)
        known = codes.code.detach()
        # As with a transformer: priors from a memory of detached codes, so that no code learns to
        # be easy to predict. Both memories are computed at once, as twice as many sequences.
        detached_pass = self._detached_pass(stoch, trained)
        if detached_pass:
            known = self._exchanged(known, generator)
            both = torch.cat([stoch, self._stoch(known.flatten(2))])
            deter, prior_deter = self._memory(carry, both, prev_action, is_first).chunk(2)
        else:
            deter = prior_deter = self._memory(carry, stoch, prev_action, is_first)
        before = before_each(stoch.detach(), carry.stoch) * ~is_first.unsqueeze(-1)
        priors = self._priors(prior_deter, known.flatten(-2), before)
        last = TokenCarry(deter[:, -1], stoch[:, -1], before[:, -1])
        levels = tuple(map(Level, codes.logit, priors))
        return last, Post(Feat(deter, stoch), levels, Aux(codes, is_first, before))

    def _memory(self, carry: Any, stoch: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """States (M,T,Z) -> memories (M,T,D); M is B, or 2 B: then the others are used twice."""
        times = len(stoch) // len(is_first)
        first = self.initial(len(is_first))
        keep = (~is_first).to(first.deter.dtype).unsqueeze(-1)  # (B, T, 1)
        twice = lambda x: x.repeat(times, *(1,) * (x.ndim - 1))
        before = before_each(stoch, twice(carry.stoch))[..., : self.reads]
        start = first.stoch[:, : self.reads].unsqueeze(1) * (1.0 - keep)
        before = torch.addcmul(twice(start), before, twice(keep))
        x = self.img_in(torch.cat([before, twice(action * keep)], -1))  # (M, T, hidden)
        deter0, deter, keep = (twice(y) for y in (first.deter, carry.deter, keep))
        if not self.has_scan:
            found = []
            for t in range(x.shape[1]):
                deter = self.cell(x[:, t], torch.lerp(deter0, deter, keep[:, t]))
                found.append(deter)
            return torch.stack(found, 1)
        weight, dtype = self.cell.linear.weight, autocast_dtype(x.device)
        weight = weight if dtype is None else weight.to(dtype)
        of_input, of_deter = weight.split([x.shape[-1], self.deter_dim], 1)
        weights = of_deter, self.cell.norm.weight, self.cell.scan_bias()
        given = (x.to(weight.dtype) @ of_input.t()).transpose(0, 1)  # (T, M, 3D)
        starts = keep.transpose(0, 1), deter0, deter
        return cell_scan(given, *starts, weights, self.eps).transpose(0, 1)

    def prior_logits(self, carry: TokenCarry) -> tuple[Tensor, ...]:
        codes = self._codes(carry.stoch)
        logits = self._priors(carry.deter, codes, carry.before)
        return tuple(x / tau for x, tau in zip(logits, self.temperature, strict=True))

    def starts(self, carry: TokenCarry, post: Post, n: int) -> TokenCarry:
        where = start_steps(post.feat.deter.shape[1], n)
        before = post.aux.before[:, where].flatten(0, 1)
        return TokenCarry(*super().starts(carry, post, n), before)

    def imagine(
        self,
        carry: TokenCarry,
        actor: Policy | Tensor,
        horizon: int,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[TokenCarry, Feat, Tensor]:
        last, feat, action = super().imagine(carry, actor, horizon, sample, generator)
        return TokenCarry(*last, feat.stoch[:, -2]), feat, action
