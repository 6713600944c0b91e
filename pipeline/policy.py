"""policy: actor and critic of one game, in dreams of the world model; judged in the real game.

Beside it stand random play, and the same agent trained online with as many real steps and updates
(``LOGDIR/policy/online``, a run of ``dreamer.py`` like any other).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tools
from comparison import stats
from envs import make_env
from envs.vector import Envs
from hidreamer import checkpoint, evaluation
from pipeline import data, manifest, tokenizer, training, world_model
from pipeline.gate import HIGHER, LOWER, Gate, Row, Table
from pipeline.manifest import InputError, again
from pipeline.stage import Stage
from pipeline.token_agent import TokenAgent
from pipeline.token_model import Windows, tensors, token_rows
from tools import Config, ConfigError
from training import Run

Episodes = list[dict[str, float]]  # as of ``evaluation.Played``

EVALUATION, RANDOM, TRAINED = 1, 2, 3  # seeds of environments
# Keys that decide what the online agent becomes, and nothing else here.
ONLINE = ("replay.capacity", "replay.prefill", "replay.online", "replay.write_back")
ONLINE += ("expl", "env.count")
NOTE = (
    "Mean return of whole episodes in the real game, ± one standard error; actions are drawn, as in"
    " training. Online: an agent of the same latent state and heads that learns everything at once,"
    " from as many real steps and with as many updates of actor and critic; its world model learns"
    " from the steps that those replay alone; its codes from reconstruction and rewards. Above: the"
    " low end of the 95% interval (Welch) of the difference of mean returns."
)


class Policy(Stage):
    """Trains an actor-critic in the world model's imagination, and plays the real game with it."""

    name = "policy"
    needs = ("collect", "encoder", "tokenizer", "world_model")
    keys = ("pipeline.policy", "actor", "critic", "imag", "model", "loss_scales", "optim")
    keys += ("encoder", "decoder", "dynamics", "reward", "cont", "precision", "eval_time_limit")

    @classmethod
    def identity(cls, config: Config) -> dict[str, Any]:
        """As of ``Stage``, with those of the online agent where one stands beside it."""
        online = ONLINE if config.pipeline.policy.online else ()
        return super().identity(config) | manifest.relevant(config.flat(), online)

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        super().__init__(config, root, device, report)
        block, games = config.pipeline.policy, config.pipeline.games
        self.game = block.game or games[0]
        if self.game not in games:
            raise ConfigError(
                f"pipeline.policy.game is {self.game!r}; it can be {', '.join(games)}"
            )
        self.block, self.total = block, block.updates
        index = games.index(self.game)
        model = world_model.load(root, config, device, index)
        env = make_env(f"atari_{self.game}", config.env.tree(), 0)
        env.close()
        self.act_space = env.act_space
        self.agent = TokenAgent(model, self.act_space, config).to(device)
        self.agent.make_optimizers()
        recording = data.load(root, config, self.game)
        rows = token_rows(recording, tokenizer.load_tokens(root, recording), None)
        self.windows = Windows([recording], [rows], block.batch, block.length, balance=True)

    def advance(self) -> Mapping[str, Tensor]:
        values = self.agent.update(tensors(self.windows.sample(), self.device))
        self.step += 1
        return dict(zip(self.agent.metric_names, values, strict=True))

    def save_state(self) -> dict[str, Any]:
        return self.agent.save_state() | {"across": True}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for one of an older version, whose windows lay within episodes."""
        if "across" not in state:
            raise InputError(
                f"{self.folder} was begun by an older version, which drew windows otherwise:"
                f" {again(self.folder)}"
            )
        self.agent.load_state(state)

    def finish(self) -> tuple[Gate, list[Path]]:
        outputs = [training.save_params(self.folder / "agent.pt", self.agent)]
        scores = {"here": self._evaluate(self.agent, EVALUATION)}
        scores["random play"] = self._evaluate(
            evaluation.RandomAgent(self.act_space, self.config.seed), RANDOM
        )
        if self.block.online:
            scores["online"] = self._online()
        returns = {}
        for who, episodes in scores.items():
            returns[who] = [episode["return"] for episode in episodes]
        facts = {
            "algorithm": self.block.algorithm,
            "memory": self.block.memory,
            "world model": "fine-tuned" if self.block.finetune else "frozen",
            "real steps": self.config.pipeline.collect.steps,
            "returns": returns,
        }
        table = Table("In the real game", score_rows(self.game, scores), NOTE)
        return Gate(self.name, [table], facts), outputs

    # ------------------------------------------------------------ the real game

    def _evaluate(self, agent: Any, role: int) -> Episodes:
        """``eval_episodes`` episodes, the same ones in every process."""
        config = self.config
        block = config.env.tree()
        limit = block["time_limit"] = evaluation.time_limit(config)

        def make(index: int, restart: int) -> Any:
            entropy = [config.seed, role, index, restart]
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
            return make_env(f"atari_{self.game}", block, seed, index=index, evaluation=True)

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed + role)
            with contextlib.closing(Envs(make, 1, False)) as envs:
                episodes = self.block.eval_episodes
                played = evaluation.play(
                    agent, envs, episodes, "train", limit=limit, check=self.poll
                )
        return played.episodes

    def _online(self) -> Episodes:
        """Train the same agent online, or continue that, and evaluate it."""
        config = online_config(self.config, self.game)
        folder = self.folder / "online"
        with checkpoint.locked(folder):
            try:
                run = Run(config, folder, None, self.device, self.report)
            except checkpoint.CheckpointError as error:
                remedy = f"move {folder} away and run `python -m pipeline policy` again"
                raise InputError(f"{error}: {remedy}") from None
            run.poll = self.poll
            with contextlib.closing(run):
                self._train_online(run)
                return self._evaluate(run.agent, TRAINED)

    def _train_online(self, run: Run) -> None:
        try:
            while run.step < run.config.steps:
                run.advance()
            run.finish()
        except BaseException:
            run.save()  # the same command goes on from here
            raise


def score_rows(game: str, scores: Mapping[str, Episodes]) -> list[Row]:
    """Of the gate. scores: episodes by who played, "here" among them.

    An episode that the limit cut has no final score: even one of a baseline is a warning.
    """
    mean, error, cut = {}, {}, {}
    for who, episodes in scores.items():
        returns = [episode["return"] for episode in episodes]
        mean[who], error[who] = float(np.mean(returns)), standard_error(returns)
        cut[f"of {who}"] = sum(episode["truncated"] for episode in episodes)
    rows = [Row(f"{game}: mean return", mean.pop("here"), mean, HIGHER)]
    here = [episode["return"] for episode in scores["here"]]
    for who in mean:
        low = shown_above(here, [episode["return"] for episode in scores[who]])
        rows.append(Row(f"{game}: above {who} by", low, {"none": 0.0}, HIGHER))
    rows.append(Row(f"{game}: standard error", error.pop("here"), error))
    if total := sum(cut.values()):
        rows.append(Row(f"{game}: episodes cut by eval_time_limit", total, {"none": 0.0}, LOWER))
        rows += [Row(f"{game}: cut episodes {who}", count) for who, count in cut.items()]
    return rows


def shown_above(x: Sequence[float], y: Sequence[float]) -> float:
    """The low end of the 95% interval of mean(x) - mean(y); NaN of single values."""
    low = stats.compare([np.array(x)], [np.array(y)], 1).low
    return float("nan") if low is None else low


def standard_error(x: list[float]) -> float:
    """Of the mean; NaN of one value."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def online_config(config: Config, game: str) -> Config:
    """Of a run of ``dreamer.py`` with the steps and updates of the staged agent.

    The code bits are the same; codes are drawn and learned as the online agent's default has it.
    """
    block, steps = config.pipeline.policy, config.pipeline.collect.steps
    prefill = max(min(steps // 10, config.replay.prefill), block.length + 1)
    ratio = block.updates * block.batch * block.length / max(steps - prefill, 1)
    changes = {
        "task": f"atari_{game}",
        "steps": steps * config.env.action_repeat,
        "logdir": "",
        "eval_episodes": 0,
        "video": False,
        "replay.batch": block.batch,
        "replay.length": block.length,
        "replay.prefill": prefill,
        "replay.pretrain": 0,
        "replay.ratio": max(round(ratio), 1),
        "log_every": max(steps * config.env.action_repeat // 20, 1),
        "checkpoint_every": max(steps * config.env.action_repeat // 5, 1),
        "dynamics.hrvq.code_dim": 32,
        "dynamics.hrvq.posterior": "sampled",
        "dynamics.hrvq.commitment": [0.0],
        "dynamics.hrvq.level_weights": [1.0],
    }
    return tools.load_config([], config.flat() | changes)
