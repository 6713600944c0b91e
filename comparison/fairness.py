"""May these be compared? Configs that differ outside the latent state, and what each model is made
of and costs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

import models
from comparison import seconds
from comparison.options import HOUSEKEEPING
from comparison.runs import Run, single_lives
from envs import Env, EnvError, env_for_spaces
from hidreamer import cost
from hidreamer.spaces import random_rows
from run_config import idle
from tools import Config, ConfigError

MATCHED = 0.05  # relative difference of capacity above which models are not "matched"
SIZES = {"bits": "bits", "feature": "feature size", "parameters": "world-model parameters"}
UNMATCHED = "Capacity is not matched"  # the first words of a report that has to say so
COSTS = {"flops": "FLOPs per update", "updates_per_s": "updates/s", "peak_mb": "memory"}

Differences = dict[str, dict[str, Any]]  # {config key: {who: value}}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> Differences:
    """Keys of flat configs, {who: config}, whose values are not the same for all: of the latent
    state and outside it.

    What is housekeeping for any run, and its seed, is left out; a key is compared among those that
    have it, the settings of an objective among those that give it a weight.
    """
    keys = sorted(set().union(*configs.values()) - HOUSEKEEPING - {"seed"})
    differing: Differences = {}
    for key in keys:
        values = {who: config[key] for who, config in configs.items() if key in config}
        counting = [values[who] for who in values if not idle(key, configs[who])]
        if any(value != counting[0] for value in counting[1:]):
            differing[key] = values
    return differing


def unfair(configs: Mapping[str, Mapping[str, Any]], varied: Collection[str] = ()) -> Differences:
    """Differences between models that are neither the latent state's nor of ``varied`` keys."""
    return {
        key: found
        for key, found in differences(configs).items()
        if not key.startswith("dynamics.") and key not in varied
    }


def unfair_runs(runs: list[Run]) -> Differences:
    """What may not differ between runs of a task: nothing outside the latent state; within a model
    nothing at all.
    """
    found: Differences = {}
    for task in sorted({run.task for run in runs}):
        of_task = [run for run in runs if run.task == task]
        varied = {run.start["varied"] for run in of_task if "varied" in run.start}
        found |= unfair({run.name: run.stated for run in of_task}, varied)
        for model in sorted({run.model for run in of_task}):
            found |= differences({run.name: run.stated for run in of_task if run.model == model})
    return found


def describe(found: Differences, most: int = 3) -> str:
    """One line: which keys, and who has what."""
    parts = []
    for key, values in list(found.items())[:most]:
        groups: dict[str, list[str]] = {}
        for who, value in values.items():
            groups.setdefault(str(value), []).append(who)
        shown = []
        for value, who in groups.items():
            shown.append(f"{value} ({', '.join(who[:3])}{', ...' if len(who) > 3 else ''})")
        parts.append(f"{key}: {', '.join(shown)}")
    return "; ".join(parts) + (f"; and {len(found) - most} more" if len(found) > most else "")


def capacity(config: Config) -> dict[str, Any]:
    """What the agent of a config is made of, counted by building it and updating it once. Raises
    ConfigError.
    """
    env, agent = built(config)
    agent.make_optimizers()
    rows = random_rows(env.obs_space, env.act_space, config.replay.batch, config.replay.length)
    batch = {key: torch.from_numpy(x) for key, x in rows.items()}
    return sizes(agent) | {"flops": cost.flops(functools.partial(agent.update, batch))}


def built(config: Config) -> tuple[Env, models.Agent]:
    """An environment, closed, and the agent for it. Raises ConfigError."""
    try:
        env = env_for_spaces(config.task, config.env.tree())
        agent = models.Agent(env.obs_space, env.act_space, env.act_dim, config)
    except (EnvError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return env, agent


def sizes(agent: models.Agent) -> dict[str, Any]:
    """Bits, feature size and parameters, those of the parts under "parts"."""
    found = cost.sizes(agent)
    params = found.pop("params")
    return found | {"parameters": params["world_model"], "parts": params}


def elsewhere(configs: Mapping[str, Mapping[str, Config]]) -> list[str]:
    """Where capacity is not matched on tasks after the first: a line for each model and kind of
    observation.

    configs: {task: {model: its config}}. Tasks that observe alike are counted once, and what this
    machine cannot build is left out.
    """
    seen, lines = [], []
    for i, (task, by_model) in enumerate(configs.items()):
        columns = {}
        for model, config in by_model.items():
            try:
                env, agent = built(config)
            # a game, a structure, a key that this machine does not have
            except (ConfigError, AttributeError):
                continue
            if not columns:
                if env.obs_space in seen:
                    break
                seen.append(env.obs_space)
                if i == 0:
                    break
            columns[model] = sizes(agent)
        lines += warnings(columns, f" on {task}")
    return lines


def origins(runs: Sequence[Run]) -> list[str]:
    """A line where models were trained by other code than each other, and one where on other
    machines.
    """
    lines = []
    for key, what, follows in (
        ("commit", "by code of", "a difference may be that of the code"),
        ("hardware", "on", "their seconds are not compared"),
    ):
        found: dict[str, set[str]] = {}
        for run in runs:
            if run.known:
                found.setdefault(run.model, set()).add(run.start.get(key, "unknown"))
        if len(set(map(frozenset, found.values()))) > 1:
            told = "; ".join(f"{model} {what} {', '.join(sorted(x))}" for model, x in found.items())
            lines.append(f"Models were trained apart, {told}: {follows}.")
    return lines


def timed(runs: Sequence[Run]) -> list[str]:
    """A line where runs of a task differ in what takes seconds."""
    lines = []
    for task in sorted({run.task for run in runs}):
        if keys := seconds.unlike([run for run in runs if run.task == task and run.complete]):
            lines.append(f"Runs of {task} differ in {', '.join(keys)}: no seconds are compared.")
    return lines


def lives(runs: Sequence[Run]) -> list[str]:
    """A line where episodes of training are single lives."""
    return [
        f"With env.atari.lives reset an episode is a life: returns on {task} are those of lives,"
        " not normalised by a human's of a game; evaluations play whole games."
        for task in sorted(single_lives(runs))
    ]


def warnings(columns: Mapping[str, Mapping[str, Any]], where: str = "") -> list[str]:
    """Where a model is more than 5% from the first one, from the columns of the capacity table.

    where: words that name the task, if not that of the table.
    """
    if not columns:
        return []
    (first, base), *others = columns.items()
    lines = []
    for kind, names in ((UNMATCHED, SIZES), ("Costs differ", COSTS)):
        for name, column in others:
            far = []
            for key, label in names.items():
                if base.get(key) and column.get(key):
                    ratio = column[key] / base[key] - 1.0
                    if abs(ratio) > MATCHED:
                        far.append(f"{label} {f'{ratio:+.0%}'.replace('-', '−')}")
            if far:
                lines.append(f"{kind}{where}: {name} against {first}: {', '.join(far)}.")
    return lines
