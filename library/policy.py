"""The agent's policy as a callable with a memory, for any Gymnasium loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from envs.base import resize
from envs.spaces import layout
from hidreamer.dynamics.base import Post
from library.checks import array, cast, random
from models import ActState


class Policy:
    """``action = policy(obs)``: follows an episode and says what to do.

        obs, info = env.reset()
        policy.reset()
        while True:
            obs, reward, terminated, truncated, info = env.step(policy(obs))

    agent: a ``LoadedAgent``. count: of environments stepped together, whose observations and
    actions are then stacked (count, ...). greedy: the likeliest action instead of a sampled one.
    generator: of random numbers, for the states are drawn in any case; None is torch's default one.
    state: of ``models.Agent``, with the last ``action`` (N,A). post: what the world model found
    at the last observation, (N,1,...).
    """

    def __init__(
        self,
        agent: Any,
        count: int | None = None,
        greedy: bool = True,
        generator: torch.Generator | None = None,
    ):
        random(generator, agent.device)
        self.agent, self.count, self.greedy, self.generator = agent, count, greedy, generator
        self.post: Post | None = None
        self.reset()

    def reset(self) -> None:
        """The next observation begins new episodes."""
        rows = self.count or 1
        self.state: ActState = self.agent.model.initial(rows)
        self.first = np.ones(rows, bool)

    def __call__(self, obs: Any, reset: Any = False) -> Any:
        """An action of the environment's own ``action_space``; with ``count`` several, stacked (a
        list of them where they are dicts or tuples).

        obs: {key: array} of the agent's observations, or the array alone where there is one.
        reset: whether it begins a new episode; with ``count`` (count,) flags. Vector environments
        of Gymnasium begin a new one in the step after its end (``AutoresetMode.NEXT_STEP``): these
        are then ``terminated | truncated`` not of the step that gave ``obs`` but of that before.
        """
        self.see(obs, reset)
        self.act()
        actions = self.state.action.cpu().numpy()
        actions = [self.agent.env_action(action) for action in actions]
        if not self.count:
            return actions[0]
        return actions if isinstance(actions[0], dict | tuple) else np.stack(actions)

    def see(self, obs: Any, reset: Any = False) -> None:
        """Take in an observation (see ``__call__``), which the last action led to."""
        flags = np.asarray(reset, bool)
        if flags.shape not in ((), self.first.shape):
            raise ValueError(f"reset is {flags.shape}, not {self.first.shape}")
        first = np.broadcast_to(flags, self.first.shape) | self.first
        rows = {key: x if self.count else x[None] for key, x in self.read(obs).items()}
        inputs = self.agent.model.tensors(rows | {"is_first": first})
        carry, self.post = self.agent.model.follow(self.state, inputs, self.generator)
        self.state = self.state._replace(carry=carry)
        self.first = np.zeros_like(first)

    def act(self, action: np.ndarray | None = None) -> np.ndarray:
        """Choose, or accept ``action`` as taken. -> the agent's vector, (A,) or (count,A)."""
        if action is None:
            feat = self.post.feat.map(lambda x: x[:, 0])
            mode = "greedy" if self.greedy else "train"
            chosen = self.agent.model.choose(feat, mode, self.generator)
        else:
            chosen = self.agent.action_vector(action).reshape(self.state.action.shape)
        self.state = self.state._replace(action=chosen)
        found = chosen.cpu().numpy()
        return found if self.count else found[0]

    def read(self, obs: Any) -> dict[str, np.ndarray]:
        """The agent's observations, with or without ``count`` in front. Raises ValueError."""
        spaces = self.agent.obs_space
        if not isinstance(obs, Mapping):
            if len(spaces) > 1:
                names = ", ".join(spaces)
                raise ValueError(f"an observation of this agent is a dict of {names}")
            obs = {next(iter(spaces)): obs}
        if missing := spaces.keys() - obs.keys():
            raise ValueError(f"the observation has no {sorted(missing)[0]}")
        lead = (self.count,) if self.count else ()
        return {key: fit(key, space, obs[key], lead) for key, space in spaces.items()}


def fit(key: str, space: Box, value: Any, lead: tuple[int, ...]) -> np.ndarray:
    """``value`` as an array (*lead, ...) of ``space``: pictures are laid out and scaled as training
    does, numbers of choices become one-hots. Raises ValueError.
    """
    name, shape = f"observation {key!r}", (*lead, *space.shape)
    x = array(name, value)
    if x.shape[: len(lead)] != lead:
        raise ValueError(f"{name} is {x.shape}; {lead[0]} environments have one each: {shape}")
    if x.shape == shape:
        return cast(name, x, space.dtype)
    if space.dtype == np.uint8 and x.dtype == np.uint8:
        own = x.shape[len(lead) :]
        found = layout(Box(0, 255, own, np.uint8))  # as training reads a picture of this shape
        if found and found.shape[2] == space.shape[2]:
            pictures = x.reshape(-1, *own)
            scaled = [
                resize(picture.transpose(found.axes).reshape(found.shape), space.shape[:2])
                for picture in pictures
            ]
            return np.stack(scaled).reshape(shape)
    several = len(space.shape) == 1 and space.shape[0] > 1  # a single number is that number
    number = space.dtype == np.float32 and x.shape == lead and x.dtype.kind in "iu"
    if several and number and x.min() >= 0 and x.max() < space.shape[0]:
        return np.eye(space.shape[0], dtype=np.float32)[x]
    # A vector is its numbers in their order; a picture or board may differ in axes of 1 alone.
    plain = [tuple(n for n in size if n != 1) for size in (x.shape, shape)]
    if x.size == np.prod(shape) and (len(space.shape) == 1 or plain[0] == plain[1]):
        return cast(name, x.reshape(shape), space.dtype)
    raise ValueError(f"{name} is {x.dtype} {x.shape}, not {space.dtype} {shape}")
