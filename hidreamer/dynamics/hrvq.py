"""hrvq: residual-VQ codes as the state, a hierarchically masked transformer as the memory.

Every step has one position per level and one for the action, ``[L0 .. L_{n-1}, A]``; a level's position carries its G
codes. A_t predicts L0_{t+1}, L0_t predicts L1_t, L1_t predicts L2_t. The memory ``deter`` of step t+1 is the output at
A_t; at an episode's start, that of a learned token that stands in A's place. ``stoch`` is the codes of all levels. The
posterior sees the observation alone: a batch's posteriors come from one encoder pass, its memories from one parallel
pass.

Positions are computed step by step as ``[A_{t-1}, L0_t ..]``: all of step t that is known once o_t is seen.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Balance, Dynamics, Feat, Level, Policy, Post, kl_losses, start_steps
from hidreamer.mask import allowed, rule
from hidreamer.nets import linear
from hidreamer.quantizer import Codes, Quantizer, per_level
from hidreamer.transformer import KV, Branch, Transformer, rotary, rotate


class Carry(NamedTuple):
    """B sequences with S cached steps, and N = B * n branches that stand at one of these steps each.

    Time counts from the last cached step, which is 0; keys are rotated to that time.
    """

    deter: Tensor  # (N, D) memory at the branch's step
    stoch: Tensor  # (N, Z) its codes
    keys: Tensor  # (B, layers, h, S * (L + 1), d)
    values: Tensor  # the same
    segment: Tensor  # (B, S) the episode of a step: 0 is the last step's, earlier ones are negative
    where: Tensor  # (N,) the branch's step, 0 .. S - 1


class Aux(NamedTuple):
    """What ``loss``, ``starts`` and ``learn`` need of a pass over (B, T)."""

    codes: Codes
    is_first: Tensor  # (B, T)
    cache: Carry  # all S + T steps, not only the window that the carry keeps


class HRVQ(Dynamics):
    """``deter`` is the transformer's width, ``hidden`` that of its feed-forward layers."""

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
        past = self.rules[0].roll(1, 1).tolist()  # what a level's rows see of earlier steps: their A, L0, L1 ..
        self.reach = [max(i for i, seen in enumerate(row, 1) if seen) for row in past]  # all within the first so many
        self.inp = linear(embed_dim // groups, code_dim) if spatial else linear(embed_dim, groups * code_dim)
        self.quantizer = Quantizer(posterior, levels, groups, codes, code_dim, unimix=balance.unimix, shared=spatial)
        self.places, self.code_shape = groups if spatial else 0, (groups, code_dim)
        self.token = nn.ModuleList([*(linear(groups * code_dim, deter) for _ in range(levels)), linear(act_dim, deter)])
        self.place = nn.Parameter(0.02 * torch.randn(levels + 1, deter))  # level embeddings
        self.begin = nn.Parameter(0.02 * torch.randn(deter))  # stands for the action before an episode
        self.transformer = Transformer(deter, layers, heads, hidden)
        self.prior = nn.ModuleList(linear(deter, groups * codes, scale=1.0) for _ in range(levels))

    # ------------------------------------------------------------ pieces

    def _numbers(self, embed: Tensor) -> Tensor:
        """(..., E) -> (..., G, d): what is quantised, normalised without statistics of the batch."""
        groups, dim = self.code_shape
        if self.places:  # a map of channels x positions, each position a group
            z = self.inp(embed.unflatten(-1, (-1, groups)).transpose(-1, -2)).flatten(-2)
        else:
            z = self.inp(embed)
        return nn.functional.layer_norm(z, z.shape[-1:]).unflatten(-1, (groups, dim))

    def _token(self, level: int, x: Tensor) -> Tensor:
        """Codes (..., G * d) of a level, or actions (..., A), -> (..., W)."""
        return self.token[level](x) + self.place[level]

    def _stoch(self, codes: Tensor) -> Tensor:
        """Codes (..., L * G * d) as the heads read them: each about as long as the one-hot of a categorical."""
        return codes * self.code_shape[1] ** -0.5

    def _columns(self, segment: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Of cached steps with segments (B,S): times and levels (P,), the steps (P,), the segments (B,P)."""
        n, steps = self.levels + 1, segment.shape[1]
        step = torch.arange(steps, device=segment.device).repeat_interleave(n)
        level = (torch.arange(n, device=segment.device) - 1).remainder(n).repeat(steps)  # A, L0, L1 ..
        time = step - (steps - 1) - (level == self.levels).long()  # A belongs to the step before
        return (time, level), step, segment.repeat_interleave(n, 1)

    def _logit(self, level: int, out: Tensor) -> Tensor:
        return self.prior[level](out).unflatten(-1, self.shapes[level])

    # ------------------------------------------------------------ the interface

    def initial(self, batch: int) -> Carry:
        x = self.begin
        none = x.new_zeros(batch, len(self.transformer.layers), self.transformer.heads, 0, self.transformer.head_dim)
        steps = torch.zeros(batch, 0, dtype=torch.long, device=x.device)
        feat = x.new_zeros(batch, self.deter_dim), x.new_zeros(batch, self.stoch_dim)
        return Carry(*feat, none, none, steps, steps.new_zeros(batch))

    def observe(self, carry: Carry, embed: Tensor, prev_action: Tensor, is_first: Tensor, sample: bool = True):
        length, n = embed.shape[1], self.levels + 1
        codes = self.quantizer.encode(self._numbers(embed), sample)
        action = torch.where(is_first.unsqueeze(-1), self.begin, self._token(self.levels, prev_action))  # (B, T, W)

        segment = is_first.long().cumsum(1)  # (B, T), the carry's last step being 0
        (time, level), _, rows = self._columns(segment)
        time = time + length  # 1 .. T, after the carry's 0
        seen = allowed(self.rules, (time, level), (time, level), self.window)  # (Q, Q)
        prefix = seen_prefix = None
        if carry.segment.shape[1]:
            prefix = [KV(*kv) for kv in zip(carry.keys.unbind(1), carry.values.unbind(1), strict=True)]
            columns, _, old = self._columns(carry.segment)
            seen_prefix = allowed(self.rules, (time, level), columns, self.window)  # (Q, P)
            seen_prefix = (seen_prefix & (rows.unsqueeze(2) == old.unsqueeze(1))).unsqueeze(1)  # (B, 1, Q, P)
        seen = (seen & (rows.unsqueeze(2) == rows.unsqueeze(1))).unsqueeze(1)  # (B, 1, Q, Q)
        turn = rotary(time, self.transformer.head_dim, action.dtype)

        def read(codes: Tensor, all_levels: bool) -> tuple[Tensor, list[Branch]]:
            """(B,T,L,G*d) -> outputs (B,T,L+1,W), or (B,T,1,W) at the actions, and each layer's keys and values."""
            tokens = [action, *(self._token(i, code) for i, code in enumerate(codes.unbind(2)))]
            x = torch.stack(tokens, 2).flatten(1, 2).unsqueeze(1)  # (B, 1, T * (L+1), W)
            own, wanted = self.transformer.branches(length * n), slice(0, None, 1 if all_levels else n)
            out = self.transformer(x, turn, own, seen, prefix, seen_prefix, wanted)
            return out.squeeze(1).unflatten(1, (length, -1)), own

        flat = codes.code.flatten(-2)  # (B, T, L, G * d)
        # What later steps need of a code shapes it through the memory; that it be easy to predict must not (law 5). So
        # the priors are told by a pass of their own, with the same numbers, that gives the codes no gradient.
        twice = flat.requires_grad
        out, own = read(flat, self.chain and not twice)
        told = read(flat.detach(), self.chain)[0] if twice else out
        post = tuple(
            Level(logit, self._logit(i, told[:, :, i if self.chain else 0])) for i, logit in enumerate(codes.logit)
        )
        deter = out[:, :, 0]
        feat = Feat(deter, self._stoch(codes.code.flatten(2)))
        cache = self._cache(carry, own, segment, feat)
        keep = min(self.window, cache.segment.shape[1])
        kept = Carry(
            *cache[:2],
            *(x[..., -keep * n :, :] for x in cache[2:4]),
            cache.segment[:, -keep:],
            cache.where * 0 + keep - 1,
        )
        return kept, Post(feat, post, Aux(codes, is_first, cache))

    def _cache(self, carry: Carry, own: list, segment: Tensor, feat: Feat) -> Carry:
        """All steps of the carry and of the pass behind it, times moved so that the last one is 0."""
        length, steps = segment.shape[1], torch.cat([carry.segment, segment], 1)
        new = [torch.stack([x.squeeze(2) for x in kv], 1) for kv in zip(*(branch.kv for branch in own), strict=True)]
        keys, values = (
            torch.cat([old, x.detach()], -2) for old, x in zip((carry.keys, carry.values), new, strict=True)
        )
        back = rotary(torch.full_like(steps[0, 0], -length), self.transformer.head_dim, keys.dtype)
        where = steps.new_full((len(steps),), steps.shape[1] - 1)
        last = (x[:, -1] for x in feat)
        return Carry(*last, rotate(keys, back), values, steps - segment[:, -1:], where)

    def loss(self, post: Post) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """KL per level, of the prior alone; where codes are chosen hard, their cross-entropy up to a constant."""
        losses, metrics = kl_losses(post.levels, self.balance, self.level_weights)
        codes, is_first, _ = post.aux
        if self.quantizer.kind == "nearest":
            away = (codes.residual - codes.code.detach()).square().sum((-2, -1))  # (B, T, L), summed over G and d
            losses["commit"] = (away * self.commitment).sum(-1)
            metrics |= {f"commit_{i}": away[..., i].detach().mean() for i in range(self.levels)}
        return losses, metrics | self.quantizer.usage(codes.index) | self._accuracy(post.levels, codes.index, is_first)

    @torch.no_grad()
    def _accuracy(self, levels: tuple[Level, ...], index: Tensor, is_first: Tensor) -> dict[str, Tensor]:
        """How often the likeliest code is right: of all, beside repeating the last one, and of those that changed."""
        metrics, going = {}, ~is_first[:, 1:].unsqueeze(-1)  # (B, T-1, 1)
        going = going.expand(-1, -1, index.shape[-1]).float()
        share = lambda x, among: (x.float() * among).sum() / among.sum().clamp(min=1.0)
        for i, level in enumerate(levels):
            now, before = index[:, 1:, i], index[:, :-1, i]  # (B, T-1, G)
            right = level.prior[:, 1:].argmax(-1) == now
            changed = going * (now != before).float()
            metrics[f"accuracy_{i}"] = share(right, going)
            metrics[f"accuracy_copy_{i}"] = share(now == before, going)
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

    def imagine(self, carry: Carry, actor: Policy | Tensor, horizon: int, sample: bool = True) -> tuple[Feat, Tensor]:
        given, n = isinstance(actor, Tensor), self.levels
        batch = len(carry.segment)
        shape = batch, len(carry.where) // batch  # (B, n): branches of each sequence
        where = carry.where.view(shape)
        (times, levels), step, old = self._columns(carry.segment)
        mine = old.unsqueeze(1) == carry.segment.gather(1, where).unsqueeze(2)  # (B, n, P): of the branch's episode
        # What the sequence goes on to do after the start lies in later steps, its next action among them.
        mine = mine & (step <= where.unsqueeze(2))
        start = where.unsqueeze(2) - (carry.segment.shape[1] - 1)  # (B, n, 1): the time of a branch's step 0
        # A branch's own positions: A_0, then L0 .. A of each imagined step.
        own_step = torch.arange(1, horizon + 1, device=where.device).repeat_interleave(n + 1)
        own_level = torch.arange(n + 1, device=where.device).repeat(horizon)
        own_step = torch.cat([own_step[:1] - 1, own_step])  # (O,)
        own_level = torch.cat([own_level[n : n + 1], own_level])
        seen = allowed(self.rules, (own_step, own_level), (own_step, own_level), self.window)
        turn = rotary(start + own_step, self.transformer.head_dim, carry.deter.dtype)  # (B, n, O, 2, d / 2)
        own = self.transformer.branches(len(own_step))

        def cut(x: Tensor, reach: int, axis: int = -1) -> Tensor:
            """The first ``reach`` of every step's L + 1 positions, which lie along ``axis``."""
            return x.unflatten(axis, (-1, n + 1)).narrow(axis, 0, reach).flatten(axis - 1, axis)

        @functools.cache
        def cached(reach: int) -> list[KV]:
            """Keys and values of each layer, in one piece: otherwise every product with them would copy them first."""
            kv = (cut(x, reach, -2).transpose(0, 1).contiguous().unbind() for x in (carry.keys, carry.values))
            return [KV(*x) for x in zip(*kv, strict=True)]

        @functools.cache
        def sight(level: int, count: int, later: bool) -> tuple[list[KV], Tensor, Tensor]:
            """For ``count`` rows from ``level`` on: cached keys and values, which they may see, and their ages.

            A_0 sees all of its own step. Later rows are multiplied only with as much of each step as they reach.
            """
            rows = slice(level + 1, level + 1 + count) if later else slice(0, 1)
            reach = max(self.reach[level : level + count]) if later else n + 1
            columns = cut(times, reach), cut(levels, reach)
            sees = allowed(self.rules, (start + own_step[rows], own_level[rows]), columns)
            return cached(reach), sees & cut(mine, reach).unsqueeze(2), (start - columns[0]).unsqueeze(2)

        def feed(tokens: list[Tensor]) -> Tensor:
            """Take the next positions (N,W) through the transformer. -> the output (N,W) at the last of them."""
            x = torch.stack(tokens, 1).unflatten(0, shape)  # (B, n, Q, W)
            rows = slice(own[0].length, own[0].length + len(tokens))
            t, level = divmod(rows.start + n, n + 1)  # all rows are of one step
            prefix, sees, age = sight(level, len(tokens), t > 0)
            sees = sees & (age < self.window - t)
            last = slice(len(tokens) - 1, None)
            out = self.transformer(x, turn[:, :, rows], own, seen[rows, : rows.stop], prefix, sees, last)
            return out.flatten(0, 2)

        feats, actions, waiting = [self.feat(carry)], [], []
        for t in range(horizon):
            action = actor[:, t] if given else actor(feats[-1])  # (N, A)
            deter = out = feed([*waiting, self._token(n, action)])
            codes, waiting = [], []
            for i in range(n):
                probs = dists.mix(self._logit(i, out) / self.temperature[i], self.balance.unimix)
                codes.append(self.quantizer.decode(i, dists.draw(probs, sample).to(out.dtype)).flatten(1))  # (N, G * d)
                waiting.append(self._token(i, codes[-1]))
                if self.chain and i < n - 1:
                    out, waiting = feed(waiting), []
            feats.append(Feat(deter, self._stoch(torch.cat(codes, 1)))), actions.append(action)
        actions.append(torch.zeros_like(actions[-1]) if given else actor(feats[-1]))
        return Feat(*(torch.stack(x, 1) for x in zip(*feats, strict=True))), torch.stack(actions, 1)

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
