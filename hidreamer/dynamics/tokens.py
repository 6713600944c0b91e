"""Residual-VQ codes as the state of a step, whatever the memory: what all of ``hrvq`` share.

The posterior is the quantiser's: a projection of what it sees becomes codes, level by level. Every
level's prior is a linear layer (``prior``) of what predicts that level, which a memory provides.

Shapes: B sequences, T steps, L levels, G groups, K codes of d numbers, E embedding, Z stoch
(= L * G * d).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Dynamics, Feat, KLConfig, Losses, Metrics, Post, kl_losses
from hidreamer.losses import scaled
from hidreamer.nets import linear
from hidreamer.quantizer import Codes, Quantizer, code_accuracy, onehots, per_level

GATE_BIAS = -2.0  # of ``copy``: at first a code is copied with a probability of 0.12


def before_each(x: Tensor, first: Tensor) -> Tensor:
    """Of steps x (B,T,.) those before each, the first of them being ``first`` (B,.)."""
    return torch.cat([first.unsqueeze(1), x[:, :-1]], 1)


class Tokens(Dynamics):
    """A state of codes. ``observe`` leaves what it chose in ``post.aux.codes``."""

    def make_codes(
        self,
        inputs: int,
        kl_config: KLConfig,
        *,
        levels: int,
        groups: int,
        codes: int,
        code_dim: int,
        chain: bool,
        posterior: str,
        posterior_sees: str = "frame",
        residual: str = "drawn",
        noise: float = 0.0,
        commitment: list[float],
        level_weights: list[float],
        temperature: list[float],
        level_dropout: float,
        spatial: bool,
    ) -> None:
        """Codes of ``inputs`` numbers: of an embedding, or of a layer that reads the memory as
        well. The arguments are those of ``dynamics.hrvq``. Raises ValueError.
        """
        self.sees_memory = posterior_sees == "memory"
        # A posterior that sees its frame alone cannot follow its prior, as that of rssm does: to be
        # near to it, all it can do is become vague. So it is not regularised towards the prior
        # (rep 0), and there are no free nats: the prior is always trained.
        alone = kl_config._replace(rep=0.0, free_nats=0.0)
        self.kl_config = kl_config if self.sees_memory else alone
        if residual == "innovation" and not self.sees_memory:
            raise ValueError(
                "dynamics.hrvq.residual: innovation needs the prior before the posterior: set"
                " memory gru and posterior_sees memory"
            )
        self.levels, self.chain, self.residual, self.code_noise = levels, chain, residual, noise
        self.level_dropout = level_dropout
        self.stoch_dim = levels * groups * code_dim
        self.shapes = ((groups, codes),) * levels
        if posterior != "nearest":
            commitment = [0.0]  # unused there, so its length is not checked
        weights = per_level(commitment, levels, "dynamics.hrvq.commitment")
        self.register_buffer("commitment", torch.tensor(weights), persistent=False)
        self.level_weights = per_level(level_weights, levels, "dynamics.hrvq.level_weights")
        self.temperature = per_level(temperature, levels, "dynamics.hrvq.temperature")
        self.code_shape = groups, code_dim
        if spatial and inputs % groups:
            raise ValueError(
                f"dynamics.hrvq.spatial: {inputs} embedding numbers are no {groups} positions"
            )
        self.map_positions = groups if spatial else 0
        if spatial:
            self.in_proj = linear(inputs // groups, code_dim)
        else:
            self.in_proj = linear(inputs, groups * code_dim)
        self.quantizer = Quantizer(
            posterior, levels, groups, codes, code_dim, unimix=kl_config.unimix, shared=spatial
        )

    def make_priors(self, widths: Sequence[int], copy: bool) -> None:
        """widths: by level, of what predicts it."""
        groups, codes = self.shapes[0]
        self.prior = nn.ModuleList(linear(width, groups * codes, scale=1.0) for width in widths)
        self.copy = copy
        if copy:  # the gate: how likely each group keeps its last code
            self.gate = nn.ModuleList(linear(width, groups, scale=0.0) for width in widths)
            for gate in self.gate:
                nn.init.constant_(gate.bias, GATE_BIAS)

    @property
    def level_dims(self) -> tuple[int, ...]:
        groups, dim = self.code_shape
        return (groups * dim,) * self.levels

    # ------------------------------------------------------------ codes

    def _project(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., G, d): what is quantised, normalised without batch statistics."""
        groups, dim = self.code_shape
        if self.map_positions:  # a map of channels x positions, each position a group
            z = self.in_proj(x.unflatten(-1, (-1, groups)).transpose(-1, -2)).flatten(-2)
        else:
            z = self.in_proj(x)
        return nn.functional.layer_norm(z, z.shape[-1:]).unflatten(-1, (groups, dim))

    def encode(
        self, embed: Tensor, sample: bool = True, generator: torch.Generator | None = None
    ) -> Codes:
        """The posterior (..., E) -> codes (..., L, G, .): of each observation alone."""
        assert not self.sees_memory, "this posterior sees the memory as well"
        assert embed.shape[-1] == self.embed_dim, (embed.shape, self.embed_dim)
        z = self._project(embed)
        return self.quantizer.encode(z, sample, generator, residual=self.residual)

    def _stoch(self, codes: Tensor) -> Tensor:
        """Codes (..., L * G * d) as heads read them: each scaled to about unit norm."""
        return codes * self.code_shape[1] ** -0.5

    def _codes(self, stoch: Tensor) -> Tensor:
        """The inverse, by level: (..., Z) -> (..., L, G * d)."""
        return stoch.unflatten(-1, (self.levels, -1)) * self.code_shape[1] ** 0.5

    # ------------------------------------------------------------ priors

    def _logit(self, level: int, out: Tensor, last: Tensor | None = None) -> Tensor:
        """What predicts a level (..., W) -> (..., G, K).

        last: with ``copy`` the one-hots (..., L, G, K) of the step before, zero where there is
        none. Then probabilities are g times these plus 1 - g times the softmax.
        """
        logit = self.prior[level](out).unflatten(-1, self.shapes[level])
        if last is None:
            return logit
        last = last[..., level, :, :]
        gate = torch.sigmoid(dists.at_least_float32(self.gate[level](out))).unsqueeze(-1)
        gate = gate * last.sum(-1, keepdim=True)  # (..., G, 1)
        probs = torch.softmax(dists.at_least_float32(logit), -1)
        return (gate * last + (1.0 - gate) * probs).clamp(min=1e-8).log()

    @torch.no_grad()
    def _last(self, stoch: Tensor) -> Tensor | None:
        """The one-hots (..., L, G, K) of codes in ``stoch`` (..., Z), zero where it is zero; None
        without ``copy``.
        """
        if not self.copy:
            return None
        codes = self._codes(stoch).unflatten(-1, self.code_shape)  # (..., L, G, d)
        index = self.quantizer.index(codes)
        there = (codes != 0).any(-1, keepdim=True)
        return onehots(index, self.shapes[0][1], stoch.dtype) * there

    def _draw(
        self, level: int, logit: Tensor, noise: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A level's logits (N, G, K) -> a code (N, G * d), and what it was drawn from (N, G, K).

        noise: uniform (N, G, 1); None takes the mode.
        """
        logit = scaled(logit, 1.0 / self.temperature[level])
        probs = dists.unimix_probs(logit, self.kl_config.unimix)
        if torch.is_grad_enabled():
            onehot = dists.sample_onehot(probs, noise).to(dtype)
            return self.quantizer.decode(level, onehot).flatten(1), logit
        index = dists.class_drawn(probs, noise).squeeze(-1)
        return self.quantizer.lookup(level, index).to(dtype).flatten(1), logit

    def _exchanged(self, codes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codes (B,T,L,G,d), each with a chance of ``noise`` that of another step of the batch.

        Priors that were trained on right codes alone trust them more than they should when a dream
        drew them.
        """
        if not self.code_noise or not torch.is_grad_enabled():
            return codes
        where = {"device": codes.device, "generator": generator}
        flat = codes.flatten(0, 1)  # (B * T, L, G, d)
        other = flat[torch.rand(len(flat), **where).argsort()]
        wrong = torch.rand(flat.shape[:-1], **where) < self.code_noise
        return torch.where(wrong.unsqueeze(-1), other, flat).view_as(codes)

    def _detached_pass(self, codes: Tensor, trained: bool | None) -> bool:
        """Whether priors come from a pass of their own: where codes have a gradient (``trained``;
        None looks), or where some are exchanged.
        """
        trained = codes.requires_grad if trained is None else trained
        return trained or (self.code_noise > 0.0 and torch.is_grad_enabled())

    # ------------------------------------------------------------ the interface

    def loss(self, post: Post) -> tuple[Losses, Metrics]:
        """KL per level; of a posterior that sees its frame alone, it trains the prior alone.

        For codes that are chosen hard it is their cross-entropy, both with their share of the
        uniform distribution; ``nearest`` adds the commitment loss.
        """
        self.check_levels(post)
        losses, metrics = kl_losses(post.levels, self.kl_config, self.level_weights)
        codes = post.aux.codes
        if self.quantizer.kind == "nearest":
            error = (codes.residual - codes.code.detach()).square()  # (B, T, L, G, d)
            error = error.sum((-2, -1))  # (B, T, L)
            losses["commit"] = (error * self.commitment).sum(-1)
            for i in range(self.levels):
                metrics[f"commit_{i}"] = error[..., i].detach().mean()
        metrics |= self.quantizer.usage(codes.index)
        priors = [level.prior for level in post.levels]
        return losses, metrics | code_accuracy(priors, codes.index, post.aux.is_first)

    def update_codebook(self, post: Post, generator: torch.Generator | None = None) -> None:
        self.quantizer.update_codebook(post.aux.codes, generator=generator)

    def classes(self, post: Post) -> tuple[Tensor, ...]:
        return post.aux.codes.index.unbind(2)

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
