"""The recurrent scan where the states are known before: the GRU cell alone, its gradient its own.

As ``scan``, without a posterior in the loop. Shapes: T steps of B sequences, D deter; tensors of
all steps lie step by step, (T,B,.).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.scan import (
    CellSaved,
    Tensors,
    add_product,
    gate_slopes,
    norm,
    norm_grad,
    norm_weight_grads,
    product,
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
            for t in range(len(keep)):
                begin = torch.addcmul(deter0[t], deter, keep[t])  # (B, D)
                gates = norm(product(begin, weight, given[t]), gain, bias, eps)  # (B, 3D)
                reset, cand, update = gates[-1].to(begin.dtype).chunk(3, -1)
                cand = torch.tanh(torch.sigmoid(reset) * cand)
                deter = torch.lerp(begin, cand, torch.sigmoid(update))
                steps.append((deter, begin, *gates))
            return tuple(torch.stack(x) for x in zip(*steps, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        _, keep, _, _, weight, gain, bias, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(keep, weight, gain, bias, *output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out: Tensor, *_: None) -> tuple:
        keep, weight, gain, bias, begin, *gates = ctx.saved_tensors
        with torch.autocast(keep.device.type, enabled=False):
            slopes, stays = gate_slopes(CellSaved(begin, begin, (), tuple(gates), ()))
            deter, begins, wide = out[-1], [], []
            for t in reversed(range(len(keep))):
                if t < len(keep) - 1:
                    deter = torch.addcmul(out[t], deter, keep[t + 1])
                of_gates = (deter.unsqueeze(-2) * slopes[t].unflatten(-1, (3, -1))).flatten(-2)
                of_norm = norm_grad(of_gates, [x[t] for x in gates], gain, bias)
                deter = add_product(deter * stays[t], of_norm, weight.t())
                begins.append(deter)
                wide.append((of_gates, of_norm))
            of_gates, of_norm = (torch.stack(x) for x in zip(*wide[::-1], strict=True))
            of_weight = weight_grad(of_norm, begin, weight)
            of_affine = norm_weight_grads(of_gates, tuple(gates), gain, bias)
        return (
            of_norm,
            None,
            torch.stack(begins[::-1]),
            deter * keep[0],
            of_weight,
            *of_affine,
            None,
        )


def cell_scan(
    given: Tensor,
    keep: Tensor,
    deter0: Tensor,
    first: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> Tensor:
    """T steps of a GRU from ``first`` (B,D) -> deter (T,B,D).

    given: (T,B,3D) what the inputs add to the gates before their norm; keep, deter0: as of
    ``scan.StepInputs``; weights: (3D,D) of the memory, the norm's weight and bias, the update
    gate's offset included.
    """
    return CellScan.apply(given, keep, deter0, dists.at_least_float32(first), *weights, eps)[0]
