"""A policy that a step of imagination can be compiled with: its random numbers come from outside.

Shapes: N states, H imagined steps, F features, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists

Shape = tuple[int, ...]
Noise = tuple[Tensor | None, ...]  # of a state: by level, uniform (N,S,1); None takes the mode


def sample_action(actor: nn.Module, x: Tensor, noise: Noise) -> Tensor:
    """Actions (N,A) in states of features x (N,F), which get no gradient from them."""
    return actor(x.detach()).sample(noise=noise)


class Sampler(NamedTuple):
    """A policy of states (N,.) -> sampled actions (N,A), which can also be ``given`` its noise.

    actor: features (N,F) -> distribution of actions (N,A).
    """

    actor: nn.Module
    generator: torch.Generator | None  # of a plain call
    noise_shapes: tuple[Shape, ...]  # of the numbers that one state's action is drawn from
    normal: bool  # whether they are normal; otherwise uniform
    sample: Callable[[nn.Module, Tensor, Noise], Tensor] = sample_action  # compiled or not

    def __call__(self, feat: Any) -> Tensor:
        return self.actor(feat.cat().detach()).sample(self.generator)

    def given(self, x: Tensor, noise: Noise) -> Tensor:
        """Of features x (N,F)."""
        return self.sample(self.actor, x, noise)


class StepNoise(NamedTuple):
    """What an imagined step is drawn from."""

    action: Noise  # the action taken in a state
    state: Noise  # the state that it leads to, by level; none after the last action


def dream_noise(
    sampler: Sampler,
    horizon: int,
    levels: Sequence[Shape],
    like: Tensor,
    sample: bool,
    generator: torch.Generator | None,
) -> list[StepNoise]:
    """Of H steps, and of the action in the state after them.

    A CPU's generator would give the same numbers if each were drawn when it is needed. Uniform ones
    come from one call; between normal ones that is impossible.

    levels: what the levels of N states are drawn from, (N, .) each; without ``sample`` modes are
    taken.
    """
    actions = [(len(like), *shape) for shape in sampler.noise_shapes]
    states = list(levels) if sample else []
    if sampler.normal:
        parts = []
        for t in range(horizon + 1):
            parts += [dists.normal(shape, like, generator) for shape in actions]
            if states and t < horizon:
                parts += dists.uniforms(states, like, generator)
    else:
        parts = dists.uniforms([*actions, *states] * horizon + actions, like, generator)
    left, steps = iter(parts), []
    for t in range(horizon + 1):
        action = tuple(next(left) for _ in actions)
        state: Noise = ()
        if t < horizon:
            state = tuple(next(left) for _ in states) or (None,) * len(levels)
        steps.append(StepNoise(action, state))
    return steps


def policy_and_noise(
    actor: Any,
    horizon: int,
    levels: Sequence[Shape],
    like: Tensor,
    sample: bool,
    generator: torch.Generator | None,
) -> tuple[Any, Callable[[], Noise]]:
    """For a loop that asks for one thing after the other: a policy of states or given actions, as
    ``actor`` is any of ``Dynamics.imagine``, and what gives the noise of each next state.
    """
    if isinstance(actor, Sampler):
        steps = dream_noise(actor, horizon, levels, like, sample, generator)
        actions, states = zip(*steps, strict=True)
        actions, states = iter(actions), iter(states)
        return lambda feat: actor.given(feat.cat(), next(actions)), lambda: next(states)
    if not sample:
        return actor, lambda: (None,) * len(levels)
    return actor, lambda: tuple(dists.uniforms(levels, like, generator))
