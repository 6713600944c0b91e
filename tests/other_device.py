"""A device that is not the CPU, for machines without one: it refuses what CUDA refuses, and counts
what is copied to it and read from it.

A tensor on it wraps one of the CPU, whose kernels compute it: results are the CPU's. Streams,
graphs, compiled code and CUDA's own kernels are not covered (``tests/test_gpu.py``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import forked
from hidreamer.cost import HOST_READS

NAME = "other"
DEVICE = torch.device("privateuseone", 0)  # NAME, once it is registered

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# These take CPU tensors beside their own, and copy them.
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class CudaAutocast(TorchDispatchMode):
    """On a CPU, where autocast works: refuses a gradient that CUDA would refuse.

    Autocast there takes the softmax inside ``_safe_softmax`` in float32, whose backward pass then
    meets a gradient in float32 of something in half precision. What autocast is cannot be read in
    here, so that every one in half precision is refused.
    """

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is aten._safe_softmax.default and args[0].dtype != torch.float32:
            raise RuntimeError(f"{func} of {args[0].dtype}")
        return func(*args, **kwargs or {})


class Remote(Tensor):
    """A tensor on it, of which ``inner`` has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        found = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return compute(func, args, kwargs or {}, None)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, x: Remote) -> None:
        Tensor.data.__set__(self, x)
        self.inner = x.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a checkpoint is read on any device

    def __repr__(self, **kwargs: Any) -> str:
        return f"Remote({self.inner!r})"


class Generator(torch.Generator):
    """Of the device that it was made for."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = None):
        self.where = torch.device(device or "cpu")

    @property
    def device(self) -> torch.device:
        return self.where


class Other(TorchDispatchMode):
    """What happens while it is on. copies: from the host. reads: by the host, which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.copies = [], []

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return compute(func, args, kwargs or {}, self)


@functools.cache
def register() -> None:
    """From then on autograd begins a thread for it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.other.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    forked.threads.append(NAME)


@contextlib.contextmanager
def other_device() -> Iterator[Other]:
    """Let DEVICE and generators of it be made and used."""
    register()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) is then a copy
    try:
        with mock.patch.object(torch, "Generator", Generator), Other() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def compute(func: Callable, args: tuple, kwargs: dict, mode: Other | None) -> Any:
    """One operation. Raises RuntimeError for tensors of both devices, as CUDA does."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, Remote)]
    strangers = [x for x in tensors if x.ndim and not isinstance(x, Remote)]
    target, kwargs = kwargs.get("device"), dict(kwargs)
    remote = bool(here) if target is None else torch.device(target).type == NAME
    crosses = bool(here and strangers) or (func in COPIES and remote != bool(here))
    if crosses and func not in (*COPIES, *INDEXING):
        devices = sorted({str(x.device) for x in (here[0], strangers[0])})
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, not {devices}")
    if mode and crosses and remote:
        mode.copies.append(str(func))
    if mode and here and reads(func, here, remote):
        mode.reads.append(str(func))
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    args_of, kwargs_of = pytree.tree_map(
        lambda x: x.inner if isinstance(x, Remote) else x, (args, kwargs)
    )
    out = func(*args_of, **kwargs_of)
    if not remote:
        return out
    out = pytree.tree_map(lambda x: Remote(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def reads(func: Callable, here: list[Remote], remote: bool) -> bool:
    """Whether the host waits for a result: of CUDA's grouped products those of bfloat16 have a
    kernel (Hopper, torch 2.11), and others copy where their groups end.
    """
    if func is aten._grouped_mm.default:
        return here[0].dtype != torch.bfloat16
    by_mask = func in INDEXING and any(x.dtype == torch.bool for x in here[1:])
    to_host = func in COPIES and not remote
    return by_mask or to_host or func.overloadpacket.__name__ in HOST_READS
