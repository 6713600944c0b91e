"""rssm: the flat latent state of DreamerV3, S categoricals of K classes (Hafner et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from hidreamer.dynamics.base import KLConfig
from hidreamer.dynamics.recurrent import Recurrent
from hidreamer.dynamics.sampler import Noise
from hidreamer.gradients import Tensors, product, sample, sample_grad, weight_grad
from hidreamer.nets import linear


class RSSM(Recurrent):
    """prior logits from u = hidden of deter; posterior logits from v = hidden of (deter, embed).

    stoch, classes: S and K; names: ``cell``, ``norm``, ``act``.
    """

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        kl_config: KLConfig,
        *,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        **names: str,
    ):
        size = stoch * classes
        super().__init__(embed_dim, act_dim, deter, hidden, size, kl_config, **names)
        self.shapes = ((stoch, classes),)
        self.prior_out = linear(hidden, size, scale=1.0)
        self.post_out = linear(hidden, size, scale=1.0)

    def prior_step(self, deter: Tensor, noise: Noise) -> Tensor:
        logit = self.prior_out(self.img_out(deter)).unflatten(-1, self.shapes[0])  # (N, S, K)
        return self.sample_stoch(logit, noise[0])

    def post_step(self, deter: Tensor, v: Tensor, noise: Noise) -> tuple[Tensor, tuple[Tensor]]:
        logit = self.post_out(v).unflatten(-1, self.shapes[0])  # (B, S, K)
        return self.sample_stoch(logit, noise[0]), (logit,)

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor]:
        return (self.prior_out(self.img_out(deter)).unflatten(-1, self.shapes[0]),)  # (B, T, S, K)

    # ------------------------------------------------------------ post_step, as a scan has it

    def post_weights(self) -> Tensors:
        return self.post_out.weight, self.post_out.bias

    def post_forward(
        self, weights: Tensors, deter: Tensor, read: Tensors, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        noise = noise[0] if noise else None
        stoch, logit = sample(product(v, *weights), self.shapes[0], self.unimix, noise)
        return stoch, (logit,), ()

    def post_seen(self, saved: Tensors, stoch: Tensor, logits: Tensors) -> Tensors:
        return (torch.softmax(logits[0], -1),)

    def post_backward(
        self,
        weights: Tensors,
        seen: Tensors,
        stoch: Tensor,
        logits: Tensors | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        logit = sample_grad(stoch, logits and logits[0], seen[0], self.unimix)  # (.., S * K)
        return product(logit, weights[0].t(), added), (logit,)

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, seen: Tensors, grads: Tensors
    ) -> Tensors:
        return weight_grad(grads[0], v, weights[0]), grads[0].sum((0, 1))
