"""hrssm: two levels of categoricals, a top (coarse) and a bottom (fine) one with a residual posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Balance, Recurrent
from hidreamer.nets import linear


class HRSSM(Recurrent):
    """With u = hidden of deter and v = hidden of (deter, embed):

    - top: prior logits from u, posterior logits from v;
    - bottom: prior logits from (u, z_top), posterior logits = sg(prior logits) + delta(sg(u), v, z_top).

    delta starts at zero, so at first the bottom's posterior is its prior. The two stops keep ``rep`` from training the
    prior through the posterior that is built on it.
    """

    def __init__(
        self,
        embed_dim: int,
        act_dim: int,
        balance: Balance,
        *,
        deter: int,
        hidden: int,
        stoch: list[int],
        classes: list[int],
    ):
        if len(stoch) != 2 or len(classes) != 2:
            raise ValueError(f"dynamics.hrssm needs two levels of stoch and classes, not {stoch} and {classes}")
        top, bottom = (variables * k for variables, k in zip(stoch, classes, strict=True))
        super().__init__(embed_dim, act_dim, deter, hidden, top + bottom, balance)
        self.shapes = tuple(zip(stoch, classes, strict=True))
        self.prior_top = linear(hidden, top, scale=1.0)
        self.post_top = linear(hidden, top, scale=1.0)
        self.prior_bottom = linear(hidden + top, bottom, scale=1.0)
        self.delta = linear(2 * hidden + top, bottom, scale=0.0)

    def _draw(self, logit: Tensor, sample: bool) -> Tensor:
        """(..., S, K) -> (..., S * K)."""
        return dists.draw(dists.mix(logit, self.balance.unimix), sample).flatten(-2)

    def _top(self, u: Tensor) -> Tensor:
        return self.prior_top(u).unflatten(-1, self.shapes[0])  # (..., S0, K0)

    def _bottom(self, u: Tensor, top: Tensor) -> Tensor:
        return self.prior_bottom(torch.cat([u, top], -1)).unflatten(-1, self.shapes[1])  # (..., S1, K1)

    def prior_step(self, deter: Tensor, sample: bool) -> Tensor:
        u = self.img_out(deter)
        top = self._draw(self._top(u), sample)
        return torch.cat([top, self._draw(self._bottom(u, top), sample)], -1)

    def post_step(self, deter: Tensor, v: Tensor, sample: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logit_top = self.post_top(v).unflatten(-1, self.shapes[0])  # (B, S0, K0)
        top = self._draw(logit_top, sample)
        with torch.no_grad():
            u = self.img_out(deter)
            base = self._bottom(u, top)
        logit_bottom = base + self.delta(torch.cat([u, v, top], -1)).unflatten(-1, self.shapes[1])  # (B, S1, K1)
        return torch.cat([top, self._draw(logit_bottom, sample)], -1), (logit_top, logit_bottom)

    def priors(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, Tensor]:
        # The bottom's prior is asked about the posterior's top. Asked about a sample of its own, which says nothing
        # of the observation, it would learn to ignore the top, and dreams would lose what ties the levels together.
        u, top = self.img_out(deter), stoch[..., : math.prod(self.shapes[0])].detach()
        return self._top(u), self._bottom(u, top)


def from_flat(flat: dict[str, Tensor], own: dict[str, Tensor], sizes: list[int], hidden: int) -> dict[str, Tensor]:
    """The heads of a flat state, ``prior_out`` and ``post_out``, split over two levels so that nothing changes.

    The flat state's first variables become the top. No level then looks at z_top, and delta turns the bottom's prior
    logits into the flat posterior's: W_post v - W_prior u. Raises ValueError where the sizes differ.
    """
    top, bottom = sizes
    weights = {name: (flat[f"{name}_out.weight"], flat[f"{name}_out.bias"]) for name in ("prior", "post")}
    (prior, prior_bias), (post, post_bias) = weights.values()
    if prior.shape != (top + bottom, hidden):
        raise ValueError(f"the flat heads are {tuple(prior.shape)}, both levels together {(top + bottom, hidden)}")
    out = {name: torch.zeros_like(x) for name, x in own.items()}
    out["prior_top.weight"], out["prior_top.bias"] = prior[:top], prior_bias[:top]
    out["post_top.weight"], out["post_top.bias"] = post[:top], post_bias[:top]
    out["prior_bottom.weight"][:, :hidden] = prior[top:]
    out["prior_bottom.bias"] = prior_bias[top:]
    out["delta.weight"][:, : 2 * hidden] = torch.cat([-prior[top:], post[top:]], 1)
    out["delta.bias"] = post_bias[top:] - prior_bias[top:]
    return out
