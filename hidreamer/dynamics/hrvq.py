"""hrvq: residual-VQ codes as the state, a transformer as the memory.

``memory: interleaved``. Every step has one position per level and one for the action, ``[L0 ..
L_{n-1}, A]``, under a hierarchical mask; a level's position carries its G codes. A_t predicts
L0_{t+1}, L0_t predicts L1_t, L1_t predicts L2_t. The memory ``deter`` of step t+1 is the output at
A_t; at an episode's start, that of a learned token instead of A.

``memory: stacked``. A step has the position A alone, whose token carries the codes of its step as
well; the levels of a step are predicted by a depth network from ``deter``.

``stoch`` is the codes of all levels. The posterior sees the observation alone: a batch's posteriors
come from one encoder pass, its memories from one parallel pass. Positions are computed step by step
as ``[A_{t-1}, L0_t ..]``: all of step t that is known once o_t is seen. (``memory: gru``:
``hrvq_gru``.)

Shapes: B sequences, T steps, N = B * n branches, H imagined steps, L levels, l levels with a
position of their own, G groups, K codes of d numbers, E embedding, A action, W width, D deter
(= W), Z stoch (= L * G * d), Q = T * (l + 1) new positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer.depth import Depth
from hidreamer.dynamics.base import Feat, KLConfig, Level, Policy, Post, unroll
from hidreamer.dynamics.sampler import Noise, policy_and_noise
from hidreamer.dynamics.sequences import Sequences
from hidreamer.dynamics.tokens import before_each
from hidreamer.experts import make_transformer
from hidreamer.mask import read_levels
from hidreamer.parallel import attention_after
from hidreamer.quantizer import Codes
from hidreamer.rollout import Carry, Rollout, RolloutCarry
from hidreamer.transformer import FFNLosses
from hidreamer.weights import former_hrvq_names


class Aux(NamedTuple):
    """What ``loss``, ``starts`` and ``update_codebook`` need of a pass over (B, T)."""

    codes: Codes
    is_first: Tensor  # (B, T)
    cache: Carry  # the steps cached before and all T new ones, not only the carry's window
    ffn_losses: FFNLosses  # (B, 1) each, of the pass that makes the priors


class HRVQ(Sequences):
    """``deter`` is the transformer's width, ``hidden`` that of its feed-forward layers.

    chain: predict each level given the coarser ones of its step; otherwise all from the memory
    alone. memory_reads: whether ``stacked`` tokens hold the codes of all levels. options: of
    ``Tokens.make_codes``, and those of ``experts.make_transformer`` that are not here.
    """

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
        memory: str = "interleaved",
        memory_reads: str = "all",
        depth_units: int = 0,
        copy: bool = False,
        layers: int,
        heads: int,
        window: int,
        mask: str,
        chain: bool,
        ffn: str = "dense",
        norm: str = "layer",
        act: str = "silu",
        **options: Any,
    ):
        super().__init__()
        stacked = memory == "stacked"
        if memory not in ("interleaved", "stacked"):
            raise ValueError(
                f"dynamics.hrvq.memory is {memory}: this model needs a transformer, interleaved or"
                " stacked"
            )
        if options.get("posterior_sees") == "memory":
            raise ValueError(
                f"dynamics.hrvq.memory {memory} computes all steps at once, from codes that must be"
                " there before: set posterior_sees frame, or memory gru"
            )
        if memory_reads != "all" and not stacked:
            raise ValueError(
                "dynamics.hrvq.memory_reads is for stacked and gru; interleaved has mask barrier"
            )
        for key in ("cell", "blocks", "prior_layers"):  # of ``gru``
            options.pop(key, None)
        moe = {key: options.pop(key) for key in list(options) if key.startswith("moe_")}
        # Levels with a position of their own: all that any row may look at, or that predict one.
        positions = 0 if stacked else read_levels(mask, levels, chain)
        if ffn == "level" and not stacked:  # its experts are counted by level
            positions = levels
        self.make_positions(positions, act_dim, deter, heads, window, mask)
        self.embed_dim = embed_dim
        sizes = {"levels": levels, "groups": groups, "code_dim": code_dim, "chain": chain}
        self.make_codes(embed_dim, kl_config, **sizes, **options)
        self.make_tokens(levels if memory_reads == "all" else 1)
        net = {"levels": positions, "ffn": ffn, "norm": norm, "act": act} | moe
        self.transformer = make_transformer(deter, layers, heads, hidden, **net)
        self.depth, widths = None, [deter] * levels
        if stacked:
            size = groups * code_dim
            self.depth = Depth(deter, size, levels, depth_units, chain, norm=norm, act=act)
            widths = self.depth.widths
            # Heads read both side by side: at the norm's 1 deter would be W ** 0.5 long beside
            # L * G codes of norm 1 (docs/decisions/022-length-of-deter.md).
            nn.init.constant_(self.transformer.norm.weight, (levels * groups / deter) ** 0.5)
        self.make_priors(widths, copy)
        self.former_names = former_hrvq_names(layers)

    # ------------------------------------------------------------ the interface

    def observe(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Post]:
        codes = self.encode(embed, sample, generator)
        return self.follow(carry, codes, prev_action, is_first, generator, torch.is_grad_enabled())

    def observe_features(
        self,
        carry: Any,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Carry, Feat]:
        args = self.encode(embed, True, generator), prev_action, is_first, generator
        carry, post = self.follow(carry, *args, torch.is_grad_enabled(), with_priors=False)
        return carry, post.feat

    def follow(
        self,
        carry: Any,
        codes: Codes,
        prev_action: Tensor,
        is_first: Tensor,
        generator: torch.Generator | None = None,
        trained: bool | None = None,
        with_priors: bool = True,
    ) -> tuple[Carry, Post]:
        """What ``observe`` makes of codes (B,T,L,G,.) that are known: memories and priors.

        prev_action (B,T,A) and is_first (B,T) as of ``observe``. trained: whether codes have a
        gradient; None looks, which ``torch.func.vmap`` hides. Without priors there are no levels.
        """
        self.check_steps(carry, prev_action, is_first)
        expected = *is_first.shape, self.levels, *self.code_shape
        assert codes.code.shape == expected, (codes.code.shape, expected)
        carry = self._sequences(carry)
        segment = is_first.long().cumsum(1)  # (B, T), the carry's last step being 0
        attention = attention_after(
            carry, segment, self.level_mask, self.window, self.transformer.head_dim
        )
        flat, steps = codes.code.flatten(-2), (prev_action, is_first)  # (B, T, L, G * d)
        # Codes learn from what later steps need of them, through the memory, but the loss of the
        # priors must not make them easier to predict. So where codes have a gradient (in training)
        # the priors come from a second pass, with the same numbers, over detached codes. Auxiliary
        # losses are taken from that pass alone, to be counted once.
        detached_pass = self._detached_pass(flat, trained)
        by_position = self.chain and self.depth is None
        how = {"all_positions": by_position and not detached_pass}
        out, own, ffn_losses = self._remember(carry, flat, steps, attention, **how)
        prior_out, known = out, flat.detach()
        if detached_pass:
            known = self._exchanged(codes.code.detach(), generator).flatten(-2)
            how = {"all_positions": by_position}
            prior_out, _, ffn_losses = self._remember(carry, known, steps, attention, **how)
        feat = Feat(out[:, :, 0], self._stoch(codes.code.flatten(2)))
        last, levels, coarser = None, [], known.unbind(2)
        if self.copy and with_priors:
            before = before_each(feat.stoch.detach(), carry.stoch)
            last = self._last(before * ~is_first.unsqueeze(-1))
        for i, logit in enumerate(codes.logit if with_priors else ()):
            if self.depth is not None:
                of_level = self.depth(i, prior_out[:, :, 0], coarser)
            else:
                of_level = prior_out[:, :, i if self.chain else 0]
            levels.append(Level(logit, self._logit(i, of_level, last)))
        keys = torch.stack([kv.keys.squeeze(2) for kv in own], 1).detach()
        values = torch.stack([kv.values.squeeze(2) for kv in own], 1).detach()
        cache = carry.extend(keys, values, segment, feat.deter[:, -1], feat.stoch[:, -1])
        aux = Aux(codes, is_first, cache, ffn_losses)
        return cache.last_steps(self.window), Post(feat, tuple(levels), aux)

    def imagine(
        self,
        carry: Any,
        actor: Policy | Tensor,
        horizon: int,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[RolloutCarry, Feat, Tensor]:
        self.check_imagined(carry, actor, horizon)
        carry = carry.sequences() if isinstance(carry, RolloutCarry) else carry
        made = self.transformer, self._enter, self.level_mask, self.slots
        rollout = Rollout(*made, self.window, carry, horizon, self.chain)
        start = self.feat(carry)
        levels = [(len(start.deter), variables, 1) for variables, _ in self.shapes]
        draws = levels, start.deter, sample, generator
        actor, noise = policy_and_noise(actor, horizon, *draws)
        step = lambda feat, action: self._imagine_step(rollout, feat, action, noise())
        last, feat, action = unroll(step, start, actor, horizon)
        return RolloutCarry(*last, rollout), feat, action

    def _imagine_step(
        self,
        rollout: Rollout,
        feat: Feat,
        action: Tensor,
        noise: Noise,
    ) -> Feat:
        """A state (N, .), action (N, A), noise (N, G, 1) by level -> the next, whose codes are
        sampled coarse to fine.
        """
        deter = out = rollout.advance(action, feat.stoch)  # (N, W)
        last, codes, rollout.logits = self._last(feat.stoch), [], []
        for level in range(self.levels):
            code, logit = self._choose(level, out, codes, last, noise[level])  # (N, G * d), (N,G,K)
            rollout.logits.append(logit)
            codes.append(code)
            if level < self.positions:
                if self.chain and level < self.levels - 1:
                    out = rollout.advance(code)
                else:  # predicts nothing before the next action: computed together with that
                    rollout.append(code)
        return Feat(deter, self._stoch(torch.cat(codes, 1)))
