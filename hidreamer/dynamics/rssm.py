"""rssm: the flat latent state of DreamerV3, S categoricals of K classes (Hafner et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Balance, Recurrent
from hidreamer.nets import linear


class RSSM(Recurrent):
    """prior logits from u = hidden of deter; posterior logits from v = hidden of (deter, embed)."""

    def __init__(
        self, embed_dim: int, act_dim: int, balance: Balance, *, deter: int, hidden: int, stoch: int, classes: int
    ):
        super().__init__(embed_dim, act_dim, deter, hidden, stoch * classes, balance)
        self.shapes = ((stoch, classes),)
        self.prior_out = linear(hidden, stoch * classes, scale=1.0)
        self.post_out = linear(hidden, stoch * classes, scale=1.0)

    def prior_step(self, deter: Tensor, sample: bool) -> Tensor:
        logit = self.prior_out(self.img_out(deter)).unflatten(-1, self.shapes[0])  # (N, S, K)
        return dists.draw(dists.mix(logit, self.balance.unimix), sample).flatten(-2)

    def post_step(self, deter: Tensor, v: Tensor, sample: bool) -> tuple[Tensor, tuple[Tensor]]:
        logit = self.post_out(v).unflatten(-1, self.shapes[0])  # (B, S, K)
        return dists.draw(dists.mix(logit, self.balance.unimix), sample).flatten(-2), (logit,)

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor]:
        return (self.prior_out(self.img_out(deter)).unflatten(-1, self.shapes[0]),)  # (B, T, S, K)
