"""World model, actor-critic in imagination, and the one update of the agent (Hafner et al. 2023, DreamerV3).

The update is a function of tensors: nothing in it reads the host, and metrics stay on the device.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

import networks
from hidreamer.capture import FastUpdate
from hidreamer.dynamics import make_dynamics
from hidreamer.dynamics.base import Feat, Post, start_steps
from hidreamer.nets import MLP
from hidreamer.optim import Optimizer
from hidreamer.returns import ReturnNorm, lambda_return
from tools import Config, ConfigError

Batch = Mapping[str, Tensor]  # observations, prev_action (B,T,A), reward, is_first, is_terminal (B,T)
Metrics = dict[str, Tensor]  # each ()


class WorldModel(nn.Module):
    """Encoder, dynamics, decoder, reward and continue heads."""

    def __init__(self, obs_space: Mapping[str, spaces.Space], act_dim: int, config):
        super().__init__()
        self.encoder = networks.Encoder(obs_space, **config.encoder)
        self.dynamics = make_dynamics(config.dynamics, self.encoder.dim, act_dim)
        needed, positions = self.dynamics.map_positions, self.encoder.map_positions
        if needed and positions not in (0, needed):
            raise ValueError(
                f"dynamics.hrvq.spatial: groups is {needed} and the encoder's map has {positions} positions: "
                "set groups to encoder.minres x encoder.minres"
            )
        self.feat_dim = self.dynamics.feat_dim
        self.decoder = networks.Decoder(self.feat_dim, obs_space, **config.decoder)
        self.reward = networks.make_head("twohot", self.feat_dim, **config.reward)
        self.cont = networks.make_head("binary", self.feat_dim, **config.cont)

    def observe(self, obs: Batch, carry: Any = None, sample: bool = True) -> tuple[Any, Post, Tensor]:
        """Follow prepared observations. -> carry, Post, embed (B,T,E)."""
        embed = self.encoder(obs)
        carry = self.dynamics.initial(len(embed)) if carry is None else carry
        return *self.dynamics.observe(carry, embed, obs["prev_action"], obs["is_first"].bool(), sample), embed

    def loss(self, obs: Batch) -> tuple[dict[str, Tensor], Any, Post, Tensor, Metrics]:
        """-> losses (B,T) by name, carry, Post, embed, metrics."""
        carry, post, embed = self.observe(obs)
        losses, metrics = self.dynamics.loss(post)
        decoded = self.decoder(self.dynamics.decoder_features(post).cat())
        losses |= {key: -dist.log_prob(obs[key]) for key, dist in decoded.items()}
        x = post.feat.cat()  # (B, T, F)
        losses["reward"] = -self.reward(x).log_prob(obs["reward"])
        losses["cont"] = -self.cont(x).log_prob(1.0 - obs["is_terminal"])
        for name, loss in losses.items():
            assert loss.shape == embed.shape[:2], (name, loss.shape)
        return losses, carry, post, embed, metrics

    @torch.no_grad()
    def show(self, feat: Feat, levels: bool = False) -> list[dict[str, Tensor]]:
        """What features (B,T,.) look like, {key: (B,T,...)}, images in [0, 1]; with ``levels`` coarse levels' too."""
        feats = [feat, *(self.dynamics.coarse_features(feat).values() if levels else [])]
        return [self.shown({key: dist.mean() for key, dist in self.decoder(f.cat()).items()}) for f in feats]

    def shown(self, obs: Batch) -> dict[str, Tensor]:
        """Prepared observations, of those that are decoded, with images in [0, 1]."""
        images, others = self.decoder.kinds["image"], self.decoder.sizes
        return {key: (obs[key] + 0.5).clamp(0.0, 1.0) for key in images} | {key: obs[key] for key in others}

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int, levels: bool = False) -> list[dict[str, Tensor]]:
        """Follow ``context`` steps, then dream on with the real actions. -> truth and model, as ``show`` has them."""
        obs = networks.prepare(batch)
        carry, post, _ = self.observe({k: x[:, :context] for k, x in obs.items()})
        start = self.dynamics.starts(carry, post, 1)
        _, dream, _ = self.dynamics.imagine(start, obs["prev_action"][:, context:], obs["reward"].shape[1] - context)
        feat = Feat(*(torch.cat([seen, new[:, 1:]], 1) for seen, new in zip(post.feat, dream, strict=True)))
        return [self.shown(obs), *self.show(feat, levels)]


class Dream(NamedTuple):
    """Imagined states and what the agent makes of them; entry 0 is the replayed state it started from."""

    feat: Feat  # (N, H+1, .)
    x: Tensor  # (N, H+1, F) the same, concatenated
    action: Tensor  # (N, H+1, A) taken in each state
    disc: Tensor  # (N, H+1) gamma times the probability that the episode goes on after each state


class Behavior(nn.Module):
    """Actor and critic, trained on dreams.

    ``backprop``: the actor's gradient goes through the dynamics to the returns; otherwise it is REINFORCE's.
    """

    def __init__(self, feat_dim: int, act_space: spaces.Space, config):
        super().__init__()
        self.actor = networks.Actor(feat_dim, act_space, **config.actor.net)
        self.critic = networks.make_head("twohot", feat_dim, **config.critic.net)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.norm = ReturnNorm()
        self.imag, self.slow_rate = config.imag, config.critic.slow_rate
        gradient, self.entropy = config.actor.gradient, config.actor.entropy
        self.backprop = gradient == "dynamics" or (gradient == "auto" and isinstance(act_space, spaces.Box))

    def dream(self, model: WorldModel, start: Any, terminal: Tensor) -> Dream:
        """Imagine H steps from N starts; terminal (N,) tells which of them ended their episode.

        REINFORCE needs no gradient through the dream, so none is recorded for it.
        """
        with torch.set_grad_enabled(self.backprop):
            policy = lambda feat: self.actor(feat.cat().detach()).sample()
            _, feat, action = model.dynamics.imagine(start, policy, self.imag.horizon)
            x = feat.cat()
            cont = torch.cat([1.0 - terminal.unsqueeze(1), model.cont(x[:, 1:]).mean()], 1)
            return Dream(feat, x, action, self.imag.discount * cont)

    def losses(self, dream: Dream, rew: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        """Actor and critic loss, () each. rew: (N, H+1), for arriving in each state."""
        x = dream.x.detach()
        value_dist = self.critic(x[:, :-1])
        slow = self.slow(x[:, :-1]).mode()
        # Backpropagating through the dynamics, returns depend on the features; for REINFORCE they are constants.
        value = self.critic(dream.x).mode() if self.backprop else self._values(value_dist, x)  # (N, H+1)
        returns = lambda_return(rew, value, dream.disc, self.imag.lam)  # (N, H)
        # A state counts as much as the episode is likely to have reached it; nothing counts after a terminal start.
        alive = dream.disc.detach() / self.imag.discount
        weight = torch.cat([alive[:, :1], dream.disc[:, 1:-1].detach()], 1).cumprod(1)  # (N, H)

        self.norm.update(returns)
        adv = (returns - value[:, :-1]) / self.norm.scale()  # (N, H)
        policy = self.actor(x[:, :-1])
        entropy = policy.entropy()  # (N, H)
        gain = adv if self.backprop else policy.log_prob(dream.action[:, :-1].detach()) * adv.detach()
        actor_loss = -(weight * (gain + self.entropy * entropy)).mean()
        critic_loss = -(weight * value_dist.log_prob(returns.detach(), slow)).mean()
        metrics = {
            "actor_loss": actor_loss,
            "critic_loss": critic_loss,
            "actor_entropy": entropy.mean(),
            "imag_reward": rew[:, 1:].mean(),
            "imag_return": returns.mean(),
            "imag_value": value.mean(),
            "imag_cont": alive[:, 1:].mean(),
            "return_scale": self.norm.scale(),
            "adv_std": adv.std(),
        }
        return actor_loss, critic_loss, {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def _values(self, known: networks.dists.TwoHot, x: Tensor) -> Tensor:
        """(N, H+1) values: those of ``known`` (N, H), and the last state's."""
        return torch.cat([known.mode(), self.critic(x[:, -1:]).mode()], 1)

    @torch.no_grad()
    def update_slow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, self.slow_rate)


class Explorer(nn.Module):
    """Plan2Explore: an ensemble that predicts the next state; where it disagrees, its own actor-critic is rewarded.

    Sekar et al. 2020, with dreamerv3-torch's targets and log-disagreement.
    """

    def __init__(self, model: WorldModel, act_space: spaces.Space, act_dim: int, config):
        super().__init__()
        self.config = config.expl
        dyn = model.dynamics
        sizes = {"embed": model.encoder.dim, "stoch": dyn.stoch_dim, "deter": dyn.deter_dim, "feat": dyn.feat_dim}
        inp = dyn.feat_dim + (act_dim if self.config.action_cond else 0)
        net = [
            MLP(inp, self.config.layers, self.config.units, sizes[self.config.target])
            for _ in range(self.config.models)
        ]
        self.ensemble = nn.ModuleList(net)
        self.behavior = Behavior(dyn.feat_dim, act_space, config)

    def _predict(self, x: Tensor, action: Tensor) -> Tensor:
        """(M, N, T, size) predictions from features (N,T,F) and the actions taken in them (N,T,A)."""
        x = torch.cat([x, action], -1) if self.config.action_cond else x
        return torch.stack([net(x) for net in self.ensemble])

    def loss(self, post: Post, embed: Tensor, prev_action: Tensor) -> Tensor:
        """Squared error of the next step's target, (). The action between two steps is the later one's prev_action."""
        targets = {"embed": embed, "feat": post.feat.cat(), **post.feat._asdict()}
        target = targets[self.config.target].detach()[:, 1:]
        pred = self._predict(post.feat.cat().detach()[:, :-1], prev_action[:, 1:])
        return 0.5 * (pred - target).square().sum(-1).mean()

    def reward(self, dream: Dream, extrinsic: Tensor) -> Tensor:
        """(N, H+1) for arriving in each state: the ensemble's disagreement about what follows.

        Conditioned on the action, the disagreement belongs to taking it, and is paid one step later.
        """
        spread = self._predict(dream.x, dream.action).std(0).mean(-1)  # (N, H+1)
        spread = spread.clamp(min=1e-8).log() if self.config.log else spread
        if self.config.action_cond:
            spread = torch.cat([torch.zeros_like(spread[:, :1]), spread[:, :-1]], 1)
        return self.config.intr_scale * spread + self.config.extr_scale * extrinsic


def renamed(state: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> dict[str, Any]:
    """``state`` by parameter, with those of ``names``, which are below ``prefix``, under their new names."""
    names = {prefix + old: prefix + new for old, new in names.items()}
    return {names.get(name, name): x for name, x in state.items()}


def module_name(parameter: str) -> str:
    """The module that a parameter belongs to, as reports name it."""
    return parameter.rpartition(".")[0] or parameter


class ActState(NamedTuple):
    """What acting carries from step to step."""

    carry: Any
    action: Tensor  # (N, A) the last action


class Agent(nn.Module):
    """World model and behavior with their optimisers: ``act`` and ``update``."""

    def __init__(self, obs_space: Mapping[str, spaces.Space], act_space: spaces.Space, act_dim: int, config):
        super().__init__()
        start_steps(config.replay.length, config.imag.starts)  # raises where they do not fit
        self.act_dim, self.config = act_dim, config
        self.world_model = WorldModel(obs_space, act_dim, config)
        self.behavior = Behavior(self.world_model.feat_dim, act_space, config)
        explores = config.expl.behavior == "plan2explore"
        self.explorer = Explorer(self.world_model, act_space, act_dim, config) if explores else None
        self.metric_names: tuple[str, ...] = ()

    def make_optimizers(self) -> None:
        """After the agent was moved to its device."""
        opt = lambda modules, block: Optimizer(
            modules, lr=block.lr, eps=block.eps, clip=block.clip, capturable=next(self.parameters()).is_cuda
        )
        wm, cfg = self.world_model, self.config
        modules = {name: getattr(wm, name) for name in ("encoder", "dynamics", "decoder", "reward", "cont")}
        self.optimizers = {"model": opt(modules, cfg.model)}
        behaviors = {"": self.behavior}
        if self.explorer:
            self.optimizers["expl_model"] = opt({"ensemble": self.explorer.ensemble}, cfg.model)
            behaviors["expl_"] = self.explorer.behavior
        for prefix, behavior in behaviors.items():
            self.optimizers[f"{prefix}actor"] = opt({"actor": behavior.actor}, cfg.actor)
            self.optimizers[f"{prefix}critic"] = opt({"critic": behavior.critic}, cfg.critic)

    def make_update(self, compiled: str) -> Callable[[Batch], Tensor]:
        """``update``, for CUDA (or ``compiled`` "on") with compiled parts, for CUDA as one recorded graph.

        Where compiling or recording fails, it warns and goes on without (see ``FastUpdate``).
        """
        cuda = next(self.parameters()).is_cuda
        if compiled == "off" or (compiled == "auto" and not cuda):
            return self.update
        return FastUpdate(self, self._compile, capture=cuda)

    def _compile(self) -> None:
        wm = self.world_model
        for module in (wm.encoder, wm.decoder, wm.reward, wm.cont, self.behavior.actor, self.behavior.critic):
            module.compile()
        wm.dynamics.compile_steps()

    def save_state(self) -> dict[str, Any]:
        """Parameters, buffers and optimiser states, by name."""
        return {"params": self.state_dict(), "optim": {name: opt.state_dict() for name, opt in self.optimizers.items()}}

    def load_state(self, state: Mapping[str, Any]) -> dict[str, str]:
        """The inverse, also for a latent state that can be translated (``Dynamics.convert_state_dict``).

        -> {module: "mapped" | "split" | "fresh"}. Raises ValueError, naming the first tensor that is missing or of
        another shape; only an explorer that is not there may start afresh.
        """
        prefix, own, former = "world_model.dynamics.", self.state_dict(), self.world_model.dynamics.former_names
        given = renamed(state["params"], prefix, former)
        params = {name: x for name, x in given.items() if not name.startswith(prefix)}
        dynamics = {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}
        dynamics = self.world_model.dynamics.convert_state_dict(dynamics)
        params |= {prefix + name: x for name, x in dynamics.items()}
        report = {}
        for name, x in own.items():
            theirs = params.get(name)
            if theirs is None and name.startswith("explorer."):
                report[module_name(name)] = "fresh"
                continue
            if theirs is None or theirs.shape != x.shape:
                shape = "nothing" if theirs is None else tuple(theirs.shape)
                raise ValueError(f"{name} is {tuple(x.shape)} here and {shape} there")
            report[module_name(name)] = "mapped" if name in given else "split"
        self.load_state_dict({name: params.get(name, x) for name, x in own.items()})
        for name, opt in self.optimizers.items():
            moments = renamed(state["optim"].get(name, {}), "dynamics.", former)
            opt.load_state_dict(moments)
            fresh = (key for key in opt.params if key not in moments)
            report |= {f"{name} optimiser, {module_name(key)}": "fresh" for key in fresh}
        return report

    def initial(self, n: int) -> ActState:
        device = next(self.parameters()).device
        with torch.no_grad():
            return ActState(self.world_model.dynamics.initial(n), torch.zeros(n, self.act_dim, device=device))

    @torch.no_grad()
    def act(self, state: ActState, obs: Batch, mode: str = "train") -> ActState:
        """One step in N environments. obs: raw (N, ...), with is_first. -> new state; its ``action`` (N,A) is chosen.

        mode: "train" samples an action, "greedy" takes the likeliest, "explore" samples the explorer's. The state is
        always sampled, as in training.
        """
        with self.autocast():
            obs = networks.prepare({k: x.unsqueeze(1) for k, x in obs.items()}) | {
                "prev_action": state.action.unsqueeze(1)
            }
            carry, post, _ = self.world_model.observe(obs, state.carry)
            behavior = self.explorer.behavior if mode == "explore" else self.behavior
            policy = behavior.actor(post.feat.cat()[:, 0])
            return ActState(carry, (policy.mode() if mode == "greedy" else policy.sample()).float())

    def tensors(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """Arrays on the agent's device."""
        device = next(self.parameters()).device
        move = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
        return {key: move(x) for key, x in rows.items()}

    @torch.no_grad()
    def levels(self, obs: Batch, state: ActState) -> list[Batch]:
        """What the first environment shows, what its state says of it, and its coarse levels alone: {key: (1,1,...)}.

        obs: what ``act`` was given to reach ``state``.
        """
        model = self.world_model
        seen = networks.prepare({key: x[:1].unsqueeze(1) for key, x in obs.items()})
        feat = model.dynamics.feat(state.carry).map(lambda x: x[:1].unsqueeze(1))
        with self.autocast():
            return [model.shown(seen), *model.show(feat, levels=True)]

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.config.precision != "bfloat16":
            return contextlib.nullcontext()
        # The cache of cast weights would outlive the optimiser step that changes them.
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, cache_enabled=False)

    def update(self, batch: Batch) -> Tensor:
        """One step of every optimiser. batch: raw, on the device. -> metrics (M,), named by ``metric_names``."""
        with self.autocast():
            obs = networks.prepare(batch)
            losses, carry, post, embed, mets = self.world_model.loss(obs)
        loss = sum(losses.values()).mean()
        metrics = {f"{name}_loss": value.detach().mean() for name, value in losses.items()}
        metrics |= {"model_loss": loss.detach()} | mets | self._step("model", loss)
        self.world_model.dynamics.update_codebook(post)

        starts = self.config.imag.starts
        terminal = obs["is_terminal"][:, start_steps(embed.shape[1], starts)].flatten()
        with torch.no_grad():
            start = self.world_model.dynamics.starts(carry, post, starts)
        metrics |= self._improve("", self.behavior, start, terminal, lambda dream, rew: rew)
        if self.explorer:
            with self.autocast():
                loss = self.explorer.loss(post, embed, obs["prev_action"])
            metrics |= {"expl_model_loss": loss.detach()} | self._step("expl_model", loss)
            metrics |= self._improve("expl_", self.explorer.behavior, start, terminal, self.explorer.reward)
        self.metric_names = tuple(metrics)
        return torch.stack([m.float() for m in metrics.values()])

    def _improve(self, prefix: str, behavior: Behavior, start: Any, terminal: Tensor, reward: Callable) -> Metrics:
        """Dream and improve one behavior on it; ``reward`` turns (dream, predicted reward) into what it is paid."""
        with self.autocast():
            dream = behavior.dream(self.world_model, start, terminal)
            with torch.set_grad_enabled(behavior.backprop):
                rew = reward(dream, self.world_model.reward(dream.x).mode())
            actor_loss, critic_loss, metrics = behavior.losses(dream, rew)
        metrics |= self._step(f"{prefix}actor", actor_loss, prefix) | self._step(f"{prefix}critic", critic_loss, prefix)
        behavior.update_slow()
        return {prefix + name: value for name, value in metrics.items()}

    def _step(self, name: str, loss: Tensor, prefix: str = "") -> Metrics:
        short = name.removeprefix(prefix)
        return {
            key.replace("grad_norm", f"{short}_grad_norm").replace("clipped", f"{short}_clipped"): value
            for key, value in self.optimizers[name].step(loss).items()
        }


def pick_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; use --device cpu")
    name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_agent(env: Any, config: Config, device: torch.device) -> Agent:
    """For the spaces of ``env``. Raises ConfigError for sizes that do not fit together."""
    try:
        return Agent(env.obs_space, env.act_space, env.act_dim, config).to(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
