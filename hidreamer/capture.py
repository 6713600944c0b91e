"""The update as fast as a machine allows: compiled parts,
and on CUDA one recorded graph, launched as a whole.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Update = Callable[[Mapping[str, Tensor]], Tensor]
WARMUP = 3  # ordinary calls before a graph is recorded


class Captured:
    """``fn`` of a dict of CUDA tensors of fixed shapes,
    recorded after ``warmup`` ordinary calls, then replayed.

    ``fn`` must read nothing on the host. What it returns is overwritten by the next call.
    """

    def __init__(self, fn: Update, warmup: int = WARMUP, generator: torch.Generator | None = None):
        self.fn, self.warmup, self.calls, self.generator = fn, warmup, 0, generator
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls <= self.warmup:
            # Not on the default stream, so that lazy set-up (libraries, optimiser states) precedes
            # the recording.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = self.fn(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return out
        if self.graph is None:
            self.inputs = {key: x.clone() for key, x in batch.items()}
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:  # every graph knows the default one
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self.out = self.fn(self.inputs)
            self.graph = graph
        for key, x in batch.items():
            self.inputs[key].copy_(x)
        self.graph.replay()
        return self.out


class FastUpdate:
    """``agent.update``, compiled and with ``capture`` recorded,
    as far as that works on this machine.

    Compilation happens at the first call and recording after WARMUP calls; either may fail there
    (no compiler, an operation that cannot be recorded). Then one RuntimeWarning names the cause,
    and that call and all later ones do without, from the weights, optimisers and random numbers
    that the call began with.

    agent: with ``update``, ``save_state`` and ``load_state``. compile: makes the agent's parts
    compile when they are called, by setting attributes of its modules. generator: that of all
    random numbers, None being torch's default one.
    """

    def __init__(
        self,
        agent: Any,
        compile: Callable[[], None],
        capture: bool,
        generator: torch.Generator | None = None,
    ):
        self.agent, self.compile, self.capture = agent, compile, capture
        self.generator = generator
        self.update: Update = functools.partial(agent.update, generator=generator)
        self.plain: dict[nn.Module, set[str]] = {}  # the attributes of uncompiled modules
        self.compiled = False
        self._select_update()

    def _select_update(self) -> None:
        """Run ``update`` from here on, recording it where that is configured."""
        self.run: Update = self.update
        if self.capture:
            self.run = Captured(self.update, generator=self.generator)
        # calls that may fail for want of a compiler or recording
        self.trial_calls = WARMUP + 1 if self.capture else 1

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        if not self.trial_calls:
            return self.run(batch)
        if not self.plain:
            # Not before: acting also calls these modules, and would fail in their stead.
            self.plain = {module: set(vars(module)) for module in self.agent.modules()}
            self.compile()
            self.compiled = True
        before = Snapshot(self.agent, self.generator or default_generator(self.agent))
        while True:
            try:
                out = self.run(batch)
            except Exception as error:  # compilers and drivers may raise anything
                recording = isinstance(self.run, Captured) and self.run.calls > WARMUP
                if not recording and not self.compiled:
                    raise
                before.restore()
                self._fall_back("record" if recording else "compile", error)
            else:
                self.trial_calls = max(0, self.trial_calls - 1)
                return out

    def _fall_back(self, what: str, error: Exception) -> None:
        if what == "record":
            self.capture = False
            # ending a broken recording fails as well, with a vaguer error
            error = error.__context__ or error
        else:
            self.compiled = False
            for module, names in self.plain.items():
                for name in set(vars(module)) - names:
                    delattr(module, name)
        self._select_update()
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = (
            f"cannot {what} the update, which continues without (slower; "
            f"--compile off does not try): {cause}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)


class Snapshot:
    """Weights and optimisers of an agent and a generator's state, copied to memory of the host."""

    def __init__(self, agent: Any, generator: torch.Generator):
        self.agent, self.generator = agent, generator
        self.state = on_host(agent.save_state())
        self.random = generator.clone_state()

    def restore(self) -> None:
        self.agent.load_state(self.state)
        if self.generator.device.type == "cuda":
            # In place of the present state, which a recording that broke off leaves in the middle
            # of it.
            self.generator.graphsafe_set_state(self.random.clone_state())
        else:
            self.generator.set_state(self.random.get_state())


def default_generator(module: nn.Module) -> torch.Generator:
    """Torch's default generator on a module's device."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def on_host(value: Any) -> Any:
    """A copy of nested dicts with all tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: on_host(x) for key, x in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
