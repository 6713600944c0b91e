"""How many kernels an update launches when its parts are compiled, counted without a GPU.

    python benchmarks/compiled.py [PRESET ...] [--precision tf32 bfloat16] [--eager] [--out F]

Every compiled piece goes through the compiler up to the plan of its kernels, which are counted and
not generated; it then runs uncompiled, so that the update takes its usual course. The plan is the
one for a CPU: a GPU's fuses more (a cumulative sum with what is around it). What runs between the
pieces is counted as it is dispatched; the attention of dreams as the one kernel that it is on CUDA.
--eager: counts of the uncompiled update alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from equality import make_agent
from torch import Tensor, nn
from torch._inductor import compile_fx, graph

from hidreamer import cost, transformer
from hidreamer.provenance import provenance

SMALL = {"replay.batch": 4, "imag.starts": 4}  # the number of kernels does not depend on these
# What a plan has beside kernels: memory, and names of parts of what a kernel returned.
NO_KERNELS = ("NopKernelSchedulerNode", "MultiOutput")


class Planned(Exception):
    """Compilation is stopped here; its argument is the number of kernels."""


class Between(cost.Operators):
    """Counts what is dispatched outside of compiled pieces."""

    inside = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.inside:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def plan(self: graph.GraphLowering) -> None:
    """In place of ``GraphLowering.compile_to_module``."""
    self.init_wrapper_code()
    self._update_scheduler()
    count = 0
    for node in self.scheduler.nodes:
        names = type(node).__name__, type(getattr(node, "node", None)).__name__
        count += not any(name in NO_KERNELS for name in names)
    raise Planned(count)


def planned(error: BaseException | None) -> int | None:
    """The count of a Planned that the compiler has wrapped."""
    while error is not None and not isinstance(error, Planned):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error.args[0] if error else None


class Pieces:
    """A backend of ``torch.compile``: kernels of what was compiled, whenever it is called."""

    def __init__(self) -> None:
        self.kernels = self.calls = 0
        self.between = Between()

    def __call__(self, module: nn.Module, inputs: list) -> Callable:
        return compile_fx.compile_fx(module, inputs, inner_compile=self.compile)

    def compile(self, module: nn.Module, inputs: list, **settings: Any) -> Callable:
        try:
            compile_fx.compile_fx_inner(module, inputs, **settings)
        except Exception as error:
            count = planned(error)
            if count is None:
                raise

        def run(args: list) -> Any:
            self.kernels += count
            self.calls += 1
            self.between.inside += 1
            try:
                return module(*args)
            finally:
                self.between.inside -= 1
                args.clear()

        run._boxed_call = True
        return run

    def attention(self, q: Tensor, *given: Tensor) -> Tensor:
        """In place of ``fused_attention.shared_attention``."""
        self.kernels += 1
        self.between.inside += 1
        prefix, near, far = map(transformer.KV, given[:6:2], given[1:6:2])
        prefix_bias, *own_bias = given[6:]
        try:
            with torch.enable_grad():  # by ordinary products
                bias = transformer.Bias(prefix_bias, [x[0, 0, 0] for x in own_bias])
                return transformer.attend_shared(q, [near, far], prefix, bias).detach()
        finally:
            self.between.inside -= 1


@contextlib.contextmanager
def compiling(pieces: Pieces) -> Iterator[None]:
    """In the block ``torch.compile`` counts; nothing is cached."""
    kept = torch.compile, graph.GraphLowering.compile_to_module, transformer.fused_attention
    torch.compile = functools.partial(torch.compile, backend=pieces)
    graph.GraphLowering.compile_to_module = plan
    transformer.fused_attention = lambda q: None if torch.is_grad_enabled() else pieces.attention
    inductor = torch._inductor.config.patch(fx_graph_cache=False, fallback_random=True)
    autograd = torch._functorch.config.patch(enable_autograd_cache=False)
    try:
        with inductor, autograd:
            yield
    finally:
        torch.compile, graph.GraphLowering.compile_to_module, transformer.fused_attention = kept
        torch._dynamo.reset()


def kernels(presets: list[str], compiled: bool = True, **overrides: Any) -> dict[str, int]:
    """Of one update: of compiled pieces, between them, in all; and how many pieces are called."""
    agent, (batch,) = make_agent(presets, torch.device("cpu"), **{**SMALL, **overrides})
    agent.to(memory_format=torch.channels_last)  # as on CUDA
    generator = torch.Generator().manual_seed(0)  # a run has one, too

    def update() -> None:
        agent.update(batch, generator)

    if not compiled:
        update()
        return {"kernels": cost.operators(update)["kernels"]}
    pieces = Pieces()
    with compiling(pieces):
        agent._compile()
        for _ in range(2):
            update()
        pieces.kernels = pieces.calls = 0
        with pieces.between:
            update()
    between = cost.kinds(pieces.between.names)["kernels"]
    found = {"compiled": pieces.kernels, "between": between, "calls": pieces.calls}
    return found | {"kernels": pieces.kernels + between}


def main() -> int:
    parser = measure.argument_parser(__doc__)
    tiny = ["tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer"]
    parser.add_argument("presets", nargs="*", default=tiny)
    parser.add_argument("--precision", nargs="+", default=["tf32", "bfloat16"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = provenance()
    for preset in args.presets:
        report[preset] = {}
        for precision in args.precision:
            found = kernels([preset], not args.eager, precision=precision)
            report[preset][precision] = found
            print(preset, precision, found, file=sys.stderr, flush=True)
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
