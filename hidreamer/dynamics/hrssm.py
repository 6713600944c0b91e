"""hrssm: categoricals on a top (coarse) and a bottom (fine) level with a residual posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Feat, KLConfig
from hidreamer.dynamics.recurrent import Noise, Recurrent
from hidreamer.dynamics.scan import (
    Tensors,
    add_product,
    norm,
    product,
    sample,
    sample_grad,
    weight_grad,
)
from hidreamer.nets import linear


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

    def post_weights(self) -> Tensors:
        """Of the top, of u, of the bottom's prior and delta as one product with (u, v, z_top)."""
        top, delta, hidden = self.post_top, self.delta, self.img_out.linear.out_features
        with torch.no_grad():
            prior = self.prior_bottom.weight
            of_v = torch.zeros_like(prior[:, :hidden])
            base = torch.cat([prior[:, :hidden], of_v, prior[:, hidden:]], 1)
            both = delta.weight + base, delta.bias + self.prior_bottom.bias
        of_u = self.img_out.linear.weight.detach()
        return top.weight, top.bias, delta.weight, delta.bias, *both, of_u

    def post_forward(
        self, weights: Tensors, deter: Tensor, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        of_top, both, of_u = weights[:2], weights[4:6], weights[6]
        noises, unimix = noise or (None, None), self.kl_config.unimix
        top, *seen_top = sample(product(v, *of_top), self.shapes[0], unimix, noises[0])
        u_norm = self.img_out.norm.weight, self.img_out.norm.bias
        u = nn.functional.silu(norm(product(deter, of_u), *u_norm, self.eps)[-1])
        given = torch.cat([u, v, top], -1)  # (B, 2 hidden + S0 * K0)
        bottom, *seen_bottom = sample(product(given, *both), self.shapes[1], unimix, noises[1])
        logits, softmaxes = zip(seen_top, seen_bottom, strict=True)
        return torch.cat([top, bottom], -1), logits, (*softmaxes, given)

    def post_backward(
        self, weights: Tensors, saved: Tensors, stoch: Tensor, logits: Tensors
    ) -> tuple[Tensor, Tensors]:
        of_top, of_delta, hidden = weights[0], weights[2], weights[0].shape[1]
        unimix, size = self.kl_config.unimix, len(of_top)
        top, bottom = stoch.split([size, stoch.shape[-1] - size], -1)
        bottom = sample_grad(bottom, logits[1], saved[1], unimix)  # (B, S1 * K1)
        # u and the bottom's prior have no gradient here
        v, through = product(bottom, of_delta[:, hidden:].t()).split([hidden, size], -1)
        top = sample_grad(top + through, logits[0], saved[0], unimix)  # (B, S0 * K0)
        return add_product(v, top, of_top.t()), (top, bottom)

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, saved: Tensors, grads: Tensors
    ) -> tuple[Tensor | None, ...]:
        top, bottom = grads
        of_top = weight_grad(top, v, weights[0]), top.sum((0, 1))
        of_delta = weight_grad(bottom, saved[2], weights[2]), bottom.sum((0, 1))
        return *of_top, *of_delta, None, None, None

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
