"""What a checkpoint holds of a ``training.Run``, the ``run`` of all functions: taking it, writing
it, and restoring it.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import run_config
import tools
from hidreamer import checkpoint
from hidreamer.checkpoint import CheckpointError
from hidreamer.episodes import EpisodeError
from hidreamer.optim import of_same_algorithm
from hidreamer.provenance import STARTS
from tools import ConfigError

# Attributes of a run, by their names in a checkpoint.
COUNTERS = ("step", "updates", "pending_updates", "started", "last_return")
COUNTERS += ("evaluated",)
OLD_COUNTERS = {"credit": "pending_updates"}  # names that checkpoints without a format have
Tree = (dict, type(None))
# What every checkpoint of a run has, and of which type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "generation": int,
    "counters": dict,
    "step": int,
    "agent": dict,
    "act": (list, type(None)),
    "obs": Tree,
    "envs": (list, type(None)),
    "episodes": dict,
    "score": dict,
    "sums": torch.Tensor,
    "metric_names": (list, tuple),
    "torch_rng": torch.Tensor,
    "cuda_rng": (torch.Tensor, type(None)),
    "replay_rng": dict,
    "explore_rng": dict,
    "log_size": int,
    "running_file": str,
}


def snapshot(run: Any) -> dict[str, Any]:
    """A checkpoint's tree, without the name of the file with the running episodes.

    Raises OSError where metrics.jsonl cannot be written to its end.
    """
    cuda = run.device.type == "cuda"
    counters = {name: getattr(run, name) for name in COUNTERS}
    counters |= {"restarts": run.env_restarts(), "summed": run.window.count}
    return {
        "config": run.config.tree(),
        "generation": run.generation,
        "counters": counters,
        "step": run.step,
        "agent": run.agent.save_state(),
        "act": None if run.act is None else [*run.act.carry, run.act.action],
        "obs": run.obs,
        "envs": None if run.obs is None else run.envs.state(),
        "episodes": run.episodes.state(),
        "score": run.scores.sums,
        "sums": run.window.sums,
        "metric_names": run.agent.metric_names,
        "last": {name: every.last for name, every in run.every.items()},
        "torch_rng": torch.get_rng_state() if cuda else run.generator.get_state(),
        "cuda_rng": run.generator.get_state() if cuda else None,
        "replay_rng": run.replay.rng.bit_generator.state,
        "replay_queue": run.replay.queue_state(),
        "explore_rng": run.explore_rng.bit_generator.state,
        "log_size": run.logger.flush(),
        "wandb_id": run.logger.wandb_id,
        "copy_from": run.copy_from,
        "moment": run.moment,
        "company": run.members_before,
        "rates": run.rates.state(),
    }


def write(run: Any) -> None:
    """Write latest.pt and, before it, the file with the running episodes that it names.

    Raises OSError; the last checkpoint stays whole then.
    """
    running = f"running-{run.step:012d}.npz"
    if running in run.running_files[-1:]:  # no part of the last checkpoint is written over
        running = f"running-{run.step:012d}-again.npz"
    rows = run.episodes.running_rows(run.replay) | run.replay.extra_rows()
    run.folder.mkdir(parents=True, exist_ok=True)
    packed = not run.replay.extra  # half precision does not compress
    write_rows = functools.partial(checkpoint.write_npz, rows=rows, compressed=packed)
    checkpoint.replace_file(run.folder / running, write_rows)
    state = snapshot(run) | {"running_file": running}
    checkpoint.save_checkpoint(run.folder / "latest.pt", state)
    run.episodes.checkpointed(state["episodes"])
    run.running_files = [*run.running_files[-1:], running]
    for path in run.folder.glob("running-*.npz"):
        if path.name not in run.running_files:
            path.unlink()


def restore(run: Any, state: dict[str, Any], rows: dict[str, np.ndarray]) -> int:
    """Restore a new ``run`` from ``state`` and the ``rows`` of its running episodes.

    -> size of metrics.jsonl at that moment. Raises ConfigError, CheckpointError.
    """
    instead = f"choose another --logdir, or continue with the commit that {STARTS} in it names"
    try:
        try:
            moved = run.agent.load_state(state["agent"])
            if lost := [x for x, how in moved.items() if how == "fresh" and "optimiser" not in x]:
                raise ValueError(f"{lost[0]} is not in the checkpoint")  # a run's own has all
        except ValueError as error:
            raise ConfigError(
                f"{run.logdir} is of another version of this code ({error}): {instead}"
            ) from None
        _restore_parts(run, state, rows)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint in {run.folder} does not fit this program ({type(error).__name__}: "
            f"{error}): {instead}"
        ) from None
    run.unsaved = False
    run.report(f"continuing {run.logdir} at step {run.step} of {run.config.steps}")
    old = tools.flatten(state["config"])
    asked = old.keys() & run_config.EVALUATION_KEYS
    if run.finished and any(old[key] != run.config[key] for key in asked):
        run.evaluated = -1  # it is over, and asked for another evaluation than it had
    log = run.logdir / "metrics.jsonl"
    size, lost = checkpoint.size_of_log(log, state["log_size"])
    if lost:
        run.report(f"{log} lost its last {lost} bytes; the log has a gap there")
    return size


def _restore_parts(run: Any, state: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
    _restore_counters(run, state)
    run.running_files = [state["running_file"]]
    run.copy_from = state.get("copy_from", "")
    run.moment, run.members_before = state.get("moment", 0), state.get("company", {})
    rng = np.random.default_rng()
    rng.bit_generator.state = state["replay_rng"]
    run.replay = run.make_replay(state["episodes"], rng)
    for key, saved in checkpoint.arrays(state["score"]).items():
        if key in run.scores.sums:  # the log keys may be others: env.invalid may change
            run.scores.sums[key] = saved
    run.agent.metric_names = tuple(state["metric_names"])
    run.explore_rng.bit_generator.state = state["explore_rng"]
    run.obs = checkpoint.arrays(state["obs"])
    for key, space in run.envs.obs_space.items() if run.obs is not None else ():
        _check_shape(key, run.obs[key], (run.envs.count, *space.shape))
    if state["act"] is not None:
        *carry, action = (x.to(run.device) for x in state["act"])
        _check_shape("action", action, (run.envs.count, run.envs.act_dim))
        run.act = models.ActState(type(run.agent.initial(1).carry)(*carry), action)
    try:
        problems = run.episodes.restore(run.replay, state["episodes"], rows)
    except EpisodeError as error:
        raise CheckpointError(
            f"{run.folder / state['running_file']} is not what this run saved ({error}): put it"
            f" back, or move {run.logdir} away to start anew"
        ) from None
    for problem in problems:
        run.report(problem)
    queue = state.get("replay_queue", run.replay.queue_state())
    if not problems:
        run.replay.load_extra_rows(rows)
    else:  # stored states and the queue would be other rows'
        queue = queue | {"queue": []}
        if run.replay.extra:
            run.report(
                "the replay lost episodes: its sequences begin without stored states for now"
            )
    run.replay.load_queue(queue)
    if run.obs is not None:
        restored = run.envs.load_state(checkpoint.arrays(state["envs"]))
        for i in np.flatnonzero(~restored & ~run.obs["is_last"]):
            run.episodes.cut(run.replay, i)  # truncated where it stood
            run.obs["is_last"][i] = True
    random = state["torch_rng" if run.device.type == "cpu" else "cuda_rng"]
    if random is not None:  # None: the run was on the other kind of device until now
        run.generator.set_state(random)


def _restore_counters(run: Any, state: dict[str, Any]) -> None:
    counters = {OLD_COUNTERS.get(name, name): value for name, value in state["counters"].items()}
    for name, value in (counters | {"log_size": state["log_size"]}).items():
        least = {"evaluated": -1, "last_return": -math.inf}.get(name, 0)
        if value is None and name == "last_return":
            continue
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{name} is {value}")
    for name in (*COUNTERS, "restarts"):
        setattr(run, name, counters[name])
    run.window.sums, run.window.count = state["sums"].to(run.device), counters["summed"]
    if run.window.count:
        _check_shape("sums", run.window.sums, (len(state["metric_names"]),))
    for name, every in run.every.items():
        if "last" in state:
            every.last = state["last"][name]
        else:  # before there was a format: how many periods of the old length had passed
            every.last = state["every"][name] * state["config"][f"{name}_every"]


def _check_shape(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {shape}")


def load_weights(run: Any, source: Path) -> None:
    """Load weights and optimisers of another run, ours or dreamerv3-torch's; an optimiser of
    another algorithm starts afresh.

    Raises ConfigError, CheckpointError.
    """
    state = checkpoint.load_checkpoint(source)
    try:
        if "agent_state_dict" in state:
            import legacy

            state = {"agent": legacy.convert(state)}
        if "agent" not in state:
            raise CheckpointError(
                f"--resume: {source} is a checkpoint neither of this program nor of "
                "dreamerv3-torch: it has no 'agent'"
            )
        agent = dict(state["agent"])
        agent["optim"] = of_same_algorithm(agent["optim"], state.get("config", {}), run.config)
        try:
            moved = run.agent.load_state(agent)
        except ValueError as error:  # tensors that are not there, or of another shape
            raise ValueError(
                f"{error}: the two have other observations, actions or sizes; choose the task and"
                " presets of that run"
            ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"--resume {source}: {error}") from None
    run.report("\n".join(f"  {how:<7} {what}" for what, how in moved.items()))
