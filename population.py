"""Several seeds of one config in one process: one update of all of them (docs/population.md).

The members' parameters lie stacked in one agent, (P, ...) each, and ``torch.func.vmap`` maps that
agent's own losses over them. A member is an ordinary ``training.Run`` whose parameters are rows of
the stack: it logs, evaluates and saves as if it were alone, and can be continued alone.

Shapes: P members, B sequences, T steps, N environments of a member.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import models
import run_state
from envs import EnvError
from hidreamer import checkpoint
from hidreamer.capture import Captured
from hidreamer.feed import Feed
from hidreamer.optim import PMIN, Optimizer
from training import Failure, Run

# Operations that are applied member by member: slower than one for all, and as right.
SLOWER = ("There is a performance drop because", r"torch.searchsorted\(\): input value tensor is")

PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

# ---------------------------------------------------------------- the update


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
        if func is nn.functional.layer_norm and kwargs.get("weight") is not None:
            weight, bias = kwargs.pop("weight"), kwargs.pop("bias")
            return torch.addcmul(bias, func(*args, **kwargs), weight)
        if kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        drawn = torch.stack([func(*args, **kwargs | {"generator": own}) for own in self.own])
        return drawn.index_select(0, self.member.unsqueeze(0)).squeeze(0)


class Mapped(nn.Module):
    """What ``functional_call`` needs: a module with the agent's parameters that calls anything."""

    def __init__(self, agent: models.Agent):
        super().__init__()
        self.agent = agent

    def forward(self, fn: Callable, *args: Any) -> Any:
        return fn(*args)


class StackedOptimizer(Optimizer):
    """An optimiser of parameters (P, ...): a loss (P,), norms and clipping for each member."""

    def gather(self, loss: Tensor, modules: Any = None, retain: bool = False) -> None:
        super().gather(loss.sum(), modules, retain)

    def norm(self, grads: list[Tensor]) -> Tensor:
        """-> (P,)."""
        return torch.linalg.vector_norm(torch.stack([norms(grad) for grad in grads]), dim=0)

    def rescale(self, total: Tensor) -> None:
        """total: (P,)."""
        scale = (self.clip / (total + 1e-6)).clamp(max=1.0)  # as torch's clipping has it
        for p in self.params.values():
            p.grad.mul_(scale.view(-1, *[1] * (p.ndim - 1)))

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
        agent: models.Agent,
        agents: Sequence[models.Agent],
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
                    own = [getattr(row, kind)[name] for _, row in rows]
                    whole = torch.stack([x.detach() for x in own])
                    for i, (_, row) in enumerate(rows):
                        if kind == "_parameters":
                            own[i].data = whole[i]
                        else:
                            setattr(row, name, whole[i])
                    if kind == "_parameters":
                        whole = nn.Parameter(whole, x.requires_grad)
                    setattr(module, name, whole)
                    self.stacked[f"agent.{key}"] = whole
        self.agent.make_optimizers(StackedOptimizer)
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(self._optimizer_state(name))
            for i, row in enumerate(agents):
                row.optimizers[name] = Row(optimizer, i)
        for row in agents:
            if row.captured_act:
                row.captured_act.graphs.clear()  # of parameters that lay elsewhere
        for start in SLOWER:
            warnings.filterwarnings("ignore", start)
        device = self.own[0].device
        self.caller, self.generator = Mapped(self.agent), torch.Generator(device)
        self.member = torch.arange(len(agents), device=device)
        self.agent.each = self.each
        self.update: Callable = functools.partial(self.agent.update, generator=self.generator)
        if device.type == "cuda":
            self.update = Captured(self.update, generator=self.own)

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

    def dissolve(self) -> None:
        """Give every agent an optimiser of its own again."""
        for agent in self.agents:
            states = {name: opt.state_dict() for name, opt in agent.optimizers.items()}
            agent.make_optimizers()
            for name, state in states.items():
                agent.optimizers[name].load_state_dict(state)

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

    @torch.no_grad()
    def act(self, state: models.ActState, obs: models.Batch, mode: str) -> models.ActState:
        """As ``Agent.act``, of all members: (P, N, ...)."""
        act = functools.partial(self.agent.plain_act, mode=mode, generator=self.generator)
        return self.each(act, state, obs)


def replaced(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """``leaves`` with these tensors in place of theirs."""
    left = iter(tensors)
    return [next(left) if isinstance(x, Tensor) else x for x in leaves]


# ---------------------------------------------------------------- the loop


class Population:
    """Runs of one config that are trained together, to their ends or until they fail.

    What a run does, and when, depends on itself alone: it collects until its next update is due,
    and updates are made when all runs that go on have come to one. A run that ends or fails leaves
    the others to go on. report: takes lines for people. ``poll`` may be replaced, as of ``Run``.
    """

    def __init__(self, runs: Sequence[Run], report: Callable[[str], None] = print):
        self.runs, self.report = list(runs), report
        self.poll: Callable[[], None] = lambda: None
        self.active: list[Run] = []
        self.stack: Stack | None = None
        self.failed: dict[Run, str] = {}
        self.feed = Feed(runs[0].device)
        for run in runs:
            run.poll = lambda: self.poll()

    def train(self) -> None:
        """Raises OSError and what ``poll`` raises, where all runs can be saved and continued."""
        groups: dict[int, list[Run]] = {}  # by updates; more than one where some went on alone
        for run in self.runs:
            groups.setdefault(-1 if over(run) else run.updates, []).append(run)
        for run in groups.pop(-1, []):
            self._try(run, run.finish)
        for group in groups.values():
            self._train(group)

    def _train(self, runs: list[Run]) -> None:
        self.active = runs
        while self.active:
            self.poll()
            self._restack()
            waiting = [run for run in self.active if not run.update_due]
            if ended := [run for run in waiting if over(run)]:
                self._leave(ended)
            elif waiting:
                for run in waiting:
                    self._try(run, functools.partial(run.run_periodic, self.save))
                if not self.failed.keys() & waiting:
                    self._collect(waiting)
            elif self.stack:
                self._learn()
            else:
                self.active[0].learn()

    def totals(self) -> tuple[int, int, float | None]:
        """The mean step, all updates, the mean of the last returns."""
        steps, updates = (sum(getattr(run, x) for run in self.runs) for x in ("step", "updates"))
        found = [run.last_return for run in self.runs if run.last_return is not None]
        return steps // len(self.runs), updates, float(np.mean(found)) if found else None

    def save(self) -> None:
        """A checkpoint of every run that goes on, all of this moment."""
        moment = 1 + max((run.moment for run in self.active), default=0)
        for run in list(self.active):
            run.moment = moment
            self._try(run, run.save)

    def _restack(self) -> None:
        """Have the runs that go on in one stack, or a single one by itself."""
        agents = [run.agent for run in self.active]
        if self.stack and self.stack.agents != agents:
            self.stack.dissolve()
            self.stack = None
            self.save()
        if self.stack is None and len(agents) > 1:
            first = self.active[0]
            template = models.make_agent(first.envs, first.config, first.device)
            self.stack = Stack(template, agents, [run.generator for run in self.active])

    def _leave(self, ended: Sequence[Run]) -> None:
        """These are over. All are saved first: whatever kills the process, the others go on in the
        same company.
        """
        self.save()
        self.active = [run for run in self.active if run not in ended]
        for run in ended:
            if run not in self.failed:
                self._try(run, run.finish)

    def _try(self, run: Run, fn: Callable[[], None]) -> None:
        """``fn()``; what breaks this run alone takes it out, as its last checkpoint has it."""
        try:
            fn()
        except (Failure, EnvError) as error:
            self.failed[run] = f"{run.logdir}: {error}"
            others = sum(other is not run for other in self.active)
            self.report(f"{self.failed[run]}; {others} others go on")
            if run in self.active:
                self.active.remove(run)

    def _collect(self, runs: Sequence[Run]) -> None:
        """One step of every environment of these runs, all at the same time."""
        actions: dict[Run, np.ndarray | None] = {}
        modes: dict[str, list[tuple[Run, tuple]]] = {}
        for run in runs:
            inputs = None if run.obs is None else run.policy_inputs()
            if isinstance(inputs, tuple):
                modes.setdefault(inputs[2], []).append((run, inputs[:2]))
            else:
                actions[run] = inputs
        for mode, found in modes.items():
            acting, inputs = zip(*found, strict=True)
            if self.stack and list(acting) == self.active:
                actions |= zip(acting, self._choose(inputs, mode), strict=True)
            else:
                actions |= {run: run.choose(*given, mode) for run, given in found}
        for run in runs:
            self._try(run, functools.partial(run.envs.send, actions[run]))
        for run in runs:
            if run not in self.failed:
                self._try(run, functools.partial(run.store, actions[run]))

    def _learn(self) -> None:
        """One update of every member, each from its own replay."""
        shared = self.feed.rows()
        samples = []
        for i, run in enumerate(self.active):
            out = {key: x[i] for key, x in shared.items()} if shared else None
            samples.append(run.sample(out))
        if shared is None:
            shared = {key: np.stack([rows[key] for rows in samples]) for key in samples[0]}
        batch = self.feed.send(shared)
        del batch["is_last"]
        metrics = self.stack.update(batch).unbind(-1)  # P times (M,)
        found = self.stack.agent.carries  # (P, B, T-1, ...)
        for i, (run, own) in enumerate(zip(self.active, metrics, strict=True)):
            run.agent.metric_names = self.stack.agent.metric_names
            run.count_update(own, {key: x[i] for key, x in found.items()})

    def _choose(self, inputs: Sequence[tuple], mode: str) -> list[np.ndarray]:
        """inputs: state and obs of every member, as of ``Run.policy_inputs``. -> actions (N, A)."""
        size = self.stack.agent.world_model.dynamics.fixed_size
        states = [state._replace(carry=size(state.carry)) for state, _ in inputs]
        obs = {key: np.stack([obs[key] for _, obs in inputs]) for key in inputs[0][1]}
        new = self.stack.act(stack_trees(states), self.stack.agent.tensors(obs), mode)
        for i, run in enumerate(self.active):
            run.act = pytree.tree_map(lambda x, i=i: x[i], new)
        return list(new.action.cpu().numpy())


def over(run: Run) -> bool:
    """Whether a run has nothing left to do but its end: the last record, evaluation, checkpoint."""
    return run.step >= run.config.steps and not run.update_due


def roll_back(folders: Sequence[Path]) -> None:
    """Have the runs in these folders begin from one moment.

    A process that was killed while it saved has left some a checkpoint later than the others: these
    return to the one before. Raises CheckpointError.
    """
    moments = {}
    for folder in folders:
        state = checkpoint.find_checkpoint(folder / "checkpoints", run_state.FIELDS)[0]
        if state and state["step"] < state["config"]["steps"]:
            moments[folder / "checkpoints"] = state.get("moment", 0)
    newest = max(moments.values(), default=0)
    if newest - 1 not in moments.values():
        return
    for folder, moment in moments.items():
        if moment == newest and (before := folder / "previous.pt").exists():
            state = checkpoint.load_checkpoint(before)
            if state.get("moment", 0) == newest - 1:
                before.replace(folder / "latest.pt")
