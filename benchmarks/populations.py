"""What a population does on a GPU beside its updates (``equality``): acting from a graph, and going
on without one where recording fails, and without a member.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import equality
import torch
from equality import Wrong, checked, flat_weights, gap, small_population
from torch import Tensor

import models
import tools
from hidreamer import capture
from hidreamer.stacked import Stack, stack_trees
from population import Population
from training import Failure, Run

EXACT = 1e-4  # largest difference between two ways through the same operations
STEPS = 12
UPDATES = 2 * capture.WARMUP  # by then an update is a replay


def recorded_acting(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """Acting of two members from a graph, and by ordinary calls. Raises Wrong."""
    (stack, each), (plain, _) = (small_population(device, **overrides)[1:3] for _ in range(2))
    stack.make_update()
    found = acted(stack, each)
    if stack.member.is_cuda:
        graphs = stack.captured_act.graphs.values()
        if not (stack.captured_act.works and graphs and all(act.graph for act in graphs)):
            raise Wrong("acting of a population was not recorded")
    return compared(found, acted(plain, each))


def without_graphs(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """Recording an update and acting fails, as a read on the host makes it: one line for each, and
    all is as by ordinary calls. On a CPU the recording is a stand-in that fails. Raises Wrong.
    """
    (stack, each, both), (plain, _, _) = (
        small_population(device, **overrides)[1:] for _ in range(2)
    )
    for name in ("update", "plain_act"):
        setattr(stack, name, reading(getattr(stack, name)))
    with warnings.catch_warnings(record=True) as seen, standing_in(device):
        warnings.simplefilter("always")
        if device.type == "cuda":
            update = stack.make_update()
        else:
            stack.captured_act = capture.CapturedAct(stack, stack.own, Broken)
            update = capture.FastUpdate(stack, None, True, stack.own)
        found = [update(batch).flatten() for batch in both] + acted(stack, each)
    texts = [str(warning.message) for warning in seen]
    for what in ("the update", "acting"):
        count = sum(text.startswith(f"cannot record {what}") for text in texts)
        if count != 1:
            raise Wrong(f"recording {what} failed with {count} lines of {len(texts)}: {texts[:3]}")
    truth = [plain.update(batch).flatten() for batch in both] + acted(plain, each)
    weights = ([flat_weights(agent) for agent in x.agents] for x in (stack, plain))
    found, truth = (x + list(y) for x, y in zip((found, truth), weights, strict=True))
    return compared(found, truth) | {"line": next(x for x in texts if x.startswith("cannot"))[:120]}


def reading(fn: Any) -> Any:
    """``fn``, and a read on the host of what it returns, which a recording does not allow."""

    def read(*args: Any, **kwargs: Any) -> Any:
        out = fn(*args, **kwargs)
        (out if isinstance(out, Tensor) else out.action).sum().item()
        return out

    return read


class Broken(capture.Captured):
    """Fails where a graph would be recorded, on a device that has none."""

    def __call__(self, batch: Any) -> Tensor:
        self.calls += 1
        out = self.fn(batch)
        if self.calls > capture.WARMUP:
            raise RuntimeError("a stand-in for a recording that fails")
        return out


def standing_in(device: torch.device) -> Any:
    """``Broken`` as what records updates, where the device cannot."""
    kind = capture.Captured if device.type == "cuda" else Broken
    return mock.patch.object(capture, "Captured", kind)


def acted(stack: Stack, each: Sequence[Sequence[models.Batch]]) -> list[Tensor]:
    """Actions and memories (P,B,.), one a step, of members that each see their batches' steps."""
    size, rows = stack.agent.world_model.dynamics.fixed_size, len(each[0][0]["is_first"])
    states, out = [agent.initial(rows) for agent in stack.agents], []
    state = stack_trees([state._replace(carry=size(state.carry)) for state in states])
    for obs in observations(each):
        state = stack.act(state, obs, "train")
        out.append(torch.cat([state.action.float(), state.carry.deter.float()], -1))
    return out


def observations(each: Sequence[Sequence[models.Batch]]) -> Iterator[models.Batch]:
    """{key: (P,B,...)} of STEPS steps, from batches that lie one behind the other."""
    keys, step = (*equality.SMALL, "is_first"), 0
    for batches in zip(*each, strict=True):
        for t in range(batches[0]["is_first"].shape[1]):
            if step < STEPS:
                yield {key: torch.stack([batch[key][:, t] for batch in batches]) for key in keys}
            step += 1


def compared(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    """Raises Wrong where they differ."""
    gaps = [gap(x, y) for x, y in zip(found, truth, strict=True)]
    return checked({"largest difference": max(gaps)}, EXACT) | {"compared": len(gaps)}


class Leaving(Run):
    """Its seed 0 fails when its update is a replay of the graph."""

    def store(self, action: Any) -> None:
        super().store(action)
        if self.config.seed == 0 and self.updates >= UPDATES:
            raise Failure("made to fail")


def going_on(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """Three seeds, one of which leaves: the others are recorded anew, and come to their end. Raises
    Wrong.
    """
    over = {"task": "dummy_vector", "device": device.type, "steps": 80, "replay.ratio": 16}
    over |= {"video": False, "eval_episodes": 0, **overrides}
    with contextlib.ExitStack() as stack:
        folder, runs = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
        for seed in range(3):
            config = tools.load_config(["debug"], over | {"seed": seed})
            runs.append(Leaving(config, folder / str(seed), None, device, str))
            stack.callback(runs[-1].close)
        population = Population(runs, str)
        stacks: list[Stack] = []

        def poll() -> None:
            if population.stack and population.stack not in stacks:
                stacks.append(population.stack)
            recorded = device.type == "cuda" and runs[1].updates == 2 * UPDATES
            if recorded and population.stack and not population.update.run.graph:
                raise Wrong("the update of those that went on was not recorded")

        population.poll = poll
        population.train()
        report = {"steps": [run.step for run in runs], "updates": [run.updates for run in runs]}
    sizes = [len(one.agents) for one in stacks]
    if list(population.failed) != runs[:1] or sizes[:2] != [3, 2] or min(report["steps"][1:]) < 80:
        raise Wrong(f"{report}, stacks of {sizes}, {list(population.failed.values())}")
    return report
