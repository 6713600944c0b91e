"""The recurrent scan with a gradient of its own.

Autograd would take the gradient of every weight at every step: T products of B rows each, and as
many sums. Here the steps backward compute only what the step before waits for; all else follows at
once for T x B rows: what gradients multiply with before the steps, and after them those of weights,
biases and norms.

Shapes: T steps of B sequences, D deter, Z stoch, W hidden, S variables of K classes in a level.
Here tensors of all steps lie step by step, (T,B,.).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.dynamics.scan_steps import (
    BeforeSteps,
    Carried,
    CellWeights,
    MemoryWeights,
    ScanDynamics,
    Slopes,
    StepInputs,
    split_weights,
)
from hidreamer.gradients import Norm, Tensors, product, unbound
from hidreamer.precision import autocast_dtype


class Scan(torch.autograd.Function):
    """``scan`` with a gradient. Outputs: deter, stoch, logits by level, then what is saved."""

    generate_vmap_rule = True  # for several members at once

    @staticmethod
    def forward(dynamics: ScanDynamics, noise: Tensors, count: int, *tensors: Tensor) -> Tensors:
        inputs, carry, weights = StepInputs(*tensors[:5], noise), tensors[5:7], tensors[7:]
        deter, stoch, logits, saved = run_steps(dynamics, weights, inputs, carry)
        return deter, stoch, *logits, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        ctx.dynamics, _, ctx.count, deter0, stoch0, keep, _, _, *rest = inputs
        ctx.mark_non_differentiable(*output[ctx.count :])
        ctx.set_materialize_grads(False)  # there are as many of saved tensors as of others
        ctx.save_for_backward(deter0, stoch0, keep, *rest, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        tensors, count = ctx.saved_tensors, ctx.count
        size = len(tensors) - len(grads)
        starts, carry, weights, outputs = tensors[:3], tensors[3:5], tensors[5:size], tensors[size:]
        given = []
        for grad, output in zip(grads[:count], outputs, strict=False):
            given.append(torch.zeros_like(output) if grad is None else grad)
        with torch.autocast(carry[0].device.type, enabled=False):
            given = tuple(given)
            before = ctx.dynamics.scan_before(weights, starts, carry, outputs, given)
            walked = walk_back(ctx.dynamics, weights, starts[2], before, given[0])
            rest = starts[2], outputs[0], given, before, *walked
            found = ctx.dynamics.scan_after(weights, *rest)
        return None, None, None, *found


def run_steps(
    dynamics: ScanDynamics, weights: Tensors, inputs: StepInputs, carry: Tensors, save: bool = True
) -> tuple[Tensor, Tensor, Tensors, Tensors]:
    """-> deter (T,B,D), stoch (T,B,Z), logits by level (T,B,S,K), what is saved of all steps."""
    steps, (deter0, stoch0, keep, action, embed, noise) = [], inputs
    count, (cell, _) = len(action), split_weights(weights)
    noise = unbound(noise) or [()] * count
    with torch.autocast(carry[0].device.type, enabled=False):
        memory, keep_product = MemoryWeights.of(dynamics, weights), keep.to(cell.img_in.dtype)
        # (T, B, W) with what a start's state adds
        action = torch.addcmul(action, product(stoch0, cell.img_in), 1.0 - keep_product)
        start = deter0, memory.gates(deter0)
        resets = [(*kept, *start) for kept in unbound((keep, keep_product))]
        begin = *carry, memory.gates(carry[0])
        of_steps = zip(resets, action.unbind(), embed.unbind(), noise, strict=True)
        for t, (reset, *step) in enumerate(of_steps):
            memory = memory.last() if t == count - 1 else memory
            found = dynamics.scan_forward(weights, memory, begin, reset, step)
            begin, logits, saved = found
            steps.append((*begin[:2], *logits, *(saved if save else ())))
        deters, stochs, *rest = (torch.stack(x) for x in zip(*steps, strict=True))
    levels = len(logits)
    return deters, stochs, tuple(map(dists.at_least_float32, rest[:levels])), tuple(rest[levels:])


def walk_back(
    dynamics: ScanDynamics, weights: Tensors, keep: Tensor, before: BeforeSteps, of_deter: Tensor
) -> tuple[Tensor, Tensor]:
    """of_deter: gradient of the memory (T,B,D), without those from later steps.

    -> gradients of the new memory (T,B,D) and of what the gates multiply (T,B,W+D).
    """
    norms, slopes, given = before.norms, before.slopes, (before.of_v, of_deter)
    (w, _), steps = split_weights(weights), []
    size, batch = given[1].shape[-1], len(keep[0])
    sizes = size, w.gru.shape[1], w.img_in.shape[1], size, 1
    later = [keep.new_zeros(batch, size) for size in sizes]  # after the last step comes nothing
    of_steps = zip(
        zip(*(unbound(norm[:3]) for norm in norms), strict=True),  # input, mean, rstd
        unbound(slopes),
        unbound(before.seen),
        unbound(given),
        keep.unbind(),
        strict=True,
    )
    for of_norms, of_slopes, of_seen, of_given, of_keep in reversed(list(of_steps)):
        own = tuple(Norm(*one, *n[3:]) for one, n in zip(of_norms, norms, strict=True))
        args = own, Slopes(*of_slopes), of_seen, of_given, Carried(*later)
        found = dynamics.scan_backward(weights, *args)
        steps.append(found[:2])
        later = *found, of_slopes[3], of_keep
    deter, inputs = zip(*steps[::-1], strict=True)
    return torch.stack(deter), torch.stack(inputs)


def scan(
    dynamics: ScanDynamics, cell: CellWeights, inputs: StepInputs, carry: Tensors
) -> tuple[Tensor, Tensor, Tensors]:
    """T steps from carry (deter, stoch) -> deter (T,B,D), stoch (T,B,Z), logits by level.

    Under autocast products are taken in its precision, all else in float32.
    """
    post, dtype = dynamics.post_weights(), autocast_dtype(carry[0].device)
    if dtype is not None:  # once, not at every step
        cell = (w.to(dtype) if w.ndim == 2 else w for w in cell)
        post = (w.to(dtype) if w.ndim <= 2 else w for w in post)  # no codebooks
    weights = (*cell, *post)
    if not torch.is_grad_enabled():
        return run_steps(dynamics, weights, inputs, carry, save=False)[:3]
    count = 2 + len(dynamics.shapes)
    deter, stoch, *rest = Scan.apply(dynamics, inputs.noise, count, *inputs[:5], *carry, *weights)
    return deter, stoch, tuple(rest[: count - 2])
