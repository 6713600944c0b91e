"""hrssm: categoricals on a top (coarse) and a bottom (fine) level with a residual posterior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Feat, KLConfig
from hidreamer.dynamics.recurrent import Recurrent
from hidreamer.dynamics.sampler import Noise
from hidreamer.gradients import (
    Tensors,
    add_product,
    norm,
    product,
    sample,
    sample_grad,
    weight_grad,
)
from hidreamer.nets import linear


class PostWeights(NamedTuple):
    """What the posterior multiplies with inside the scan. The bottom's logits are the sum of its
    prior's and delta's, so their weights are added once for all steps.
    """

    top: Tensor  # (S0 * K0, W) of v
    top_bias: Tensor
    delta: Tensor  # (S1 * K1, 2 W + S0 * K0) of u, v and z_top
    delta_bias: Tensor
    both: Tensor  # (S0 * K0 + S1 * K1, 2 W) of u and v, for the logits of both levels
    both_bias: Tensor
    of_top: Tensor  # (S1 * K1, S0 * K0) of z_top, for the bottom's logits
    of_u: Tensor  # (W, D) of the memory, for u


class PostSeen(NamedTuple):
    """What the posterior's gradient needs of all steps or of one."""

    softmax_top: Tensor  # (.., S0, K0)
    softmax_bottom: Tensor  # (.., S1, K1)
    u: Tensor  # (.., W)
    top: Tensor  # (.., S0 * K0) z_top


class HRSSM(Recurrent):
    """With u = hidden of deter and v = hidden of (deter, embed):

    - top: prior logits from u, posterior logits from v;
    - bottom: prior logits from (u, z_top), posterior logits = sg(prior logits) + delta(sg(u), v,
      z_top).

    delta starts at zero, so at first the bottom's posterior is its prior. The two stops keep
    ``rep`` from training the prior through the posterior that is built on it.

    stoch, classes: S and K of top and bottom; names: ``cell``, ``norm``, ``act``.
    """

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        kl_config: KLConfig,
        *,
        deter: int,
        hidden: int,
        stoch: list[int],
        classes: list[int],
        **names: str,
    ):
        if len(stoch) != 2 or len(classes) != 2:
            raise ValueError(
                f"dynamics.hrssm needs two levels of stoch and classes, not {stoch} and {classes}"
            )
        top, bottom = (variables * k for variables, k in zip(stoch, classes, strict=True))
        super().__init__(embed_dim, act_dim, deter, hidden, top + bottom, kl_config, **names)
        self.shapes = tuple(zip(stoch, classes, strict=True))
        self.prior_top = linear(hidden, top, scale=1.0)
        self.post_top = linear(hidden, top, scale=1.0)
        self.prior_bottom = linear(hidden + top, bottom, scale=1.0)
        self.delta = linear(2 * hidden + top, bottom, scale=0.0)

    def _top_prior(self, u: Tensor) -> Tensor:
        """Hidden of the memory (..., hidden) -> logits (..., S0, K0)."""
        return self.prior_top(u).unflatten(-1, self.shapes[0])

    def _bottom_prior(self, u: Tensor, top: Tensor) -> Tensor:
        """(..., hidden), z_top (..., S0 * K0) -> logits (..., S1, K1)."""
        return self.prior_bottom(torch.cat([u, top], -1)).unflatten(-1, self.shapes[1])

    def prior_step(self, deter: Tensor, noise: Noise) -> Tensor:
        u = self.img_out(deter)
        top = self.sample_stoch(self._top_prior(u), noise[0])
        bottom = self.sample_stoch(self._bottom_prior(u, top), noise[1])
        return torch.cat([top, bottom], -1)

    def post_step(
        self, deter: Tensor, v: Tensor, noise: Noise
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logit_top = self.post_top(v).unflatten(-1, self.shapes[0])  # (B, S0, K0)
        top = self.sample_stoch(logit_top, noise[0])
        with torch.no_grad():
            u = self.img_out(deter)
            base = self._bottom_prior(u, top)
        delta = self.delta(torch.cat([u, v, top], -1)).unflatten(-1, self.shapes[1])
        logit_bottom = base + delta  # (B, S1, K1)
        bottom = self.sample_stoch(logit_bottom, noise[1])
        return torch.cat([top, bottom], -1), (logit_top, logit_bottom)

    def _top_of(self, stoch: Tensor) -> Tensor:
        """z_top (..., S0 * K0) of a state (..., Z)."""
        return stoch[..., : math.prod(self.shapes[0])]

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, Tensor]:
        # The bottom's prior is conditioned on the posterior's top. Conditioned on a sample of the
        # prior's own, which is independent of the observation, it would learn to ignore the top,
        # and the levels of imagined states would not fit together.
        u, top = self.img_out(deter), self._top_of(stoch).detach()
        return self._top_prior(u), self._bottom_prior(u, top)

    def coarse_features(
        self, feat: Feat, generator: torch.Generator | None = None
    ) -> dict[str, Feat]:
        """The bottom level sampled again from its prior given the top."""
        u, top = self.img_out(feat.deter), self._top_of(feat.stoch)
        logit = self._bottom_prior(u, top)  # (..., S1, K1)
        noise = dists.uniform((*logit.shape[:-1], 1), logit, generator)
        bottom = self.sample_stoch(logit, noise)
        return {"top": feat._replace(stoch=torch.cat([top, bottom], -1))}

    # ------------------------------------------------------------ post_step, as a scan has it

    def post_weights(self) -> PostWeights:
        top, delta, hidden = self.post_top, self.delta, self.img_out.linear.out_features
        with torch.no_grad():
            prior = self.prior_bottom.weight
            u, v, of_top = delta.weight.split([hidden, hidden, len(top.weight)], 1)
            u, of_top = u + prior[:, :hidden], of_top + prior[:, hidden:]
            rows = torch.cat([torch.zeros_like(top.weight), top.weight], 1), torch.cat([u, v], 1)
            bias = torch.cat([top.bias, delta.bias + self.prior_bottom.bias])
        of_u = self.img_out.linear.weight.detach()
        own = top.weight, top.bias, delta.weight, delta.bias
        return PostWeights(*own, torch.cat(rows), bias, of_top, of_u)

    def post_reads(self, weights: Tensors) -> Tensors:
        return (PostWeights(*weights).of_u,)

    def post_forward(
        self, weights: Tensors, deter: Tensor, read: Tensors, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        w = PostWeights(*weights)
        noises = noise or (None, None)
        u_norm = self.img_out.norm
        u = nn.functional.silu(norm(read[0], u_norm.weight, u_norm.bias, self.eps))
        logits = product(torch.cat([u, v], -1), w.both, w.both_bias)
        logit_top, rest = logits.split([len(w.top), len(w.of_top)], -1)
        top, logit_top = sample(logit_top, self.shapes[0], self.unimix, noises[0])
        bottom = sample(product(top, w.of_top, rest), self.shapes[1], self.unimix, noises[1])
        return torch.cat([top, bottom[0]], -1), (logit_top, bottom[1]), (u,)

    def post_seen(self, saved: Tensors, stoch: Tensor, logits: Tensors) -> Tensors:
        # Under vmap the module's own parameters are not those of one member here.
        softmax = (torch.softmax(logit, -1) for logit in logits)
        return PostSeen(*softmax, *saved, self._top_of(stoch))

    def post_backward(
        self,
        weights: Tensors,
        seen: Tensors,
        stoch: Tensor,
        logits: Tensors | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        w, s = PostWeights(*weights), PostSeen(*seen)
        hidden, size = w.top.shape[1], len(w.top)
        top, bottom = stoch.split([size, stoch.shape[-1] - size], -1)
        scale = 1.0 - self.unimix if logits is None else 1.0
        logit_top, logit_bottom = logits or (None, None)
        bottom = sample_grad(bottom, logit_bottom, s.softmax_bottom, self.unimix)  # (.., S1 * K1)
        # u and the bottom's prior have no gradient here
        v, through = product(bottom, w.delta[:, hidden:].t()).split([hidden, size], -1)
        top = torch.add(top, through, alpha=scale)
        top = sample_grad(top, logit_top, s.softmax_top, self.unimix)  # (.., S0 * K0)
        v = v if added is None else v + added
        return add_product(v, top, w.top.t()), (top, bottom)

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, seen: Tensors, grads: Tensors
    ) -> tuple[Tensor | None, ...]:
        w, s, (top, bottom) = PostWeights(*weights), PostSeen(*seen), grads
        given = torch.cat([s.u, v, s.top], -1)  # (T, B, 2 W + S0 * K0)
        of_top = weight_grad(top, v, w.top), top.sum((0, 1))
        of_delta = weight_grad(bottom, given, w.delta), bottom.sum((0, 1))
        return *of_top, *of_delta, None, None, None, None

    def convert_state_dict(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Split the heads of a flat state over two levels: it computes the same until trained.

        The flat state's first variables become the top. No prior looks at z_top yet, and delta
        turns the bottom's prior logits into the flat posterior's: W_post v - W_prior u.
        """
        if "prior_out.weight" not in params:
            return params
        flat = ("prior_out.", "post_out.")
        rest = {name: x for name, x in params.items() if not name.startswith(flat)}
        prior, prior_bias = params["prior_out.weight"], params["prior_out.bias"]
        post, post_bias = params["post_out.weight"], params["post_out.bias"]
        top, hidden = self.prior_top.weight.shape
        if prior.shape != (self.stoch_dim, hidden) or len({k for _, k in self.shapes}) > 1:
            raise ValueError(
                f"dynamics.prior_out of the flat state is {tuple(prior.shape)}; it cannot be split "
                f"over {self.shapes} (variables, classes), which together are "
                f"{(self.stoch_dim, hidden)}"
            )
        heads = {}
        for name, x in self.state_dict().items():
            if name not in rest:
                heads[name] = torch.zeros_like(x)
        heads["prior_top.weight"], heads["prior_top.bias"] = prior[:top], prior_bias[:top]
        heads["post_top.weight"], heads["post_top.bias"] = post[:top], post_bias[:top]
        heads["prior_bottom.weight"][:, :hidden] = prior[top:]
        heads["prior_bottom.bias"] = prior_bias[top:]
        delta = torch.cat([-prior[top:], post[top:]], 1)
        heads["delta.weight"][:, : 2 * hidden] = delta
        heads["delta.bias"] = post_bias[top:] - prior_bias[top:]
        return rest | heads
