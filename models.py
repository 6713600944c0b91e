"""World model, agent, and the one update (DreamerV3, Hafner et al. 2023).

The update is a function of tensors: nothing in it reads the host, and metrics stay on the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import networks
from hidreamer import carries, precision
from hidreamer.behavior import Behavior, Replayed
from hidreamer.capture import CapturedAct, FastUpdate
from hidreamer.dynamics import make_dynamics
from hidreamer.dynamics.base import Feat, Joined, Post, start_steps
from hidreamer.explorer import Explorer
from hidreamer.losses import scaled
from hidreamer.metrics import prefixed
from hidreamer.objectives import NLL, Harmony, make_objectives
from hidreamer.optim import Optimizer, joint_name, make_optimizers
from hidreamer.update import behavior_losses, step_together, train_step
from hidreamer.weights import load_state
from tools import Config, ConfigError

# Observations (B,T,...), prev_action (B,T,A); reward, is_first, is_terminal (B,T).
Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]  # each ()


class WorldModel(nn.Module):
    """Encoder, dynamics, and the objectives that train them besides the dynamics' own loss.

    The parameters of an objective are those of the module of its name here, as
    ``Agent.make_optimizers`` and checkpoints have it. An objective with parameters of its own is
    that module itself; one that has none may have no module.
    """

    def __init__(self, obs_space: Mapping[str, spaces.Space], act_dim: int, config):
        super().__init__()
        self.encoder = networks.Encoder(obs_space, **config.encoder)
        embed, positions = self.encoder.dim, self.encoder.map_positions
        self.dynamics = make_dynamics(config.dynamics, embed, act_dim, positions)
        self.feat_dim = self.dynamics.feat_dim
        weights, block = config.model.losses, dict(config.decoder)
        self.probed = block.pop("probe") and not weights.decoder
        make = networks.Decoder if weights.decoder or self.probed else networks.NoDecoder
        # a run is the same with a probe and without: its weights are not of the run's numbers
        with torch.random.fork_rng(devices=[], enabled=self.probed):
            self.decoder = make(self.feat_dim, obs_space, **block)
        self.reward = networks.make_head("twohot", self.feat_dim, **config.reward)
        self.cont = networks.make_continue_head(self.feat_dim, config)
        self.nll = NLL()
        self.objectives = make_objectives(self, config)
        for name, objective in self.objectives.items():
            if isinstance(objective, nn.Module):
                self.add_module(name, objective)
        self.scales = {name: weights[name] for name in self.objectives}
        self.harmony = Harmony(weights.harmony) if weights.harmony else None

    def observe(
        self,
        obs: Batch,
        carry: Any = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Post, Tensor]:
        """Follow preprocessed observations (B,T,...). -> carry, Post, embed (B,T,E)."""
        embed = self.encoder(obs)
        carry = self.dynamics.initial(len(embed)) if carry is None else carry
        steps = embed, obs["prev_action"], obs["is_first"].bool()
        carry, post = self.dynamics.observe(carry, *steps, sample, generator)
        return carry, post, embed

    def loss(
        self, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Any, Post, Tensor, Metrics]:
        """-> losses (B,T) by name, carry, Post, embed, metrics.

        The losses are weighted: their sum is to be minimised.
        """
        start = carries.given(self.dynamics, obs)
        carry, post, embed = self.observe(obs, start, generator=generator)
        losses, metrics = self.dynamics.loss(post)
        groups = dict.fromkeys(losses, "dynamics")  # for ``Harmony``
        joined = post._replace(feat=Joined.of(post.feat.cat(), self.dynamics.stoch_dim))
        for name, objective in self.objectives.items():
            found, more = objective.loss(joined, embed, obs, generator)
            assert not found.keys() & losses.keys(), (name, found.keys())
            losses |= {key: scaled(loss, self.scales[name]) for key, loss in found.items()}
            groups |= dict.fromkeys(found, name if name in ("reward", "cont") else "observation")
            metrics |= more
        if self.harmony is not None:
            losses, more = self.harmony.balance(losses, groups)
            metrics |= more
        for name, loss in losses.items():
            assert loss.shape == embed.shape[:2], (name, loss.shape)
        return losses, carry, post, embed, metrics

    @torch.no_grad()
    def decode(
        self, feat: Feat, levels: bool = False, generator: torch.Generator | None = None
    ) -> list[dict[str, Tensor]]:
        """Observations that features (B,T,.) stand for, {key: (B,T,...)}, images in [0, 1].

        With ``levels`` also those of the coarse levels alone, coarsest first.
        """
        feats = [feat]
        if levels:
            feats += self.dynamics.coarse_features(feat, generator).values()
        recons = []
        for feat in feats:
            dists = self.decoder(feat.cat())
            recons.append(self.postprocess({key: dist.mean() for key, dist in dists.items()}))
        return recons

    def postprocess(self, obs: Batch) -> dict[str, Tensor]:
        """Preprocessed observations, of those that are decoded, with images in [0, 1]."""
        images = {key: (obs[key] + 0.5).clamp(0.0, 1.0) for key in self.decoder.kinds["image"]}
        return images | {key: obs[key] for key in self.decoder.sizes}

    @torch.no_grad()
    def open_loop(
        self,
        batch: Batch,
        context: int,
        levels: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Tensor]]:
        """Observe ``context`` of T steps, then imagine the others from the real actions.

        -> the observations (B,T,...), then what ``decode`` makes of the features of all T steps.
        """
        obs = networks.preprocess(batch)
        seen = {key: x[:, :context] for key, x in obs.items()}
        carry, post, _ = self.observe(seen, generator=generator)
        start = self.dynamics.starts(carry, post, 1)
        action = obs["prev_action"][:, context:]
        horizon = action.shape[1]
        _, imagined, _ = self.dynamics.imagine(start, action, horizon, generator=generator)
        pairs = zip(post.feat, imagined, strict=True)
        feat = Feat(*(torch.cat([observed, x[:, 1:]], 1) for observed, x in pairs))
        return [self.postprocess(obs), *self.decode(feat, levels, generator)]


class ActState(NamedTuple):
    """What acting carries from step to step."""

    carry: Any
    action: Tensor  # (N, A) the last action


class Agent(nn.Module):
    """World model and behavior with their optimisers: ``act`` and ``update``."""

    def __init__(
        self, obs_space: Mapping[str, spaces.Space], act_space: spaces.Space, act_dim: int, config
    ):
        super().__init__()
        start_steps(config.replay.length, config.imag.starts)  # raises where they do not fit
        self.act_dim, self.config = act_dim, config
        self.world_model = WorldModel(obs_space, act_dim, config)
        self.behavior = self._make_behavior(act_space)
        explores = config.expl.behavior == "plan2explore"
        make = functools.partial(self._make_behavior, act_space)
        self.explorer = Explorer(self.world_model, act_dim, config.expl, make) if explores else None
        self.metric_names: tuple[str, ...] = ()
        self.carries: dict[str, Tensor] = {}  # see ``update``
        carries.check(self.world_model.dynamics, config)
        self.captured_act: CapturedAct | None = None  # on CUDA, where it trains

    def _make_behavior(self, act_space: spaces.Space) -> Behavior:
        config, feat_dim = self.config, self.world_model.feat_dim
        actor = networks.Actor(feat_dim, act_space, **config.actor.net)
        critic = networks.make_head("twohot", feat_dim, **config.critic.net)
        gradient, continuous = config.actor.gradient, isinstance(act_space, spaces.Box)
        backprop = gradient == "dynamics" or (gradient == "auto" and continuous)
        return Behavior(actor, critic, config, backprop)

    def behaviors(self) -> dict[str, Behavior]:
        """By the prefix of their metrics and optimisers."""
        return {"": self.behavior} | ({"expl_": self.explorer.behavior} if self.explorer else {})

    def trained(self) -> dict[str, dict[str, nn.Module]]:
        """{loss: {name: module}}: the modules that each loss trains, and no others."""
        wm = self.world_model
        names = ["encoder", "dynamics", *wm.objectives, *(["harmony"] if wm.harmony else [])]
        modules = {"model": {name: getattr(wm, name) for name in names if hasattr(wm, name)}}
        if wm.probed:
            modules["probe"] = {"decoder": wm.decoder}
        for prefix, behavior in self.behaviors().items():
            if prefix:
                modules["expl_model"] = {"ensemble": self.explorer.ensemble}
            modules[f"{prefix}actor"] = {"actor": behavior.actor}
            modules[f"{prefix}critic"] = {"critic": behavior.critic}
        return modules

    def make_optimizers(self, cls: type[Optimizer] = Optimizer) -> None:
        """After the agent was moved to its device. One for each loss, or one for all."""
        capturable = next(self.parameters()).is_cuda
        self.optimizers = make_optimizers(self.trained(), self.config, capturable, cls)

    def make_update(
        self,
        compiled: str,
        generator: torch.Generator | None = None,
        report: Callable[[str], None] = print,
    ) -> Callable[[Batch], Tensor]:
        """``update``, drawing random numbers from ``generator``: on CUDA as one graph, and ``act``
        as well; with ``compiled`` "on", or "auto" on CUDA, with compiled parts, which it reports.

        Where compiling or recording fails, it warns and continues without (see ``FastUpdate``).
        """
        cuda = next(self.parameters()).is_cuda
        compiling = compiled == "on" or (compiled == "auto" and cuda)
        if not compiling and not cuda:
            return functools.partial(self.update, generator=generator)
        self.captured_act = CapturedAct(self, generator) if cuda else None
        return FastUpdate(self, self._compile if compiling else None, cuda, generator, report)

    def _compile(self) -> None:
        wm = self.world_model
        for module in (wm.encoder, wm.nll, wm.decoder, wm.reward, wm.cont):
            module.compile()
        for behavior in self.behaviors().values():
            behavior.compile_parts()
        wm.dynamics.compile_steps()

    def save_state(self) -> dict[str, Any]:
        """Parameters, buffers and optimiser states, by name."""
        return {
            "params": self.state_dict(),
            "optim": {name: opt.state_dict() for name, opt in self.optimizers.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> dict[str, str]:
        """The inverse, also for a latent state that ``Dynamics.convert_state_dict`` translates.

        -> {module: "mapped", "split" over levels, or "fresh" (left as initialised)}. Raises
        ValueError, naming the first tensor that is missing or of another shape; only an explorer, a
        decoder and objectives that are not there may start afresh.
        """
        return load_state(self, state)

    def initial(self, n: int) -> ActState:
        """The state of ``n`` environments before their first step."""
        action = torch.zeros(n, self.act_dim, device=next(self.parameters()).device)
        with torch.no_grad():
            return ActState(self.world_model.dynamics.initial(n), action)

    def act(
        self,
        state: ActState,
        obs: Batch,
        mode: str = "train",
        generator: torch.Generator | None = None,
    ) -> ActState:
        """One step in N environments. -> new state, whose ``action`` (N,A) is the one to take.

        obs: raw (N, ...), with is_first. mode: see ``choose``. The state is always sampled, as in
        training.
        """
        return (self.captured_act or self.plain_act)(state, obs, mode, generator)

    @torch.no_grad()
    def plain_act(
        self, state: ActState, obs: Batch, mode: str, generator: torch.Generator | None
    ) -> ActState:
        """``act`` without compilation or CUDA graph; same arguments."""
        with self.autocast():
            obs, wm = self._one_step(state, obs), self.world_model
            steps = state.carry, wm.encoder(obs), obs["prev_action"], obs["is_first"].bool()
            carry, feat = wm.dynamics.observe_features(*steps, generator)
        return ActState(carry, self.choose(feat.map(lambda x: x[:, 0]), mode, generator))

    def _one_step(self, state: ActState, obs: Batch) -> Batch:
        """Raw observations (N, ...), preprocessed to (N,1,...)."""
        obs = networks.preprocess({key: x.unsqueeze(1) for key, x in obs.items()})
        return obs | {"prev_action": state.action.unsqueeze(1)}

    @torch.no_grad()
    def follow(
        self, state: ActState, obs: Batch, generator: torch.Generator | None = None
    ) -> tuple[Any, Post]:
        """``WorldModel.observe`` of one step in N environments, (N,1,...). obs: raw (N, ...)."""
        with self.autocast():
            obs = self._one_step(state, obs)
            return self.world_model.observe(obs, state.carry, generator=generator)[:2]

    @torch.no_grad()
    def choose(
        self, feat: Feat, mode: str = "train", generator: torch.Generator | None = None
    ) -> Tensor:
        """Actions (N,A) in states (N,.).

        mode: "train" samples an action, "greedy" takes the likeliest, "explore" samples the
        explorer's.
        """
        with self.autocast():
            behavior = self.explorer.behavior if mode == "explore" else self.behavior
            policy = behavior.actor(feat.cat())
            return (policy.mode() if mode == "greedy" else policy.sample(generator)).float()

    def tensors(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """Arrays on the agent's device."""
        device = next(self.parameters()).device
        move = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
        return {key: move(x) for key, x in rows.items()}

    @torch.no_grad()
    def decode_state(
        self, obs: Batch, state: ActState, generator: torch.Generator | None = None
    ) -> list[Batch]:
        """Of the first environment: its observation, its state decoded, its coarse levels decoded.

        {key: (1,1,...)} each. obs: what ``act`` was given to reach ``state``, raw (N,...).
        """
        model = self.world_model
        observed = networks.preprocess({key: x[:1].unsqueeze(1) for key, x in obs.items()})
        feat = model.dynamics.feat(state.carry).map(lambda x: x[:1].unsqueeze(1))
        with self.autocast():
            return [model.postprocess(observed), *model.decode(feat, True, generator)]

    def autocast(self) -> contextlib.AbstractContextManager:
        return precision.autocast(self.config.precision, next(self.parameters()).device)

    def update(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """One step of every optimiser. -> metrics (M,), named by ``metric_names``.

        batch: raw (B,T,...), on the device, with ``replay.write_back`` also the carries to begin
        from; those it found are ``self.carries`` until the next. generator: of all random numbers.
        """
        metrics = train_step(self, networks.preprocess(batch), generator)
        self.metric_names = tuple(metrics)
        return torch.stack([m.float() for m in metrics.values()])

    def each(self, fn: Callable, *args: Any) -> Any:
        """``fn(*args)``, trees of tensors. A population maps it over its members."""
        return fn(*args)

    def update_behavior(
        self,
        prefix: str,
        start: Any,
        terminal: Tensor,
        reward: Callable,
        generator: torch.Generator | None = None,
        replayed: Replayed | None = None,
        model_loss: Tensor | None = None,
    ) -> Metrics:
        """Imagine from N starts, terminal (N,), and train one behavior on the trajectories.

        ``reward`` maps (traj, predicted reward (N,H+1)) to the behavior's reward, (N,H+1). With a
        ``model_loss`` () the model is trained as well, along that and the critic's.
        """
        dream = functools.partial(behavior_losses, self, prefix, reward, generator)
        actor_loss, critic_loss, metrics = self.each(dream, start, terminal, replayed)
        if model_loss is not None:
            losses = {"actor": actor_loss, "critic": critic_loss, "model": model_loss + critic_loss}
            return metrics | step_together(self, losses)
        metrics = prefixed(prefix, metrics) | self.step(f"{prefix}actor", actor_loss)
        return metrics | self.step(f"{prefix}critic", critic_loss)

    def step(self, name: str, loss: Tensor) -> Metrics:
        """Train what ``loss`` is to train: now, or jointly at the end of the update."""
        if name in self.optimizers:
            return prefixed(f"{name}_", self.optimizers[name].step(loss))
        return self.gather_joint(name, loss)

    def gather_joint(self, name: str, loss: Tensor, retain: bool = False) -> Metrics:
        """Add what ``loss`` is to train to the joint step; ``retain`` its graph. -> no metrics."""
        modules = [joint_name(name, module) for module in self.trained()[name]]
        self.optimizers["joint"].gather(loss, modules, retain)
        return {}


def pick_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; use --device cpu")
    name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_agent(env: Any, config: Config, device: torch.device) -> Agent:
    """For the spaces of ``env``, at the config's precision (``set_precision``).

    Raises ConfigError for sizes that do not fit together.
    """
    precision.set_precision(config, device)
    try:
        agent = Agent(env.obs_space, env.act_space, env.act_dim, config).to(device)
        # cuDNN's convolutions of channels-last images would reorder their weights at every use
        return agent.to(memory_format=torch.channels_last) if device.type == "cuda" else agent
    except ValueError as error:
        raise ConfigError(str(error)) from None
