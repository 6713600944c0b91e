"""What a run is made of: its environments and its random numbers, from the config's seed."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from envs import make_env
from envs.base import Env
from envs.vector import Envs
from hidreamer import evaluation, objectives
from run_config import idle
from tools import Config, ConfigError, dump_yaml, load_config

# What an optimiser is set by. With ``optim joint`` those of ``model`` are for all parts.
OPTIMISER_KEYS = ("lr", "eps", "clip", "agc", "warmup", "algorithm")
TRANSFORMERS = ("interleaved", "stacked")
# (a key, values of it, keys of its group that do something with these alone)
NEEDED_BY = (
    ("dynamics.hrvq.memory", ("gru",), ("cell", "prior_layers")),
    ("dynamics.hrvq.memory", ("stacked", "gru"), ("depth_units", "memory_reads")),
    ("dynamics.hrvq.memory", ("interleaved",), ("mask",)),
    ("dynamics.hrvq.memory", TRANSFORMERS, ("window", "ffn")),
    ("dynamics.hrvq.ffn", ("moe",), ("moe_experts", "moe_top", "moe_balance")),
    ("dynamics.hrvq.posterior", ("nearest",), ("commitment",)),
    *((f"dynamics.{kind}.cell", ("block_gru",), ("blocks",)) for kind in ("rssm", "hrssm", "hrvq")),
)


def make_envs(
    config: Config,
    count: int,
    moment: int,
    error_log: Path | None = None,
    *,
    evaluating: bool = False,
) -> Envs:
    """A run's environments, for training or an evaluation, seeded by all of these numbers.

    moment: how often the run was continued, or the step of the evaluation. Raises EnvError.
    """
    task, block, seed = config.task, config.env.tree(), config.seed
    if evaluating:
        block["time_limit"] = evaluation.time_limit(config)

    def make(index: int, restart: int) -> Env:
        entropy = [seed, int(evaluating), moment, index, restart]
        number = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
        with warnings.catch_warnings():
            if index or restart or evaluating:  # the first one said it, of all
                warnings.simplefilter("ignore", RuntimeWarning)
            return make_env(task, block, number, index=index, evaluation=evaluating)

    return Envs(make, count, config.env.parallel, config.env.timeout, error_log)


def evaluation_generator(config: Config, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of a run's evaluation at ``step``."""
    number = np.random.SeedSequence([config.seed, 1, step]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(number))


def make_generator(device: torch.device) -> torch.Generator:
    """The random numbers of a run: on the CPU those that torch's default generator would go on
    with.
    """
    generator = torch.Generator(device)
    if device.type == "cpu":
        return generator.set_state(torch.get_rng_state())
    return generator.manual_seed(torch.initial_seed())


def check_objectives(config: Config) -> None:
    """Raises ConfigError where an objective counts that this process does not know: an agent that
    acts needs none, and one that trained on without it would be another.
    """
    for name, weight in config.model.losses.items():
        known = name in objectives.OBJECTIVES or name == "harmony"  # which balances the others
        if weight and not known:
            raise ConfigError(
                f"model.losses.{name} is {weight}, and nothing here is that objective: start the"
                " script that adds it to OBJECTIVES (docs/objectives.md)"
            )


def idle_keys(config: Config) -> list[str]:
    """A line for every row of NEEDED_BY by which keys that are set do nothing."""
    given, usual, found = config.flat(), load_config([], {}).flat(), []
    for key, values, others in NEEDED_BY:
        if idle(key, given) or given[key] in values:  # of another latent state, or with an effect
            continue
        group = key.rpartition(".")[0]
        names = [name for x in others if given[name := f"{group}.{x}"] != usual[name]]
        if names:
            found.append(
                f"{key} {given[key]}: without effect {'are' if names[1:] else 'is'}"
                f" {', '.join(names)}, for --{key} {' or '.join(values)}"
            )
    return found


def notes(config: Config, repeat: int, rows: int) -> list[str]:
    """Lines about keys that will do nothing, or less than they seem to.

    repeat: frames of an agent step. rows: of replay that the first update waits for, 0 if it was.
    """
    found, weights, length = [], config.model.losses, config.replay.length
    steps = -(-config.steps // repeat)
    if config.replay.ratio and 2 * steps < rows:  # a step brings at most two rows
        found.append(
            f"steps {config.steps} are too few for an update: replay.prefill and replay.length"
            f" ask for {rows} rows first"
        )
    if weights.ac_cpc and config.model.ac_cpc.steps >= length:
        found.append(
            f"model.ac_cpc.steps {config.model.ac_cpc.steps}: sequences of replay.length {length}"
            " have no pairs so far apart"
        )
    explores = config.expl.behavior == "plan2explore" and not config.expl.until
    if not weights.reward and not explores:
        found.append(
            "model.losses.reward 0: no reward is ever predicted, and the agent learns from"
            " predicted ones alone"
        )
    if not weights.decoder and not config.decoder.probe and config.video:
        found.append(
            "model.losses.decoder 0: videos show no predictions; --decoder.probe true trains a"
            " decoder for them that changes nothing else"
        )
    if not config.dynamics.dyn and not weights.ac_cpc:
        found.append("dynamics.dyn 0: nothing trains the prior, which dreams are made of")
    if config.optim == "joint":
        given, usual = config.flat(), load_config([], {}).flat()
        keys = [f"{part}.{key}" for part in ("actor", "critic") for key in OPTIMISER_KEYS]
        if names := [key for key in keys if given[key] != usual[key]]:
            found.append(
                f"optim joint: without effect are {', '.join(names)}, since one optimiser with the"
                " settings of model trains all parts"
            )
    found += idle_keys(config)
    if weights.decoder and config.decoder.probe:
        found.append(
            "decoder.probe true does nothing while model.losses.decoder has a weight: the decoder"
            " is trained anyway"
        )
    if config.critic.replay_grad and not config.critic.replay_loss:
        found.append("critic.replay_grad true does nothing while critic.replay_loss is 0")
    return found


def write_yaml(path: Path, tree: dict) -> None:
    """The resolved config of a run."""
    path.write_text(dump_yaml(tree), encoding="utf-8")
