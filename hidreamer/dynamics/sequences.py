"""The transformer memories of ``hrvq``: tokens, the carry that caches them, imagination's starts,
and what reads their outputs.

Shapes: B sequences, T steps, N = B * n branches, L levels, l levels with a position of their own,
G groups of d numbers, A action, W width, Z stoch, Q = T * (l + 1) new positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hidreamer.dynamics.base import Losses, Metrics, Post, start_steps
from hidreamer.dynamics.tokens import Tokens, before_each
from hidreamer.experts import expert_use
from hidreamer.mask import make_level_mask
from hidreamer.nets import linear
from hidreamer.parallel import Attention, Whole
from hidreamer.rollout import Carry, Given, RolloutCarry
from hidreamer.transformer import KV, FFNLosses, Transformer

COMPILED_KINDS = 16  # at most, of calls that a compiled piece meets


class Sequences(Tokens):
    """Tokens of steps in a transformer: one for each of l levels, and one for the action.

    Without levels that have a position (``stacked``) the action's token holds the codes of the
    state that it was taken in.
    """

    transformer: Transformer
    depth: nn.Module | None  # of ``stacked``

    def make_positions(
        self, positions: int, act_dim: int, width: int, heads: int, window: int, mask: str
    ) -> None:
        """positions: l. Raises ValueError for widths that the heads do not divide evenly."""
        if width % heads or (width // heads) % 2:  # rotary positions turn pairs of numbers
            raise ValueError(
                f"dynamics.deter {width} must be dynamics.hrvq.heads ({heads}) times an even number"
            )
        self.positions, self.window = positions, window
        self.act_dim, self.deter_dim = act_dim, width
        level_mask = make_level_mask(mask, positions)
        self.register_buffer("level_mask", level_mask, persistent=False)
        # By level of the query: how many leading positions (A, L0, L1 ..) of an earlier step it may
        # attend to.
        with torch.device("cpu"):  # numbers for the host, also where parameters are made elsewhere
            past = make_level_mask(mask, positions)[0].roll(1, 1)  # (l + 1, l + 1) level, position
            self.slots = (past * torch.arange(1, positions + 2)).amax(1).tolist()

    def make_tokens(self, reads: int) -> None:
        """reads: how many levels' codes an action's token holds where no level has a position."""
        size, width = self.level_dims[0], self.deter_dim
        self.reads = reads
        if not self.positions:
            self.token = linear(reads * size + self.act_dim, width)
            with torch.no_grad():  # an action of norm 1 beside codes whose numbers are about 1
                self.action_weights().mul_(self.code_shape[1] ** 0.5)
        else:
            self.token = nn.ModuleList(linear(size, width) for _ in range(self.levels))
            self.token.append(linear(self.act_dim, width))
            self.level_emb = nn.Parameter(0.02 * torch.randn(self.levels + 1, width))
        self.bos_token = nn.Parameter(0.02 * torch.randn(width))  # for the action before an episode

    def action_weights(self) -> Tensor:
        layer = self.token[self.levels] if self.positions else self.token
        return layer.weight[:, -self.act_dim :]

    def _token(self, level: int, x: Tensor) -> Tensor:
        """Codes (..., G * d) of a level, or actions (..., A), -> (..., W)."""
        return self.token[level](x) + self.level_emb[level]

    def _action_token(self, action: Tensor, before: Tensor) -> Tensor:
        """Actions (..., A), the states (..., Z) that they were taken in -> (..., W)."""
        if self.positions:
            return self._token(self.levels, action)
        read = before[..., : self.reads * self.level_dims[0]] * self.code_shape[1] ** 0.5
        return self.token(torch.cat([read, action], -1))

    def _sequences(self, carry: Carry | RolloutCarry) -> Carry:
        """Any carry as one in which every branch has cached steps of its own."""
        if isinstance(carry, RolloutCarry):
            return carry.sequences()
        return carry if len(carry.step) == len(carry.segment) else carry.unshared(self.window)

    def _enter(
        self, given: list[tuple[int, *Given]], rope: Tensor, room: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, KV | None]]:
        """Tokens (B,n,Q,W), and the first layer's ``project`` of them.

        given: the level of each, and its codes (N, G*d), or the action and the state that it was
        taken in.
        """
        tokens = []
        for level, *parts in given:
            if level == self.positions:
                tokens.append(self._action_token(*parts))
            else:
                tokens.append(self._token(level, *parts))
        x = torch.stack(tokens, 1).unflatten(0, rope.shape[:2])
        return x, self.transformer.layers[0].project(x, rope, room)

    def _choose(
        self,
        level: int,
        out: Tensor,
        codes: list[Tensor],
        last: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A level's code of outputs (N, W) and the coarser codes, as of ``_draw``."""
        of_level = out if self.depth is None else self.depth(level, out, codes)
        return self._draw(level, self._logit(level, of_level, last), noise, out.dtype)

    def _run_transformer(
        self, action: Tensor, codes: Tensor, attention: Attention, all_positions: bool
    ) -> tuple[Tensor, list[KV], FFNLosses]:
        """Action tokens (B,T,W), codes (B,T,L,G*d) -> outputs, K/V by layer, auxiliary losses.

        Outputs are (B,T,l+1,W), without ``all_positions`` only those at the actions, (B,T,1,W).
        """
        length, slots = action.shape[1], self.positions + 1
        tokens = [action]
        for i, code in enumerate(codes.unbind(2)[: self.positions]):
            tokens.append(self._token(i, code))
        x = torch.stack(tokens, 2).flatten(1, 2).unsqueeze(1)  # (B, 1, T * (l+1), W)
        out_index = slice(0, None, 1 if all_positions else slots)
        rope, level, *seen = attention
        whole = Whole(*seen)
        out, losses = self.transformer(x, rope, level, whole, out_index)
        return out.squeeze(1).unflatten(1, (length, -1)), whole.kv, losses

    def _remember(
        self, carry: Carry, codes: Tensor, steps: tuple[Tensor, Tensor], attention: Attention, **how
    ) -> tuple[Tensor, list[KV], FFNLosses]:
        """As ``_run_transformer``; steps: prev_action (B,T,A), is_first (B,T)."""
        prev_action, is_first = steps
        before = None
        if not self.positions:
            before = before_each(self._stoch(codes.flatten(2)), carry.stoch)
        action = self._action_token(prev_action, before)  # (B, T, W)
        action = torch.where(is_first.unsqueeze(-1), self.bos_token, action)
        return self._run_transformer(action, codes, attention, **how)

    def initial(self, batch: int) -> Carry:
        x = self.bos_token
        net = self.transformer
        none = x.new_zeros(batch, len(net.layers), net.heads, 0, net.head_dim)
        steps = torch.zeros(batch, 0, dtype=torch.long, device=x.device)
        deter, stoch = x.new_zeros(batch, self.deter_dim), x.new_zeros(batch, self.stoch_dim)
        return Carry(deter, stoch, none, none, steps, steps.new_zeros(batch))

    def select(self, carry: Carry | RolloutCarry, index: Tensor) -> Carry:
        return carry.select(index, self.window)

    def join(self, carries: list[Carry | RolloutCarry]) -> Carry:
        return Carry.join([self._sequences(carry) for carry in carries])

    def starts(self, carry: Carry, post: Post, n: int) -> Carry:
        self.check_feat(post.feat)
        length, cache = post.feat.deter.shape[1], post.aux.cache
        chosen = start_steps(length, n)
        cached = cache.segment.shape[1] - length  # steps before the post's
        steps = torch.arange(length, device=cache.segment.device)[chosen] + cached
        deter, stoch = (x[:, chosen].flatten(0, 1).detach() for x in post.feat)  # (B * n, .)
        where = steps.repeat(len(cache.segment))
        start = cache._replace(deter=deter, stoch=stoch, step=where)
        # A start sees a window of the steps before it: with pieces of the sequence, of about as
        # many steps, products of starts and steps grow with the length and not with its square.
        count = length // self.window if self.window else 1
        starts = len(range(length)[chosen])
        if count < 3 or starts % count:
            return start
        each = starts // count
        lasts = range(
            cached + chosen.start + (each - 1) * chosen.step, cached + length, each * chosen.step
        )
        return start.cut(lasts, self.window + (each - 1) * chosen.step)

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        losses, metrics = super().loss(post)
        for name, loss in post.aux.ffn_losses.items():  # (B, 1) each
            losses[name] = loss.expand(post.aux.is_first.shape)
        return losses, metrics | expert_use(self.transformer)

    def prior_logits(self, carry: RolloutCarry) -> tuple[Tensor, ...]:
        return tuple(carry.rollout.logits)

    def fixed_size(self, carry: Carry) -> Carry:
        return carry.padded(self.window, self.positions + 1)

    def compile_steps(self) -> None:
        # Acting, training, dreaming and open loops make nine kinds of calls, each compiled once.
        # Beyond the limit (8 by default) torch would run a piece uncompiled for ever.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, COMPILED_KINDS)
        self._choose, self._enter = torch.compile(self._choose), torch.compile(self._enter)
        layers = self.transformer.layers
        for layer in layers[:-1]:
            layer.to_next = torch.compile(layer.to_next)
        self.transformer.finish = torch.compile(self.transformer.finish)
