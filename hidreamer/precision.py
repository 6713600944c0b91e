"""Precision of matrix products: TF32 of the whole process, weights cast once under autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def set_precision(config: Any, device: torch.device) -> None:
    """Whether float32 products and convolutions on CUDA round their inputs to TF32.

    For the whole process. torch's own default is TF32 for convolutions alone.
    """
    if device.type != "cuda":
        return
    allowed = config.precision != "float32"
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def name(config: Any, device: torch.device) -> str:
    """Of what products are computed in: on a CPU "tf32" is "float32"."""
    only_cuda = config.precision == "tf32" and device.type != "cuda"
    return "float32" if only_cuda else config.precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """What everything that calls a model runs under.

    Without autocast's cache of cast weights: what is cast in imagination, where no gradient is
    recorded, would be used in the losses. ``cast_weights`` and the scan cast once instead.
    """
    return products_in(torch.bfloat16 if precision == "bfloat16" else None, device)


def products_in(
    dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager:
    """Autocast to a half precision; for any other ``dtype``, or None, nothing is changed."""
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast takes products in; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def side_by_side(*parts: Tensor) -> Tensor:
    """(.., n1), (.., n2) .. as one (.., n1 + n2), for a product.

    Compiled under autocast they are cast before: as a part of the kernels that compute them.
    """
    if casts_early(parts[0].device):
        dtype = autocast_dtype(parts[0].device)
        parts = tuple(x.to(dtype) for x in parts)
    return torch.cat(parts, -1)


def casts_early(device: torch.device) -> bool:
    """Whether ``side_by_side`` casts."""
    return torch.compiler.is_compiling() and autocast_dtype(device) is not None


class CastTogether(torch.autograd.Function):
    """Tensors in another precision, and their gradients back, by one kernel each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in tensors]
        return cast_together(tensors, [dtype] * len(tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [i for i, grad in enumerate(grads) if grad is not None]
        cast = cast_together([grads[i] for i in given], [ctx.dtypes[i] for i in given])
        found: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(given, cast, strict=True):
            found[i] = grad
        return None, *found


def cast_together(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    out = [torch.empty_like(x, dtype=d) for x, d in zip(tensors, dtypes, strict=True)]
    if out:
        torch._foreach_copy_(out, list(tensors))
    return tuple(out)


PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@contextlib.contextmanager
def cast_weights(*modules: nn.Module, trained: bool = False) -> Iterator[None]:
    """Cast the weights of all linear layers and convolutions once for autocast, instead of at every
    use.

    trained: with a gradient. A cast without one must not be used where there is one, which is what
    autocast's own cache would do; the other way round is right.
    """
    parts = {part for module in modules for part in module.modules() if type(part) in PRODUCTS}
    uncast: list[tuple[nn.Module, str, Tensor]] = []
    for part in parts:
        dtype = autocast_dtype(part.weight.device)
        for name, p in part._parameters.items():
            if dtype is not None and p is not None and p.dtype != dtype:
                uncast.append((part, name, p))
    if not uncast or (torch.is_grad_enabled() and not trained):
        yield
        return
    weights = [p for _, _, p in uncast]
    if any(map(is_mapped, weights)):
        cast = [p.to(dtype) for p in weights]
    else:
        cast = CastTogether.apply(dtype, *weights)
    try:
        for (part, name, _), p in zip(uncast, cast, strict=True):
            part._parameters[name] = p
        yield
    finally:
        for part, name, p in uncast:
            part._parameters[name] = p


def is_mapped(x: Tensor) -> bool:
    """Whether ``torch.func.vmap`` maps over ``x``."""
    return torch._C._functorch.is_batchedtensor(x)


def masked_attention(q: Tensor) -> contextlib.AbstractContextManager:
    """The kernels of ``scaled_dot_product_attention`` that are known to be right with our masks,
    for queries ``q``.

    On Hopper torch would take cuDNN's in bfloat16, which nobody has compared yet
    (``benchmarks/gpu_check.py`` does, item "attention"). Mapped by ``vmap`` the memory-efficient
    one fails in its backward pass ("LSE is not correctly aligned"; torch 2.11, H200).
    """
    if is_mapped(q):
        return sdpa_kernel([SDPBackend.MATH])
    if not q.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
