"""Where an agent is read from: a run's folder, an exported one, or a model hub.

Reading never executes code: checkpoints load with ``weights_only=True``, exported weights are
safetensors, configs are plain YAML.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

import run_config
import tools
from envs import env_for_spaces
from envs.base import one_line
from hidreamer import app
from hidreamer.app import HUB
from hidreamer.checkpoint import CheckpointError, FolderError, UnreadError, load_checkpoint
from hidreamer.provenance import STARTS
from tools import Config, ConfigError

WEIGHTS = "model.safetensors"
FORMAT = "hidreamer 1"  # of exported weights


class Source(NamedTuple):
    """What an agent is made of."""

    folder: Path
    config: Config
    params: dict[str, Tensor]  # of ``models.Agent``, by name
    obs_space: spaces.Dict  # of images, grids and vectors
    action_space: gymnasium.Space  # the environment's own
    # "task", "seed", "step" (environment frames), "commit", and "scores" {name: last value}
    facts: dict[str, Any]


def read(where: str | os.PathLike) -> Source:
    """A run's folder (or a checkpoint in it), an exported folder, or "hf:ORG/NAME[@REVISION]".

    Raises ConfigError, FolderError, EnvError, one line each, for all that is none of these, is
    damaged, or was made by another version.
    """
    if str(where).startswith(HUB):
        return read_export(download(str(where)))
    path = path_of(where)
    if not os.path.exists(path):  # Path.exists raises for names that no file can have
        raise FolderError(app.missing(path))
    if (path / WEIGHTS).exists():
        return read_export(path)
    if path.is_file() and path.suffix == ".pt":
        return read_run(Path(os.path.abspath(path)).parent.parent, [path])
    if problem := app.missing(path):
        raise FolderError(problem)
    checkpoints = checkpoints_of(path)
    if not any(os.path.lexists(checkpoint) for checkpoint in checkpoints):
        what = f"neither checkpoints/latest.pt nor {WEIGHTS}"
        others = [*path.glob("latest.pt"), *path.glob("*/checkpoints/latest.pt")]
        other = f", such as {others[0].resolve().parent.parent}" if others else ""
        raise FolderError(f"{path} holds no agent ({what}): name the --logdir of a run{other}")
    return read_run(path, checkpoints)


def path_of(where: str | os.PathLike) -> Path:
    """Raises FolderError for what is no path, ConfigError for a home that is not known."""
    if isinstance(where, str | os.PathLike) and str(where):
        return tools.user_path(where)
    found = "''" if where == "" else type(where).__name__
    raise FolderError(f"the path of a folder is needed, not {found}")


def checkpoints_of(folder: Path) -> list[Path]:
    """Of a run, newest first; they need not be there."""
    return [folder / "checkpoints" / name for name in ("latest.pt", "previous.pt")]


def read_config(folder: Path) -> Config:
    """Raises ConfigError, naming the file."""
    saved = run_config.saved_config(folder)
    try:
        return tools.load_config([], saved | {"logdir": ""})
    except ConfigError as error:
        raise ConfigError(
            f"{folder / 'config.yaml'} is of another version of this program: {error}; load it"
            " with the version that wrote it"
        ) from None


# ---------------------------------------------------------------- runs


def read_run(folder: Path, checkpoints: list[Path]) -> Source:
    """The first of ``checkpoints`` that is whole. Its environment is built once, for its spaces."""
    config = read_config(folder)
    state = newest(checkpoints)
    params = state["agent"]["params"]
    facts = {"task": config.task, "seed": config.seed, "step": state["step"]}
    facts |= {"commit": last_commit(folder), "scores": last_scores(folder)}
    env = env_for_spaces(config.task, config.env.tree(), config.seed)
    return Source(folder, config, params, *spaces_of(env), facts)


def newest(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """The state in the first of ``checkpoints`` that is whole; one warning says which were not.
    Raises CheckpointError, about the first, where none is, or about one that may be whole and
    cannot be read.
    """
    problems: list[CheckpointError] = []
    for path in checkpoints:
        try:
            state = load_checkpoint(path, {"agent": dict, "step": int})
            if "params" not in state["agent"]:
                raise CheckpointError(f"{path} is no checkpoint of a run: it has no parameters")
        except UnreadError:
            raise
        except CheckpointError as error:
            problems.append(error)
            continue
        if problems:
            text = f"{problems[0]}; reading {path} at step {state['step']} instead"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return state
    raise problems[0]


def spaces_of(env: Any) -> tuple[spaces.Dict, gymnasium.Space]:
    return spaces.Dict(env.obs_space), env.suite.action_space


def last_commit(folder: Path) -> str:
    """The commit that last trained the run; "" where that is unknown."""
    for line in reversed(json_lines(folder / STARTS)):
        if "commit" in line:
            return str(line["commit"])
    return ""


def last_scores(folder: Path) -> dict[str, float]:
    """{name: last value} of the returns in metrics.jsonl, and the step of each evaluation."""
    found: dict[str, float] = {}
    for line in json_lines(folder / "metrics.jsonl"):
        for name in ("train_return", "eval_return", "eval_return_std", "eval_episodes"):
            if isinstance(line.get(name), int | float):
                found[name] = line[name]
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of them; lines that are none, and a missing file, count as nothing."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


# ---------------------------------------------------------------- exports


def digest(params: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes, bytes and metadata: safetensors itself has no checksum."""
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(params):
        x = params[name].contiguous()
        found.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_export(path: Path) -> bool:
    """Whether a file holds weights that ``hidreamer.export`` wrote, of whatever format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("format")).startswith("hidreamer ")
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return False


def read_export(folder: Path) -> Source:
    """The folder that ``hidreamer.export`` wrote. Raises CheckpointError where its weights are
    missing, damaged or not an export, ConfigError for its config.
    """
    from safetensors import SafetensorError, safe_open

    config, path = read_config(folder), folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no safetensors file: {reason}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no export of this program (format {metadata.get('format')!r}, not"
            f" {FORMAT!r}): export the run again"
        )
    expected = metadata.pop("sha256", "")
    if digest(params, metadata) != expected:
        raise CheckpointError(f"{path} is damaged: its contents are not what was exported")
    text = (folder / "config.yaml").read_text(encoding="utf-8")  # with \n as the end of lines
    if text_digest(text) != metadata.get("config", text_digest(text)):  # older exports have none
        raise CheckpointError(
            f"{folder / 'config.yaml'} is not the one that was exported with {WEIGHTS}: put it"
            " back, or export the run again"
        )
    try:
        facts = json.loads(metadata["facts"])
        obs_space, action_space = (decode_space(json.loads(metadata[name])) for name in SPACES)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} has no spaces of an environment: {one_line(error)}"
        ) from None
    return Source(folder, config, params, obs_space, action_space, facts)


SPACES = ("observation_space", "action_space")


def encode_space(space: gymnasium.Space) -> dict[str, Any]:
    """Plain values for a space. Raises TypeError for kinds that no environment here has."""
    match space:
        case spaces.Dict():
            return {"Dict": {key: encode_space(part) for key, part in space.items()}}
        case spaces.Tuple():
            return {"Tuple": [encode_space(part) for part in space]}
        case spaces.Discrete():
            return {"Discrete": [int(space.n), int(space.start)]}
        case spaces.MultiDiscrete():
            return {"MultiDiscrete": [space.nvec.tolist(), space.start.tolist()]}
        case spaces.MultiBinary():
            return {"MultiBinary": space.n if isinstance(space.n, int) else list(space.n)}
        case spaces.Box():
            low, high = space.low, space.high
            bounds = [
                x.ravel()[0].item() if (x == x.ravel()[0]).all() else x.tolist()
                for x in (low, high)
            ]
            return {"Box": [*bounds, list(space.shape), space.dtype.name]}
    raise TypeError(f"{type(space).__name__} spaces cannot be exported")


def decode_space(tree: Mapping[str, Any]) -> gymnasium.Space:
    """The space that ``encode_space`` described. Raises TypeError for a kind that it never does."""
    ((kind, value),) = tree.items()
    match kind:
        case "Dict":
            # in this order, which says what numbers of an action mean; a mapping would be sorted
            return spaces.Dict([(key, decode_space(part)) for key, part in value.items()])
        case "Tuple":
            return spaces.Tuple([decode_space(part) for part in value])
        case "Discrete":
            return spaces.Discrete(value[0], start=value[1])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(value[0], start=value[1])
        case "MultiBinary":
            return spaces.MultiBinary(value)
        case "Box":
            low, high, shape, dtype = value
            bounds = (np.broadcast_to(np.asarray(x, dtype), shape) for x in (low, high))
            return spaces.Box(*bounds, tuple(shape), np.dtype(dtype).type)
    raise TypeError(f"there is no space {kind!r}")


# ---------------------------------------------------------------- the hub


def hub() -> Any:
    """The module huggingface_hub. Raises ConfigError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"a model hub needs its extra: {app.install_line('hub')}") from None
    return huggingface_hub


def download(name: str) -> Path:
    """ "hf:ORG/NAME[@REVISION]" -> its folder in the hub's cache. Raises FolderError."""
    module = hub()
    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        path = module.snapshot_download(
            repo, revision=revision or None, allow_patterns=[WEIGHTS, "config.yaml", "README.md"]
        )
    except Exception as error:  # the hub, the network and its client may raise anything
        reason = one_line(error) or type(error).__name__
        raise FolderError(f"{name} cannot be downloaded: {reason}") from None
    if not (Path(path) / WEIGHTS).exists():
        raise FolderError(f"{name} holds no {WEIGHTS}: it is no export of this program")
    return Path(path)
