"""collect: frames once, actions, rewards, ends and the console's memory, in the episodes' format.

An episode depends on the config, the game and its own number alone, so that a stage that was killed
plays the interrupted one again. ``LOGDIR/collect/GAME`` is like the folder of a run:
``--paired-offline`` and the world models read its episodes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.utils import seeding

import models
import run_config
import tools
from envs import make_env
from envs.base import Env
from hidreamer import checkpoint
from hidreamer.checkpoint import CheckpointError
from hidreamer.episodes import save_episode
from hidreamer.spaces import random_action
from library import source
from pipeline import data
from pipeline.gate import Gate, Row, Table
from pipeline.manifest import InputError, again
from pipeline.stage import Stage
from tools import Config, ConfigError

EPISODE = re.compile(r"(\d{7})-00-\d+\.npz(\.tmp)?")  # its number; half a file is one too
NOTE = (
    "Returns are of episodes as far as they were recorded: env.time_limit cuts them, and the last"
    " one of each game ends with the steps asked for. No measure of a policy."
)


class Played(NamedTuple):
    """An episode's rows {key: (T, ...)} and its return."""

    rows: dict[str, np.ndarray]
    score: float


class Game:
    """The environment of a game, opened once: loading a cartridge costs as much as hundreds of
    steps.
    """

    def __init__(self, name: str, config: Config):
        self.env = make_env(f"atari_{name}", config.env.tree(), 0)
        self.env.reset()
        self.start = self.env.get_state()

    def seeded(self, seed: int) -> Env:
        """The environment, whose next episode is the first one of a new environment of ``seed``,
        whatever was played before.
        """
        self.env.set_state(self.start)
        self.env.suite.np_random, _ = seeding.np_random(seed)
        self.env.suite.np_random.integers(2**31)  # the emulator's own seed: it draws nothing
        return self.env


class Collect(Stage):
    """Records episodes of every game: of random play, of a trained agent, or of a Minari data
    set.
    """

    name = "collect"
    keys = ("pipeline.collect.steps", "pipeline.collect.agent", "pipeline.collect.random")
    keys += ("pipeline.collect.from_minari", "env.size", "env.action_repeat", "env.time_limit")
    keys += ("env.atari",)

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        super().__init__(config, root, device, report)
        self.games, block = config.pipeline.games, config.pipeline.collect
        if len(set(self.games)) != len(self.games):
            raise ConfigError(f"pipeline.games names a game twice: {' '.join(self.games)}")
        spaces = [data.space(config, game) for game in self.games]
        if block.to_minari:
            from pipeline import minari

            minari.package()
            minari.refuse_existing(tools.user_path(block.to_minari), self.games)
        self.per_game, self.total = block.steps, block.steps * len(self.games)
        self.names: list[list[str]] = [[] for _ in self.games]  # of the episodes' files
        self.returns: list[list[float]] = [[] for _ in self.games]
        self.rows = [0] * len(self.games)  # recorded steps of each
        self.opened: dict[int, Game] = {}
        self.seconds = [0.0] * len(self.games)  # of this thread's processor time, for playing
        self.policy: RecordedPolicy | None = None
        if block.from_minari:
            from pipeline import minari

            self.imported = minari.read(block.from_minari, spaces, block.steps)
        elif block.agent:
            self.policy = RecordedPolicy(tools.user_path(block.agent), config, self.games, device)
        self.writer = ThreadPoolExecutor(1)  # compressing leaves the interpreter to the emulator
        self.pending: list[Future] = []

    def refuse_used(self) -> None:
        super().refuse_used()
        for game in self.games:
            checkpoint.refuse_used_folder(data.folder(self.root, game).parent)

    # ------------------------------------------------------------ one episode

    def advance(self) -> Mapping[str, float]:
        """Record the next episode of the first game that lacks steps."""
        game = next(i for i, rows in enumerate(self.rows) if rows < self.per_game)
        if self.config.pipeline.collect.from_minari:
            played = self.imported[game][len(self.names[game])]
        else:
            played = self._play(game, len(self.names[game]), self.per_game - self.rows[game])
        steps = len(played.rows["reward"]) - 1
        name = f"{len(self.names[game]):07d}-00-{steps + 1}.npz"
        folder = data.folder(self.root, self.games[game])
        folder.mkdir(parents=True, exist_ok=True)
        self.pending.append(self.writer.submit(save_episode, folder / name, played.rows))
        self.names[game].append(name)
        self.returns[game].append(played.score)
        self.rows[game] += steps
        self.step = sum(self.rows)
        metrics = {"train_return": played.score, "train_length": float(steps)}
        return {f"{self.games[game]}/{key}": value for key, value in metrics.items()}

    def _play(self, game: int, index: int, budget: int) -> Played:
        """Episode ``index`` of a game, cut (a truncation) after ``budget`` steps."""
        config, name = self.config, self.games[game]
        entropy = [config.seed, zlib.crc32(name.encode()), index]
        seeds = np.random.SeedSequence(entropy).generate_state(2)
        if game not in self.opened:
            self.opened[game] = Game(name, config)
        start = time.thread_time()
        env = self.opened[game].seeded(int(seeds[0] >> 1))
        rng = np.random.default_rng(seeds)
        played = play(env, self._chooser(env, rng, int(seeds[1])), budget)
        self.seconds[game] += time.thread_time() - start
        return played

    def _chooser(self, env: Env, rng: np.random.Generator, seed: int) -> Callable:
        """A function from an output of ``env`` to the next action (A,)."""
        if self.policy is None:
            return random_player(env, rng)
        share = self.config.pipeline.collect.random
        act = self.policy.episode(seed)

        def choose(obs: Mapping[str, Any]) -> np.ndarray:
            other = random_action(env.act_space, 1, rng)[0] if rng.random() < share else None
            return act(obs, other)

        return choose

    # ------------------------------------------------------------ state and end

    def save_state(self) -> dict[str, Any]:
        self._wait()
        state = {"names": self.names, "returns": self.returns, "rows": self.rows}
        return state | {"seconds": self.seconds} | self.facts()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError where another agent played the first episodes."""
        if self.policy is not None:
            self._check_agent(state.get("agent"))
        self.names, self.returns, self.rows = state["names"], state["returns"], state["rows"]
        self.seconds = state["seconds"]
        for game, names in zip(self.games, self.names, strict=True):
            for path in data.folder(self.root, game).glob("*.npz*"):
                number = EPISODE.fullmatch(path.name)
                if number and int(number[1]) >= len(names):  # of after the checkpoint: played again
                    path.unlink()

    def _check_agent(self, before: Mapping[str, Any] | None) -> None:
        """before: of the agent that the recording was begun with, None if that is not known."""
        logdir, now = self.policy.logdir, self.policy.identity
        if before is None:
            self.report(
                f"an older version began {self.folder} and did not note {logdir}'s step: if that"
                " run has trained on since, this recording is of two policies"
            )
        elif dict(before) != now:
            raise InputError(
                f"{self.folder} was begun with {logdir} at step {before['step']}, and that run is"
                f" another now, at step {now['step']}: put its checkpoint back, or"
                f" {again(self.folder)}"
            )

    def facts(self) -> dict[str, Any]:
        return {} if self.policy is None else {"agent": self.policy.identity}

    def _wait(self) -> None:
        """Until all episodes are written. Raises OSError."""
        for future in self.pending:
            future.result()
        self.pending.clear()

    def finish(self) -> tuple[Gate, list[Path]]:
        self._wait()
        block = self.config.pipeline.collect
        outputs, rows = [], []
        for game, names, returns in zip(self.games, self.names, self.returns, strict=True):
            outputs += [data.folder(self.root, game) / name for name in names]
            rows.append(Row(f"{game}: mean return", float(np.mean(returns))))
            rows.append(Row(f"{game}: episodes", len(names)))
        tables = [Table("Recorded", rows, NOTE)]
        if not block.agent and not block.from_minari:
            from pipeline import speed

            tables.append(speed.table(self.config, self.games[0], self.rows[0], self.seconds[0]))
        policy = block.from_minari or block.agent or "random"
        return Gate(self.name, tables, {"policy": policy, "steps of each game": self.rows}), outputs

    @classmethod
    def export(cls, config: Config, root: Path, report: Callable) -> None:
        if folder := config.pipeline.collect.to_minari:
            from pipeline import minari

            load = functools.partial(data.load, root, config)
            for line in minari.write(tools.user_path(folder), config.pipeline.games, load):
                report(line)

    def close(self) -> None:
        self.writer.shutdown()
        for game in self.opened.values():
            game.env.close()


def random_player(env: Env, rng: np.random.Generator) -> Callable[[Any], np.ndarray]:
    """``spaces.random_action`` of one environment, without making its one-hots anew each step."""
    onehots = np.eye(env.act_dim, dtype=np.float32)
    return lambda obs: onehots[rng.integers(len(onehots))]


def play(env: Env, choose: Callable[[Mapping[str, Any]], np.ndarray], budget: int) -> Played:
    """One episode of ``env``, its console's memory beside every row; cut after ``budget`` steps."""
    obs, action = env.reset(), np.zeros(env.act_dim, np.float32)
    keys = (*env.obs_space, "reward", "is_first", "is_last", "is_terminal")
    found: dict[str, list] = {key: [] for key in (*keys, "prev_action", "ram")}
    while True:
        if len(found["reward"]) == budget:
            obs["is_last"] = True
        for key in keys:
            found[key].append(obs[key])
        found["prev_action"].append(action)
        found["ram"].append(env.suite.ram())
        if obs["is_last"]:
            break
        action = choose(obs)
        obs = env.step(action)
    rows = {key: np.stack(values) for key, values in found.items()}
    return Played(rows, float(rows["reward"].sum()))


class RecordedPolicy:
    """A trained agent's policy. Raises ConfigError where it sees or does something else than is
    recorded, CheckpointError.
    """

    def __init__(self, logdir: Path, config: Config, games: list[str], device: torch.device):
        if not (logdir / "config.yaml").exists():
            raise ConfigError(
                f"pipeline.collect.agent: {logdir} is no run, it has no config.yaml: give the"
                " --logdir of a dreamer.py run, or leave it empty for random play"
            )
        saved = run_config.saved_config(logdir)
        saved.pop("logdir", None)
        known = tools.load_config([], {}).flat()
        theirs = tools.load_config([], {key: x for key, x in saved.items() if key in known})
        with contextlib.closing(make_env(theirs.task, theirs.env.tree(), 0)) as played:
            for game in games:
                with contextlib.closing(make_env(f"atari_{game}", config.env.tree(), 0)) as env:
                    same = env.obs_space == played.obs_space and env.act_dim == played.act_dim
                if not same or theirs.env.action_repeat != config.env.action_repeat:
                    raise ConfigError(
                        f"pipeline.collect.agent: {logdir} plays {theirs.task} from"
                        f" {described(played)}, and {game} is recorded as {described(env)}: set"
                        " pipeline.games, env.size, env.action_repeat and env.atari to the agent's"
                    )
        self.agent = models.make_agent(played, theirs, device)
        self.agent.make_optimizers()
        state = source.newest(source.checkpoints_of(logdir))
        self.logdir = logdir
        self.identity = {"step": state["step"]}  # the path alone would be another's once it trains
        self.identity["sha256"] = source.digest(state["agent"]["params"], {})
        try:
            self.agent.load_state(state["agent"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{logdir} cannot be used: {error}") from None

    def episode(self, seed: int) -> Callable[..., np.ndarray]:
        """The policy of one episode, sampled as in training: a function from an output of the
        environment, and an action (A,) to take instead of its own or None, to the action taken.
        """
        torch.manual_seed(seed)
        state = self.agent.initial(1)

        def act(obs: Mapping[str, Any], instead: np.ndarray | None) -> np.ndarray:
            nonlocal state
            keys = (*self.agent.world_model.encoder.observed, "is_first")
            inputs = {key: np.asarray(obs[key])[None] for key in keys}
            state = self.agent.act(state, self.agent.tensors(inputs), "train")
            if instead is not None:  # its next state is to know what was done
                given = torch.as_tensor(instead, dtype=state.action.dtype)
                state = state._replace(action=given.to(state.action.device).unsqueeze(0))
            return state.action[0].cpu().numpy()

        return act


def described(env: Env) -> str:
    shapes = ", ".join(f"{key} {space.shape}" for key, space in env.obs_space.items())
    return f"{shapes} with {env.act_dim} actions, {env.repeat} frames each"
