"""The update as fast as a machine allows: compiled parts,
and on CUDA one recorded graph, launched as a whole.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Update = Callable[[Mapping[str, Tensor]], Tensor]
# Whose numbers are drawn: None is torch's default one, several are those of a population's members.
Generators = torch.Generator | Sequence[torch.Generator] | None
WARMUP = 3  # ordinary calls before a graph is recorded


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """For calls that precede a recording. One for all: each has its own workspace."""
    return torch.cuda.Stream()


class Captured:
    """``fn`` of a dict of CUDA tensors of fixed shapes,
    recorded after WARMUP ordinary calls, then replayed.

    ``fn`` must read nothing on the host. What it returns is overwritten by the next call.
    generator: whose numbers it draws.
    """

    def __init__(self, fn: Update, generator: Generators = None):
        self.fn, self.calls = fn, 0
        self.generators = as_list(generator)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls <= WARMUP:
            # Not on the default stream, so that lazy set-up (libraries, optimiser states) precedes
            # the recording.
            stream = side_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = self.fn(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return out
        if self.graph is None:
            self.inputs = {key: x.clone() for key, x in batch.items()}
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                if generator is not None:  # every graph knows the default one
                    graph.register_generator_state(generator)
            # other threads of this process may do as they like, such as train another seed
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.out = self.fn(self.inputs)
            self.graph = graph
        for key, x in batch.items():
            self.inputs[key].copy_(x)
        self.graph.replay()
        return self.out


class CapturedAct:
    """``agent.act`` with a graph for every number of environments and mode.

    Where recording fails, one RuntimeWarning names the cause, and acting continues without.

    agent: with ``plain_act``, and ``world_model.dynamics.fixed_size``. generator: whose numbers
    graphs draw; a call with another one is an ordinary one. record: makes what ``Captured`` makes.
    """

    def __init__(
        self,
        agent: Any,
        generator: Generators = None,
        record: Callable[..., Callable] = Captured,
    ):
        self.agent, self.generator, self.record = agent, generator, record
        self.graphs: dict[tuple, Callable] = {}
        self.works = True

    def __call__(
        self, state: Any, obs: Mapping[str, Tensor], mode: str, generator: Generators
    ) -> Any:
        if not self.works or generator is not self.generator:
            return self.agent.plain_act(state, obs, mode, generator)
        carry = self.agent.world_model.dynamics.fixed_size(state.carry)
        state = state._replace(carry=carry)
        inputs = dict(obs) | {f"state {i}": x for i, x in enumerate((*carry, state.action))}
        # What is compiled since is compiled at its first call, not while a graph is recorded.
        compiled = self.agent.world_model.encoder._compiled_call_impl is not None
        key = (mode, compiled, *((name, x.shape) for name, x in inputs.items()))

        def act(inputs: Mapping[str, Tensor]) -> Any:
            given = [inputs[f"state {i}"] for i in range(len(carry) + 1)]
            start = state._replace(carry=type(carry)(*given[:-1]), action=given[-1])
            observed = {name: inputs[name] for name in obs}
            return self.agent.plain_act(start, observed, mode, generator)

        if key not in self.graphs:
            self.graphs[key] = self.record(act, generator=generator)
        before = RandomState(self.agent, generator)
        try:
            new = self.graphs[key](inputs)
        except Exception as error:  # drivers may raise anything
            before.restore()
            self.works = False
            cause = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
            message = f"cannot record acting, which continues without (slower): {cause[0]}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return self.agent.plain_act(state, obs, mode, generator)
        # the next call writes over what this one returned
        kept = type(new.carry)(*(x.clone() for x in new.carry))
        return new._replace(carry=kept, action=new.action.clone())


class FastUpdate:
    """``agent.update``, compiled and with ``capture`` recorded,
    as far as that works on this machine.

    Compilation happens at the first call and recording after WARMUP calls; either may fail there
    (no compiler, an operation that cannot be recorded). Then one RuntimeWarning names the cause,
    and that call and all later ones do without, from the weights, optimisers and random numbers
    that the call began with.

    agent: with ``update``, ``save_state`` and ``load_state``. compile: makes the agent's parts
    compile when they are called, by setting attributes of its modules; None to record alone.
    generator: that of all random numbers. report: takes a line for people when compilation begins.
    """

    def __init__(
        self,
        agent: Any,
        compile: Callable[[], None] | None,
        capture: bool,
        generator: Generators = None,
        report: Callable[[str], None] = print,
    ):
        self.agent, self.compile, self.capture, self.report = agent, compile, capture, report
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
        if self.compile is not None and not self.plain:
            # Not before: acting also calls these modules, and would fail in their stead.
            self.plain = {module: set(vars(module)) for module in self.agent.modules()}
            prepare_compiler()
            self.report(COMPILING)
            self.compile()
            self.compiled = True
        before = Snapshot(self.agent, self.generator)
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
        remedy = "; --compile off does not try" if what == "compile" else ""
        message = f"cannot {what} the update, which continues without (slower{remedy}): {cause}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


COMPILING = "compiling the update: about a minute, once for these sizes on this machine"
# What the compiler says of its own choices, which nobody here can change.
NOISE = ("Online softmax is disabled on the fly", "TensorFloat32 tensor cores .* not enabled")


def prepare_compiler() -> None:
    """Keep what is compiled where it outlives a restart of the machine, and hide NOISE."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hidreamer/inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        except OSError:
            pass  # it stays torch's own, in the folder of temporary files
    for start in NOISE:
        warnings.filterwarnings("ignore", rf"\s*{start}")


def as_list(generator: Generators) -> list[torch.Generator | None]:
    one = generator is None or isinstance(generator, torch.Generator)
    return [generator] if one else list(generator)


class RandomState:
    """Of an agent's generators, on the host."""

    def __init__(self, agent: Any, generator: Generators):
        self.generators = [one or default_generator(agent) for one in as_list(generator)]
        self.random = [one.clone_state() for one in self.generators]

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.random, strict=True):
            if generator.device.type == "cuda":
                # In place of the present state, which a recording that broke off leaves in the
                # middle of it.
                generator.graphsafe_set_state(state.clone_state())
            else:
                generator.set_state(state.get_state())


def default_generator(module: nn.Module) -> torch.Generator:
    """Torch's default generator on a module's device."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


class Snapshot:
    """Weights, optimisers and random state of an agent, copied to memory of the host."""

    def __init__(self, agent: Any, generator: Generators):
        self.agent, self.random = agent, RandomState(agent, generator)
        self.state = on_host(agent.save_state())

    def restore(self) -> None:
        self.agent.load_state(self.state)
        self.random.restore()


def on_host(value: Any) -> Any:
    """A copy of nested dicts with all tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: on_host(x) for key, x in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
