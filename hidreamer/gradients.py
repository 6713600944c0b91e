"""Layers and samples whose gradients are taken by hand, in few kernels.

Shapes: any leading axes (..), B rows, T steps, D deter, S variables of K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hidreamer import distributions as dists

Tensors = tuple[Tensor, ...]
LayerNormBackward = torch.ops.aten.native_layer_norm_backward
SiLUBackward = torch.ops.aten.silu_backward
SoftmaxBackward = torch.ops.aten._softmax_backward_data


class Norm(NamedTuple):
    """A layer norm of all steps or of one."""

    x: Tensor  # (.., N) its input, in float32 at least
    mean: Tensor  # (.., 1)
    rstd: Tensor  # (.., 1) reciprocal deviation
    weight: Tensor  # (N,)
    bias: Tensor


def unbound(tensors: Sequence[Tensor]) -> list[Tensors]:
    """Tensors (T,...) -> one tuple of tensors (...) for each of T steps."""
    return list(zip(*(x.unbind() for x in tensors), strict=True))


def product(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """x (.., in) times weight (out, in), plus ``added``, in the weight's precision -> (.., out)."""
    x = x if x.dtype == weight.dtype else x.to(weight.dtype)
    if added is None:
        return x @ weight.t()
    if added.ndim > 1 and torch.compiler.is_compiling():
        # A sum that is one kernel with what follows it: CUDA's addmm copies ``added`` first, and
        # the compiler would make one of both, were it not for the axis.
        return (added.unsqueeze(0) + x @ weight.t()).squeeze(0)
    added = added if added.dtype == weight.dtype else added.to(weight.dtype)
    return torch.addmm(added, x, weight.t())


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total`` in its own precision, plus the product in the weight's."""
    if total.dtype == weight.dtype and total.ndim == 2:
        return product(x, weight, total)
    return total + product(x, weight)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of a weight (out, in): grad (T,B,out) of the product with x (T,B,in)."""
    grad, x = (part.flatten(0, 1).to(weight.dtype) for part in (grad, x))
    return grad.t() @ x


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm, in float32 at least."""
    return F.layer_norm(dists.at_least_float32(x), x.shape[-1:], weight, bias, eps)


def norm_again(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Norm, Tensor]:
    """``norm`` of all steps, for its gradient -> what that needs, and the output."""
    x = dists.at_least_float32(x)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return Norm(x, mean, rstd, weight, bias), y


def norm_grad(grad: Tensor, norm: Norm, wanted: Sequence[bool] = (True, False, False)) -> Tensors:
    """From the output's: of input, weight and bias, those that are ``wanted``."""
    return LayerNormBackward(grad, norm.x, norm.x.shape[-1:], *norm[1:], wanted)


def sample(logit: Tensor, shape: tuple[int, int], unimix: float, noise: Tensor | None) -> Tensors:
    """One level's logits (B, S * K), with given noise (B,S,1) or None for the mode.

    -> one-hots (B, S * K), logits (B,S,K) in their own precision.
    """
    logit = logit.unflatten(-1, shape)
    return dists.invert_cdf(dists.unimix_probs(logit, unimix), noise).flatten(-2), logit


def sample_grad(stoch: Tensor, logit: Tensor | None, softmax: Tensor, unimix: float) -> Tensor:
    """From those of one-hots (.., S * K), straight-through, and logits (..,S,K) -> (.., S * K).

    softmax: of the logits. Without ``logit``, stoch's is multiplied by 1 - unimix already.
    """
    stoch = stoch.unflatten(-1, softmax.shape[-2:])
    through = SoftmaxBackward(stoch, softmax, -1, softmax.dtype)
    if logit is not None:
        through = torch.add(logit, through, alpha=1.0 - unimix)
    return through.flatten(-2)


def silu_slope(x: Tensor) -> Tensor:
    return SiLUBackward(torch.ones_like(x), x)


def gated(
    deter: Tensor, x: Tensor, weight: Tensor, added: Tensor, affine: Tensors, eps: float
) -> Tensors:
    """The end of a GRU from old memory (B,D), the product of x (B,in) with the gates' weight
    (3D,in), what is ``added`` to it, and weight and bias of their norm.

    -> new memory (B,D), what the norm read (B,3D).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        x = product(x, weight, added)
        gates = norm(x, *affine, eps).to(deter.dtype).unflatten(-1, (3, -1))
        reset, update = torch.sigmoid(gates[:, ::2]).unbind(1)
        cand = gates[:, 1]
    else:  # gate by gate, of one size throughout: one kernel
        parts = zip(product(x, weight).chunk(3, -1), added.chunk(3, -1), strict=True)
        parts = [one + other for one, other in parts]  # (B, D) each
        x, size = torch.cat(parts, -1), len(weight)
        parts = [dists.at_least_float32(part) for part in parts]
        mean = sum(parts).sum(-1, keepdim=True) / size
        parts = [part - mean for part in parts]
        var = sum(part.square() for part in parts).sum(-1, keepdim=True) / size
        rstd = torch.rsqrt(var + eps)
        gain, bias = (y.chunk(3) for y in affine)
        reset, cand, update = (p * rstd * g + b for p, g, b in zip(parts, gain, bias, strict=True))
        reset, update = torch.sigmoid(reset), torch.sigmoid(update)
    return torch.lerp(deter, torch.tanh(reset * cand).to(deter.dtype), update.to(deter.dtype)), x


def gated_grad(deter: Tensor, slopes: Tensor, norm: Norm) -> Tensor:
    """From the new memory's (B,D), of what the gates' norm reads (B,3D). slopes: (B,3,D) of
    ``gate_slopes``.
    """
    if not torch.compiler.is_compiling():
        return norm_grad((deter.unsqueeze(1) * slopes).flatten(1), norm)[0]
    # of one size throughout: one kernel
    x, weight, rest = norm.x.unflatten(-1, (3, -1)), norm.weight.view(3, -1), []
    for i in range(3):
        rest.append((deter * slopes[:, i] * weight[i], (x[:, i] - norm.mean) * norm.rstd))
    mean = sum(grad for grad, _ in rest).sum(-1, keepdim=True) / norm.x.shape[-1]
    along = sum(grad * y for grad, y in rest).sum(-1, keepdim=True) / norm.x.shape[-1]
    return torch.cat([norm.rstd * (grad - mean - y * along) for grad, y in rest], -1)


def gate_slopes(gates: Tensor, begin: Tensor) -> Tensors:
    """Of all steps: how the new memory depends on what the gates' norm returned (..,3D), and on the
    memory before (..,D) -> (..,3,D), (..,D).
    """
    reset, cand, update = gates.to(begin.dtype).chunk(3, -1)
    reset, update = torch.sigmoid(reset), torch.sigmoid(update)
    new, stays = torch.tanh(reset * cand), 1.0 - update
    of_product = update * (1.0 - new.square())
    of_reset = of_product * cand * reset * (1.0 - reset)
    of_update = (new - begin) * update * stays
    return torch.stack([of_reset, of_product * reset, of_update], -2), stays
