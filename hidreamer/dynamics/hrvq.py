"""hrvq: residual-VQ codes as the state, a hierarchically masked transformer as the memory.

Every step has one position per level and one for the action, ``[L0 .. L_{n-1}, A]``; a level's
position carries its G codes. A_t predicts L0_{t+1}, L0_t predicts L1_t, L1_t predicts L2_t. The
memory ``deter`` of step t+1 is the output at A_t; at an episode's start, that of a learned token
instead of A. ``stoch`` is the codes of all levels. The posterior sees the observation alone: a
batch's posteriors come from one encoder pass, its memories from one parallel pass.

Positions are computed step by step as ``[A_{t-1}, L0_t ..]``: all of step t that is known once o_t
is seen.

Shapes: B sequences, T steps, N = B * n branches, H imagined steps, L levels, G groups, K codes of d
numbers, E embedding, A action, W width, D deter (= W), Z stoch (= L * G * d), Q = T * (L + 1) new
positions, P cached ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from hidreamer.experts import expert_use, make_transformer
from hidreamer.losses import scaled
from hidreamer.mask import make_level_mask
from hidreamer.nets import linear
from hidreamer.quantizer import Codes, Quantizer, code_accuracy, per_level
from hidreamer.rollout import Attention, Carry, Rollout, RolloutCarry, attention_after
from hidreamer.transformer import Branch, FFNLosses
from hidreamer.weights import former_hrvq_names


class Aux(NamedTuple):
    """What ``loss``, ``starts`` and ``update_codebook`` need of a pass over (B, T)."""

    codes: Codes
    is_first: Tensor  # (B, T)
    cache: Carry  # the steps cached before and all T new ones, not only the carry's window
    ffn_losses: FFNLosses  # (B, 1) each, of the pass that makes the priors


COMPILED_KINDS = 16  # at most, of calls that a compiled piece meets


class HRVQ(Dynamics):
    """``deter`` is the transformer's width, ``hidden`` that of its feed-forward layers.

    codes: how many a codebook has, K. chain: predict each level given the coarser ones of its step;
    otherwise all from the memory alone. temperature: by level, of samples in imagination only.
    options: those of ``experts.make_transformer``.
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
        codes: int,
        code_dim: int,
        layers: int,
        heads: int,
        window: int,
        mask: str,
        chain: bool,
        posterior: str,
        commitment: list[float],
        level_weights: list[float],
        temperature: list[float],
        level_dropout: float,
        spatial: bool,
        **options: Any,
    ):
        super().__init__()
        if deter % heads or (deter // heads) % 2:  # rotary positions turn pairs of numbers
            raise ValueError(
                f"dynamics.deter {deter} must be dynamics.hrvq.heads ({heads}) times an even number"
            )
        # A posterior that sees its frame alone cannot follow its prior, as that of rssm does: to be
        # near to it, all it can do is become vague. So it is not regularised towards the prior
        # (rep 0), and there are no free nats: the prior is always trained.
        self.kl_config = kl_config._replace(rep=0.0, free_nats=0.0)
        self.levels, self.window, self.chain = levels, window, chain
        self.level_dropout = level_dropout
        self.deter_dim, self.stoch_dim = deter, levels * groups * code_dim
        self.embed_dim, self.act_dim = embed_dim, act_dim
        self.shapes = ((groups, codes),) * levels
        if posterior != "nearest":
            commitment = [0.0]  # unused there, so its length is not checked
        weights = per_level(commitment, levels, "dynamics.hrvq.commitment")
        self.register_buffer("commitment", torch.tensor(weights), persistent=False)
        self.level_weights = per_level(level_weights, levels, "dynamics.hrvq.level_weights")
        self.temperature = per_level(temperature, levels, "dynamics.hrvq.temperature")
        if spatial and embed_dim % groups:
            raise ValueError(
                f"dynamics.hrvq.spatial: {embed_dim} embedding numbers are no {groups} positions"
            )
        self.register_buffer("level_mask", make_level_mask(mask, levels), persistent=False)
        # By level of the query: how many leading positions (A, L0, L1 ..) of an earlier step it may
        # attend to.
        with torch.device("cpu"):  # numbers for the host, also where parameters are made elsewhere
            past = make_level_mask(mask, levels)[0].roll(1, 1)  # (L + 1, L + 1) row level, position
            self.slots = (past * torch.arange(1, levels + 2)).amax(1).tolist()
        self.code_shape = groups, code_dim
        self.level_dims = (groups * code_dim,) * levels
        self.map_positions = groups if spatial else 0
        if spatial:
            self.in_proj = linear(embed_dim // groups, code_dim)
        else:
            self.in_proj = linear(embed_dim, groups * code_dim)
        self.quantizer = Quantizer(
            posterior, levels, groups, codes, code_dim, unimix=kl_config.unimix, shared=spatial
        )
        self.token = nn.ModuleList(linear(groups * code_dim, deter) for _ in range(levels))
        self.token.append(linear(act_dim, deter))
        self.level_emb = nn.Parameter(0.02 * torch.randn(levels + 1, deter))
        self.bos_token = nn.Parameter(0.02 * torch.randn(deter))  # for the action before an episode
        self.transformer = make_transformer(deter, layers, heads, hidden, levels, **options)
        self.prior = nn.ModuleList(linear(deter, groups * codes, scale=1.0) for _ in range(levels))
        self.former_names = former_hrvq_names(layers)

    # ------------------------------------------------------------ pieces

    def _project(self, embed: Tensor) -> Tensor:
        """(..., E) -> (..., G, d): what is quantised, normalised without batch statistics."""
        groups, dim = self.code_shape
        if self.map_positions:  # a map of channels x positions, each position a group
            z = self.in_proj(embed.unflatten(-1, (-1, groups)).transpose(-1, -2)).flatten(-2)
        else:
            z = self.in_proj(embed)
        return nn.functional.layer_norm(z, z.shape[-1:]).unflatten(-1, (groups, dim))

    def _token(self, level: int, x: Tensor) -> Tensor:
        """Codes (..., G * d) of a level, or actions (..., A), -> (..., W)."""
        return self.token[level](x) + self.level_emb[level]

    def _stoch(self, codes: Tensor) -> Tensor:
        """Codes (..., L * G * d) as heads read them: each scaled to about unit norm."""
        return codes * self.code_shape[1] ** -0.5

    def _logit(self, level: int, out: Tensor) -> Tensor:
        """Outputs (..., W) that predict a level -> (..., G, K)."""
        return self.prior[level](out).unflatten(-1, self.shapes[level])

    def _sequences(self, carry: Carry | RolloutCarry) -> Carry:
        """Any carry as one in which every branch has cached steps of its own."""
        if isinstance(carry, RolloutCarry):
            return carry.sequences()
        return carry if len(carry.step) == len(carry.segment) else carry.unshared(self.window)

    def _run_transformer(
        self, action: Tensor, codes: Tensor, attention: Attention, all_levels: bool
    ) -> tuple[Tensor, list[Branch], FFNLosses]:
        """Action tokens (B,T,W), codes (B,T,L,G*d) -> outputs, K/V by layer, auxiliary losses.

        Outputs are (B,T,L+1,W), without ``all_levels`` only those at the actions, (B,T,1,W).
        """
        length, slots = action.shape[1], self.levels + 1
        tokens = [action, *(self._token(i, code) for i, code in enumerate(codes.unbind(2)))]
        x = torch.stack(tokens, 2).flatten(1, 2).unsqueeze(1)  # (B, 1, T * (L+1), W)
        own = self.transformer.branches(length * slots)
        out_index = slice(0, None, 1 if all_levels else slots)
        rope, level, mask, prefix, prefix_mask = attention
        out, losses = self.transformer(x, rope, level, own, mask, prefix, prefix_mask, out_index)
        return out.squeeze(1).unflatten(1, (length, -1)), own, losses

    # ------------------------------------------------------------ the interface

    def initial(self, batch: int) -> Carry:
        x = self.bos_token
        net = self.transformer
        none = x.new_zeros(batch, len(net.layers), net.heads, 0, net.head_dim)
        steps = torch.zeros(batch, 0, dtype=torch.long, device=x.device)
        deter, stoch = x.new_zeros(batch, self.deter_dim), x.new_zeros(batch, self.stoch_dim)
        return Carry(deter, stoch, none, none, steps, steps.new_zeros(batch))

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
        return self.follow(carry, codes, prev_action, is_first, torch.is_grad_enabled())

    def encode(
        self, embed: Tensor, sample: bool = True, generator: torch.Generator | None = None
    ) -> Codes:
        """The posterior (..., E) -> codes (..., L, G, .): of each observation alone."""
        assert embed.shape[-1] == self.embed_dim, (embed.shape, self.embed_dim)
        return self.quantizer.encode(self._project(embed), sample, generator)

    def follow(
        self,
        carry: Any,
        codes: Codes,
        prev_action: Tensor,
        is_first: Tensor,
        trained: bool | None = None,
    ) -> tuple[Carry, Post]:
        """What ``observe`` makes of codes (B,T,L,G,.) that are known: memories and priors.

        prev_action (B,T,A) and is_first (B,T) as of ``observe``. trained: whether codes have a
        gradient; None looks, which ``torch.func.vmap`` hides.
        """
        self.check_steps(carry, prev_action, is_first)
        expected = *is_first.shape, self.levels, *self.code_shape
        assert codes.code.shape == expected, (codes.code.shape, expected)
        carry = self._sequences(carry)
        action = self._token(self.levels, prev_action)  # (B, T, W)
        action = torch.where(is_first.unsqueeze(-1), self.bos_token, action)
        segment = is_first.long().cumsum(1)  # (B, T), the carry's last step being 0
        attention = attention_after(
            carry, segment, self.level_mask, self.window, self.transformer.head_dim
        )
        flat = codes.code.flatten(-2)  # (B, T, L, G * d)
        # Codes learn from what later steps need of them, through the memory, but the loss of the
        # priors must not make them easier to predict. So where codes have a gradient (in training)
        # the priors come from a second pass, with the same numbers, over detached codes. Auxiliary
        # losses are taken from that pass alone, to be counted once.
        detached_pass = flat.requires_grad if trained is None else trained
        all_levels = self.chain and not detached_pass
        out, own, ffn_losses = self._run_transformer(action, flat, attention, all_levels)
        prior_out = out
        if detached_pass:
            prior_out, _, ffn_losses = self._run_transformer(
                action, flat.detach(), attention, self.chain
            )
        levels = []
        for i, logit in enumerate(codes.logit):
            at = i if self.chain else 0  # the position whose output predicts this level
            levels.append(Level(logit, self._logit(i, prior_out[:, :, at])))
        feat = Feat(out[:, :, 0], self._stoch(codes.code.flatten(2)))
        keys = torch.stack([branch.kv.keys.squeeze(2) for branch in own], 1).detach()
        values = torch.stack([branch.kv.values.squeeze(2) for branch in own], 1).detach()
        cache = carry.extend(keys, values, segment, feat.deter[:, -1], feat.stoch[:, -1])
        aux = Aux(codes, is_first, cache, ffn_losses)
        return cache.last_steps(self.window), Post(feat, tuple(levels), aux)

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        """KL per level, of the prior alone: for codes that are chosen hard, their cross-entropy.

        ``nearest`` adds the commitment loss, and feed-forward parts their auxiliary losses.
        """
        self.check_levels(post)
        losses, metrics = kl_losses(post.levels, self.kl_config, self.level_weights)
        codes, is_first = post.aux.codes, post.aux.is_first
        if self.quantizer.kind == "nearest":
            error = (codes.residual - codes.code.detach()).square()  # (B, T, L, G, d)
            error = error.sum((-2, -1))  # (B, T, L)
            losses["commit"] = (error * self.commitment).sum(-1)
            for i in range(self.levels):
                metrics[f"commit_{i}"] = error[..., i].detach().mean()
        for name, loss in post.aux.ffn_losses.items():  # (B, 1) each
            losses[name] = loss.expand(is_first.shape)
        metrics |= self.quantizer.usage(codes.index)
        metrics |= expert_use(self.transformer)
        return losses, metrics | code_accuracy(
            [level.prior for level in post.levels], codes.index, is_first
        )

    def update_codebook(self, post: Post, generator: torch.Generator | None = None) -> None:
        self.quantizer.update_codebook(post.aux.codes, generator=generator)

    def select(self, carry: Carry | RolloutCarry, index: Tensor) -> Carry:
        return carry.select(index, self.window)

    def join(self, carries: list[Carry | RolloutCarry]) -> Carry:
        return Carry.join([self._sequences(carry) for carry in carries])

    def classes(self, post: Post) -> tuple[Tensor, ...]:
        return post.aux.codes.index.unbind(2)

    def prior_logits(self, carry: RolloutCarry) -> tuple[Tensor, ...]:
        return tuple(carry.rollout.logits)

    def starts(self, carry: Carry, post: Post, n: int) -> Carry:
        self.check_feat(post.feat)
        length, cache = post.feat.deter.shape[1], post.aux.cache
        chosen = start_steps(length, n)
        cached = cache.segment.shape[1] - length  # steps before the post's
        steps = torch.arange(length, device=cache.segment.device)[chosen] + cached
        deter, stoch = (x[:, chosen].flatten(0, 1).detach() for x in post.feat)  # (B * n, .)
        where = steps.repeat(len(cache.segment))
        return cache._replace(deter=deter, stoch=stoch, step=where)

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
        rollout = Rollout(
            self.transformer, self.level_mask, self.slots, self.window, carry, horizon
        )
        step = lambda _, action: self._imagine_step(rollout, action, sample, generator)
        last, feat, action = unroll(step, self.feat(carry), actor, horizon)
        return RolloutCarry(*last, rollout), feat, action

    def _imagine_step(
        self,
        rollout: Rollout,
        action: Tensor,
        sample: bool,
        generator: torch.Generator | None,
    ) -> Feat:
        """Action (N, A) -> the next state (N, .), whose codes are sampled coarse to fine."""
        deter = out = rollout.advance(self._token(self.levels, action))  # (N, W)
        codes, rollout.logits = [], []
        for level in range(self.levels):
            logit = scaled(self._logit(level, out), 1.0 / self.temperature[level])  # (N, G, K)
            rollout.logits.append(logit)
            probs = dists.unimix_probs(logit, self.kl_config.unimix)
            noise = dists.uniform((*probs.shape[:-1], 1), probs, generator) if sample else None
            onehot = dists.sample_onehot(probs, noise).to(out.dtype)
            codes.append(self.quantizer.decode(level, onehot).flatten(1))  # (N, G * d)
            token = self._token(level, codes[-1])
            if self.chain and level < self.levels - 1:
                out = rollout.advance(token)
            else:  # predicts nothing before the next action, and is computed together with that
                rollout.append(token)
        return Feat(deter, self._stoch(torch.cat(codes, 1)))

    def fixed_size(self, carry: Carry) -> Carry:
        return carry.padded(self.window, self.levels + 1)

    def coarse_features(
        self, feat: Feat, generator: torch.Generator | None = None
    ) -> dict[str, Feat]:
        """L0 alone, L0+L1, and so on, finer codes being zero; all levels would be ``feat``."""
        size = self.stoch_dim // self.levels
        level = torch.arange(self.stoch_dim, device=feat.stoch.device)
        level = level.div(size, rounding_mode="floor")  # (Z,)
        out, name = {}, "L0"
        for i in range(self.levels - 1):
            out[name] = feat._replace(stoch=feat.stoch * (level <= i))
            name += f"+L{i + 1}"
        return out

    def decoder_features(self, post: Post, generator: torch.Generator | None = None) -> Feat:
        """Features (B,T,.), at random steps without fine levels: coarse ones can be decoded."""
        if not self.level_dropout or self.levels == 1:
            return post.feat
        stoch = post.feat.stoch.unflatten(-1, (self.levels, -1))  # (B, T, L, G * d)
        steps, device = stoch.shape[:2], stoch.device
        where = {"device": device, "generator": generator}
        dropped = torch.rand(steps, **where) < self.level_dropout
        kept = torch.randint(1, self.levels, steps, **where)
        kept = kept.where(dropped, self.levels)  # (B, T) levels
        level = torch.arange(self.levels, device=device)
        keep = (level < kept.unsqueeze(-1)).unsqueeze(-1)  # (B, T, L, 1)
        return post.feat._replace(stoch=(stoch * keep).flatten(-2))

    def compile_steps(self) -> None:
        # Acting, training, dreaming and open loops make nine kinds of calls, each compiled once.
        # Beyond the limit (8 by default) torch would run a piece uncompiled for ever.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, COMPILED_KINDS)
        for layer in self.transformer.layers:
            layer.project = torch.compile(layer.project)
            layer.add_residuals = torch.compile(layer.add_residuals)
