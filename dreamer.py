"""Train a DreamerV3 agent whose latent state is chosen by config.

    python dreamer.py --configs PRESET [PRESET ...] --task SUITE_NAME --logdir FOLDER [--key value | --group.key value]

The same command again continues the run.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import tools
from envs import EnvError, make_env
from envs.vector import Envs
from hidreamer import cost, evaluation, memory
from hidreamer.episodes import DAMAGED, EpisodeError, Episodes, first_line, named_rows, rows_held
from hidreamer.logger import Logger, Rates, Screen
from hidreamer.provenance import STARTS, note_start, provenance
from hidreamer.replay import Replay, record, row_spec, rows_to_come
from tools import CheckpointError, Config, ConfigError

# What a run may change when it is continued; everything else makes it another run.
FREE = {"steps", "device", "compile", "logger", "logdir", "video", "decode_levels", "eval_episodes", "eval_greedy"}
FREE |= {"log_every", "eval_every", "checkpoint_every", "replay.store", "replay.keep_episodes"}


class Failure(Exception):
    """One line: the run cannot go on, and why."""


class Stop(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int):
        self.signum = signum


# ---------------------------------------------------------------- command line


def prepare(args: tools.Args) -> tuple[Config, Path, Path | None]:
    """-> config, folder of the run, checkpoint of another run to start from. Raises ConfigError."""
    source = Path(args.resume) if args.resume else None
    if source is not None and source.is_dir():
        found = [p for p in (source / "checkpoints" / "latest.pt", source / "latest.pt") if p.exists()]
        source = found[0] if found else source / "checkpoints" / "latest.pt"
    if source is not None and not source.exists():
        raise ConfigError(f"--resume: there is no checkpoint {source}")
    home = source.parent.parent if source is not None and source.parent.name == "checkpoints" else None
    alone = home is not None and not args.presets and "logdir" not in args.overrides  # it goes on as it was
    saved = {}
    if alone:
        known = tools.load_config([], {}).flat().keys() - {"logdir"}  # what no longer exists is told as a change, later
        saved = {key: x for key, x in tools.saved_config(home).items() if key in known}
    config = tools.load_config(args.presets, saved | args.overrides)
    if config.logger == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger wandb needs its extra: pip install -e '.[wandb]'")
    logdir = Path(config.logdir or home or f"runs/{config.task}-{config.dynamics.type}-{config.seed}").expanduser()
    own = home is not None and logdir.resolve() == home.resolve()
    return config, logdir, None if own else source


def capacity(args: tools.Args) -> str:
    """The agent of --configs beside those with its last preset replaced by each of --capacity."""
    columns = {}
    for name in [args.presets[-1] if args.presets else "defaults", *args.capacity]:
        config = tools.load_config([*args.presets[:-1], name], args.overrides)
        env = make_env(config.task, config.env.tree(), 0)
        agent = models.make_agent(env, config, torch.device("cpu"))
        agent.make_optimizers()
        rows = cost.random_rows(env.obs_space, env.act_space, config.replay.batch, config.replay.length)
        batch = {key: torch.from_numpy(x) for key, x in rows.items()}
        update = functools.partial(agent.update, batch)
        update()  # the first one allocates the optimisers' states
        columns[name] = cost.sizes(agent) | {"FLOPs per update": cost.flops(update)} | cost.operators(update)
    return cost.table(columns)


# ---------------------------------------------------------------- the run


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
        self.screen = Screen(config.steps)
        self.replay = self._make_replay(state, source, rngs["replay"])
        self.episodes = Episodes(logdir / "train_eps", n, config.replay.keep_episodes)
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
        self.running_files: list[str] = []  # of the last two checkpoints
        log_size = 0
        if state:
            log_size = self._load(state, rows)
        else:
            if found := self.episodes.present():
                raise ConfigError(
                    f"{self.episodes.folder} holds {len(found)} episodes, but {logdir} no checkpoint to go on from: "
                    "choose another --logdir, or move them away"
                )
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

    def _make_replay(self, state: dict | None, source: Path | None, rng: np.random.Generator) -> Replay:
        """Empty, as large as this run can come to need. Raises MemoryError where the machine cannot hold that."""
        config, n, block = self.config, self.config.env.count, self.config.replay
        done = state["counters"]["step"] if state else 0
        left = -(-max(0, config.steps - done) // self.envs.repeat)
        held = rows_held(state["episodes"]) if state else [0] * n
        imported = sum(named_rows(path) or 0 for path in recorded(source)) if source else 0
        spec, folder = row_spec(self.envs.obs_space, self.envs.act_dim), self.logdir if block.store == "disk" else None
        steps = min(block.capacity, sum(held) + imported + left)
        self.screen.line(memory.check(steps, record(spec).itemsize, folder))
        # How much is imported shows only when it has been read.
        capacity = block.capacity if source else min(block.capacity, rows_to_come(max(held), left, n))
        return Replay(
            spec, capacity=capacity, batch=block.batch, length=block.length, streams=n, rng=rng, folder=folder
        )

    # ------------------------------------------------------------ collecting and learning

    def train(self) -> None:
        """Until ``steps``. Raises Stop, Failure, EnvError, OSError; the run can be saved after a Stop."""
        while self.step < self.config.steps:
            self._heed()
            while self.credit >= 1.0 and self.replay.ready():
                self._improve()
                self._heed()
            self._collect()
            for name, act in (("log", self.log), ("eval", self.evaluate), ("checkpoint", self.save)):
                if self.every[name].due(self.step):
                    act()
        while self.credit >= 1.0 and self.replay.ready():
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
        return len(self.replay) >= min(self.config.replay.prefill, self.replay.capacity)

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

    def farewell(self, argv: list[str]) -> str:
        """Where everything is, and which command goes on."""
        videos = sorted((self.logdir / "videos").glob(f"{self.step:09d}-*.mp4"))
        kept = [word for i, word in enumerate(argv) if not word.startswith("--steps") and argv[i - 1] != "--steps"]
        again = shlex.join(["python", "dreamer.py", *kept, "--steps", str(2 * self.config.steps)])
        lines = [f"done: {self.step} steps, {self.updates} updates"]
        lines += [f"video:      {path}" for path in videos]
        return "\n".join([*lines, f"checkpoint: {self.folder / 'latest.pt'}", f"continue:   {again}"])

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
                if config.video and self.replay.ready():
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
        self.episodes.checkpointed(state["episodes"])
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
        try:
            problems = self.episodes.restore(self.replay, state["episodes"], rows)
        except EpisodeError as error:
            file = self.folder / state["running_file"]
            raise CheckpointError(f"{file} is not what this run saved: {error}; move {self.folder} away") from None
        for problem in problems:
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
        for problem in self.episodes.load(self.replay, recorded(source)):
            self.screen.line(problem)
        self.screen.line(f"started from {source}, {len(self.replay)} steps of replay")


COUNTERS = ("step", "agent_steps", "updates", "credit", "started", "summed", "last_return", "evaluated")


def recorded(checkpoint: Path) -> list[Path]:
    """The episodes beside a checkpoint of ours or dreamerv3-torch's."""
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return sorted((home / "train_eps").glob("*.npz"))


def write_npz(path: Path, rows: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **rows)


# ---------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 2 bad arguments, 1 failure, 128 + signal after a signal."""
    if not argv or "--help" in argv or "-h" in argv:
        print(tools.help_text(__doc__))
        return 0 if argv else 2
    run = None
    try:
        args = tools.parse(argv)
        if args.capacity:
            print(capacity(args))
            return 0
        config, logdir, source = prepare(args)
        run = Run(config, logdir, source, models.pick_device(config))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, run.heed)
        with run.screen.bar:
            run.train()
            run.finish()
        print(run.farewell(argv))
        return 0
    except Stop as stop:
        run.save()
        print(
            f"stopped by {signal.Signals(stop.signum).name} at step {run.step}; checkpoint {run.folder / 'latest.pt'}"
        )
        return 128 + stop.signum
    except (ConfigError, CheckpointError, EnvError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) or (run and isinstance(error, EnvError)) else 2
    except MemoryError as error:
        told = str(error) or "memory is full: lower replay.capacity, or set replay.store disk"
        print(f"error: {told}", file=sys.stderr)
        return 1 if run else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: the disk is full ({error}); the last checkpoint in {logdir / 'checkpoints'} is whole",
            file=sys.stderr,
        )
        return 1
    finally:
        if run is not None:
            run.close()


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of --help | head: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
