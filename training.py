"""A training run: all that a checkpoint holds, and the loop that moves it. ``dreamer.py`` is its command line."""

from __future__ import annotations

import contextlib
import functools
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import tools
from envs import make_env
from envs.vector import Envs
from hidreamer import cost, evaluation
from hidreamer.logger import Logger, Rates, Screen
from hidreamer.provenance import STARTS, note_start, provenance
from hidreamer.replay import DAMAGED, Episodes, Replay, first_line
from tools import CheckpointError, Config, ConfigError

# What a run may change when it is continued; everything else makes it another run.
FREE = {"steps", "device", "compile", "logger", "logdir", "video", "decode_levels", "eval_episodes", "eval_greedy"}
FREE |= {"log_every", "eval_every", "checkpoint_every"}


class Failure(Exception):
    """One line: the run cannot go on, and why."""


class Stop(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int):
        self.signum = signum


class Run:
    """Everything that a checkpoint holds, and the loop that moves it.

    On CPU a run that was killed and continued logs, from its last checkpoint on, what one that was never killed logs.
    So nothing here reads the clock or a global random state, except what goes to the names ``perf/...``.
    """

    def __init__(self, config: Config, logdir: Path, source: Path | None, device: torch.device):
        self.config, self.logdir, self.device = config, logdir, device
        self.folder = logdir / "checkpoints"
        state, rows = self._find_checkpoint()
        if state:
            self._check_same(state["config"])
        self.generation = state["generation"] + 1 if state else 0  # how often the run was continued
        rngs = tools.seed_all(config.seed)
        self.explore_rng = rngs["explore"]
        n = config.env.count
        self.envs = self._make_envs(n, 0, self.generation)
        self.agent = models.make_agent(self.envs, config, device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.agent.make_optimizers()
        self.update = self.agent.make_update(config.compile)
        block = config.replay
        sizes = {"capacity": block.capacity, "batch": block.batch, "length": block.length}
        self.replay = Replay(**sizes, streams=n, rng=rngs["replay"])
        self.episodes = Episodes(logdir / "train_eps", n)
        self.step = self.agent_steps = self.updates = 0  # environment frames, actions taken, optimiser steps
        self.credit, self.started = 0.0, False  # updates that are due
        self.restarts = 0  # of environments, before this process
        self.obs: dict[str, np.ndarray] | None = None
        self.act: models.ActState | None = None
        self.score = {key: np.zeros(n) for key in ("return", "length", *self.envs.log_keys)}
        self.sums, self.summed = torch.zeros(0, device=device), 0
        self.broken = torch.zeros((), dtype=torch.bool, device=device)  # metrics of the first update that went wrong
        self.last_return: float | None = None
        self.evaluated = -1  # the step of the last evaluation
        self.every = {name: tools.Every(config[f"{name}_every"]) for name in ("log", "eval", "checkpoint")}
        self.signal = 0
        self.screen = Screen(config.steps)
        self.running_files: list[str] = []  # of the last two checkpoints
        log_size = 0
        if state:
            log_size = self._load(state, rows)
        else:
            self.episodes.restore(self.replay, self.episodes.state(), {})  # an earlier start may have left files
            if source is not None:
                self._start_from(source)
        (logdir / "config.yaml").write_text(tools.dump_yaml(config.tree()))
        if self.step < config.steps:
            note_start(logdir, provenance())
        self.rates = Rates(self.step, self.updates)
        self.screen.rates = Rates(self.step, self.updates)
        self.logger = Logger(logdir, self.step, log_size, config.tree() if config.logger == "wandb" else None)

    def _make_envs(self, count: int, role: int, generation: int) -> Envs:
        task, block, seed = self.config.task, self.config.env.tree(), self.config.seed

        def make(index: int, restart: int):
            entropy = [seed, role, generation, index, restart]
            return make_env(task, block, int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1))

        return Envs(make, count, self.config.env.parallel)

    # ------------------------------------------------------------ collecting and learning

    def train(self) -> None:
        """Until ``steps``. Raises Stop, Failure, EnvError, OSError; the run can be saved after a Stop."""
        while self.step < self.config.steps:
            self._heed()
            while self.credit >= 1.0:
                self._improve()
                self._heed()
            self._collect()
            for name, act in (("log", self.log), ("eval", self.evaluate), ("checkpoint", self.save)):
                if self.every[name].due(self.step):
                    act()
        while self.credit >= 1.0:
            self._improve()
            self._heed()

    def heed(self, signum: int, frame: Any) -> None:
        """Signal handler: stop at the next safe moment; a second signal stops at once."""
        self.signal = signum
        signal.signal(signum, signal.SIG_DFL)

    def _heed(self) -> None:
        if self.signal:
            raise Stop(self.signal)
        if self.screen.due():
            self._show()

    def _collect(self) -> None:
        """One step of every environment into the replay."""
        config = self.config
        action = None if self.obs is None else self._choose()
        self.obs = obs = self.envs.step(action)
        first = obs["is_first"]
        prev = np.zeros((len(first), self.envs.act_dim), np.float32) if action is None else action
        row = {key: obs[key] for key in (*self.envs.obs_space, "reward", "is_first", "is_last", "is_terminal")}
        row["prev_action"] = np.where(first[:, None], np.float32(0), prev)
        self.replay.add(row)
        self.episodes.add(self.replay, obs["is_last"])
        taken = int((~first).sum())
        self.agent_steps += taken
        self.step += taken * self.envs.repeat
        self._count(obs)
        if self._filled() and self.replay.ready():
            if not self.started:
                self.started, self.credit = True, float(config.replay.pretrain)
            self.credit += taken * config.replay.ratio / (config.replay.batch * config.replay.length)

    def _filled(self) -> bool:
        return len(self.replay) >= min(self.config.replay.prefill, self.config.replay.capacity)

    def _choose(self) -> np.ndarray:
        """(count, A) actions for the last observations."""
        expl = self.config.expl
        exploring = expl.behavior != "greedy" and (expl.until == 0 or self.step < expl.until)
        if not self._filled() or (exploring and expl.behavior == "random"):
            self.act = None
            return cost.random_action(self.envs.act_space, self.envs.count, self.explore_rng)
        obs = {key: self.obs[key] for key in (*self.envs.obs_space, "is_first")}
        if self.act is None:
            # What came before was not followed: begin as a replayed chunk begins.
            self.act = self.agent.initial(self.envs.count)
            obs["is_first"] = np.ones_like(obs["is_first"])
        self.act = self.agent.act(self.act, self.agent.tensors(obs), "explore" if exploring else "train")
        return self.act.action.cpu().numpy()

    def _count(self, obs: dict[str, np.ndarray]) -> None:
        """Sum up episodes and record the finished ones."""
        for key, score in self.score.items():
            score *= ~obs["is_first"]
            score += {"return": obs["reward"], "length": ~obs["is_first"]}.get(key, obs.get(key))
        for i in np.flatnonzero(obs["is_last"]):
            done = {f"train_{key.removeprefix('log_')}": float(score[i]) for key, score in self.score.items()}
            self.last_return = done["train_return"]
            self.logger.scalars(self.step, done)

    def _improve(self) -> None:
        batch = self.replay.sample()
        del batch["is_last"]
        metrics = self.update(self.agent.tensors(batch))
        self.sums = self.sums + metrics if self.summed else metrics.clone()
        self.summed += 1
        self.broken = torch.where(self.broken.any(), self.broken, ~metrics.isfinite())
        self.updates += 1
        self.credit -= 1.0

    def finish(self) -> None:
        """The last evaluation and checkpoint, unless this run had them already."""
        if self.evaluated != self.step:
            self.evaluate()
            self.save()

    def close(self) -> None:
        self.envs.close()
        self.logger.close()

    # ------------------------------------------------------------ telling

    def metrics(self) -> dict[str, float]:
        """Means of the training metrics since the last record. Raises Failure where one is not finite."""
        values = (self.sums / max(self.summed, 1)).tolist() if self.summed else []
        metrics = dict(zip(self.agent.metric_names, values, strict=False))
        if not np.isfinite(values).all():
            # One NaN makes all metrics NaN an update later: tell the one that it began with.
            broken = self.broken.expand(len(values)).tolist()
            culprits = [name for name, bad in zip(metrics, broken, strict=True) if bad]
            name = (culprits or [name for name, value in metrics.items() if not np.isfinite(value)])[0]
            last = self.logdir / "checkpoints" / "latest.pt"
            good = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
            raise Failure(f"{name} became {metrics[name]} by step {self.step} (update {self.updates}); {good}")
        return metrics

    def log(self) -> None:
        frames, updates = self.rates(self.step, self.updates)
        counts = {"updates": self.updates, "replay_steps": len(self.replay), "env_restarts": self._restarts()}
        rates = {"perf/frames_per_s": frames, "perf/updates_per_s": updates, "perf/peak_mb": cost.peak_mb(self.device)}
        self.logger.scalars(self.step, self.metrics() | counts | rates)
        self.logger.flush()
        self._show()
        self.sums, self.summed = torch.zeros(0, device=self.device), 0
        self.every["log"].done(self.step)

    def _restarts(self) -> int:
        return self.restarts + self.envs.restarts

    def _show(self) -> None:
        metrics = self.metrics()
        losses = {
            key.removesuffix("_loss"): metrics[key]
            for key in ("model_loss", "actor_loss", "critic_loss")
            if key in metrics
        }
        self.screen.update(self.step, self.updates, losses, self.last_return)

    def evaluate(self) -> None:
        """Episodes in fresh environments, and videos. Leaves the run's own state and random numbers alone."""
        config = self.config
        if config.eval_episodes and self.started:
            entropy = np.random.SeedSequence([config.seed, 1, self.step])
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(int(entropy.generate_state(1)[0]))
                mode, shows = "greedy" if config.eval_greedy else "train", (config.video, config.decode_levels)
                count = min(config.env.count, config.eval_episodes)
                with contextlib.closing(self._make_envs(count, 1, self.step)) as envs:
                    played = evaluation.play(self.agent, envs, config.eval_episodes, mode, *shows, self._heed)
                returns, lengths, videos = played
                scores = {"eval_return": float(np.mean(returns)), "eval_return_std": float(np.std(returns))}
                scores |= {"eval_length": float(np.mean(lengths)), "eval_episodes": len(returns)}
                self.logger.scalars(self.step, scores)
                self.screen.line(f"[{self.step}] eval return {scores['eval_return']:.2f} over {len(returns)} episodes")
                if config.video:
                    batch = self.replay.sample(np.random.default_rng(entropy))
                    videos["open_loop"] = evaluation.open_loop(self.agent, batch, config.decode_levels)
                for name, frames in videos.items():
                    if len(frames):
                        self.logger.video(self.step, name, np.asarray(frames), fps=5 if name == "open_loop" else 15)
            self.logger.flush()
        self.evaluated = self.step
        self.every["eval"].done(self.step)

    # ------------------------------------------------------------ checkpoints

    def _find_checkpoint(self) -> tuple[dict | None, dict[str, np.ndarray]]:
        """The newest checkpoint of this run that can be read, and the rows of its unfinished episodes."""
        problems = []
        for name in ("latest.pt", "previous.pt"):
            path = self.folder / name
            try:
                state = tools.load_checkpoint(path)
                with np.load(self.folder / state["running_file"]) as file:
                    rows = dict(file)
            except (CheckpointError, *DAMAGED) as error:
                problems += [first_line(error)] if path.exists() else []
                continue
            for problem in problems:
                print(f"{problem}; continuing from {path} at step {state['step']}")
            return state, rows
        if problems:
            raise CheckpointError(f"{'; '.join(problems)}; move {self.folder} away to start anew")
        return None, {}

    def _check_same(self, old: dict) -> None:
        old, new = tools.flatten(old), self.config.flat()
        # A key that the old config lacks is younger than the run.
        changed = [key for key in old if key not in FREE and old[key] != new.get(key)]
        if changed:
            told = ", ".join(f"{key} {old[key]} -> {new.get(key)}" for key in changed[:3])
            raise ConfigError(
                f"{self.logdir} holds a run with another config ({told}{', ...' if len(changed) > 3 else ''}): "
                f"choose another --logdir, with --resume {self.logdir} to start from its weights"
            )

    def save(self) -> None:
        """Write a checkpoint; the last one becomes previous.pt and stays whole if this fails (OSError, Failure)."""
        self.metrics()
        self.every["checkpoint"].done(self.step)
        running = f"running-{self.step:012d}.npz"
        rows = self.episodes.running_rows(self.replay)
        tools.replace_file(self.folder / running, functools.partial(write_npz, rows=rows))
        cuda = self.device.type == "cuda"
        state = {
            "config": self.config.tree(),
            "generation": self.generation,
            "counters": {name: getattr(self, name) for name in COUNTERS} | {"restarts": self._restarts()},
            "step": self.step,
            "agent": self.agent.save_state(),
            "act": None if self.act is None else [*self.act.carry, self.act.action],
            "obs": self.obs,
            "envs": self.envs.state(),
            "episodes": self.episodes.state(),
            "running_file": running,
            "score": self.score,
            "sums": self.sums,
            "metric_names": self.agent.metric_names,
            "every": {name: every.count for name, every in self.every.items()},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "replay_rng": self.replay.rng.bit_generator.state,
            "explore_rng": self.explore_rng.bit_generator.state,
            "log_size": self.logger.flush(),
        }
        tools.save_checkpoint(self.folder / "latest.pt", state)
        self.running_files = [*self.running_files[-1:], running]
        for path in self.folder.glob("running-*.npz"):
            if path.name not in self.running_files:
                path.unlink()

    def _load(self, state: dict, rows: dict[str, np.ndarray]) -> int:
        """Be what ``state`` says. -> size of metrics.jsonl at that moment."""
        try:
            self.agent.load_state(state["agent"])
        except ValueError as error:
            raise ConfigError(
                f"{self.logdir} is of another version of this code ({error}): choose another --logdir, or go on with "
                f"the commit that {STARTS} in it names"
            ) from None
        for name, value in state["counters"].items():
            setattr(self, name, value)
        for name, count in state["every"].items():
            self.every[name].count = count
        for problem in self.episodes.restore(self.replay, state["episodes"], rows):
            self.screen.line(problem)
        self.running_files = [state["running_file"]]
        self.score = tools.arrays(state["score"])
        self.sums, self.agent.metric_names = state["sums"].to(self.device), tuple(state["metric_names"])
        self.replay.rng.bit_generator.state = state["replay_rng"]
        self.explore_rng.bit_generator.state = state["explore_rng"]
        self.obs = tools.arrays(state["obs"])
        if state["act"] is not None:
            *carry, action = (x.to(self.device) for x in state["act"])
            self.act = models.ActState(type(self.agent.initial(1).carry)(*carry), action)
        restored = self.envs.load_state(tools.arrays(state["envs"]))
        if self.obs is not None:
            self._cut(~restored & ~self.obs["is_last"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.screen.line(f"continuing {self.logdir} at step {self.step} of {self.config.steps}")
        return state["log_size"]

    def _cut(self, lost: np.ndarray) -> None:
        """Close the running episodes of environments that could not be restored: truncated where they stood."""
        for i in np.flatnonzero(lost):
            self.episodes.cut(self.replay, i)
            self.obs["is_last"][i] = True

    def _start_from(self, source: Path) -> None:
        """Begin with another run's weights, optimisers and episodes; ours or dreamerv3-torch's. Raises ConfigError."""
        state = tools.load_checkpoint(source)
        home = source.parent.parent if source.parent.name == "checkpoints" else source.parent
        if "agent_state_dict" in state:
            import legacy

            weights = legacy.convert(state)
        else:
            weights = state["agent"]
        try:
            told = self.agent.load_state(weights)
        except ValueError as error:
            raise ConfigError(f"--resume {source}: {error}") from None
        self.screen.line("\n".join(f"  {how:<7} {what}" for what, how in told.items()))
        paths = sorted((home / "train_eps").glob("*.npz"))
        keys = {*self.envs.obs_space, "reward", "is_first", "is_last", "is_terminal", "prev_action"}
        for problem in self.episodes.load(self.replay, paths, keys):
            self.screen.line(problem)
        self.screen.line(f"started from {source}, {len(self.replay)} steps of replay")


COUNTERS = ("step", "agent_steps", "updates", "credit", "started", "summed", "last_return", "evaluated")


def write_npz(path: Path, rows: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **rows)
