"""hrssm: two levels of categoricals, a top (coarse) and a bottom (fine) one with a residual posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.base import Balance, Feat, Recurrent
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

    def partial(self, feat: Feat) -> dict[str, Feat]:
        """The bottom level drawn anew from its prior given the top."""
        u, top = self.img_out(feat.deter), feat.stoch[..., : math.prod(self.shapes[0])]
        return {"top": feat._replace(stoch=torch.cat([top, self._draw(self._bottom(u, top), True)], -1))}

    def adopt(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Split the heads of a flat state over two levels, so that nothing changes until training changes it.

        The flat state's first variables become the top. No prior looks at z_top yet, and delta turns the bottom's
        prior logits into the flat posterior's: W_post v - W_prior u.
        """
        if "prior_out.weight" not in params:
            return params
        rest = {name: x for name, x in params.items() if not name.startswith(("prior_out.", "post_out."))}
        prior, prior_bias = params["prior_out.weight"], params["prior_out.bias"]
        post, post_bias = params["post_out.weight"], params["post_out.bias"]
        top, hidden = self.prior_top.weight.shape
        if prior.shape != (self.stoch_dim, hidden) or len({k for _, k in self.shapes}) > 1:
            raise ValueError(
                f"dynamics.prior_out of the flat state is {tuple(prior.shape)}; it cannot be split over {self.shapes} "
                f"(variables, classes), which together are {(self.stoch_dim, hidden)}"
            )
        heads = {name: torch.zeros_like(x) for name, x in self.state_dict().items() if name not in rest}
        heads["prior_top.weight"], heads["prior_top.bias"] = prior[:top], prior_bias[:top]
        heads["post_top.weight"], heads["post_top.bias"] = post[:top], post_bias[:top]
        heads["prior_bottom.weight"][:, :hidden] = prior[top:]
        heads["prior_bottom.bias"] = prior_bias[top:]
        heads["delta.weight"][:, : 2 * hidden] = torch.cat([-prior[top:], post[top:]], 1)
        heads["delta.bias"] = post_bias[top:] - prior_bias[top:]
        return rest | heads
