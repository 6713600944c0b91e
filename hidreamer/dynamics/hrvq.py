"""hrvq: residual-VQ codes as the state, a hierarchically masked transformer as the memory.

Every step has one position per level and one for the action, ``[L0 .. L_{n-1}, A]``; a level's position carries its G
codes. A_t predicts L0_{t+1}, L0_t predicts L1_t, L1_t predicts L2_t. The memory ``deter`` of step t+1 is the output at
A_t; at an episode's start, that of a learned token that stands in A's place. ``stoch`` is the codes of all levels. The
posterior sees the observation alone: a batch's posteriors come from one encoder pass, its memories from one parallel
pass.

Positions are computed step by step as ``[A_{t-1}, L0_t ..]``: all of step t that is known once o_t is seen.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Balance, Dynamics, Feat, Level, Policy, Post, kl_losses, start_steps
from hidreamer.mask import allowed, rule
from hidreamer.nets import linear
from hidreamer.quantizer import Codes, Quantizer, per_level
from hidreamer.rollout import Carry, Layout, Rollout, RolloutCarry
from hidreamer.transformer import KV, Branch, Transformer, rotary


class Aux(NamedTuple):
    """What ``loss``, ``starts`` and ``learn`` need of a pass over (B, T)."""

    codes: Codes
    is_first: Tensor  # (B, T)
    cache: Carry  # all S + T steps, not only the window that the carry keeps


class Attention(NamedTuple):
    """What the positions of a pass over (B, T) attend to; Q = T * (L + 1)."""

    rope: Tensor  # (Q, 2, d / 2) their rotations
    mask: Tensor  # (B, 1, Q, Q) among themselves
    prefix: list[KV] | None  # of each layer, cached steps
    prefix_mask: Tensor | None  # (B, 1, Q, P)


class HRVQ(Dynamics):
    """``deter`` is the transformer's width, ``hidden`` that of its feed-forward layers."""

    former_names: ClassVar = {
        "begin": "bos_token",
        "place": "level_emb",
        "inp.weight": "in_proj.weight",
        "inp.bias": "in_proj.bias",
    }

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        balance: Balance,
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
    ):
        super().__init__()
        if deter % heads or (deter // heads) % 2:  # rotary positions turn pairs of numbers
            raise ValueError(f"dynamics.deter {deter} must be dynamics.hrvq.heads ({heads}) times an even number")
        # A posterior that sees its frame alone cannot follow its prior, as that of rssm does: to be near to it, all it
        # can do is become vague. So nothing draws it there, and no nats are free: the prior is always trained.
        self.balance = balance._replace(rep=0.0, free=0.0)
        self.levels, self.window, self.chain, self.level_dropout = levels, window, chain, level_dropout
        self.deter_dim, self.stoch_dim = deter, levels * groups * code_dim
        self.shapes = ((groups, codes),) * levels
        commits = posterior == "nearest"  # with the others the key means nothing: any number of levels goes
        weights = per_level(commitment if commits else [0.0], levels, "dynamics.hrvq.commitment")
        self.register_buffer("commitment", torch.tensor(weights), persistent=False)
        self.level_weights = per_level(level_weights, levels, "dynamics.hrvq.level_weights")
        self.temperature = per_level(temperature, levels, "dynamics.hrvq.temperature")
        if spatial and embed_dim % groups:
            raise ValueError(f"dynamics.hrvq.spatial: {embed_dim} embedding numbers are no {groups} positions")
        self.register_buffer("rules", rule(mask, levels), persistent=False)
        # By level of a row: it sees nothing of earlier steps behind their first so many positions (A, L0, L1 ..).
        with torch.device("cpu"):  # numbers for the host, also where parameters are made elsewhere
            past = rule(mask, levels)[0].roll(1, 1)  # (L + 1, L + 1) row level, position
            self.slots = (past * torch.arange(1, levels + 2)).amax(1).tolist()
        self.in_proj = linear(embed_dim // groups, code_dim) if spatial else linear(embed_dim, groups * code_dim)
        self.quantizer = Quantizer(posterior, levels, groups, codes, code_dim, unimix=balance.unimix, shared=spatial)
        self.places, self.code_shape = groups if spatial else 0, (groups, code_dim)
        self.token = nn.ModuleList([*(linear(groups * code_dim, deter) for _ in range(levels)), linear(act_dim, deter)])
        self.level_emb = nn.Parameter(0.02 * torch.randn(levels + 1, deter))
        self.bos_token = nn.Parameter(0.02 * torch.randn(deter))  # in place of the action before an episode
        self.transformer = Transformer(deter, layers, heads, hidden)
        self.prior = nn.ModuleList(linear(deter, groups * codes, scale=1.0) for _ in range(levels))

    # ------------------------------------------------------------ pieces

    def _project(self, embed: Tensor) -> Tensor:
        """(..., E) -> (..., G, d): what is quantised, normalised without statistics of the batch."""
        groups, dim = self.code_shape
        if self.places:  # a map of channels x positions, each position a group
            z = self.in_proj(embed.unflatten(-1, (-1, groups)).transpose(-1, -2)).flatten(-2)
        else:
            z = self.in_proj(embed)
        return nn.functional.layer_norm(z, z.shape[-1:]).unflatten(-1, (groups, dim))

    def _token(self, level: int, x: Tensor) -> Tensor:
        """Codes (..., G * d) of a level, or actions (..., A), -> (..., W)."""
        return self.token[level](x) + self.level_emb[level]

    def _stoch(self, codes: Tensor) -> Tensor:
        """Codes (..., L * G * d) as the heads read them: each about as long as the one-hot of a categorical."""
        return codes * self.code_shape[1] ** -0.5

    def _logit(self, level: int, out: Tensor) -> Tensor:
        """Outputs (..., W) that predict a level -> (..., G, K)."""
        return self.prior[level](out).unflatten(-1, self.shapes[level])

    def _sequences(self, carry: Carry | RolloutCarry) -> Carry:
        """Any carry as one with a sequence for each branch."""
        if isinstance(carry, RolloutCarry):
            return carry.sequences()
        return carry if len(carry.where) == len(carry.segment) else carry.unshared(self.window)

    def _attention(self, carry: Carry, segment: Tensor) -> Attention:
        """Of T steps after the carry's, whose episodes are counted on from its last step's: segment (B, T)."""
        new = Layout.of(segment.shape[1], self.levels, 1, segment.device)
        rows = new.time, new.level
        episode = segment.repeat_interleave(self.levels + 1, 1)  # (B, Q)
        mask = allowed(self.rules, rows, rows, self.window)  # (Q, Q)
        mask = (mask & (episode.unsqueeze(2) == episode.unsqueeze(1))).unsqueeze(1)
        rope = rotary(new.time, self.transformer.head_dim, carry.deter.dtype)
        steps = carry.segment.shape[1]
        if not steps:
            return Attention(rope, mask, None, None)
        old = Layout.of(steps, self.levels, 1 - steps, segment.device)
        past = carry.segment.repeat_interleave(self.levels + 1, 1)  # (B, P)
        prefix_mask = allowed(self.rules, rows, (old.time, old.level), self.window)  # (Q, P)
        prefix_mask = (prefix_mask & (episode.unsqueeze(2) == past.unsqueeze(1))).unsqueeze(1)
        return Attention(rope, mask, carry.prefix(), prefix_mask)

    def _run_transformer(
        self, action: Tensor, codes: Tensor, attention: Attention, all_levels: bool
    ) -> tuple[Tensor, list[Branch]]:
        """Action tokens (B,T,W) and codes (B,T,L,G*d) -> outputs (B,T,L+1,W) and each layer's keys and values.

        Without ``all_levels`` only the outputs at the actions, (B,T,1,W).
        """
        length, slots = action.shape[1], self.levels + 1
        tokens = [action, *(self._token(i, code) for i, code in enumerate(codes.unbind(2)))]
        x = torch.stack(tokens, 2).flatten(1, 2).unsqueeze(1)  # (B, 1, T * (L+1), W)
        own, index = self.transformer.branches(length * slots), slice(0, None, 1 if all_levels else slots)
        rope, mask, prefix, prefix_mask = attention
        out = self.transformer(x, rope, own, mask, prefix, prefix_mask, index)
        return out.squeeze(1).unflatten(1, (length, -1)), own

    # ------------------------------------------------------------ the interface

    def initial(self, batch: int) -> Carry:
        x = self.bos_token
        none = x.new_zeros(batch, len(self.transformer.layers), self.transformer.heads, 0, self.transformer.head_dim)
        steps = torch.zeros(batch, 0, dtype=torch.long, device=x.device)
        feat = x.new_zeros(batch, self.deter_dim), x.new_zeros(batch, self.stoch_dim)
        return Carry(*feat, none, none, steps, steps.new_zeros(batch))

    def observe(
        self, carry: Any, embed: Tensor, prev_action: Tensor, is_first: Tensor, sample: bool = True
    ) -> tuple[Carry, Post]:
        return self.follow(carry, self.encode(embed, sample), prev_action, is_first)

    def encode(self, embed: Tensor, sample: bool = True) -> Codes:
        """The posterior (..., E) -> codes (..., L, G, .): of each observation alone."""
        return self.quantizer.encode(self._project(embed), sample)

    def follow(self, carry: Any, codes: Codes, prev_action: Tensor, is_first: Tensor) -> tuple[Carry, Post]:
        """What ``observe`` makes of codes (B,T,L,G,.) that are known: memories and priors, in one parallel pass."""
        carry = self._sequences(carry)
        action = torch.where(is_first.unsqueeze(-1), self.bos_token, self._token(self.levels, prev_action))  # (B,T,W)
        segment = is_first.long().cumsum(1)  # (B, T), the carry's last step being 0
        attention = self._attention(carry, segment)
        flat = codes.code.flatten(-2)  # (B, T, L, G * d)
        # What later steps need of a code shapes it through the memory; that it be easy to predict must not (law 5). So
        # the priors come from a pass of their own, with the same numbers, that gives the codes no gradient.
        detached_pass = flat.requires_grad
        out, own = self._run_transformer(action, flat, attention, self.chain and not detached_pass)
        prior_out = out
        if detached_pass:
            prior_out, _ = self._run_transformer(action, flat.detach(), attention, self.chain)
        levels = []
        for i, logit in enumerate(codes.logit):
            levels.append(Level(logit, self._logit(i, prior_out[:, :, i if self.chain else 0])))
        feat = Feat(out[:, :, 0], self._stoch(codes.code.flatten(2)))
        kv = zip(*(branch.kv for branch in own), strict=True)  # the keys (B, h, 1, T * (L+1), d) of all layers; values
        keys, values = (torch.stack([x.squeeze(2) for x in layers], 1).detach() for layers in kv)
        cache = carry.extend(keys, values, segment, feat.deter[:, -1], feat.stoch[:, -1])
        return cache.last_steps(self.window), Post(feat, tuple(levels), Aux(codes, is_first, cache))

    def loss(self, post: Post) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """KL per level, of the prior alone; where codes are chosen hard, their cross-entropy up to a constant."""
        losses, metrics = kl_losses(post.levels, self.balance, self.level_weights)
        codes, is_first, _ = post.aux
        if self.quantizer.kind == "nearest":
            error = (codes.residual - codes.code.detach()).square().sum((-2, -1))  # (B, T, L), summed over G and d
            losses["commit"] = (error * self.commitment).sum(-1)
            metrics |= {f"commit_{i}": error[..., i].detach().mean() for i in range(self.levels)}
        return losses, metrics | self.quantizer.usage(codes.index) | self._accuracy(post.levels, codes.index, is_first)

    @torch.no_grad()
    def _accuracy(self, levels: tuple[Level, ...], index: Tensor, is_first: Tensor) -> dict[str, Tensor]:
        """How often the likeliest code is right: of all, beside repeating the last one, and of those that changed."""
        metrics, same_episode = {}, ~is_first[:, 1:].unsqueeze(-1)  # (B, T-1, 1)
        same_episode = same_episode.expand(-1, -1, index.shape[-1]).float()
        share = lambda x, among: (x.float() * among).sum() / among.sum().clamp(min=1.0)
        for i, level in enumerate(levels):
            now, before = index[:, 1:, i], index[:, :-1, i]  # (B, T-1, G)
            right = level.prior[:, 1:].argmax(-1) == now
            changed = same_episode * (now != before).float()
            metrics[f"accuracy_{i}"] = share(right, same_episode)
            metrics[f"accuracy_copy_{i}"] = share(now == before, same_episode)
            metrics[f"accuracy_changed_{i}"] = share(right, changed)
        return metrics

    def learn(self, post: Post) -> None:
        self.quantizer.learn(post.aux.codes)

    def starts(self, carry: Carry, post: Post, n: int) -> Carry:
        length, cache = post.feat.deter.shape[1], post.aux.cache
        chosen = start_steps(length, n)
        steps = torch.arange(length, device=cache.segment.device)[chosen] + cache.segment.shape[1] - length
        feat = (x[:, chosen].flatten(0, 1).detach() for x in post.feat)
        return Carry(*feat, *cache[2:5], steps.repeat(len(cache.segment)))

    def imagine(
        self, carry: Any, actor: Policy | Tensor, horizon: int, sample: bool = True
    ) -> tuple[RolloutCarry, Feat, Tensor]:
        given = isinstance(actor, Tensor)
        carry = carry.sequences() if isinstance(carry, RolloutCarry) else carry
        rollout = Rollout(self.transformer, self.rules, self.slots, self.window, carry, horizon)
        feats, actions = [self.feat(carry)], []
        for t in range(horizon):
            action = actor[:, t] if given else actor(feats[-1])  # (N, A)
            deter = out = rollout.advance(self._token(self.levels, action))  # (N, W)
            codes = []
            for level in range(self.levels):
                probs = dists.mix(self._logit(level, out) / self.temperature[level], self.balance.unimix)
                code = self.quantizer.decode(level, dists.draw(probs, sample).to(out.dtype))  # (N, G, d)
                codes.append(code.flatten(1))
                token = self._token(level, codes[-1])
                if self.chain and level < self.levels - 1:
                    out = rollout.advance(token)
                else:  # nothing is predicted from it before the next action: it goes through together with that
                    rollout.append(token)
            feats.append(Feat(deter, self._stoch(torch.cat(codes, 1))))
            actions.append(action)
        actions.append(torch.zeros_like(actions[-1]) if given else actor(feats[-1]))
        feat = Feat(*(torch.stack(x, 1) for x in zip(*feats, strict=True)))  # (N, H+1, .)
        return RolloutCarry(*feats[-1], rollout), feat, torch.stack(actions, 1)

    def partial(self, feat: Feat) -> dict[str, Feat]:
        """L0 alone, L0+L1, and so on, finer codes being zero; all levels together are ``feat`` itself."""
        size = self.stoch_dim // self.levels
        level = torch.arange(self.stoch_dim, device=feat.stoch.device).div(size, rounding_mode="floor")
        names = ["+".join(f"L{j}" for j in range(i)) for i in range(1, self.levels)]
        return {name: feat._replace(stoch=feat.stoch * (level <= i)) for i, name in enumerate(names)}

    def decoded(self, post: Post) -> Feat:
        """Fine levels are dropped now and then, so that decoding coarse ones alone means something."""
        if not self.level_dropout or self.levels == 1:
            return post.feat
        stoch = post.feat.stoch.unflatten(-1, (self.levels, -1))  # (B, T, L, G * d)
        some = torch.rand(stoch.shape[:2], device=stoch.device) < self.level_dropout
        kept = torch.randint(1, self.levels, stoch.shape[:2], device=stoch.device).where(some, self.levels)  # (B, T)
        level = torch.arange(self.levels, device=stoch.device)
        return post.feat._replace(stoch=(stoch * (level < kept.unsqueeze(-1)).unsqueeze(-1)).flatten(-2))

    def compile_steps(self) -> None:
        for layer in self.transformer.layers:
            layer.project, layer.finish = map(torch.compile, (layer.project, layer.finish))
