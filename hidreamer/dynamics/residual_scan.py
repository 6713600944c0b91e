"""The posterior of residual codes inside ``scan``: sampled codes, and their gradient.

All levels' residuals depend on z alone, since the codes taken off are detached: so backward all
levels are one product.

Shapes: T steps of B sequences, W hidden, L levels, G groups, K codes of d numbers, Z stoch
(= L * G * d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.tokens import Tokens
from hidreamer.gradients import (
    LayerNormBackward,
    SoftmaxBackward,
    Tensors,
    product,
    weight_grad,
)

EPS = 1e-5  # of ``Tokens._project``


class ResidualScan(Tokens):
    """``post_step`` as a scan has it (``scan_steps.ScanDynamics``).

    Logits lack what is the same for all codes of a group, the residual's square.
    """

    def post_weights(self) -> Tensors:
        """Of the projection; codes (L,G,K,d); what residuals multiply with, and what is taken off,
        for logits.
        """
        book = dists.at_least_float32(self.quantizer.book)  # (L, G, K, d)
        tau = self.quantizer.log_tau.exp()[:, None, None, None]
        away = (book.square().sum(-1) / tau[..., 0]).unsqueeze(-2)  # (L, G, 1, K)
        return self.in_proj.weight, self.in_proj.bias, book, 2.0 * book / tau, away

    def post_forward(
        self, weights: Tensors, deter: Tensor, read: Tensors, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        weight, bias, book, near, away = weights
        unimix, (groups, dim) = self.unimix, self.code_shape
        x = dists.at_least_float32(product(v, weight)) + bias  # (B, G * d)
        z = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
        left = z.unflatten(-1, (groups, dim)).transpose(0, 1)  # (G, B, d)
        expected, codes, seen = self._expected(deter, weight.dtype), [], []
        for level in range(self.levels):
            given = left
            if expected is not None:
                coarser = [code.transpose(0, 1).flatten(1) for code in codes]
                given = left - expected(level, coarser).transpose(0, 1)
            logit = torch.baddbmm(away[level], given, near[level].mT, beta=-1.0)  # (G, B, K)
            probs = dists.unimix_probs(logit, unimix)
            onehot = dists.invert_cdf(probs, noise[level].transpose(0, 1) if noise else None)
            codes.append(onehot @ book[level])  # (G, B, d)
            seen.append((logit.transpose(0, 1), given, onehot))
            taken = codes[-1] if self.residual == "drawn" else probs @ book[level]
            left = left - taken
        logits, *kept = zip(*seen, strict=True)
        stoch = torch.stack(codes).permute(2, 0, 1, 3).flatten(1)  # (B, Z)
        return self._stoch(stoch), logits, (x, *map(torch.stack, kept))

    def post_seen(self, saved: Tensors, stoch: Tensor, logits: Tensors) -> Tensors:
        """Of the norm: input, mean, deviation; softmax, residuals, one-hots (T,L,G,B,.)."""
        x, given, onehot = saved
        _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        softmax = torch.softmax(by_level(logits), -1)
        return x, mean, rstd, softmax, given, onehot

    def post_backward(
        self,
        weights: Tensors,
        seen: Tensors,
        stoch: Tensor,
        logits: Tensors | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        weight, _, book, near, _ = weights
        x, mean, rstd, softmax, _, _ = seen
        code = self._stoch(stoch).unflatten(-1, (self.levels, *self.code_shape))
        code = code.movedim(-4, -2)  # (.., L, G, B, d)
        logit = SoftmaxBackward(code @ book.mT, softmax, -1, softmax.dtype)  # (.., L, G, B, K)
        if logits is not None:
            logit = torch.add(by_level(logits), logit, alpha=1.0 - self.unimix)
        z = (logit @ near).sum(-4).transpose(-3, -2).flatten(-2)  # (.., B, G * d)
        args = z.contiguous(), x, x.shape[-1:], mean, rstd, None, None
        x = LayerNormBackward(*args, [True, False, False])[0]
        return product(x, weight.t(), added), (x, logit, code)

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, seen: Tensors, grads: Tensors
    ) -> Tensors:
        (x, logit, code), (_, _, _, _, given, onehot) = grads, seen
        by_code = lambda rows, numbers: torch.einsum("tlgbk,tlgbd->lgkd", rows, numbers)
        away = -logit.sum((0, 3)).unsqueeze(-2)  # (L, G, 1, K)
        of_proj = weight_grad(x, v, weights[0]), x.sum((0, 1))
        return *of_proj, by_code(onehot, code), by_code(logit, given), away


def by_level(logits: Tensors) -> Tensor:
    """(T,B,G,K) by level -> (T,L,G,B,K)."""
    return torch.stack(logits, 1).transpose(2, 3).contiguous()
