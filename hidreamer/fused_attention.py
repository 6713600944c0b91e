"""Attention over a shared prefix and a branch's own positions as one kernel, for dreams on CUDA.

What ``transformer.attend_shared`` does in a dozen: there the single new position of each of B * n
branches is multiplied with its own keys by a matrix product of one row, which takes longer than
all others together (measured on an H200, results/gpu). Softmax is computed tile by tile (Milakov
and Gimelshein 2018; FlashAttention, Dao et al. 2022).

Shapes as in ``transformer``: B sequences, n branches of each, Q new positions, P prefix positions,
O of a branch's own, h heads of d numbers.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, own and prefix positions of a tile, warps of a program; ``benchmarks/gpu_check.py`` tries
# others. A matrix product has at least 16 rows.
TILES = {"ROWS": 16, "OWN": 16, "PREFIX": 64, "num_warps": 8}


@triton.jit
def attend_own(
    wide, keys, values, bias, n, size, k_n, k_o, v_n, v_o, inside, part, d, scale,
    top, total, result, OWN: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of rows ``wide`` (ROWS, 1, WIDE), each over positions of its own."""
    for first in range(0, size, OWN):
        o = first + tl.arange(0, OWN)
        there = o < size
        tile = inside[:, None, None] & there[None, :, None] & part[None, None, :]
        at = (n * k_n)[:, None, None] + (o * k_o)[None, :, None] + d[None, None, :]
        k = tl.load(keys + at, tile, 0.0).to(tl.float32)
        at = (n * v_n)[:, None, None] + (o * v_o)[None, :, None] + d[None, None, :]
        v = tl.load(values + at, tile, 0.0).to(tl.float32)
        given = inside[:, None] & there[None, :]
        score = tl.sum(wide * k, 2) * scale  # (ROWS, OWN)
        score += tl.load(bias + o[None, :], given, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(score, 1))
        weight, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        result = result * shrink[:, None] + tl.sum(weight[:, :, None] * v, 1)
        total, top = total * shrink + tl.sum(weight, 1), higher
    return top, total, result


@triton.jit(do_not_specialize=["count", "queries", "prefix", "near", "far"])
def kernel(
    q, pk, pv, nk, nv, fk, fv, seen, near_bias, far_bias, out,
    q_b, q_h, q_n, q_r, pk_b, pk_h, pk_p, pv_b, pv_h, pv_p,
    nk_b, nk_h, nk_n, nk_o, nv_b, nv_h, nv_n, nv_o, fk_b, fk_h, fk_n, fk_o, fv_b, fv_h, fv_n, fv_o,
    seen_b, seen_n, seen_r, near_b, near_n, near_r, far_b, far_n, far_r,
    heads, count, queries, prefix, near, far, scale,
    DIM: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of the n * Q rows of one head of one sequence. WIDE: d rounded up to a
    power of two. The numbers of a head, and the columns of biases, lie side by side.
    """
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = index < count * queries
    n, r = index // queries, index % queries
    d = tl.arange(0, WIDE)
    part = d < DIM
    mask = inside[:, None] & part[None, :]
    x = tl.load(q + b * q_b + h * q_h + (n * q_n + r * q_r)[:, None] + d[None, :], mask, 0.0)
    bias = seen + b * seen_b + (n * seen_n + r * seen_r)[:, None]  # (ROWS, 1)
    top = tl.full((ROWS,), -1e30, tl.float32)  # largest score so far
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, prefix, PREFIX):
        p = first + tl.arange(0, PREFIX)
        there = p < prefix
        tile = there[:, None] & part[None, :]
        k = tl.load(pk + b * pk_b + h * pk_h + p[:, None] * pk_p + d[None, :], tile, 0.0)
        v = tl.load(pv + b * pv_b + h * pv_h + p[:, None] * pv_p + d[None, :], tile, 0.0)
        score = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale  # (ROWS, PREFIX)
        given = inside[:, None] & there[None, :]
        score += tl.load(bias + p[None, :], given, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(score, 1))
        weight, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        product = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        result, top = result * shrink[:, None] + product, higher
        total = total * shrink + tl.sum(weight, 1)
    wide = x.to(tl.float32)[:, None, :]
    bias = near_bias + b * near_b + (n * near_n + r * near_r)[:, None]
    top, total, result = attend_own(
        wide, nk + b * nk_b + h * nk_h, nv + b * nv_b + h * nv_h, bias, n, near,
        nk_n, nk_o, nv_n, nv_o, inside, part, d, scale, top, total, result, OWN,
    )  # fmt: skip
    bias = far_bias + b * far_b + (n * far_n + r * far_r)[:, None]
    top, total, result = attend_own(
        wide, fk + b * fk_b + h * fk_h, fv + b * fv_b + h * fv_h, bias, n, far,
        fk_n, fk_o, fv_n, fv_o, inside, part, d, scale, top, total, result, OWN,
    )  # fmt: skip
    result /= total[:, None]
    to = out + ((b * count * queries + index) * heads + h) * DIM
    tl.store(to[:, None] + d[None, :], result.to(out.dtype.element_ty), mask)


@torch.library.custom_op("hidreamer::shared_attention", mutates_args=())
def shared_attention(
    q: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    prefix_bias: Tensor,
    near_bias: Tensor,
    far_bias: Tensor,
) -> Tensor:
    """q (B,h,n,Q,d), prefix (B,h,P,d), own positions in two parts (B,h,n,O,d), biases (B,1,n,Q,P)
    and (B,1,n,Q,O) -> (B,n,Q,h*d). Any of P and O may be 0.
    """
    batch, heads, count, queries, dim = q.shape
    given = q, prefix_keys, prefix_values, near_keys, near_values, far_keys, far_values
    given = *given, prefix_bias, near_bias, far_bias
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in given]
    strides = [step for x in inputs[:7] for step in x.stride()[:-1]]
    strides += [x.stride(i) for x in inputs[7:] for i in (0, 2, 3)]
    sizes = heads, count, queries, prefix_keys.shape[2], near_keys.shape[3], far_keys.shape[3]
    out = q.new_empty(batch, count, queries, heads * dim)
    exact = torch.get_float32_matmul_precision() == "highest"
    grid = batch * heads, triton.cdiv(count * queries, TILES["ROWS"])
    kernel[grid](
        *inputs, out, *strides, *sizes, dim**-0.5,
        DIM=dim, WIDE=max(16, triton.next_power_of_2(dim)), PRECISION="ieee" if exact else "tf32",
        **TILES,
    )  # fmt: skip
    return out


@shared_attention.register_vmap
def members_as_sequences(info: Any, in_dims: tuple, *inputs: Tensor) -> tuple[Tensor, int]:
    """Under ``vmap`` the mapped axis is folded into B."""
    folded = []
    for x, dim in zip(inputs, in_dims, strict=True):
        whole = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        folded.append(whole.flatten(0, 1))  # (P * B, ...)
    return shared_attention(*folded).unflatten(0, (info.batch_size, -1)), 0


@functools.cache
def works(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernel can be built here and is right; else one RuntimeWarning names the cause.

    It needs a C compiler, as all of Triton's do.
    """
    q = torch.linspace(-1, 1, 4 * dim, device=device).view(1, 1, 2, 2, dim).to(dtype)
    prefix, own = q[:, :, 0], q.flip(2)
    bias = torch.zeros(1, 1, 2, 2, 2, device=device, dtype=dtype)
    keys = torch.cat([prefix.unsqueeze(2).expand(-1, -1, 2, -1, -1), own], 3).float()
    try:
        near, far = own[..., :1, :], own[..., 1:, :]
        kv = prefix, prefix, near, near, far, far
        found = shared_attention(q, *kv, bias, bias[..., :1], bias[..., 1:]).float()
        true = torch.softmax(q.float() @ keys.mT * dim**-0.5, -1) @ keys
        gap = (found.view_as(true) - true).abs().max().item()
        if not gap < 0.05:
            raise ValueError(f"its result is off by {gap:.2g}")
    except Exception as error:  # compilers and drivers may raise anything
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"cannot use one kernel for the attention of dreams, which are slower: {cause}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True
