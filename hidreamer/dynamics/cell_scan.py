"""The recurrent scan where the states are known before: the GRU cell alone, its gradient its own.

As ``scan``, without a posterior in the loop. Shapes: T steps of B sequences, D deter; tensors of
all steps lie step by step, (T,B,.).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.gradients import (
    Norm,
    Tensors,
    add_product,
    gate_slopes,
    gated,
    gated_grad,
    norm_again,
    norm_grad,
    unbound,
    weight_grad,
)


class CellScan(torch.autograd.Function):
    """``cell_scan`` with a gradient. Outputs: deter (T,B,D), then what is saved."""

    generate_vmap_rule = True  # for several members at once

    @staticmethod
    def forward(
        given: Tensor,
        keep: Tensor,
        deter0: Tensor,
        first: Tensor,
        weight: Tensor,
        gain: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensors:
        deter, steps = first, []
        with torch.autocast(first.device.type, enabled=False):
            for of_step, kept in unbound((given, keep)):
                begin = torch.lerp(deter0, deter, kept)  # (B, D)
                deter, x = gated(begin, begin, weight, of_step, (gain, bias), eps)
                steps.append((deter, x))
            return tuple(torch.stack(x) for x in zip(*steps, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        _, *rest, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out: Tensor, *_: None) -> tuple:
        keep, deter0, first, weight, gain, bias, deter, x = ctx.saved_tensors
        with torch.autocast(keep.device.type, enabled=False):
            begin = torch.lerp(deter0, torch.cat([first.unsqueeze(0), deter[:-1]]), keep)
            whole, gates = norm_again(x, gain, bias, ctx.eps)
            slopes, stays = gate_slopes(gates, begin)
            found = walk_back(out, whole, weight, slopes * keep.unsqueeze(-1), stays * keep)
            of_gates = (found.unsqueeze(-2) * slopes).flatten(-2)
            of_norm, *of_affine = norm_grad(of_gates, whole, (True, True, True))
            begins = add_product(found * stays, of_norm, weight.t())  # (T, B, D)
            of_deter0, of_first = (begins * (1.0 - keep)).sum(0), begins[0] * keep[0]
            of_weight = weight_grad(of_norm, begin, weight)
        return of_norm, None, of_deter0, of_first, of_weight, *of_affine, None


def walk_back(out: Tensor, norm: Norm, weight: Tensor, slopes: Tensor, stays: Tensor) -> Tensor:
    """Gradients of the memories (T,B,D) that steps alone give -> those that later steps give, too.

    slopes, stays: of ``gate_slopes``, 0 where an episode starts, which ends the gradient.
    """
    steps, found = unbound((out, slopes, stays, *norm[:3])), []
    for t in reversed(range(len(steps))):
        deter = steps[t][0]
        if found:
            _, of_gates, of_memory, *of_norm = steps[t + 1]
            grad = gated_grad(found[-1], of_gates, Norm(*of_norm, *norm[3:]))  # (B, 3D)
            deter = torch.addcmul(deter, found[-1], of_memory)
            deter = add_product(deter, grad, weight.t())
        found.append(deter)
    return torch.stack(found[::-1])


def cell_scan(
    given: Tensor,
    keep: Tensor,
    deter0: Tensor,
    first: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> Tensor:
    """T steps of a GRU from ``first`` (B,D) -> deter (T,B,D).

    given: (T,B,3D) what the inputs add to the gates before their norm; keep (T,B,1) 0 where an
    episode starts, else 1; deter0 (B,D) its memory there; weights: (3D,D) of the memory, the norm's
    weight and bias, the update gate's offset included.
    """
    return CellScan.apply(given, keep, deter0, dists.at_least_float32(first), *weights, eps)[0]
