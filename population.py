"""Several seeds of one config in one process: one update of all of them (docs/population.md).

A member is an ordinary ``training.Run`` whose parameters are rows of a stack
(``hidreamer.stacked``): it logs, evaluates and saves as if it were alone, and can be continued
alone.

Shapes: P members, N environments of a member.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils import _pytree as pytree

import models
import run_config
import run_state
from envs import EnvError
from hidreamer import checkpoint
from hidreamer.feed import Feed
from hidreamer.stacked import Stack, stack_trees, steps_made
from tools import Config, ConfigError
from training import Failure, Run


class Population:
    """Runs of one config that are trained together, to their ends or until they fail.

    What a run does, and when, depends on itself alone: it collects until its next update is due,
    and updates are made when all runs that go on have come to one. A run that ends or fails leaves
    the others to go on; those that end between the same two updates leave together, as every other
    set of runs is another stack. report: takes lines for people. ``poll`` may be replaced, as of
    ``Run``.
    """

    def __init__(self, runs: Sequence[Run], report: Callable[[str], None] = print):
        self.runs, self.report = list(runs), report
        self.poll: Callable[[], None] = lambda: None
        self.active: list[Run] = []
        self.stack: Stack | None = None  # of several that go on
        self.update: Callable | None = None  # of all in it
        self.failed: dict[Run, str] = {}
        self.feed: Feed | None = None  # to the stack; each has batches of another shape
        for run in runs:
            run.poll = lambda: self.poll()

    def train(self) -> None:
        """Raises OSError and what ``poll`` raises, where all runs can be saved and continued."""
        groups: dict[tuple, list[Run]] = {}  # more than one where some went on alone
        for run in self.runs:
            if over(run):
                self._try(run, run.finish)
            else:
                made = run.updates, steps_made(run.agent)
                groups.setdefault(made, []).append(run)
        if len(groups) > 1:
            seeds = (" ".join(str(run.config.seed) for run in group) for group in groups.values())
            self.report(
                f"one after the other, as their updates are not as many: {'; '.join(seeds)}"
            )
        for group in groups.values():
            self._train(group)

    def _train(self, runs: list[Run]) -> None:
        self.active = runs
        while self.active:
            self.poll()
            self._restack()
            waiting = [run for run in self.active if not run.update_due]
            if collecting := [run for run in waiting if not over(run)]:
                for run in collecting:
                    if run not in self.failed:  # in the checkpoint of another
                        self._try(run, functools.partial(run.run_periodic, self.save))
                if not self.failed.keys() & collecting:
                    self._collect(collecting)
            elif waiting:
                self._leave(waiting)
            elif self.stack:
                self._learn()
            elif self.active:
                self.active[0].learn()

    def totals(self) -> tuple[int, int, float | None]:
        """The mean step, all updates, the mean of the last returns."""
        steps, updates = (sum(getattr(run, x) for run in self.runs) for x in ("step", "updates"))
        found = [run.last_return for run in self.runs if run.last_return is not None]
        return steps // len(self.runs), updates, float(np.mean(found)) if found else None

    def save(self) -> None:
        """A checkpoint of every run that goes on, all of this moment."""
        saved: list[Run] = []
        while self.active and saved != self.active:  # again without those that failed to
            saved = list(self.active)
            before = {run.config.seed: run.moment for run in saved}
            furthest = max(run.step for run in saved)
            for run in saved:
                run.moment, run.members_before = 1 + max(before.values()), before
                run.every["checkpoint"].done(furthest)  # those behind come to that step as well
                self._try(run, run.save)

    def _restack(self) -> None:
        """Have the runs that go on in one stack, or a single one by itself."""
        if self.stack and self.stack.agents != [run.agent for run in self.active]:
            self.stack.dissolve()
            self.stack = self.update = None
            if any(run.unsaved for run in self.active):  # one failed
                self.save()
        agents = [run.agent for run in self.active]
        for run in self.active:
            run.members = len(agents)
        if self.stack is None and len(agents) > 1:
            first = self.active[0]
            template = models.make_agent(first.envs, first.config, first.device)
            self.stack = Stack(template, agents, [run.generator for run in self.active])
            self.feed = Feed(first.device)
            self.update = self.stack.make_update()

    def _leave(self, ended: Sequence[Run]) -> None:
        """These are over. All are saved first: whatever kills the process, the others go on in the
        same set of runs.
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
            self.report(f"{self.failed[run]}; {others} of {len(self.runs)} go on")
            if run in self.active:
                self.active.remove(run)

    def _collect(self, runs: Sequence[Run]) -> None:
        """One step of every environment of these runs, all at the same time."""
        given = {run: None if run.obs is None else run.policy_inputs() for run in runs}
        acting = [run for run in runs if isinstance(given[run], tuple)]
        inputs = [given[run] for run in acting]
        if self.stack and acting == self.active and len({mode for *_, mode in inputs}) == 1:
            chosen = self._choose(inputs)
        else:
            chosen = [run.choose(*one) for run, one in zip(acting, inputs, strict=True)]
        actions = given | dict(zip(acting, chosen, strict=True))
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

    def _choose(self, inputs: Sequence[tuple]) -> list[np.ndarray]:
        """inputs: of every member, as of ``Run.policy_inputs``, of one mode. -> actions (N, A)."""
        size = self.stack.agent.world_model.dynamics.fixed_size
        states = [state._replace(carry=size(state.carry)) for state, *_ in inputs]
        obs = {key: np.stack([obs[key] for _, obs, _ in inputs]) for key in inputs[0][1]}
        new = self.stack.act(stack_trees(states), self.stack.agent.tensors(obs), inputs[0][2])
        for i, run in enumerate(self.active):
            run.act = pytree.tree_map(lambda x, i=i: x[i], new)
        return list(new.action.cpu().numpy())


class Lines:
    """Prints what runs report, with the seed before it; in a ``with`` block what several report is
    kept, and printed once at its end.
    """

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self.kept: dict[str, list[int]] | None = None  # seeds by what they said

    def __call__(self, seed: int, text: str) -> None:
        if self.kept is None:
            self.report(f"{seed}: {text}")
        else:
            self.kept.setdefault(text, []).append(seed)

    def __enter__(self) -> None:
        self.kept = {}

    def __exit__(self, *error: object) -> None:
        kept, self.kept = self.kept, None
        for text, seeds in kept.items():
            self.report(f"{' '.join(map(str, seeds))}: {text}")


def over(run: Run) -> bool:
    """Whether a run has nothing left to do but its end: the last record, evaluation, checkpoint."""
    return run.step >= run.config.steps and not run.update_due


def check_alike(folders: Mapping[Path, Config]) -> None:
    """Raises ConfigError where runs in these folders differ in more than their seeds: resumed
    without --configs each has its own config.
    """
    first, *others = ((folder, config.flat()) for folder, config in folders.items())
    for folder, config in others:
        for key, value in config.items():
            if key not in ("seed", "logdir") and value != first[1][key]:
                raise ConfigError(
                    f"{folder} and {first[0]} differ in {key} ({value}, {first[1][key]}), where"
                    " seeds share a config: give --configs and keys, or continue them one by one"
                )


def roll_back(folders: Mapping[Path, Config]) -> None:
    """Have the runs in these folders begin from one moment.

    A process that was killed while it saved has left some a checkpoint later than the others: these
    return to the one before. folders: with the config that each is to be continued with.
    Raises CheckpointError, ConfigError; nothing was changed then.
    """
    states = {}
    for folder, config in folders.items():
        state = checkpoint.find_checkpoint(folder / "checkpoints", run_state.FIELDS)[0]
        if state:
            run_config.check_same_run(folder, state["config"], config)
            states[folder] = state
    moments = {state["config"]["seed"]: state.get("moment", 0) for state in states.values()}
    newest, before = max(moments.values(), default=0), {}
    latest = [folder for folder, state in states.items() if state.get("moment", 0) == newest]
    for folder in latest:
        before |= states[folder].get("company", {})
    if not before.items() & moments.items():  # all of these members have this moment, or went on
        return
    for folder in latest:
        if (previous := folder / "checkpoints" / "previous.pt").exists():
            state = checkpoint.load_checkpoint(previous)
            if state.get("moment", 0) < newest:
                previous.replace(previous.with_name("latest.pt"))
