"""Trained agents out of run folders, and episodes that they all are judged on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
import networks
import tools
from analysis import factors
from comparison import fairness, runs
from envs import crashes, env_for_spaces, open_env
from hidreamer.episodes import stack_rows
from hidreamer.replay import Rows
from library import source
from tools import Config, ConfigError

# Settings of environments that change neither what is seen nor what may be done.
UNOBSERVED_KEYS = ("env.count", "env.parallel", "env.timeout", "env.invalid")
SEED = 715_517  # of the episodes: no run's own


@dataclass
class Subject:
    """A trained agent, and the same before training."""

    run: runs.Run
    config: Config
    agent: models.Agent
    untrained: models.WorldModel

    @property
    def name(self) -> str:
        """model/seed, or the model alone where there is no other."""
        return f"{self.run.model}/{self.run.seed}"


@dataclass
class Episode:
    """An episode that nobody was trained on."""

    rows: Rows  # (T, ...): observations, prev_action, reward, is_first, is_terminal
    factors: dict[str, np.ndarray]  # (T,) each; {} where the task has none with a name
    by: str  # the subject whose policy acted

    def __len__(self) -> int:
        return len(self.rows["reward"])


def load(run: runs.Run) -> Subject:
    """Raises ConfigError, CheckpointError, EnvError, one line each."""
    saved = {key: x for key, x in run.config.items() if key != "logdir"}
    where = f"{run.folder} cannot be analysed"
    try:
        config = tools.load_config([], saved)
    except ConfigError as error:
        raise ConfigError(f"{where}, it is a run of another version: {error}") from None
    state = source.newest(source.checkpoints_of(run.folder))
    env = env_for_spaces(config.task, config.env.tree())
    tools.seed_all(config.seed)  # the parameters that training began from
    agent = models.make_agent(env, config, models.pick_device(config))
    untrained = copy.deepcopy(agent.world_model)
    agent.make_optimizers()
    try:
        agent.load_state(state["agent"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}, its weights are of another version: {reason}") from None
    return Subject(run, config, agent.eval(), untrained.eval())


def load_all(found: Sequence[runs.Run]) -> list[Subject]:
    """The subjects of runs of one task and one environment. Raises ConfigError otherwise."""
    tasks = sorted({run.task for run in found})
    if len(tasks) > 1:
        raise ConfigError(f"these are runs of {', '.join(tasks)}: give those of one task")
    env = lambda run: {
        key: x
        for key, x in run.config.items()
        if key.startswith("env.") and key not in UNOBSERVED_KEYS
    }
    for run in found[1:]:
        differing = [key for key, x in env(run).items() if env(found[0]).get(key) != x]
        if differing:
            raise ConfigError(
                f"{run.name} and {found[0].name} differ in {differing[0]}: give runs that see the"
                " same observations"
            )
    return [load(run) for run in found]


def differing(subjects: Sequence[Subject]) -> str:
    """In what their runs differ besides latent state and seed, and runs of one model besides the
    seed, as a line; "" for nothing.
    """
    trained = [subject.run for subject in subjects]
    found = fairness.unfair_runs(trained)
    # Of unfinished runs alone: the last record of a whole one lies a little before its end.
    if not all(run.complete for run in trained):
        found["frames of training"] = {run.name: run.step for run in trained}
    return fairness.describe(found)


def has_factors(subject: Subject) -> bool:
    """Whether its task has named factors."""
    env = open_env(subject.config.task, subject.config.env.tree(), SEED)
    try:
        return factors.reader(env, subject.config.task) is not None
    finally:
        env.close()


def turns(subjects: int, count: int) -> np.ndarray:
    """(count,): the number of the subject whose policy acts in each episode, round by round.

    Every round has an order of its own. In a fixed one all episodes that probes are tested on,
    every fifth, would be of one policy where there are five subjects, or ten.
    """
    rng, rounds = np.random.default_rng(SEED), math.ceil(count / subjects)
    return np.concatenate([rng.permutation(subjects) for _ in range(rounds)])[:count]


def collect(subjects: Sequence[Subject], count: int, longest: int) -> list[Episode]:
    """``count`` new episodes of at most ``longest`` steps, the subjects' policies taking turns.

    All subjects are judged on all of them, so none is judged on its own policy's alone. Actions
    are sampled. Raises EnvError.
    """
    first = subjects[0]
    task, out = first.config.task, []
    who = turns(len(subjects), count)
    env = open_env(task, first.config.env.tree(), SEED)
    try:
        read = factors.reader(env, task)
        device = next(subjects[0].agent.parameters()).device
        random = torch.Generator(device).manual_seed(SEED)
        for i in range(count):
            subject = subjects[who[i]]
            where = f"{task} failed in episode {i + 1} of {count}"
            rows, values = play(subject.agent, env, read, longest, random, where)
            out.append(Episode(stack_rows(rows), stack_rows(values), subject.name))
    finally:
        env.close()
    return out


def play(
    agent: models.Agent,
    env: Any,
    read: factors.Reader | None,
    longest: int,
    random: torch.Generator,
    where: str,
) -> tuple[list[dict], list[dict]]:
    """One episode of the agent's sampled policy. -> its rows, the factors at each. Raises EnvError,
    which begins with ``where``.
    """
    state, action = agent.initial(1), np.zeros(env.act_dim, np.float32)
    rows, values = [], []
    while True:
        with crashes(where):
            obs = env.step(action) if rows else env.reset()
        seen = {key: obs[key] for key in (*env.obs_space, "reward", "is_first", "is_terminal")}
        rows.append(seen | {"prev_action": action})
        values.append(read(obs) if read else {})
        if obs["is_last"] or len(rows) >= longest:
            return rows, values
        keys = (*env.obs_space, "is_first")
        inputs = agent.tensors({key: np.asarray(obs[key])[None] for key in keys})
        state = agent.act(state, inputs, generator=random)
        action = state.action[0].cpu().numpy()


def preprocessed(agent: models.Agent, rows: Rows) -> dict[str, Tensor]:
    """An episode (T, ...) as a preprocessed batch (1, T, ...) on the agent's device."""
    return networks.preprocess(agent.tensors({key: x[None] for key, x in rows.items()}))
