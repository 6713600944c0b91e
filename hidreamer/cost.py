"""What an agent is made of and what its update costs, counted: parameters, bits, operators, FLOPs,
memory.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Operators that launch no kernel: they make another view of a tensor, or memory.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty",
    "empty_like", "empty_strided", "expand", "lift_fresh", "narrow", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "squeeze_", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_record_function_enter_new", "_record_function_exit",  # names for a profiler
}  # fmt: skip
# the host must wait for the device
HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}


def attention_flops(q, k, v, *_, **__) -> int:
    """Of shapes, as ``FlopCounterMode`` calls it."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad, q, k, v, *_, **__) -> int:
    """Of shapes, as ``FlopCounterMode`` calls it."""
    return sdpa_backward_flop_count(grad, q, k, v)


def shared_attention_flops(q, keys, _, near_keys, __, far_keys, *___, **____) -> int:
    """Of shapes, as ``FlopCounterMode`` calls it: every row's products with both kinds of keys, and
    the values'.
    """
    batch, heads, count, rows, dim = q
    return 4 * batch * heads * count * rows * dim * (keys[2] + near_keys[3] + far_keys[3])


# torch counts the products inside fused attention on GPUs, but neither on CPUs nor inside ours.
UNCOUNTED = {
    "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_flops,
}


class Operators(TorchDispatchMode):
    """Counts what is dispatched below autograd."""

    def __init__(self):
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def operators(fn: Callable[[], object]) -> dict[str, int]:
    """Dispatched by one call of ``fn``: "kernels", "views" (and allocations), "host_reads"."""
    with Operators() as mode:
        fn()
    return kinds(mode.names)


def kinds(names: Mapping[str, int]) -> dict[str, int]:
    """Of operators by name: "kernels", "views" (and allocations), "host_reads"."""
    views = sum(n for name, n in names.items() if name in VIEWS)
    reads = sum(n for name, n in names.items() if name in HOST_READS)
    return {"kernels": sum(names.values()) - views - reads, "views": views, "host_reads": reads}


def flops(fn: Callable[[], object]) -> int:
    """Of the matrix products and convolutions in one call of ``fn``, forward and backward."""
    more = {getattr(torch.ops.aten, name): count for name, count in UNCOUNTED.items()}
    if hasattr(torch.ops.hidreamer, "shared_attention"):  # made when it is first needed
        more[torch.ops.hidreamer.shared_attention] = shared_attention_flops
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        fn()
    return counter.get_total_flops()


def sizes(agent) -> dict:
    """Latent sizes and trainable parameters by part. Bits: what the state of one step can hold at
    most.
    """
    wm, dyn = agent.world_model, agent.world_model.dynamics
    parts = {"world_model": wm, "actor": agent.behavior.actor, "critic": agent.behavior.critic}
    parts |= {"encoder": wm.encoder, "decoder": wm.decoder, "dynamics": dyn}
    params = {}
    for name, part in parts.items():
        params[name] = sum(p.numel() for p in part.parameters() if p.requires_grad)
    out = {
        "variables": [n for n, _ in dyn.shapes],
        "classes": [k for _, k in dyn.shapes],
        "bits": dyn.bits,
    }
    return out | {
        "stoch": dyn.stoch_dim,
        "deter": dyn.deter_dim,
        "feature": dyn.feat_dim,
        "params": params,
    }


def table(columns: Mapping[str, dict]) -> str:
    """Agents side by side, from ``sizes`` and counts; with the ratio to the first column where a
    number differs.
    """
    rows: dict[str, list] = {}
    for column in columns.values():
        flat = {key: value for key, value in column.items() if key != "params"}
        flat |= {f"parameters {name}": count for name, count in column["params"].items()}
        for key, value in flat.items():
            rows.setdefault(key, []).append(value)
    lines = [["", *columns]]
    for key, values in rows.items():
        shown = [
            f"{v:,.0f}" if isinstance(v, int | float) else " + ".join(map(str, v)) for v in values
        ]
        for i, value in enumerate(values[1:], 1):
            if isinstance(value, int | float) and value != values[0] and values[0]:
                shown[i] += f" ({value / values[0]:.3f})"
        lines.append([key, *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def peak_mb(device: torch.device) -> float:
    """The most memory that this process ever held: of the GPU if that is its device, otherwise
    resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    found = (
        re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if status.exists()
        else None
    )
    if found:  # Linux's getrusage would count what the parent held when it started this process
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
