"""The config that a run was begun with: what is kept of it, and what may change when the run is
continued.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tools import Config, ConfigError, current_names, flatten, load_config

# What a run may change when it is continued; everything else makes it another run.
CHANGEABLE_KEYS = {"steps", "device", "compile", "precision", "logger", "logdir", "video"}
CHANGEABLE_KEYS |= {f"{name}_every" for name in ("log", "eval", "checkpoint")}
EVALUATION_KEYS = {f"eval_{name}" for name in ("episodes", "greedy", "time_limit")}
CHANGEABLE_KEYS |= EVALUATION_KEYS
CHANGEABLE_KEYS |= {"decode_levels", "env.invalid", "env.parallel", "env.timeout", "threads"}
CHANGEABLE_KEYS |= {"replay.store", "replay.keep_episodes"}


def saved_config(folder: Path) -> dict[str, Any]:
    """{"group.key": value} of a run's config.yaml, by present names. Raises ConfigError."""
    try:
        tree = YAML(typ="safe").load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(tree, Mapping):
            raise ValueError("it has no keys")
        return current_names(flatten(tree))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {folder / 'config.yaml'}: name the --logdir of a run, or continue it by"
            " its --configs and keys"
        ) from None
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if mark := getattr(error, "problem_mark", None):
            reason = f"line {mark.line + 1}: {' '.join(str(error.problem).split())}"
        raise ConfigError(
            f"{folder / 'config.yaml'} is no config of a run: {reason}; correct it, or continue"
            " the run by its --configs and keys"
        ) from None


def idle(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key sets up an objective of the world model that has no weight in the flat
    ``config``, or another latent state than its own.
    """
    group, *rest = key.split(".")
    if group == "dynamics" and len(rest) > 1:
        return config.get("dynamics.type", rest[0]) != rest[0]
    return group == "model" and config.get(f"model.losses.{rest[0]}") == 0


def differences(before: Mapping[str, Any], now: Mapping[str, Any], but: Container[str] = ()) -> str:
    """'key old -> new' of the first three keys of the flat ``before`` that differ; "" if none does.

    but: keys that may. So may what is ``idle`` in both, and a key that ``before`` lacks, since it
    is younger.
    """
    before = current_names(before)
    changed = [key for key in before if key not in but and before[key] != now.get(key)]
    changed = [key for key in changed if not (idle(key, before) and idle(key, now))]
    shown = ", ".join(f"{key} {before[key]} -> {now.get(key)}" for key in changed[:3])
    return shown + (", ..." if len(changed) > 3 else "")


def check_same_run(
    folder: Path, old: Mapping[str, Any], new: Config, remedy: str | None = None
) -> None:
    """Raises ConfigError where the config tree ``old`` of the run in ``folder`` cannot be
    continued as ``new``. remedy: what the message advises, if not what dreamer.py does.
    """
    if remedy is None:
        remedy = (
            f"--resume {folder} without --configs continues it as it is; for another run choose"
            f" another --logdir, with --resume {folder} to start from its weights"
        )
    before = load_config([], {}).flat() | current_names(flatten(old))  # younger keys are as then
    if changed := differences(before, new.flat(), CHANGEABLE_KEYS):
        raise ConfigError(f"{folder} holds a run with another config ({changed}): {remedy}")
