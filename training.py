"""A training run: its state and its steps. ``run_state.py`` says what a checkpoint holds of it,
``dreamer.py`` is its command line and its loop.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import run_config
import run_setup
import run_state
import tools
from envs.errors import ActionError
from hidreamer import carries, checkpoint, cost, evaluation, precision, process
from hidreamer.episodes import Episodes, make_replay, recorded
from hidreamer.feed import Feed
from hidreamer.logger import RENDER, VIDEO, Logger, Rates
from hidreamer.metrics import EpisodeScores, Means
from hidreamer.provenance import note_start, provenance
from hidreamer.replay import Replay, row_spec
from hidreamer.spaces import random_action
from run_setup import evaluation_generator, make_envs, make_generator, notes, write_yaml
from tools import Config, ConfigError

SLOW_COMPILE = "compile on: on a CPU that takes minutes and gains nothing that was measured"


class Failure(Exception):
    """One line: the run cannot continue, and why."""


class Run:
    """The state of one training run: ``advance`` it until ``steps``, then ``finish``.

    On CPU a run that was killed and continued logs, from its last checkpoint on, what one that was
    never killed logs. So nothing here reads the clock or a global random state, except what goes
    to the names ``perf/...``.

    config: of all keys. logdir: its folder, which the caller keeps for it (``checkpoint.locked``).
    source: a checkpoint of another run to start from. report: takes lines for people. ``poll`` may
    be replaced: it is called between two updates and two steps, where an exception leaves a state
    that can be saved and continued.
    Raises ConfigError, FolderError, EnvError where the run cannot be; nothing was written then, or
    it can be continued.
    """

    def __init__(
        self,
        config: Config,
        logdir: Path,
        source: Path | None,
        device: torch.device,
        report: Callable[[str], None] = print,
    ):
        run_setup.check_objectives(config)
        self.config, self.logdir, self.device, self.report = config, logdir, device, report
        self.poll: Callable[[], None] = lambda: None
        self.folder, self.env_errors = logdir / "checkpoints", logdir / "env_errors.txt"
        state, rows, problems = checkpoint.find_checkpoint(self.folder, run_state.FIELDS)
        for problem in problems:
            report(problem)
        if state:
            run_config.check_same_run(logdir, state["config"], config)
        else:
            checkpoint.refuse_used_folder(logdir)
        # How often the run was continued after its first step.
        self.generation = state["generation"] + (state["obs"] is not None) if state else 0
        rngs = tools.seed_all(config.seed)
        self.explore_rng = rngs["explore"]
        self._make_agent()
        if source is not None and not state:
            run_state.load_weights(self, source)
        self._reset_counts()
        self.copy_from = "" if source is None else str(source.resolve())  # its episodes
        self.replay: Replay
        if state:
            log_size = run_state.restore(self, state, rows)
        else:
            log_size, self.replay = 0, self.make_replay(None, rngs["replay"])
        if problems:
            checkpoint.set_aside(self.folder / "latest.pt")
        self._announce()
        saved = state or {}
        self.rates = Rates(self.step, self.updates, saved.get("rates"))
        about = config.tree(), saved.get("wandb_id")
        self.logger = Logger(logdir, self.step, log_size, *about, service=config.logger)
        if not state:
            # From now on the folder is this run's, and it can be continued if killed at any moment.
            self.save()
        if self.copy_from:
            self._copy_episodes(Path(self.copy_from))
            self.copy_from = ""
            self.save()

    def _make_agent(self) -> None:
        """Environments, an agent for them and its update."""
        config, device = self.config, self.device
        self.envs = make_envs(config, config.env.count, self.generation, self.env_errors)
        self.agent = models.make_agent(self.envs, config, device)
        torch.set_num_threads(process.pick_threads(self.agent, config.threads))
        self.agent.make_optimizers()
        self.generator = make_generator(device)
        if config.compile == "on" and device.type == "cpu":
            self.report(SLOW_COMPILE)
        self.update = self.agent.make_update(config.compile, self.generator, self.report)
        self.feed, self.write_back = Feed(device), carries.WriteBack()

    def _reset_counts(self) -> None:
        """What a run counts and keeps while it trains, before its first step."""
        config, n = self.config, self.envs.count
        self.episodes = Episodes(self.logdir / "train_eps", n, config.replay.keep_episodes)
        self.step = 0  # environment frames
        self.updates = 0  # optimiser steps
        self.pending_updates = 0.0  # that the replay ratio asks for by now
        self.started = False  # whether there was enough data for a first update
        self.restarts = 0  # of environments, before this process
        self.moment = 0  # of the last checkpoint that a population's members wrote together
        self.members = 1  # runs that are trained together now
        self.members_before: dict[int, int] = {}  # {seed: its moment before}, of these members
        self.obs: dict[str, np.ndarray] | None = None
        self.act: models.ActState | None = None
        self.scores = EpisodeScores(n, self.envs.log_keys)
        self.window = Means(self.device)  # of the updates since the last record
        self.logged: dict[str, float] = {}  # the training metrics of the last record
        self.last_return: float | None = None
        self.evaluated = -1  # the step of the last evaluation
        self.unsaved = True  # whether anything happened since the last checkpoint
        self.every = {x: tools.Every(config[f"{x}_every"]) for x in ("log", "eval", "checkpoint")}
        self.running_files: list[str] = []  # of the last two checkpoints

    def _announce(self) -> None:
        """config.yaml and, of a run that goes on, a line in the list of its starts and lines for
        people.
        """
        config = self.config
        write = functools.partial(write_yaml, tree=config.tree())
        checkpoint.replace_file(self.logdir / "config.yaml", write)
        if self.finished:
            return
        note_start(self.logdir, provenance() | {"precision": precision.name(config, self.device)})
        filled = self.started or self.copy_from
        awaited = 0 if filled else max(self._prefill_rows(), config.replay.length)
        for line in notes(config, self.envs.repeat, awaited):
            self.report(line)

    def make_replay(self, episodes: dict[str, Any] | None, rng: np.random.Generator) -> Replay:
        """An empty replay. episodes: a checkpoint's, which will be restored into it."""
        copies = recorded(Path(self.copy_from)) if self.copy_from else []
        left = -(-max(0, self.config.steps - self.step) // self.envs.repeat)
        plan = {"steps": left, "state": episodes, "copies": copies}
        spec, block = row_spec(self.envs.obs_space, self.envs.act_dim), self.config.replay
        if block.write_back:
            plan["extra"] = carries.carry_spec(self.agent.world_model.dynamics)
        try:
            return make_replay(
                spec, block, self.envs.count, rng, **plan, folder=self.logdir, report=self.report
            )
        except MemoryError as error:
            raise ConfigError(str(error)) from None

    # ------------------------------------------------------------ collecting and learning

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, not even the last evaluation."""
        evaluated = self.step >= self.config.steps and self.evaluated == self.step
        return evaluated and self.pending_updates < 1.0

    def advance(self) -> None:
        """What is due (updates, log, checkpoint, evaluation), then one step of every environment.

        In this order a checkpoint of any moment, also during an evaluation, continues with what
        was still due. Raises Failure, EnvError, OSError, and what ``poll`` raises.
        """
        self._run_due()
        self.poll()
        self._collect()

    def finish(self) -> None:
        """The pending updates, and the last record, evaluation and checkpoint if missing."""
        self._run_due()
        if self.window.count or self.every["log"].last < self.step:
            self.log()
        if self.evaluated != self.step:
            self.unsaved = True
            self.evaluate()
        if self.unsaved:
            self.save()

    @property
    def update_due(self) -> bool:
        # A replay that lost its episodes is not ready.
        return self.pending_updates >= 1.0 and self.replay.ready()

    def _run_due(self) -> None:
        while self.update_due:
            self.poll()
            self.learn()
        self.run_periodic(self.save)

    def run_periodic(self, save: Callable[[], None]) -> None:
        """The log, the checkpoint (``save``) and the evaluation that are due."""
        if self.every["log"].due(self.step):
            self.log()
        # Before the evaluation, so that a kill during it costs no more than it.
        if self.every["checkpoint"].due(self.step):
            save()
        if self.every["eval"].due(self.step):
            self.unsaved = True
            self.evaluate()

    def _collect(self) -> None:
        """One step of every environment into the replay."""
        action = None if self.obs is None else self._policy()
        self.envs.send(action)
        self.store(action)

    def store(self, action: np.ndarray | None) -> None:
        """The step of every environment that ``action`` began, into the replay."""
        config = self.config
        try:
            self.obs = obs = self.envs.receive()
        except ActionError:
            self.metrics()  # of an agent that became NaN actions are invalid as well
            raise
        self.unsaved = True
        first = obs["is_first"]
        prev = np.zeros((len(first), self.envs.act_dim), np.float32) if action is None else action
        keys = (*self.envs.obs_space, "reward", "is_first", "is_last", "is_terminal")
        row = {key: obs[key] for key in keys}
        row["prev_action"] = np.where(first[:, None], np.float32(0), prev)
        known = self.config.replay.write_back and self.act is not None
        self.replay.add(row, carries.acted(self.act.carry) if known else None)
        self.episodes.add(self.replay, obs["is_last"])
        taken = int((~first).sum())
        self.step += taken * self.envs.repeat
        whole = obs["is_last"] & ~self.envs.crashed  # what a crash cut short has no return
        for scores in self.scores.add(obs | {"is_last": whole}):
            self.last_return = scores.get("train_return", self.last_return)
            self.logger.scalars(self.step, scores)
        if self._prefilled() and self.replay.ready():
            if not self.started:
                self.started, self.pending_updates = True, float(config.replay.pretrain)
            batch_steps = config.replay.batch * config.replay.length
            self.pending_updates += taken * config.replay.ratio / batch_steps

    def _prefill_rows(self) -> int:
        """Rows of replay before the first update: ``prefill``, but not more than fit."""
        return min(self.config.replay.prefill, self.replay.capacity)

    def _prefilled(self) -> bool:
        return len(self.replay) >= self._prefill_rows()

    def _policy(self) -> np.ndarray:
        """(count, A) actions for the last observations."""
        inputs = self.policy_inputs()
        if isinstance(inputs, np.ndarray):
            return inputs
        return self.choose(*inputs)

    def choose(self, state: models.ActState, obs: dict[str, np.ndarray], mode: str) -> np.ndarray:
        """Follow ``obs`` (count, ...). -> the agent's actions (count, A)."""
        self.act = self.agent.act(state, self.agent.tensors(obs), mode, self.generator)
        return self.act.action.cpu().numpy()

    def policy_inputs(self) -> np.ndarray | tuple[models.ActState, dict[str, np.ndarray], str]:
        """Random actions (count, A), or what ``Agent.act`` is to be given: state, obs, mode."""
        expl = self.config.expl
        exploring = expl.behavior != "greedy" and (expl.until == 0 or self.step < expl.until)
        if not self._prefilled() or (exploring and expl.behavior == "random"):
            self.act = None
            return random_action(self.envs.act_space, self.envs.count, self.explore_rng)
        obs = {key: self.obs[key] for key in (*self.envs.obs_space, "is_first")}
        if self.act is None:
            # The state of the earlier steps is unknown: start as a replayed chunk starts.
            self.act = self.agent.initial(self.envs.count)
            obs["is_first"] = np.ones_like(obs["is_first"])
        return self.act, obs, "explore" if exploring else "train"

    def learn(self) -> None:
        """One update, which ``update_due`` asked for."""
        batch = self.feed.send(self.sample(self.feed.rows()))
        del batch["is_last"]
        self.count_update(self.update(batch), self.agent.carries)

    def sample(self, out: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """A batch for the next update, from a replay that knows what the last one found."""
        return self.write_back.sample(self.replay, out)

    def count_update(self, metrics: torch.Tensor, found: dict[str, torch.Tensor]) -> None:
        """An update was made of the last ``sample``; its metrics (M,), ``Agent.carries``."""
        self.write_back.found = found
        self.window.add(metrics)
        self.updates += 1
        self.pending_updates -= 1.0
        self.unsaved = True

    def close(self) -> None:
        """Close the environments and the log."""
        self.envs.close()
        self.logger.close()

    # ------------------------------------------------------------ metrics and evaluation

    def metrics(self) -> dict[str, float]:
        """Means of the training metrics since the last record. Raises Failure where one is not
        finite.
        """
        metrics = self.window.read(self.agent.metric_names)
        if name := self.window.first_nonfinite(metrics):
            raise Failure(
                f"{name} became {metrics[name]} by step {self.step} (update {self.updates}); the"
                f" last good checkpoint is {self.folder / 'latest.pt'}"
            )
        return metrics

    def log(self) -> None:
        """Record the training metrics and begin a new window."""
        self.logged = self.metrics()
        frames, updates = self.rates(self.step, self.updates)
        counts = {
            "updates": self.updates,
            "replay_steps": len(self.replay),
            "env_restarts": self.env_restarts(),
        }
        rates = {
            "perf/frames_per_s": frames,
            "perf/updates_per_s": updates,
            "perf/cpu_s": self.rates.cpu_s,
            "perf/peak_mb": cost.peak_mb(self.device),
            "perf/members": self.members,
        }
        self.logger.scalars(self.step, self.logged | counts | rates)
        self.logger.flush()
        self.window.reset()
        self.every["log"].done(self.step)
        self.unsaved = True

    def env_restarts(self) -> int:
        """How many environments crashed and were replaced, over all processes of the run."""
        return self.restarts + self.envs.restarts

    def evaluate(self) -> None:
        """Episodes in fresh environments, and videos. Leaves the run's own state and random
        numbers alone.
        """
        config = self.config
        if config.eval_episodes and self.started:
            entropy = np.random.SeedSequence([config.seed, 1, self.step])
            generator = evaluation_generator(config, self.step, self.device)
            best_effort = self.logger.best_effort
            count = min(config.env.count, config.eval_episodes)
            drawable = RENDER not in best_effort.off
            made = make_envs(config, count, self.step, self.env_errors, evaluating=True)
            with contextlib.closing(made) as envs:
                scores, played = evaluation.evaluate(
                    self.agent, envs, config, drawable, self.poll, generator
                )
            self.logger.scalars(self.step, scores)
            self.report(f"[{self.step}] {evaluation.line(scores)}")
            if played.problem:
                best_effort.failed(RENDER, played.problem)
            if config.video and self.replay.ready():
                self.poll()
                batch = self.replay.sample_apart(np.random.default_rng(entropy))
                args = (self.logger, self.step, self.agent, played, batch, config.decode_levels)
                best_effort(VIDEO, evaluation.record, *args, generator)
            self.logger.flush()
        self.evaluated = self.step
        self.every["eval"].done(self.step)

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint. The last one becomes previous.pt.

        Raises OSError, Failure; the last one stays whole then.
        """
        self.metrics()
        self.every["checkpoint"].done(self.step)
        self.write_back.finish(self.replay)
        run_state.write(self)
        self.unsaved = False

    # ------------------------------------------------------------ starting from another run

    def _copy_episodes(self, source: Path) -> None:
        """The episodes beside a checkpoint of another run."""
        for problem in self.episodes.load(self.replay, recorded(source)):
            self.report(problem)
        self.report(f"started from {source}, {len(self.replay)} steps of replay")
