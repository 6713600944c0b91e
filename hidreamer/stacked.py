"""Agents whose parameters lie stacked in one, (P, ...) each, and one update of all of them.

``torch.func.vmap`` maps that agent's own losses over the members (docs/population.md).

Shapes: P members, B sequences, T steps, N environments of a member.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hidreamer.capture import CapturedAct, FastUpdate
from hidreamer.optim import PMIN, Optimizer
from hidreamer.precision import autocast_dtype

Batch = Mapping[str, Tensor]

# Operations that are applied member by member: slower than one for all, and as right.
SLOWER = ("There is a performance drop because", r"torch.searchsorted\(\): input value tensor is")

PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
# vmap comes before autocast, which takes products all the same, but of these only parts: on CUDA it
# would take the softmax inside attention in float32, whose gradient then is of no dtype it accepts.
CAST_BEFORE = (
    nn.functional.conv2d,
    nn.functional.conv_transpose2d,
    nn.functional.scaled_dot_product_attention,
)


class MemberMode(TorchFunctionMode):
    """What torch's functions do differently in a function that is mapped over the members.

    - Random numbers that would come from ``generator`` come, for each member, from its ``own``, as
      many in the same order as it would draw alone.
    - Products with a matrix of weights take their input as rows (R, F).
    - Convolutions and attention get inputs in autocast's dtype, and run without it.
    - ``layer_norm`` is called without weight and bias, which differ by member; its result is
      multiplied and shifted by them.
    """

    def __init__(self, generator: torch.Generator, own: Sequence[torch.Generator], member: Tensor):
        super().__init__()
        self.generator, self.own, self.member = generator, own, member

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and args[0].ndim > 2 and args[1].ndim == 2:
            x, *others = args  # as rows: else every row of B would get a copy of the weight
            return func(x.flatten(0, -2), *others, **kwargs).unflatten(0, x.shape[:-1])
        if func in CAST_BEFORE and (dtype := autocast_dtype(args[0].device)):
            args = tuple(cast_floats(x, dtype) for x in args)
            with torch.autocast(args[0].device.type, enabled=False):
                return func(*args, **kwargs)
        if func is nn.functional.layer_norm and kwargs.get("weight") is not None:
            weight, bias = kwargs.pop("weight"), kwargs.pop("bias")
            return torch.addcmul(bias, func(*args, **kwargs), weight)
        if kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        drawn = torch.stack([func(*args, **kwargs | {"generator": own}) for own in self.own])
        return drawn.index_select(0, self.member.unsqueeze(0)).squeeze(0)


def cast_floats(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in ``dtype`` where it is a tensor of floating point; a boolean mask stays one."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class Mapped(nn.Module):
    """What ``functional_call`` needs: a module with the agent's parameters that calls anything."""

    def __init__(self, agent: Any):
        super().__init__()
        self.agent = agent

    def forward(self, fn: Callable, *args: Any) -> Any:
        return fn(*args)


class StackedOptimizer(Optimizer):
    """An optimiser of parameters (P, ...): a loss (P,), norms and clipping for each member."""

    def gather(self, loss: Tensor, modules: Any = None, retain: bool = False) -> None:
        super().gather(loss.sum(), modules, retain)

    def norms(self, grads: list[Tensor]) -> Tensor:
        """-> (M,P)."""
        return torch.stack([norms(grad) for grad in grads])

    def rescale(self, total: Tensor) -> None:
        """total: (P,)."""
        ratio = (total / self.clip).clamp(min=1.0)
        for p in self.params.values():
            p.grad.div_(ratio.view(-1, *[1] * (p.ndim - 1)))

    @torch.no_grad()
    def clip_each(self) -> Tensor:
        """-> (P,)."""
        longer = []
        for p in self.params.values():
            ratio = norms(p.grad) / (norms(p).clamp(min=PMIN) * self.agc)
            p.grad.div_(ratio.clamp(min=1.0).view(-1, *[1] * (p.ndim - 1)))
            longer.append(ratio > 1.0)
        return torch.stack(longer).float().mean(0)


def norms(x: Tensor) -> Tensor:
    """(P, ...) -> (P,)."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


class MemberOptimizer:
    """A member's optimiser, as checkpoints see it."""

    def __init__(self, stacked: StackedOptimizer, i: int):
        self.stacked, self.i = stacked, i

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        one = lambda name, x: x if name == "step" else x[self.i]  # all have one count of steps
        state = self.stacked.state_dict().items()
        return {key: {name: one(name, x) for name, x in own.items()} for key, own in state}


def stack_trees(trees: Sequence[Any]) -> Any:
    """Equal trees of tensors (...) as one of tensors (P, ...)."""
    return pytree.tree_map(lambda *x: torch.stack(x), *trees)


def stack_moments(states: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict:
    """States of the members' optimisers as that of their stack's, which counts their steps once."""
    out = {}
    for key, first in states[0].items():
        own = stack_trees([state[key] for state in states])
        out[key] = own | {"step": first["step"]}
    return out


class Stack:
    """Agents that become the rows of one, which acts and learns for all of them.

    agent: another of their kind, whose parameters are replaced. agents: with optimisers, which have
    made equally many steps: Adam counts them once for all. own: the generator of each.
    """

    def __init__(
        self,
        agent: Any,
        agents: Sequence[Any],
        own: Sequence[torch.Generator],
    ):
        self.agent, self.agents, self.own = agent, list(agents), list(own)
        assert len(set(map(steps_made, agents))) == 1, "agents of different numbers of updates"
        self.stacked: dict[str, Tensor] = {}
        rows = [row.state_dict() for row in agents]
        for key, x in self.agent.state_dict(keep_vars=True).items():  # other buffers are constants
            whole = torch.stack([row[key] for row in rows])
            for i, row in enumerate(agents):
                replace_tensor(row, key, whole[i])
            if isinstance(x, nn.Parameter):
                whole = nn.Parameter(whole, x.requires_grad)
            path, _, name = key.rpartition(".")
            setattr(self.agent.get_submodule(path), name, whole)
            self.stacked[f"agent.{key}"] = whole
        self.agent.make_optimizers(StackedOptimizer)
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(
                stack_moments([row.optimizers[name].state_dict() for row in agents])
            )
            for i, row in enumerate(agents):
                row.optimizers[name] = MemberOptimizer(optimizer, i)
        forget_graphs(agents)
        for start in SLOWER:
            warnings.filterwarnings("ignore", start)
        device = self.own[0].device
        self.caller, self.generator = Mapped(self.agent), torch.Generator(device)
        self.member = torch.arange(len(agents), device=device)
        self.agent.each = self.each
        self.world_model = self.agent.world_model
        self.save_state, self.load_state = self.agent.save_state, self.agent.load_state
        self.captured_act: CapturedAct | None = None  # on CUDA

    def update(self, batch: Batch, generator: Any = None) -> Tensor:
        """As ``Agent.update``, of all members, raw (P,B,T,...). -> metrics (M,P). ``generator`` has
        no part in it: each member draws from its own.
        """
        return self.agent.update(batch, self.generator)

    def make_update(self) -> Callable[[Batch], Tensor]:
        """``update``: on CUDA as one graph, and ``act`` as well. Where recording fails, it warns
        and continues without.
        """
        if not self.member.is_cuda:
            return self.update
        self.captured_act = CapturedAct(self, self.own)
        return FastUpdate(self, None, True, self.own)

    def dissolve(self) -> None:
        """Give every agent parameters and an optimiser of its own again: a row would keep the
        memory of all.
        """
        for agent in self.agents:
            for key, x in agent.state_dict().items():
                replace_tensor(agent, key, x.clone())
            states = {name: opt.state_dict() for name, opt in agent.optimizers.items()}
            agent.make_optimizers()
            for name, state in states.items():
                agent.optimizers[name].load_state_dict(state)
        forget_graphs(self.agents)

    def each(self, fn: Callable, *args: Any) -> Any:
        """``fn`` of every member's trees of tensors, given those of all (P, ...). What it returns
        that is no tensor is the same for all.
        """
        out: list = []

        def one(params: Mapping[str, Tensor], member: Tensor, args: tuple) -> list:
            with MemberMode(self.generator, self.own, member):
                found = torch.func.functional_call(self.caller, params, (fn, *args))
            out[:] = pytree.tree_flatten(found)
            return [x for x in out[0] if isinstance(x, Tensor)]

        dims = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, args)
        # "same" allows the draws of ``MemberMode``, each of which is one member's
        mapped = torch.func.vmap(one, (0, 0, dims), randomness="same")
        found = iter(mapped(self.stacked, self.member, args))
        leaves = [next(found) if isinstance(x, Tensor) else x for x in out[0]]
        return pytree.tree_unflatten(leaves, out[1])

    def act(self, state: Any, obs: Batch, mode: str) -> Any:
        """As ``Agent.act``, of all members: (P, N, ...), carries in their ``fixed_size``."""
        return (self.captured_act or self.plain_act)(state, obs, mode, self.own)

    @torch.no_grad()
    def plain_act(self, state: Any, obs: Batch, mode: str, generator: Any) -> Any:
        """``act``, an operation at a time."""
        act = functools.partial(self.agent.plain_act, mode=mode, generator=self.generator)
        return self.each(act, state, obs)


def replace_tensor(agent: nn.Module, key: str, x: Tensor) -> None:
    """Let a parameter or buffer of ``agent`` be ``x``; a parameter stays the same object."""
    path, _, name = key.rpartition(".")
    module = agent.get_submodule(path)
    if name in module._parameters:
        module._parameters[name].data = x
    else:
        module._buffers[name] = x


def forget_graphs(agents: Sequence[Any]) -> None:
    """Of acting, whose parameters lie elsewhere now."""
    for agent in agents:
        if agent.captured_act:
            agent.captured_act.graphs.clear()


def steps_made(agent: Any) -> tuple[tuple[str, str, int], ...]:
    """How many steps each optimiser of an agent has made of each parameter, as (optimiser,
    parameter, steps). Agents can be stacked where these are equal.
    """
    found = []
    for name, optimizer in agent.optimizers.items():
        for key, state in optimizer.state_dict().items():
            found.append((name, key, int(state["step"])))
    return tuple(found)
