"""What a run is made of: its environments and its random numbers, from the config's seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from envs import make_env
from envs.base import Env
from envs.vector import Envs
from hidreamer import evaluation
from tools import Config, dump_yaml


def make_envs(
    config: Config, count: int, role: int, generation: int, error_log: Path | None = None
) -> Envs:
    """A run's environments, seeded by all of these numbers.

    role: 0 for training, 1 for an evaluation. generation: how often the run was continued, or the
    step of the evaluation. Raises EnvError.
    """
    task, block, seed = config.task, config.env.tree(), config.seed
    if role == 1:
        block["time_limit"] = evaluation.time_limit(config)

    def make(index: int, restart: int) -> Env:
        entropy = [seed, role, generation, index, restart]
        number = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
        return make_env(task, block, number, index=index, evaluation=role == 1)

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


def write_yaml(path: Path, tree: dict) -> None:
    """The resolved config of a run."""
    path.write_text(dump_yaml(tree), encoding="utf-8")
