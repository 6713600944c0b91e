"""rssm: the flat latent state of DreamerV3, S categoricals of K classes (Hafner et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from hidreamer.dynamics.base import KLConfig
from hidreamer.dynamics.recurrent import Noise, Recurrent
from hidreamer.dynamics.scan import Tensors, product, sample, sample_grad, weight_grad
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
        self, weights: Tensors, deter: Tensor, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        noise, unimix = noise[0] if noise else None, self.kl_config.unimix
        stoch, logit, softmax = sample(product(v, *weights), self.shapes[0], unimix, noise)
        return stoch, (logit,), (softmax,)

    def post_backward(
        self, weights: Tensors, saved: Tensors, stoch: Tensor, logits: Tensors
    ) -> tuple[Tensor, Tensors]:
        logit = sample_grad(stoch, *logits, *saved, self.kl_config.unimix)  # (B, S * K)
        return product(logit, weights[0].t()), (logit,)

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, saved: Tensors, grads: Tensors
    ) -> Tensors:
        return weight_grad(grads[0], v, weights[0]), grads[0].sum((0, 1))
