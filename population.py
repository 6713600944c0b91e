"""Several seeds of one config in one process: one update of all of them (docs/population.md).

A member is an ordinary ``training.Run`` whose parameters are rows of a stack
(``hidreamer.stacked``): it logs, evaluates and saves as if it were alone, and can be continued
alone.

Shapes: P members, N environments of a member.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch.utils import _pytree as pytree

import models
import run_state
from envs import EnvError
from hidreamer import checkpoint
from hidreamer.feed import Feed
from hidreamer.stacked import Stack, stack_trees
from training import Failure, Run


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
            self.update = self.stack.make_update()

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
        metrics = self.update(batch).unbind(-1)  # P times (M,)
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
