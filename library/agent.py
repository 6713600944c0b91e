"""A trained agent in a few lines: encode episodes, dream, decode, act.

Shapes: T steps of an episode, N dreams of H imagined steps, D deter, Z stoch, S variables of K
classes in a level, A action. Tensors are float32 on the agent's device.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

import envs
import models
import networks
from envs.actions import action_codec
from hidreamer import evaluation
from hidreamer.dynamics.base import Feat
from hidreamer.episodes import stack_rows
from hidreamer.weights import load_params
from library import checks, source
from library.checks import whole
from library.policy import Policy
from tools import ConfigError

CHUNK = 256  # steps of an episode that are encoded at once
HORIZON = 15  # steps that are imagined where nothing says how many

Actor = Callable[[Feat], Tensor]  # states (N,.) -> actions (N,A)


class LevelLatents(NamedTuple):
    """One level of the state at T steps."""

    index: Tensor  # (T, S) int64: the code or class of each variable
    post: Tensor  # (T, S, K) logits given the observation
    prior: Tensor  # (T, S, K) logits given all before it and the coarser levels
    embed: Tensor  # (T, Z_l) this level's part of ``stoch``: one-hots, or the codes' numbers


class Latents(NamedTuple):
    """What the world model holds at T steps of an episode, and predicts from it."""

    levels: tuple[LevelLatents, ...]  # coarse -> fine
    feat: Feat  # deter (T, D) the memory, stoch (T, Z) the state, levels concatenated
    reward: Tensor  # (T,) predicted for arriving at each step
    cont: Tensor  # (T,) probability that the episode goes on after each step
    value: Tensor  # (T,) the critic's, discounted
    starts: tuple[Any, ...]  # what ``dream`` continues from, opaque

    @property
    def deter(self) -> Tensor:
        """(T, D)."""
        return self.feat.deter

    @property
    def stoch(self) -> Tensor:
        """(T, Z)."""
        return self.feat.stoch


class Dream(NamedTuple):
    """N dreams; entry 0 is the state that they started from."""

    feat: Feat  # (N, H+1, .)
    action: Tensor  # (N, H+1, A) taken in each state; of given actions the last one is zero
    reward: Tensor  # (N, H+1) predicted for arriving in each state
    cont: Tensor  # (N, H+1) probability that the episode goes on after each state
    value: Tensor  # (N, H+1) the critic's, discounted
    carry: Any  # what ``dream`` continues from, opaque


def load(folder: str | os.PathLike, *, device: str = "auto") -> LoadedAgent:
    """The trained agent of a run's folder, of an exported one, or of ``"hf:ORG/NAME[@REVISION]"``.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. Nothing that is read is executed.
    Raises ConfigError, FolderError (both of them ``Exception``s of one line), EnvError.
    """
    return LoadedAgent(source.read(folder), device)


class LoadedAgent:
    """A trained agent. Made by ``hidreamer.load``.

    config: of the run, read-only. facts: its task, seed, step, commit and last scores.
    obs_space: {name: Box} of images uint8 (H,W,C), grids bool (H,W,C) and vectors float32 (n,).
    action_space: the environment's own. act_space, act_dim: the agent's, a vector of A numbers
    (one-hots side by side, or numbers in [-1, 1]); ``action_vector`` translates.
    policy: a ``Policy`` that takes the likeliest actions. model: the ``models.Agent`` inside.
    """

    def __init__(self, found: source.Source, device: str = "auto"):
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {device!r}; it can be auto, cpu, cuda")
        tree = found.config.tree() | {"device": device}
        self.config, self.folder, self.facts = models.Config(tree), found.folder, found.facts
        self.obs_space, self.action_space = dict(found.obs_space.items()), found.action_space
        self.act_space, self.act_dim, self.env_action = action_codec(self.action_space)
        self.device = models.pick_device(self.config)
        self.model = models.make_agent(self, self.config, self.device)
        try:
            load_params(self.model, found.params)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"the weights in {found.folder} are of another version of this program, or of"
                f" another config than the one beside them: {reason}"
            ) from None
        self.model.eval().requires_grad_(False)
        self.policy = self.make_policy()

    @property
    def world_model(self) -> models.WorldModel:
        return self.model.world_model

    @property
    def dynamics(self) -> Any:
        return self.model.world_model.dynamics

    # ------------------------------------------------------------ acting

    def make_policy(
        self,
        count: int | None = None,
        *,
        greedy: bool = True,
        generator: torch.Generator | None = None,
    ) -> Policy:
        """A policy with a memory of its own; for ``count`` environments side by side if given.

        greedy: take the likeliest action instead of sampling one. generator: of random numbers.
        Raises ValueError.
        """
        if count is not None:
            count = whole("count", count, 1)
        return Policy(self, count, greedy, generator)

    def make_env(self) -> gymnasium.Env:
        """The real environment of the task, with the run's settings; ``render()`` is RGB."""
        env = self.real_env().suite
        limit = self._agent_steps(self.config.env.time_limit)
        return gymnasium.wrappers.TimeLimit(env, limit) if limit else env

    def real_env(self, seed: int | None = None) -> envs.Env:
        """The real environment as an evaluation has it: whole games, flags, action vectors."""
        number = self.config.seed if seed is None else whole("seed", seed, 0)
        return envs.open_env(self.config.task, self.config.env.tree(), number, evaluation=True)

    def _agent_steps(self, frames: int) -> int:
        """After how many agent steps an episode of a limit in frames is cut."""
        return -(-frames // self.config.env.action_repeat)

    def action_vector(self, action: Any) -> Tensor:
        """(..., A) of actions of ``act_space``: numbers of choices (...,) or (..., choices), or
        arrays that are such vectors already, here within [-1, 1]. Raises ValueError for others.
        """
        space = self.act_space
        try:
            x = torch.as_tensor(action, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{action!r} is no action: {str(error).splitlines()[0]}") from None
        if not x.isfinite().all():
            raise ValueError("an action is not finite")
        if isinstance(space, gymnasium.spaces.Box) or (
            x.is_floating_point() and x.ndim and x.shape[-1] == self.act_dim
        ):
            if x.shape[-1:] != (self.act_dim,):
                raise ValueError(f"actions are {tuple(x.shape)}, not (..., {self.act_dim})")
            return x.float().clamp(-1.0, 1.0)
        sizes = torch.as_tensor(getattr(space, "nvec", getattr(space, "n", 0)), device=self.device)
        if sizes.ndim and x.shape[-1:] != sizes.shape:
            raise ValueError(f"actions are {tuple(x.shape)}, not (..., {len(sizes)})")
        if ((x < 0) | (x >= sizes) | (x != x.long())).any():
            raise ValueError(f"an action is outside {space}")
        one_hot = torch.nn.functional.one_hot
        if isinstance(space, gymnasium.spaces.Discrete):
            return one_hot(x.long(), int(space.n)).float()
        choices = zip(x.long().unbind(-1), space.nvec.tolist(), strict=True)
        return torch.cat([one_hot(choice, n) for choice, n in choices], -1).float()

    # ------------------------------------------------------------ looking

    def recorded(self) -> list[Path]:
        """The episodes that the run recorded, oldest first; an export has none."""
        return sorted((self.folder / "train_eps").glob("*.npz"))

    def collect(
        self, *, seed: int | None = None, steps: int | None = None, greedy: bool = True
    ) -> dict[str, np.ndarray]:
        """One episode of this agent in the real environment, of at most ``steps`` agent steps.

        -> {key: (T, ...)}: observations, ``prev_action`` (T,A), ``reward``, ``is_first``,
        ``is_last``, ``is_terminal`` (T,), as ``encode`` takes them. seed: of the environment and of
        the agent's random numbers, so that it fixes the episode; without one the environment has
        the run's, and the agent torch's default numbers.
        Raises ValueError, EnvError.
        """
        limit = self._agent_steps(evaluation.time_limit(self.config))
        limit = limit if steps is None else whole("steps", steps, 1)
        env = self.real_env(seed)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(int(seed))
        policy = self.make_policy(greedy=greedy, generator=generator)
        rows, action = [], np.zeros(self.act_dim, np.float32)
        try:
            while True:
                with envs.crashes(f"{self.config.task} failed"):
                    obs = env.step(action) if rows else env.reset()
                row = {key: np.asarray(x) for key, x in obs.items()}
                rows.append(row | {"prev_action": action})
                if obs["is_last"] or len(rows) > limit:
                    break
                policy.see(obs, reset=bool(obs["is_first"]))
                action = policy.act()
        finally:
            env.close()
        return stack_rows(rows)

    def rows(self, episode: Mapping[str, Any] | str | os.PathLike) -> dict[str, np.ndarray]:
        """What ``encode`` needs of an episode, checked. Raises ValueError, FolderError."""
        return checks.rows(episode, self.obs_space, self.act_dim)

    @torch.no_grad()
    def encode(
        self,
        episode: Mapping[str, Any] | str | os.PathLike,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """What the world model holds at every step of an episode.

        episode: {key: (T, ...)}: the observations of ``obs_space``, ``prev_action`` (T,A) the
        action that led to each step (or ``action``, as files have it), and optionally ``is_first``
        (T,); or the path of a recorded episode. sample: draw the states, as training and acting
        do, instead of taking the likeliest. generator: of random numbers, here and elsewhere; None
        is torch's default one.
        Raises ValueError for what is missing or of another shape.
        """
        checks.random(generator, self.device)
        rows, model = self.rows(episode), self.world_model
        total, carry, parts = len(rows["is_first"]), self.dynamics.initial(1), []
        for first in range(0, total, CHUNK):
            batch = {key: x[None, first : first + CHUNK] for key, x in rows.items()}
            with self.model.autocast():
                obs = networks.preprocess(self.model.tensors(batch))
                carry, post, _ = model.observe(obs, carry, sample, generator)
                start = self.dynamics.starts(carry, post, 0)
            parts.append((post, self.dynamics.classes(post), start))
        levels = []
        for i, size in enumerate(self.dynamics.level_dims):
            offset = sum(self.dynamics.level_dims[:i])
            level = [
                (
                    index[i][0],
                    post.levels[i].post[0].float(),
                    post.levels[i].prior[0].float(),
                    post.feat.stoch[0, :, offset : offset + size].float(),
                )
                for post, index, _ in parts
            ]
            levels.append(LevelLatents(*(torch.cat(x) for x in zip(*level, strict=True))))
        feats = zip(*(post.feat for post, _, _ in parts), strict=True)
        feat = Feat(*(torch.cat(x, 1)[0].float() for x in feats))
        return Latents(tuple(levels), feat, *self.heads(feat), tuple(x for _, _, x in parts))

    @torch.no_grad()
    def heads(self, feat: Feat) -> tuple[Tensor, Tensor, Tensor]:
        """-> reward, continue probability and value of states (...,.), each (...)."""
        with self.model.autocast():
            x = feat.cat()
            dists = self.world_model.reward(x), self.world_model.cont(x).undiscounted()
            value = self.model.behavior.critic(x)
        return dists[0].mode(), dists[1].mean(), value.mode()

    @torch.no_grad()
    def dream(
        self,
        latents: Latents | Dream,
        actor: Any = None,
        horizon: int | None = None,
        *,
        start: int | Sequence[int] = -1,
        count: int = 1,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> Dream:
        """Imagine H = ``horizon`` steps; None is as many as there are given actions, or else 15.

        latents: of ``encode``; or a ``Dream`` of N, which goes on, each from where it ended.
        actor: actions (H,A) or (N,H,A), for choices also their numbers, as ``action_vector`` takes
        them; or a function of states (N,.) -> actions (N,A); by default the agent's own policy.
        start: the step of ``latents`` to begin at, or several. count: dreams from each of them.
        sample: draw the imagined states instead of taking the likeliest.
        Raises ValueError, IndexError.
        """
        horizon = None if horizon is None else whole("horizon", horizon, 1)
        count = whole("count", count, 1)
        self._check(latents, generator, Latents, Dream)
        if isinstance(latents, Dream) and not np.array_equal(start, -1):
            raise ValueError("a dream goes on from where it ended: start is of latents alone")
        carry = latents.carry if isinstance(latents, Dream) else self._start(latents, start)
        total = len(self.dynamics.feat(carry).deter)
        if count > 1:
            index = torch.arange(total, device=self.device).repeat_interleave(count)
            carry, total = self.dynamics.select(carry, index), total * count
        actor, horizon = self.policy_of(actor, total, horizon, generator)
        with self.model.autocast():
            carry, feat, action = self.dynamics.imagine(carry, actor, horizon, sample, generator)
        feat = feat.map(Tensor.float)
        return Dream(feat, action.float(), *self.heads(feat), carry)

    def _check(self, found: Any, generator: Any, *kinds: type) -> None:
        """Raises ValueError unless ``found`` is one of these and of an agent like this one."""
        checks.random(generator, self.device)
        if not isinstance(found, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"a {type(found).__name__} is no {names}, which encode and dream give")
        feat = found if isinstance(found, Feat) else found.feat
        sizes = feat.deter.shape[-1], feat.stoch.shape[-1]
        same = sizes == (self.dynamics.deter_dim, self.dynamics.stoch_dim)
        if isinstance(found, Latents):
            shapes = [tuple(level.post.shape[1:]) for level in found.levels]
            same = same and shapes == [tuple(shape) for shape in self.dynamics.shapes]
        if not same:
            raise ValueError("these states are of another agent")

    def _start(self, latents: Latents, start: int | Sequence[int]) -> Any:
        total = len(latents.value)
        try:
            steps = [operator.index(start)]
        except TypeError:
            steps = list(start) if np.ndim(start) == 1 else []
        if not all(isinstance(step, int | np.integer) for step in steps) or not steps:
            steps = [total]  # out of range
        if not all(-total <= step < total for step in steps):
            raise IndexError(f"start is {start!r}; the latents have steps 0 to {total - 1}")
        carries = []
        for step in steps:
            chunk, at = divmod(step % total, CHUNK)
            index = torch.tensor([at], device=self.device)
            carries.append(self.dynamics.select(latents.starts[chunk], index))
        return carries[0] if len(carries) == 1 else self.dynamics.join(carries)

    def policy_of(
        self, actor: Any, count: int, horizon: int | None, generator: torch.Generator | None
    ) -> tuple[Actor | Tensor, int]:
        """``actor`` and ``horizon`` of ``dream`` as ``Dynamics.imagine`` takes them."""
        if actor is None:
            return lambda feat: self.model.choose(feat, generator=generator), horizon or HORIZON
        if callable(actor):
            return lambda feat: self._acted(actor, feat.map(Tensor.float)), horizon or HORIZON
        action = self.action_vector(actor)
        horizon = horizon or (action.shape[-2] if action.ndim > 1 else 0) or HORIZON
        if action.ndim == 2:
            action = action.expand(count, -1, -1)
        if action.shape != (count, horizon, self.act_dim):
            expected = f"({horizon}, {self.act_dim}) or ({count}, {horizon}, {self.act_dim})"
            raise ValueError(f"actions are {tuple(action.shape)}, not {expected}")
        return action, horizon

    def _acted(self, actor: Actor, feat: Feat) -> Tensor:
        """Actions (N,A) of a function of states (N,.). Raises ValueError."""
        action, expected = self.action_vector(actor(feat)), (len(feat.deter), self.act_dim)
        if action.shape != expected:
            raise ValueError(f"the actor gave actions {tuple(action.shape)}, not {expected}")
        return action

    @torch.no_grad()
    def decode(
        self,
        latents: Latents | Dream | Feat,
        *,
        levels: bool | int | str | Sequence[int | str] = False,
        generator: torch.Generator | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """The observations that states stand for: {"all": {key: (T, ...) or (N, H+1, ...)}}.

        Images are in [0, 1], grids probabilities, vectors as they are. levels: first also what the
        coarse levels alone say, by their names, such as "top" or "L0" and "L0+L1": True for all of
        them, or the levels up to which to decode, such as 0, "L1" or ["L0", "L1"].
        Raises ValueError.
        """
        self._check(latents, generator, Latents, Dream, Feat)
        feat = latents if isinstance(latents, Feat) else latents.feat
        flat = feat.deter.ndim == 2
        feat = feat.map(lambda x: x.unsqueeze(0)) if flat else feat
        with self.model.autocast():
            coarse = {} if levels is False else self.dynamics.coarse_features(feat, generator)
            states, out = coarse | {"all": feat}, {}
            for name in dict.fromkeys([*checks.levels(levels, list(coarse)), "all"]):
                (obs,) = self.world_model.decode(states[name])
                out[name] = {key: (x[0] if flat else x).float() for key, x in obs.items()}
        return out
