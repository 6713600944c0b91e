"""The parts of the recurrent scan, each of which can be compiled: a step forward, a step backward,
and what goes before and after all steps backward.

Shapes: T steps of B sequences, D deter, Z stoch, W hidden, S variables of K classes in a level.
Here tensors of all steps lie step by step, (T,B,.).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hidreamer import distributions as dists
from hidreamer.gradients import (
    Norm,
    Tensors,
    add_product,
    gate_slopes,
    gated,
    gated_grad,
    norm,
    norm_again,
    norm_grad,
    product,
    silu_slope,
    weight_grad,
)
from hidreamer.nets import SplitBlock


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

    @classmethod
    def of(cls, dynamics: Any, img_in: SplitBlock, obs_out: SplitBlock) -> CellWeights:
        """Those of a ``Recurrent``, whose two input layers are split by what they read."""
        cell = dynamics.cell
        img, obs = ((x.norm.weight, x.norm.bias) for x in (dynamics.img_in, dynamics.obs_out))
        of_stoch = img_in.weights[0]
        if dynamics.reads < dynamics.stoch_dim:  # what the memory does not read has weight zero
            of_stoch = F.pad(of_stoch, (0, dynamics.stoch_dim - dynamics.reads))
        gru = cell.linear.weight, cell.norm.weight, cell.scan_bias()
        return cls(of_stoch, *img, *gru, obs_out.weights[0], *obs)


def split_weights(weights: Tensors) -> tuple[CellWeights, Tensors]:
    """The cell's, and ``post_weights``."""
    count = len(CellWeights._fields)
    return CellWeights(*weights[:count]), weights[count:]


class StepInputs(NamedTuple):
    """What does not wait for the recurrence."""

    deter0: Tensor  # (B, D) memory of an episode's start
    stoch0: Tensor  # (B, Z) its state, a constant
    keep: Tensor  # (T, B, 1) 0 where an episode starts, else 1
    action: Tensor  # (T, B, W) product with the input layer
    embed: Tensor  # (T, B, W) product with the layer of memory and embedding
    noise: Tensors  # (T, B, S, 1) of each level, uniform; none where modes are taken


class Slopes(NamedTuple):
    """How much of a gradient passes: of all steps or of one."""

    img: Tensor  # (.., W) the input layer's activation; for the state before it, as it is scaled
    gates: Tensor  # (.., 3, D) from the new memory to what the gates' norm returns
    obs: Tensor  # (.., W) the activation of the layer of memory and embedding
    stays: Tensor  # (.., D) from the new memory to the one before, 0 where an episode starts


class ScanDynamics(Protocol):
    """A dynamics whose posterior tells its gradient.

    The state is sampled from memory (B,D) and v (B,W), the hidden layer of memory and embedding.
    ``scan_forward``, ``scan_before``, ``scan_backward`` and ``scan_after`` are ``forward_step``,
    ``before_steps``, ``backward_step`` and ``after_steps`` here, compiled or not.
    """

    eps: float  # of all norms
    unimix: float  # share of the uniform distribution in what is sampled

    def post_weights(self) -> Tensors:
        """Those that the posterior multiplies with, and their biases."""
        ...

    def post_reads(self, weights: Tensors) -> Tensors:
        """Those of ``weights`` (., D) that multiply the memory: their products are ``read``."""
        ...

    def post_forward(
        self, weights: Tensors, deter: Tensor, read: Tensors, v: Tensor, noise: Tensors
    ) -> tuple[Tensor, Tensors, Tensors]:
        """-> stoch (B,Z), logits by level (B,S,K), what the gradient needs besides."""
        ...

    def post_seen(self, saved: Tensors, stoch: Tensor, logits: Tensors) -> Tensors:
        """What ``post_forward`` returned, of all steps -> what its gradient needs, (T,B,.)."""
        ...

    def post_backward(
        self,
        weights: Tensors,
        seen: Tensors,
        stoch: Tensor,
        logits: Tensors | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Gradients of stoch (..,Z) and logits -> of v (..,W), to which ``added`` is added, and
        what those of the weights need. Without ``logits``, stoch's is multiplied by 1 - unimix
        before.
        """
        ...

    def post_weight_grads(
        self, weights: Tensors, v: Tensor, seen: Tensors, grads: Tensors
    ) -> tuple[Tensor | None, ...]:
        """Of ``post_weights``, from what all steps saw and found, (T,B,.) each."""
        ...

    def scan_forward(self, weights: Tensors, *step: Any) -> tuple: ...

    def scan_before(self, weights: Tensors, *all_steps: Any) -> BeforeSteps: ...

    def scan_backward(self, weights: Tensors, *step: Any) -> tuple: ...

    def scan_after(self, weights: Tensors, *all_steps: Any) -> tuple: ...


# ---------------------------------------------------------------- one step


class MemoryWeights(NamedTuple):
    """What the gates and all that reads the memory multiply with."""

    of_img: Tensor  # (3D, W) of the gates, what the input layer returns
    of_deter: Tensor  # (W + .. + 3D, D) obs_out, the posterior's own, the next step's gates
    sizes: list[int]  # of these parts
    reads: int  # how many are the posterior's

    @classmethod
    def of(cls, dynamics: ScanDynamics, weights: Tensors) -> MemoryWeights:
        w, post = split_weights(weights)
        reads = dynamics.post_reads(post)
        of_img, of_gates = w.gru.split([len(w.img_weight), w.obs_out.shape[1]], 1)
        parts = [w.obs_out, *reads, of_gates]
        return cls(of_img.contiguous(), torch.cat(parts), list(map(len, parts)), len(reads))

    def gates(self, deter: Tensor) -> Tensor:
        """Their product with deter (B,D) -> (B,3D)."""
        return product(deter, self.of_deter[-self.sizes[-1] :])

    def last(self) -> MemoryWeights:
        """That of the last step, after which no gates come."""
        return self._replace(of_deter=self.of_deter[: -self.sizes[-1]], sizes=self.sizes[:-1])


def forward_step(
    dynamics: ScanDynamics,
    weights: Tensors,
    memory: MemoryWeights,
    begin: Tensors,
    reset: Tensors,
    inputs: tuple[Tensor, Tensor, Tensors],
) -> tuple[Tensors, Tensors, Tensors]:
    """weights: CellWeights, then ``post_weights``. begin: deter (B,D), stoch (B,Z) and the gates'
    product with that deter (B,3D), before a reset. reset: keep (B,1), the same in the precision of
    products, an episode's first deter (B,D) and the gates' product with it. inputs: action with
    what a start adds to it, embed, noise, as ``StepInputs`` of one step.

    -> what the next step begins with (after the last one without gates), logits by level (B,S,K),
    what the gradient needs.
    """
    w, post = split_weights(weights)
    eps, (deter, stoch, gates), (action, embed, noise) = dynamics.eps, begin, inputs
    # Products are reset, in place of what they are of: in kernels that there are anyway.
    keep, keep_product, deter0, gates0 = reset
    img = torch.addcmul(action, product(stoch, w.img_in), keep_product)  # (B, W)
    deter, gates = torch.lerp(deter0, deter, keep), torch.lerp(gates0, gates, keep_product)
    x = F.silu(norm(img, w.img_weight, w.img_bias, eps))
    deter, gru = gated(deter, x, memory.of_img, gates, (w.gru_weight, w.gru_bias), eps)
    obs, *products = product(deter, memory.of_deter).split(memory.sizes, -1)
    obs = obs + embed  # (B, W)
    v = F.silu(norm(obs, w.obs_weight, w.obs_bias, eps))
    read, later = tuple(products[: memory.reads]), products[memory.reads :]
    stoch, logits, saved = dynamics.post_forward(post, deter, read, v, noise)
    return (deter, stoch, *later), logits, (img, gru, obs, *saved)


class Carried(NamedTuple):
    """What the gradient of a step needs of the step after it."""

    deter: Tensor  # (B, D) gradient of its new memory
    inputs: Tensor  # (B, W + D) of what its gates multiply
    stoch: Tensor  # (B, Z) of the state that it begins with, times keep and 1 - unimix
    stays: Tensor  # (B, D) as in ``Slopes``
    keep: Tensor  # (B, 1)


def backward_step(
    dynamics: ScanDynamics,
    weights: Tensors,
    norms: tuple[Norm, Norm, Norm],
    slopes: Slopes,
    seen: Tensors,
    given: tuple[Tensor, Tensor],
    later: Carried,
) -> tuple[Tensor, Tensor, Tensor]:
    """norms: of ``img``, ``gru``, ``obs``; seen: of ``post_seen``; given: gradients of v (B,W) and
    deter (B,D) without those from the step after, which is ``later``.

    -> the first three of the step before's ``later``.
    """
    w, post = split_weights(weights)
    (of_img, of_gru, of_obs), (v, deter) = norms, given
    stoch = dists.at_least_float32(later.stoch)
    v, _ = dynamics.post_backward(post, seen, stoch, None, v)
    deter = torch.addcmul(deter, later.deter, later.stays)
    deter = torch.addcmul(deter, later.inputs[:, -deter.shape[1] :], later.keep)
    deter = add_product(deter, norm_grad(v * slopes.obs, of_obs)[0], w.obs_out.t())
    inputs = product(gated_grad(deter, slopes.gates, of_gru), w.gru.t())
    img = inputs[:, : -deter.shape[1]] * slopes.img  # (B, W)
    return deter, inputs, product(norm_grad(img, of_img)[0], w.img_in.t())


# ---------------------------------------------------------------- before and after all steps


class BeforeSteps(NamedTuple):
    """What the gradient needs of all steps, from what they computed (T,B,.)."""

    norms: tuple[Norm, Norm, Norm]  # of ``img``, ``gru``, ``obs``
    slopes: Slopes
    of_img: Tensor  # (T, B, W) of ``slopes``, unscaled
    stays: Tensor  # (T, B, D) of ``slopes``, across starts as well
    seen: Tensors
    of_v: Tensor  # (T, B, W) gradient of v, without those from later steps
    deter: Tensor  # (T, B, D) with which each step begins
    stoch: Tensor  # (T, B, Z)
    img: Tensor  # (T, B, W) what the gates read beside the memory
    v: Tensor  # (T, B, W)


def before_steps(
    dynamics: ScanDynamics,
    weights: Tensors,
    starts: Tensors,
    carry: Tensors,
    outputs: Tensors,
    grads: Tensors,
) -> BeforeSteps:
    """starts: deter0, stoch0, keep; outputs: of ``Scan``; grads: of its deter, stoch, logits."""
    w, post = split_weights(weights)
    (deter0, stoch0, keep), eps = starts, dynamics.eps
    (deter, stoch, *logits), saved = outputs[: len(grads)], outputs[len(grads) :]
    begin_deter = torch.lerp(deter0, torch.cat([carry[0].unsqueeze(0), deter[:-1]]), keep)
    begin_stoch = torch.lerp(stoch0, torch.cat([carry[1].unsqueeze(0), stoch[:-1]]), keep)
    of_img, img = norm_again(saved[0], w.img_weight, w.img_bias, eps)
    of_gru, gru = norm_again(saved[1], w.gru_weight, w.gru_bias, eps)
    of_obs, obs = norm_again(saved[2], w.obs_weight, w.obs_bias, eps)
    gates, stays = gate_slopes(gru, begin_deter)
    slope = silu_slope(img)
    scaled = slope * (keep * (1.0 - dynamics.unimix))
    slopes = Slopes(scaled, gates, silu_slope(obs), stays * keep)
    seen = dynamics.post_seen(saved[3:], stoch, tuple(logits))
    of_v, _ = dynamics.post_backward(post, seen, grads[1], grads[2:])
    begins = begin_deter, begin_stoch, F.silu(img), F.silu(obs)
    norms = of_img, of_gru, of_obs
    return BeforeSteps(norms, slopes, slope, stays, seen, of_v, *begins)


def after_steps(
    dynamics: ScanDynamics,
    weights: Tensors,
    keep: Tensor,
    deter: Tensor,
    grads: Tensors,
    steps: BeforeSteps,
    of_deter: Tensor,
    of_inputs: Tensor,
) -> tuple[Tensor | None, ...]:
    """deter: (T,B,D) of ``Scan``; of_deter, of_inputs: of ``walk_back``.

    -> gradients of the inputs (without noise), of the carry, of the weights.
    """
    (w, post), whole = split_weights(weights), (True, True, True)
    x, through = of_inputs.split([len(w.img_weight), deter.shape[-1]], -1)
    img = norm_grad(x * steps.of_img, steps.norms[0], whole)
    of_begin = product(img[0], w.img_in.t()) * keep  # (T, B, Z)
    of_stoch = torch.cat([grads[1][:-1] + of_begin[1:], grads[1][-1:]])
    v, post_grads = dynamics.post_backward(post, steps.seen, of_stoch, grads[2:])
    obs = norm_grad(v * steps.slopes.obs, steps.norms[2], whole)
    gates = (of_deter.unsqueeze(-2) * steps.slopes.gates).flatten(-2)
    gates = norm_grad(gates, steps.norms[1], whole)
    begins = torch.addcmul(through, of_deter, steps.stays)  # (T, B, D)
    of_weights = (
        weight_grad(img[0], steps.stoch, w.img_in),
        *img[1:],
        weight_grad(gates[0], torch.cat([steps.img, steps.deter], -1), w.gru),
        *gates[1:],
        weight_grad(obs[0], deter, w.obs_out),
        *obs[1:],
        *dynamics.post_weight_grads(post, steps.v, steps.seen, post_grads),
    )
    inputs = (begins * (1.0 - keep)).sum(0), None, None, img[0], obs[0]
    return *inputs, begins[0] * keep[0], of_begin[0], *of_weights
