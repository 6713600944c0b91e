"""The recurrent scan of ``rssm`` and ``hrssm`` with a gradient of its own.

Autograd would take the gradient of every weight at every step: T products of B rows each, and as
many sums. Here the steps backward compute only what the step before waits for; the gradients of
weights, biases and norms follow as one product each over T x B rows.

Shapes: T steps of B sequences, D deter, Z stoch, W hidden, S variables of K classes in a level.
Here tensors of all steps lie step by step, (T,B,.).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hidreamer import distributions as dists
from hidreamer.precision import autocast_dtype

Tensors = tuple[Tensor, ...]
LayerNormBackward = torch.ops.aten.native_layer_norm_backward
SoftmaxBackward = torch.ops.aten._softmax_backward_data


class CellWeights(NamedTuple):
    """What every step multiplies with; each norm's weight and bias follow its product's."""

    img_in: Tensor  # (W, Z), of stoch; the action's product is added
    img_weight: Tensor
    img_bias: Tensor
    gru: Tensor  # (3D, W + D)
    gru_weight: Tensor
    gru_bias: Tensor  # the update gate's offset included
    obs_out: Tensor  # (W, D), of deter; the embedding's product is added
    obs_weight: Tensor
    obs_bias: Tensor


class StepInputs(NamedTuple):
    """What does not wait for the recurrence, of all steps or of one."""

    keep: Tensor  # (T, B, 1) 0 where an episode starts, else 1
    deter0: Tensor  # (T, B, D) memory of an episode's start, 0 elsewhere
    stoch0: Tensor  # (T, B, Z) its state, a constant, 0 elsewhere
    action: Tensor  # (T, B, W) product with the input layer
    embed: Tensor  # (T, B, W) product with the layer of memory and embedding
    noise: Tensors  # (T, B, S, 1) of each level, uniform; none where modes are taken


class CellSaved(NamedTuple):
    """Of a step, for its gradient. Each norm: input, mean, reciprocal deviation, output."""

    stoch: Tensor  # (B, Z), with which the step begins
    deter: Tensor  # (B, D)
    img_norm: Tensors  # (B, W)
    gru_norm: Tensors  # (B, 3D)
    obs_norm: Tensors  # (B, W)


class CellGrads(NamedTuple):
    """Of a step: what the gradients of its weights are made of. Each norm: of output and input."""

    img: Tensors  # (B, W)
    gru: Tensors  # (B, 3D)
    obs: Tensors  # (B, W)


class ScanDynamics(Protocol):
    """A dynamics whose posterior tells its gradient.

    The state is sampled from memory (B,D) and v (B,W), the hidden layer of memory and embedding.
    ``scan_forward`` and ``scan_backward`` are ``forward_step`` and ``backward_step`` here, compiled
    or not.
    """

    eps: float  # of all norms

    def post_weights(self) -> Tensors:
        """Those that the posterior multiplies with, and their biases."""
        ...

    def post_forward(
        self, weights: Tensors, deter: Tensor, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        """-> stoch (B,Z), logits by level (B,S,K), what the gradient needs besides."""
        ...

    def post_backward(
        self, weights: Tensors, saved: Tensors, stoch: Tensor, logits: Tensors
    ) -> tuple[Tensor, Tensors]:
        """Gradients of stoch (B,Z) and logits -> of v (B,W), and what those of the weights need."""
        ...

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, saved: Tensors, grads: Tensors
    ) -> tuple[Tensor | None, ...]:
        """Of ``post_weights``, from what all steps saved and found, (T,B,.) each."""
        ...

    def scan_forward(self, weights: Tensors, begin: Tensors, *step: Any) -> tuple: ...

    def scan_backward(self, weights: Tensors, saved: Tensors, *grads: Any) -> tuple: ...


# ---------------------------------------------------------------- pieces


def product(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """x (.., in) times weight (out, in), plus ``added``, in the weight's precision -> (.., out)."""
    x = x.to(weight.dtype)
    if added is None:
        return x @ weight.t()
    if added.ndim > 1 and torch.compiler.is_compiling():
        # A sum that is one kernel with what follows it: CUDA's addmm copies ``added`` first, and
        # the compiler would make one of both, were it not for the axis.
        return (added.unsqueeze(0) + x @ weight.t()).squeeze(0)
    return torch.addmm(added.to(weight.dtype), x, weight.t())


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total`` in its own precision, plus the product in the weight's."""
    if total.dtype == weight.dtype:
        return product(x, weight, total)
    return total + product(x, weight)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of a weight (out, in): grad (T,B,out) of the product with x (T,B,in)."""
    grad, x = (part.flatten(0, 1).to(weight.dtype) for part in (grad, x))
    return grad.t() @ x


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensors:
    """LayerNorm -> input in its own precision, mean, reciprocal deviation, output."""
    args = dists.at_least_float32(x), x.shape[-1:], weight, bias, eps
    y, mean, rstd = torch.native_layer_norm(*args)
    return x, mean, rstd, y


def norm_grad(grad: Tensor, saved: Tensors, weight: Tensor, bias: Tensor) -> Tensor:
    """Of the input, from the output's."""
    x, mean, rstd, _ = saved
    args = grad, x, x.shape[-1:], mean, rstd, weight, bias
    return LayerNormBackward(*args, [True, False, False])[0]


def norm_weight_grads(grad: Tensor, saved: Tensors, weight: Tensor, bias: Tensor) -> Tensors:
    x, mean, rstd, _ = saved
    args = grad, x, x.shape[-1:], mean, rstd, weight, bias
    return LayerNormBackward(*args, [False, True, True])[1:]


def sample(logit: Tensor, shape: tuple[int, int], unimix: float, noise: Tensor | None) -> Tensors:
    """One level's logits (B, S * K), with given noise (B,S,1) or None for the mode.

    -> one-hots (B, S * K), logits (B,S,K) in their own precision, their softmax.
    """
    logit = logit.unflatten(-1, shape)
    probs = softmax = torch.softmax(dists.at_least_float32(logit), -1)
    if unimix:
        probs = torch.add(unimix / shape[1], softmax, alpha=1.0 - unimix)
    return dists.invert_cdf(probs, noise).flatten(-2), logit, softmax


def sample_grad(stoch: Tensor, logit: Tensor, softmax: Tensor, unimix: float) -> Tensor:
    """From those of one-hots (B, S * K), straight-through, and logits (B,S,K) -> (B, S * K)."""
    stoch = stoch.unflatten(-1, softmax.shape[-2:])
    through = SoftmaxBackward(stoch, softmax, -1, softmax.dtype)
    return torch.add(logit, through, alpha=1.0 - unimix).flatten(-2)


# ---------------------------------------------------------------- one step


def begin_step(deter: Tensor, stoch: Tensor, reset: Tensors, dtype: torch.dtype) -> Tensors:
    """The state before a step (B,.), reset where an episode starts -> stoch (B,Z) as ``dtype``, for
    its product, and deter (B,D).

    reset: the step's keep, deter0 and stoch0.
    """
    keep, deter0, stoch0 = reset
    return torch.addcmul(stoch0, stoch, keep).to(dtype), torch.addcmul(deter0, deter, keep)


def forward_step(
    dynamics: ScanDynamics,
    weights: Tensors,
    begin: Tensors,
    inputs: tuple[Tensor, Tensor, Tensors],
    next_reset: Tensors | None,
) -> tuple[Tensor, Tensor, Tensors, Tensors, Tensors | None]:
    """weights: CellWeights, then ``post_weights``; begin: of ``begin_step``; inputs: action, embed
    and noise of ``StepInputs``, of one step; next_reset: of the next step, None after the last.

    -> deter (B,D), stoch (B,Z), logits by level (B,S,K), what the gradient needs, and what the next
    step begins with: computed here, it is part of kernels that there are anyway.
    """
    cell, eps, (stoch, deter) = CellWeights(*weights[:9]), dynamics.eps, begin
    action, embed, noise = inputs
    x = product(stoch, cell.img_in, action)
    img = norm(x, cell.img_weight, cell.img_bias, eps)  # (B, W)
    x = torch.cat([x.to(cell.gru.dtype) for x in (torch.nn.functional.silu(img[-1]), deter)], -1)
    gru = norm(product(x, cell.gru), cell.gru_weight, cell.gru_bias, eps)  # (B, 3D)
    reset, cand, update = gru[-1].to(deter.dtype).chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    deter = torch.lerp(deter, cand, torch.sigmoid(update))
    obs = norm(product(deter, cell.obs_out, embed), cell.obs_weight, cell.obs_bias, eps)
    v = torch.nn.functional.silu(obs[-1])
    stoch, logits, saved = dynamics.post_forward(weights[9:], deter, v, noise)
    saved, later = (*begin, *img, *gru, *obs, *saved), None
    if next_reset is not None:
        later = begin_step(deter, stoch, next_reset, cell.img_in.dtype)
    return deter, stoch, logits, saved, later


def split_saved(saved: Tensors) -> tuple[CellSaved, Tensors]:
    """What ``forward_step`` saved: of the cell, of the posterior."""
    return CellSaved(*saved[:2], saved[2:6], saved[6:10], saved[10:14]), saved[14:]


def backward_step(
    dynamics: ScanDynamics,
    weights: Tensors,
    saved: Tensors,
    gates: Tensors,
    carried: Tensors,
    deter: Tensor,
    stoch: Tensor,
    logits: Tensors,
) -> tuple[Tensor, Tensor, Tensor, Tensors]:
    """gates: ``gate_slopes`` of the step; deter, stoch, logits: gradients of what it returned,
    without those of the step after it. carried: what that one begins with of it (B,1), how its new
    memory depends on that (B,D), and what this function returned of it.

    -> of the deter (B,D) that it begins with, the gradient through the gates' product and that of
    the new memory (``begin_grad``); the gradient of the stoch (B,Z) that it begins with; what those
    of the weights need: CellGrads flat, then the posterior's.
    """
    keep, stayed, through, later, later_stoch = carried
    deter = torch.addcmul(deter, begin_grad(through, later, stayed), keep)
    stoch = torch.addcmul(stoch, dists.at_least_float32(later_stoch), keep)
    w, (cell, post) = CellWeights(*weights[:9]), split_saved(saved)
    silu_grad = torch.ops.aten.silu_backward
    v, post_grads = dynamics.post_backward(weights[9:], post, stoch, logits)  # (B, W)
    obs = silu_grad(dists.at_least_float32(v), cell.obs_norm[-1])
    obs = obs, norm_grad(obs, cell.obs_norm, w.obs_weight, w.obs_bias)
    deter = add_product(deter, obs[1], w.obs_out.t())
    slope, stays = gates  # (B, 3D), (B, D)
    gru = (deter.unsqueeze(-2) * slope.unflatten(-1, (3, -1))).flatten(-2)
    gru = gru, norm_grad(gru, cell.gru_norm, w.gru_weight, w.gru_bias)
    x = product(gru[1], w.gru.t())
    x, through = x.split([x.shape[-1] - stays.shape[-1], stays.shape[-1]], -1)  # (B, W), (B, D)
    img = silu_grad(dists.at_least_float32(x), cell.img_norm[-1])
    img = img, norm_grad(img, cell.img_norm, w.img_weight, w.img_bias)
    stoch = product(img[1], w.img_in.t())
    return through, deter, stoch, (*img, *gru, *obs, *post_grads)


def begin_grad(through: Tensor, deter: Tensor, stays: Tensor) -> Tensor:
    """Of the memory that a step begins with (.., D), from what ``backward_step`` returned."""
    return torch.addcmul(dists.at_least_float32(through), deter, stays)


def gate_slopes(saved: CellSaved) -> Tensors:
    """Of all steps: how the new memory depends on the gates before their norm's output is used
    (T,B,3D), and on the memory before (T,B,D).
    """
    reset, cand, update = saved.gru_norm[-1].to(saved.deter.dtype).chunk(3, -1)
    reset, update = torch.sigmoid(reset), torch.sigmoid(update)
    new, stays = torch.tanh(reset * cand), 1.0 - update
    of_product = update * (1.0 - new.square())
    of_reset = of_product * cand * reset * (1.0 - reset)
    of_update = (new - saved.deter) * update * stays
    return torch.cat([of_reset, of_product * reset, of_update], -1), stays


# ---------------------------------------------------------------- all steps


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
        ctx.dynamics, ctx.noise, ctx.count, *tensors = inputs
        ctx.mark_non_differentiable(*output[ctx.count :])
        ctx.set_materialize_grads(False)  # there are as many of saved tensors as of others
        ctx.save_for_backward(tensors[0], *tensors[7:], *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        keep, *tensors = ctx.saved_tensors
        size = len(tensors) - len(grads)
        weights, outputs = tensors[:size], tensors[size:]
        # of all steps at once
        saved = tuple(dists.at_least_float32(x) for x in tensors[size + ctx.count :])
        given = []
        for grad, output in zip(grads[: ctx.count], outputs, strict=False):
            given.append(torch.zeros_like(output) if grad is None else grad)
        with torch.autocast(keep.device.type, enabled=False):
            inputs, carry, steps = walk_back(ctx.dynamics, weights, keep, saved, given)
            found = weight_grads(ctx.dynamics, weights, outputs[0], saved, steps)
        return None, None, None, *inputs, *carry, *found


def run_steps(
    dynamics: ScanDynamics, weights: Tensors, inputs: StepInputs, carry: Tensors, save: bool = True
) -> tuple[Tensor, Tensor, Tensors, Tensors]:
    """-> deter (T,B,D), stoch (T,B,Z), logits by level (T,B,S,K), what is saved of all steps."""
    steps, resets = [], [*zip(*(x.unbind() for x in inputs[:3]), strict=True), None]
    with torch.autocast(carry[0].device.type, enabled=False):
        begin = begin_step(*carry, resets[0], weights[0].dtype)
        for t, reset in enumerate(resets[1:]):
            step = inputs.action[t], inputs.embed[t], tuple(x[t] for x in inputs.noise)
            deter, stoch, logits, saved, begin = dynamics.scan_forward(weights, begin, step, reset)
            steps.append((deter, stoch, *logits, *(saved if save else ())))
        deters, stochs, *rest = (torch.stack(x) for x in zip(*steps, strict=True))
    levels = len(logits)
    return deters, stochs, tuple(map(dists.at_least_float32, rest[:levels])), tuple(rest[levels:])


def walk_back(
    dynamics: ScanDynamics, weights: Tensors, keep: Tensor, saved: Tensors, grads: Sequence[Tensor]
) -> tuple[tuple, Tensors, Tensors]:
    """Gradients of deter, stoch and logits (T,B,.) -> of the inputs (without noise), of the carry,
    and of all steps (T,B,.) what those of the weights need.
    """
    gates, (out_deter, out_stoch, *out_logits) = gate_slopes(split_saved(saved)[0]), grads
    nothing, stays = torch.zeros_like(out_deter[0]), gates[1]  # after the last step comes nothing
    carried = torch.zeros_like(keep[0]), nothing, nothing, nothing, torch.zeros_like(out_stoch[0])
    steps = []
    for t in reversed(range(len(keep))):
        of_step = [tuple(x[t] for x in part) for part in (saved, gates, out_logits)]
        args = *of_step[:2], carried, out_deter[t], out_stoch[t], of_step[2]
        through, deter, stoch, step = dynamics.scan_backward(weights, *args)
        carried = keep[t], stays[t], through, deter, stoch
        steps.append((through, deter, *step))
    through, deter, *steps = (torch.stack(x) for x in zip(*steps[::-1], strict=True))
    begins = begin_grad(through, deter, stays)  # (T, B, D)
    carry = begins[0] * keep[0], dists.at_least_float32(stoch) * keep[0]
    inputs = None, begins, None, steps[1], steps[5]
    return inputs, carry, tuple(steps)


def weight_grads(
    dynamics: ScanDynamics, weights: Tensors, deter: Tensor, saved: Tensors, steps: Tensors
) -> Tensors:
    """Of all weights: one product or sum over all steps for each."""
    w, (cell, post) = CellWeights(*weights[:9]), split_saved(saved)
    silu = torch.nn.functional.silu
    img, gru, obs = steps[:2], steps[2:4], steps[4:6]  # of output and input of each norm
    return (
        weight_grad(img[1], cell.stoch, w.img_in),
        *norm_weight_grads(img[0], cell.img_norm, w.img_weight, w.img_bias),
        weight_grad(gru[1], torch.cat([silu(cell.img_norm[-1]), cell.deter], -1), w.gru),
        *norm_weight_grads(gru[0], cell.gru_norm, w.gru_weight, w.gru_bias),
        weight_grad(obs[1], deter, w.obs_out),
        *norm_weight_grads(obs[0], cell.obs_norm, w.obs_weight, w.obs_bias),
        *dynamics.post_weight_grads(weights[9:], silu(cell.obs_norm[-1]), post, steps[6:]),
    )


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
