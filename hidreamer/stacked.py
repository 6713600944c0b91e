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
CONVOLUTIONS = (nn.functional.conv2d, nn.functional.conv_transpose2d)


class Draws(TorchFunctionMode):
    """In a mapped function: what would be drawn from ``generator`` is, for each member, drawn from
    its own, as many numbers in the same order as it would draw alone.
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
        if func in CONVOLUTIONS and (dtype := autocast_dtype(args[0].device)):
            # vmap comes before autocast, which takes products all the same, but not these
            args = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in args)
        if func is nn.functional.layer_norm and kwargs.get("weight") is not None:
            weight, bias = kwargs.pop("weight"), kwargs.pop("bias")
            return torch.addcmul(bias, func(*args, **kwargs), weight)
        if kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        drawn = torch.stack([func(*args, **kwargs | {"generator": own}) for own in self.own])
        return drawn.index_select(0, self.member.unsqueeze(0)).squeeze(0)


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
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


class Row:
    """A member's optimiser, as checkpoints see it."""

    def __init__(self, stacked: StackedOptimizer, i: int):
        self.stacked, self.i = stacked, i

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        found = {}
        for key, state in self.stacked.state_dict().items():
            found[key] = {name: x[self.i] if x.ndim else x for name, x in state.items()}
        return found


def stack_trees(trees: Sequence[Any]) -> Any:
    """Equal trees of tensors (...) as one of tensors (P, ...)."""
    return pytree.tree_map(lambda *x: torch.stack(x), *trees)


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
        saved = self.agent.state_dict().keys()  # other buffers are constants
        self.stacked: dict[str, Tensor] = {}
        modules = zip(*(agent.named_modules() for agent in (self.agent, *agents)), strict=True)
        for (path, module), *rows in modules:
            for kind in ("_parameters", "_buffers"):
                for name, x in getattr(module, kind).items():
                    key = f"{path}.{name}" if path else name
                    if x is None or key not in saved:
                        continue
                    whole = torch.stack([getattr(row, kind)[name].detach() for _, row in rows])
                    for i, (_, row) in enumerate(rows):
                        replace_tensor(row, name, whole[i])
                    if kind == "_parameters":
                        whole = nn.Parameter(whole, x.requires_grad)
                    setattr(module, name, whole)
                    self.stacked[f"agent.{key}"] = whole
        self.agent.make_optimizers(StackedOptimizer)
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(self._optimizer_state(name))
            for i, row in enumerate(agents):
                row.optimizers[name] = Row(optimizer, i)
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

    def _optimizer_state(self, name: str) -> dict[str, dict[str, Tensor]]:
        states = [agent.optimizers[name].state_dict() for agent in self.agents]
        found = {}
        for key, state in states[0].items():
            found[key] = {}
            for kind, x in state.items():
                rows = torch.stack([state[key][kind] for state in states])
                assert x.ndim or (rows == x).all(), f"agents of {rows.tolist()} updates"
                found[key][kind] = rows if x.ndim else x
        return found

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
            for key in self.stacked:
                path, _, name = key.removeprefix("agent.").rpartition(".")
                module = agent.get_submodule(path)
                replace_tensor(module, name, getattr(module, name).detach().clone())
            states = {name: opt.state_dict() for name, opt in agent.optimizers.items()}
            agent.make_optimizers()
            for name, state in states.items():
                agent.optimizers[name].load_state_dict(state)
        forget_graphs(self.agents)

    def each(self, fn: Callable, *args: Any) -> Any:
        """``fn`` of every member's trees of tensors, given those of all (P, ...). What it returns
        that is no tensor is the same for all.
        """
        flat, spec = pytree.tree_flatten(args)
        out: list = []

        def one(params: Mapping[str, Tensor], member: Tensor, tensors: list[Tensor]) -> list:
            with Draws(self.generator, self.own, member):
                own = pytree.tree_unflatten(replaced(flat, tensors), spec)
                found = torch.func.functional_call(self.caller, params, (fn, *own))
            out[:] = pytree.tree_flatten(found)
            return [x for x in out[0] if isinstance(x, Tensor)]

        # "same" allows the draws of ``Draws``, each of which is one member's
        mapped = torch.func.vmap(one, randomness="same")
        found = mapped(self.stacked, self.member, [x for x in flat if isinstance(x, Tensor)])
        return pytree.tree_unflatten(replaced(out[0], found), out[1])

    def act(self, state: Any, obs: Batch, mode: str) -> Any:
        """As ``Agent.act``, of all members: (P, N, ...), carries in their ``fixed_size``."""
        return (self.captured_act or self.plain_act)(state, obs, mode, self.own)

    @torch.no_grad()
    def plain_act(self, state: Any, obs: Batch, mode: str, generator: Any) -> Any:
        """``act``, an operation at a time."""
        act = functools.partial(self.agent.plain_act, mode=mode, generator=self.generator)
        return self.each(act, state, obs)


def replace_tensor(module: nn.Module, name: str, x: Tensor) -> None:
    """Let a parameter or buffer of ``module`` be ``x``; a parameter stays the same object."""
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


def replaced(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """``leaves`` with these tensors in place of theirs."""
    left = iter(tensors)
    return [next(left) if isinstance(x, Tensor) else x for x in leaves]
