"""Whether a faster update computes what the eager one does, and single functions what they should:
by comparison on this machine.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import measure  # noqa: F401  finds the project's modules
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

import models
import tools
from hidreamer import capture, precision
from hidreamer.spaces import random_rows
from hidreamer.stacked import Stack
from hidreamer.transformer import KV, Bias, as_bias, attend, attend_shared

IMAGE = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
SMALL = {
    "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "grid": spaces.Box(0, 1, (6, 6, 4), np.bool_),
}
ACTIONS = {
    "discrete": (spaces.Discrete(6), 6),
    "multi": (spaces.MultiDiscrete([2, 3]), 5),
    "continuous": (spaces.Box(-1, 1, (2,), np.float32), 2),
}
UPDATES = 8  # of a comparison: after the warm-up all of them are replays
METRICS, WEIGHTS = 0.02, 0.05  # largest differences that count as equal, as ``compare`` has them
KERNEL = 1e-3  # the same of a single function in float32

Update = Callable[[models.Batch], Tensor]
Make = Callable[[], tuple[models.Agent, list[models.Batch]]]


class Wrong(Exception):
    """Numbers that should be equal are not."""


class Difference(NamedTuple):
    """Of a faster update to the eager one."""

    metrics: list[float]  # of every update, largest relative difference of a metric
    weights: float  # after all of them, relative to how far the eager update moved the weights
    worst: str  # the metric that differs most

    def check(self, metrics: float = METRICS, weights: float = WEIGHTS) -> dict[str, Any]:
        """-> the differences as numbers to print. Raises Wrong where they are not small."""
        report = {
            "metrics": [float(f"{x:.1e}") for x in self.metrics],
            "weights": float(f"{self.weights:.1e}"),
            "worst": self.worst,
        }
        # This way round NaN is wrong, too.
        if not (all(x <= metrics for x in self.metrics) and self.weights <= weights):
            raise Wrong(json.dumps(report))
        return report


def compare(make: Make, faster: Callable[[models.Agent, torch.Generator], Update]) -> Difference:
    """Updates of two equal agents on the same batches with the same draws, one of them ``faster``.

    The batches differ, and all updates are compared, so that it is replays that are tested, not the
    ordinary calls before them.
    """
    runs, moved = [], 0.0
    for way in (eager, faster):
        agent, batches = make()
        generator = seeded(agent)
        before, update = flat_weights(agent), way(agent, generator)
        metrics = torch.stack([update(batch).clone() for batch in batches])  # (updates, M)
        after = flat_weights(agent)
        runs.append((metrics, after))
        moved = moved or (after - before).norm().item()
    (truth, weights), (found, other) = runs
    return difference(agent, truth, found, (weights - other).norm().item() / moved)


def flat_weights(agent: models.Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.parameters()])


def small_agent(
    device: torch.device, act: str = "discrete", updates: int = UPDATES, **overrides: Any
) -> tuple[models.Agent, list[models.Batch]]:
    """An agent of debug size that sees everything, and as many batches, the same each time."""
    few = {"imag.horizon": 2}  # rounding may turn a draw: the more of them, the likelier
    return make_agent(["debug"], device, SMALL, act, updates, **few, **overrides)


def make_agent(
    presets: list[str],
    device: torch.device,
    obs: dict[str, spaces.Space] = IMAGE,
    act: str = "discrete",
    batches: int = 1,
    **overrides: Any,
) -> tuple[models.Agent, list[models.Batch]]:
    config = tools.load_config(presets, {"device": device.type, **overrides})
    precision.set_precision(config, device)
    torch.manual_seed(0)
    space, dim = ACTIONS[act]
    agent = models.Agent(obs, space, dim, config).to(device)
    if device.type == "cuda":
        agent = agent.to(memory_format=torch.channels_last)  # as ``models.make_agent`` does
    agent.make_optimizers()
    shape = config.replay.batch, config.replay.length
    rows = random_rows(obs, space, shape[0] * batches, shape[1])
    parts = {key: np.split(x, batches) for key, x in rows.items()}
    return agent, [agent.tensors({key: x[i] for key, x in parts.items()}) for i in range(batches)]


def seeded(agent: models.Agent) -> torch.Generator:
    """The random numbers of a run of it."""
    return torch.Generator(next(agent.parameters()).device).manual_seed(1)


def eager(agent: models.Agent, generator: torch.Generator) -> Update:
    return functools.partial(agent.update, generator=generator)


def captured(agent: models.Agent, generator: torch.Generator) -> Update:
    """The update as one graph, not compiled; eager where there are no graphs."""
    update, cuda = eager(agent, generator), next(agent.parameters()).is_cuda
    return capture.Captured(update, generator=generator) if cuda else update


def compiled(agent: models.Agent, generator: torch.Generator) -> Update:
    return agent.make_update("on", generator)


def replay_equals_eager(device: torch.device, **overrides: Any) -> dict[str, Any]:
    make = functools.partial(small_agent, device, **overrides)
    return compare(make, captured).check()


def compiled_equals_eager(device: torch.device, **overrides: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    # compiled code would draw other numbers
    with torch._inductor.config.patch(fallback_random=True):
        make = functools.partial(small_agent, device, updates=6, **overrides)
        return compare(make, compiled).check()


def small_population(
    device: torch.device, **overrides: Any
) -> tuple[list[models.Agent], Stack, list[list[models.Batch]], list[models.Batch]]:
    """-> copies of two members, their stack, the batches of each, which differ, those of both."""
    agent, batches = small_agent(device, updates=6, **overrides)
    members = [copy.deepcopy(agent) for _ in range(2)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(1.1)
    alone, own = copy.deepcopy(members), []
    for seed in range(2):
        own.append(torch.Generator(device).manual_seed(seed))
    each, both = [batches, batches[::-1]], []
    for pair in zip(*each, strict=True):
        both.append({key: torch.stack([x[key] for x in pair]) for key in pair[0]})
    return alone, Stack(agent, members, own), each, both


def recorded_updates(stack: Stack, batches: list[models.Batch]) -> Tensor:
    """Metrics (updates, M, P), on CUDA of one graph. Raises Wrong where recording failed."""
    update = stack.make_update()
    metrics = torch.stack([update(batch).clone() for batch in batches])
    if stack.member.is_cuda and not (update.capture and update.run.graph):
        raise Wrong("the update of a population was not recorded")
    return metrics


def population_equals_alone(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """Updates of two members at once, on CUDA as one graph, and of each alone."""
    alone, stack, each, both = small_population(device, **overrides)
    found, report = recorded_updates(stack, both), {}
    for i, agent in enumerate(alone):
        before, generator = flat_weights(agent), torch.Generator(device).manual_seed(i)
        truth = torch.stack([agent.update(batch, generator) for batch in each[i]])
        distance = (flat_weights(agent) - flat_weights(stack.agents[i])).norm()
        moved = (flat_weights(agent) - before).norm()
        checked = difference(agent, truth, found[..., i], distance / moved).check()
        report |= {f"member {i}, {key}": x for key, x in checked.items()}
    return report


def population_replays_equal_eager(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """The updates of two members at once as one graph, and as ordinary calls."""
    (stack, both), (eager_stack, _) = (
        small_population(device, **overrides)[1::2] for _ in range(2)
    )
    found = recorded_updates(stack, both).flatten(1)  # (updates, M * P)
    truth = torch.stack([eager_stack.update(batch) for batch in both]).flatten(1)
    weights = (torch.cat([flat_weights(x) for x in s.agents]) for s in (stack, eager_stack))
    distance = torch.dist(*weights).item()
    error = (truth - found).abs() / truth.abs().clamp(min=0.1)
    worst = stack.agent.metric_names[int(error.amax(0).argmax()) // 2]
    return Difference(error.amax(1).tolist(), distance, worst).check(1e-3, 1e-3)


def resume_equals_going_on(device: torch.device, **overrides: Any) -> dict[str, Any]:
    """Updates after a checkpoint, of its agent and of another one that is restored from it."""
    half = capture.WARMUP + 1
    agent, batches = small_agent(device, updates=2 * half, **overrides)
    generator = seeded(agent)
    update = captured(agent, generator)
    for batch in batches[:half]:
        update(batch)
    state, draws = copy.deepcopy(agent.save_state()), generator.get_state()
    before = flat_weights(agent)
    straight = torch.stack([update(batch).clone() for batch in batches[half:]])
    other, _ = small_agent(device, **overrides)
    other.load_state(state)
    generator = seeded(other)
    generator.set_state(draws)
    update = captured(other, generator)
    found = torch.stack([update(batch).clone() for batch in batches[half:]])
    distance = (flat_weights(agent) - flat_weights(other)).norm()
    return difference(
        agent, straight, found, distance / (flat_weights(agent) - before).norm()
    ).check()


def difference(
    agent: models.Agent, truth: Tensor, found: Tensor, weights: Tensor | float
) -> Difference:
    """Of metrics (updates, M)."""
    error = (truth - found).abs() / truth.abs().clamp(min=0.1)
    worst = agent.metric_names[int(error.amax(0).nan_to_num(torch.inf).argmax())]
    return Difference(error.amax(1).tolist(), float(weights), worst)


def gap(found: Tensor, truth: Tensor) -> float:
    """Largest difference, of numbers from 1 on relative."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return ((found - truth).abs() / truth.abs().clamp(min=1.0)).max().item()


def log_ndtr(device: torch.device) -> dict[str, Any]:
    """The one function that CUDA compiles when it is first called, and its gradient."""
    found = []
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        x = torch.linspace(-8, 8, 201, dtype=dtype, device=where).requires_grad_()
        y = torch.special.log_ndtr(x)
        found.append((y, torch.autograd.grad(y.sum(), x)[0]))
    gaps = {
        name: gap(*pair)
        for name, pair in zip(("value", "gradient"), zip(*found, strict=True), strict=True)
    }
    return checked(gaps, KERNEL)


def attention(device: torch.device) -> dict[str, Any]:
    """Masked attention in bfloat16 as the transformer calls it, against float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 4, 1, 24, 16, device=device) for _ in range(3))
    mask = torch.ones(24, 24, dtype=torch.bool, device=device).tril()
    episodes = torch.rand(12, 1, 24, device=device).lt(0.1).cumsum(-1)
    mask = mask & (episodes.unsqueeze(-1) == episodes.unsqueeze(-2))  # (12, 1, 24, 24)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        each = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(each[0], KV(*each[1:]), mask)
        found.append((out, *torch.autograd.grad(out.square().sum(), each)))
    names = ("value", "query", "keys", "values")
    gaps = {name: gap(*pair) for name, pair in zip(names, zip(*found, strict=True), strict=True)}
    return checked(gaps, 0.1)  # bfloat16 has 3 digits, and these are sums of many


def dream_inputs(each: list[Tensor], seen: Tensor, mine: Tensor) -> tuple[Any, ...]:
    """Queries, own and prefix K/V, masks -> what ``attend_shared`` takes; own in two parts."""
    q, keys, values, *prefix = each
    parts, bias, cut = [], [], mine.shape[-1] // 3
    for part in (slice(cut), slice(cut, None)):
        parts.append(KV(keys[..., part, :], values[..., part, :]))
        bias.append(as_bias(mine[:, part], q.dtype))
    return q, parts, KV(*prefix), Bias(as_bias(seen, q.dtype), bias)


@torch.no_grad()
def dream_attention(device: torch.device) -> dict[str, Any]:
    """The attention of dreams, over a shared prefix and own positions, against float64."""
    torch.manual_seed(0)
    report: dict[str, float] = {}
    bounds = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 0.05}  # numbers of about 1
    for name, bound in bounds.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        for queries, own in ((1, 5), (2, 37)):
            q = torch.randn(4, 60, queries, 3, 64, device=device).permute(0, 3, 1, 2, 4)
            kept = torch.randn(2, 4, 3, 60, own + 8, 64, device=device)[..., :own, :]
            prefix = KV(*torch.randn(2, 4, 3, 130, 64, device=device))
            seen = torch.rand(4, 1, 60, queries, 130, device=device) < 0.3
            mine = torch.ones(queries, own, dtype=torch.bool, device=device).tril(own - queries)
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            each = [x.to(dtype) for x in (q, *kept, *prefix)]
            found = attend_shared(*dream_inputs(each, seen, mine))
            # in float64, of which there is no such kernel
            truth = attend_shared(*dream_inputs([x.double() for x in each], seen, mine))
            report[f"{name}, {own} own"] = gap(found, truth) / bound
    return checked(report, 1.0)  # of the bounds


def checked(gaps: dict[str, float], bound: float) -> dict[str, Any]:
    report = {name: float(f"{x:.1e}") for name, x in gaps.items()}
    if not all(x <= bound for x in gaps.values()):
        raise Wrong(json.dumps(report))
    return report
