"""Precision of matrix products: TF32 of the whole process, weights cast once under autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast takes products in; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


@contextlib.contextmanager
def cast_weights(*modules: nn.Module) -> Iterator[None]:
    """Cast the weights of all linear layers once for autocast, instead of at every use.

    Only where no gradient is recorded: a cast without one must not be used where there is one,
    which is what autocast's own cache would do.
    """
    linears = [part for module in modules for part in module.modules() if type(part) is nn.Linear]
    dtype = autocast_dtype(linears[0].weight.device) if linears else None
    if dtype is None or torch.is_grad_enabled():
        yield
        return
    kept = [dict(part._parameters) for part in linears]
    try:
        for part in linears:
            for name, p in part._parameters.items():
                part._parameters[name] = None if p is None else p.to(dtype)
        yield
    finally:
        for part, params in zip(linears, kept, strict=True):
            part._parameters.update(params)


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
