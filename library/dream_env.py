"""The dream of a trained agent as a Gymnasium environment, one or many at once.

    env = gymnasium.make("hidreamer/Dream-v0", logdir=LOGDIR)
    envs = gymnasium.make_vec("hidreamer/Dream-v0", 1024, logdir=LOGDIR)

Shapes: N dreams, T context steps, A action, F features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

import networks
from hidreamer.checkpoint import FolderError
from hidreamer.episodes import EpisodeError, load_episode, stack_rows
from library.agent import LoadedAgent, load
from library.checks import whole
from library.pictures import picture
from tools import ConfigError

CONTEXT = 8  # recorded steps that a start is observed through
EPISODES = 200  # recorded episodes that starts are drawn from, at most: the latest ones
USES = 4  # times that a start is used, on average, where many dream side by side
FPS = 15


class Dreams:
    """N dreams of an agent, which begin and end each on its own.

    The shared part of ``DreamEnv`` and ``VectorDreamEnv``; their arguments are explained there.
    All chance comes from ``rng`` and ``generator``: the global ones are left alone.
    """

    def __init__(self, logdir: Any, horizon: int, decode: bool, start: str, device: str):
        horizon = whole("horizon", horizon, 1, ConfigError)
        if not isinstance(decode, bool):
            raise ConfigError(f"decode is {decode!r}; it can be True, False")
        if start not in ("recorded", "real"):
            raise ConfigError(f"start is {start!r}; it can be recorded, real")
        self.agent = logdir if isinstance(logdir, LoadedAgent) else load(logdir, device=device)
        self.horizon, self.decoded, self.start = horizon, decode, start
        self.rng, self.generator = np.random.default_rng(), torch.Generator(self.agent.device)
        self.generator.manual_seed(int(self.rng.integers(2**63)))
        self.obs_space = self._obs_space()
        self.episodes = self._recorded() if start == "recorded" else []
        self.real = self.agent.real_env() if start == "real" else None
        self.carry: Any = None  # of N dreams
        self.pool: Any = None  # of N starts
        self.used = 0  # how many dreams have begun from them again
        self.steps = np.zeros(0, int)  # (N,) that each dream has had

    def _obs_space(self) -> spaces.Space:
        agent = self.agent
        if not self.decoded:
            shape = (agent.dynamics.feat_dim,)
            return spaces.Box(-np.inf, np.inf, shape, np.float32)
        decoder = agent.world_model.decoder
        keys = [*decoder.kinds["image"], *decoder.sizes]
        if not keys:
            raise ConfigError(
                f"{agent.folder} decodes nothing: ask for features, or train with"
                " --decoder.probe true"
            )
        shown = {key: agent.obs_space[key] for key in keys}
        return spaces.Dict(shown) if len(shown) > 1 else shown[keys[0]]

    # ------------------------------------------------------------ starts

    def _recorded(self) -> list[dict[str, np.ndarray]]:
        """The run's episodes that have a step to begin at. Raises FolderError."""
        found, problem = [], ""
        for path in self.agent.recorded()[-EPISODES:]:
            try:
                rows = self.agent.rows(load_episode(path))
            except (EpisodeError, ValueError) as error:
                problem = problem or f" ({path.name}: {error})"
                continue
            if len(rows["is_first"]) > 1:
                found.append(rows)
        if not found:
            raise FolderError(
                f"{self.agent.folder} has no recorded episodes to begin a dream from{problem}:"
                ' with start="real" it begins in the real environment'
            )
        return found

    def _context(self) -> dict[str, np.ndarray]:
        """Rows (CONTEXT, ...) up to where a dream begins. In front of an episode that is shorter
        its first row is repeated, which counts as episodes of one step.
        """
        if self.real is not None:
            obs = self.real.reset()
            rows = {key: np.asarray(obs[key])[None] for key in self.agent.obs_space}
            rows["prev_action"] = np.zeros((1, self.agent.act_dim), np.float32)
            rows["is_first"], last = np.ones(1, bool), 0
        else:
            rows = self.episodes[self.rng.integers(len(self.episodes))]
            last = int(self.rng.integers(len(rows["is_first"]) - 1))  # the last row is an end
        index = np.arange(last - CONTEXT + 1, last + 1)
        context = {key: x[np.maximum(index, 0)] for key, x in rows.items()}
        # A sequence begins as a replayed one does, wherever in the episode it is cut out.
        context["is_first"] = context["is_first"] | (index <= 0)
        context["is_first"][0] = True
        return context

    def begin(self, count: int) -> Any:
        """A carry of ``count`` new starts."""
        contexts = [self._context() for _ in range(count)]
        batch = stack_rows(contexts)
        with self.agent.model.autocast():
            obs = networks.preprocess(self.agent.model.tensors(batch))
            return self.agent.world_model.observe(obs, generator=self.generator)[0]

    # ------------------------------------------------------------ stepping

    def seed(self, seed: int | None) -> None:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
            self.generator.manual_seed(int(self.rng.integers(2**63)))
            if self.real is not None:
                self.real.close()
                self.real = self.agent.real_env(seed)

    @torch.no_grad()
    def reset(self, count: int) -> Any:
        """Begin ``count`` dreams. -> their observations."""
        self.carry = self.pool = self.begin(count)
        self.steps, self.used = np.zeros(count, int), 0
        return self.observations()

    def begin_again(self, over: np.ndarray) -> None:
        """Begin the dreams of ``over`` (N,) anew, from starts that others had as well: to observe
        one costs as much as a whole dream.
        """
        dynamics, count = self.agent.dynamics, int(over.sum())
        if self.used >= USES * len(over):
            self.pool, self.used = self.begin(len(over)), 0
        self.used += count
        index = lambda x: torch.from_numpy(x).to(self.agent.device)
        kept, new = np.flatnonzero(~over), np.flatnonzero(over)
        starts = dynamics.select(self.pool, index(self.rng.integers(len(over), size=count)))
        if count < len(over):
            both = dynamics.join([dynamics.select(self.carry, index(kept)), starts])
            # these are the kept ones, then the new ones: back to where they were
            starts = dynamics.select(both, index(np.argsort(np.concatenate([kept, new]))))
        self.carry = starts
        self.steps[over] = 0

    @torch.no_grad()
    def step(
        self, action: Tensor, over: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Actions (N,A) -> observations, reward, terminated, truncated, each (N,...).

        over: (N,) which dreams begin anew instead.
        """
        if self.carry is None:
            raise ResetNeeded("a dream begins with reset")
        if len(action) != len(over):
            raise ValueError(f"{len(action)} actions for {len(over)} dreams")
        if action.ndim != 2:
            shape, expected = tuple(action.shape), (len(over), action.shape[-1])
            raise ValueError(f"the action vectors are {shape}, not {expected}: one for each dream")
        with self.agent.model.autocast():
            self.carry, feat, _ = self.agent.dynamics.imagine(
                self.carry, action.unsqueeze(1), 1, generator=self.generator
            )
        self.steps += 1
        if over.any():
            self.begin_again(over)
        reward, cont, _ = self.agent.heads(feat.map(lambda x: x[:, 1]))
        ended = self.rng.random(len(over)) >= cont.cpu().numpy()
        terminated = ended & ~over
        truncated = ~terminated & ~over & (self.steps >= self.horizon)
        reward = np.where(over, 0.0, reward.cpu().numpy())
        return self.observations(), reward, terminated, truncated

    @torch.no_grad()
    def observations(self) -> Any:
        """Of all dreams, (N, ...), as ``obs_space`` has them."""
        feat = self.agent.dynamics.feat(self.carry)
        if not self.decoded:
            return feat.cat().float().cpu().numpy()
        found = {}
        for key, x in self.agent.decode(feat)["all"].items():
            dtype = self.agent.obs_space[key].dtype
            if dtype == np.uint8:
                x = (255.0 * x).round().byte()
            elif dtype == np.bool_:
                x = x > 0.5
            space = self.agent.obs_space[key]
            x = x.cpu().numpy()
            # what is decoded of a bounded vector may lie beside its bounds
            found[key] = x if x.dtype.kind != "f" else np.clip(x, space.low, space.high)
        return found if isinstance(self.obs_space, spaces.Dict) else found[next(iter(found))]

    @torch.no_grad()
    def render(self, row: int) -> np.ndarray:
        """uint8 (H,W,3): what the dream ``row`` decodes to."""
        if self.carry is None:
            raise ResetNeeded("a dream begins with reset")
        feat = self.agent.dynamics.feat(self.carry).map(lambda x: x[row : row + 1])
        decoded = self.agent.decode(feat)["all"]
        return picture({key: x[0] for key, x in decoded.items()})

    def close(self) -> None:
        if self.real is not None:
            self.real.close()


class DreamEnv(gymnasium.Env):
    """A world model as an environment: every step is imagined.

    Observations are what the model decodes, in the space of the real task's (a ``Dict`` where it
    has several); without ``decode`` they are features, float32 (F,). Actions are those of the
    agent: ``Discrete``, ``MultiDiscrete``, or a ``Box``, [-1, 1] wherever the real environment's
    bounds are finite. The reward is that of the reward head. An episode terminates with the
    probability that the continue head gives, and is truncated after ``horizon`` steps.

    logdir: all that ``hidreamer.load`` takes, or a ``LoadedAgent``. start: begin in the middle of
    ``recorded`` episodes of the run, or where the ``real`` environment begins. render_mode:
    "rgb_array" or None. device: as of ``hidreamer.load``.
    Raises ConfigError, FolderError, EnvError.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        logdir: str | os.PathLike | LoadedAgent,
        horizon: int = 15,
        decode: bool = True,
        start: str = "recorded",
        render_mode: str | None = None,
        device: str = "auto",
    ):
        check_render_mode(render_mode)
        self.dreams = Dreams(logdir, horizon, decode, start, device)
        self.render_mode = render_mode
        self.observation_space = self.dreams.obs_space
        self.action_space = self.dreams.agent.act_space
        self.over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.dreams.seed(seed)
        self.over = False
        return first(self.dreams.reset(1)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if self.over:
            raise ResetNeeded("a dream begins with reset, and after its end with another one")
        vector = self.dreams.agent.action_vector(np.asarray(action)[None])
        obs, reward, terminated, truncated = self.dreams.step(vector, np.zeros(1, bool))
        self.over = bool(terminated[0] or truncated[0])
        return first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray | None:
        return self.dreams.render(0) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.dreams.close()


class VectorDreamEnv(VectorEnv):
    """``num_envs`` dreams stepped as one batch; see ``DreamEnv`` for the other arguments.

    A dream that has ended begins anew at the next step, whose action for it is ignored. ``reset``
    takes one seed, or as many as there are dreams, which count as one together.
    """

    metadata: ClassVar = {
        "render_modes": ["rgb_array"],
        "render_fps": FPS,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        logdir: str | os.PathLike | LoadedAgent,
        horizon: int = 15,
        decode: bool = True,
        start: str = "recorded",
        render_mode: str | None = None,
        device: str = "auto",
    ):
        num_envs = whole("num_envs", num_envs, 1, ConfigError)
        check_render_mode(render_mode)
        self.dreams = Dreams(logdir, horizon, decode, start, device)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = self.dreams.obs_space
        self.single_action_space = self.dreams.agent.act_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.over = np.ones(num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict]:
        if np.iterable(seed):
            seeds = [whole("a seed", one, 0) for one in seed]
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} dreams")
            seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
        super().reset(seed=seed)
        self.dreams.seed(seed)
        self.over = np.zeros(self.num_envs, bool)
        return self.dreams.reset(self.num_envs), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict]:
        vector = self.dreams.agent.action_vector(np.asarray(actions))
        obs, reward, terminated, truncated = self.dreams.step(vector, self.over)
        self.over = terminated | truncated
        return obs, reward, terminated, truncated, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        if self.render_mode != "rgb_array":
            return None
        return tuple(self.dreams.render(row) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self.dreams.close()


def check_render_mode(mode: str | None) -> None:
    if mode not in ("rgb_array", None):
        raise ConfigError(f"render_mode is {mode!r}; it can be 'rgb_array', None")


def first(obs: Any) -> Any:
    """The first of stacked observations."""
    return {key: x[0] for key, x in obs.items()} if isinstance(obs, dict) else obs[0]
