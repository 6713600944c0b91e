"""Config and command line, seeding, schedules: nothing else."""

from __future__ import annotations

import copy
import difflib
import functools
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

CONFIGS = Path(__file__).parent / "configs.yaml"
# {former name: name} of keys of older runs, which are accepted as well.
FORMER_KEYS = {f"loss_scales.{key}": f"model.losses.{key}" for key in ("decoder", "reward", "cont")}
# never names, but where one looks for them
FORMER_KEYS |= {f"model.losses.{key}": f"dynamics.{key}" for key in ("dyn", "rep")}

WORDS = ("configs", "resume", "capacity")  # of every command line; ``seeds`` knows those of some
FEW = 40  # names that a message lists whole
MOST = 2**63 - 1  # the largest whole number that tensors and random generators take

# ---------------------------------------------------------------- config


class ConfigError(Exception):
    """One line: what is wrong with the arguments, and what would be right."""


class Config(Mapping):
    """A frozen tree of settings: ``config.actor.lr``, ``**config.encoder``. Remembers which leaves
    were read.
    """

    def __init__(self, tree: dict, reads: set[str] | None = None, path: str = ""):
        object.__setattr__(self, "_tree", tree)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "reads", set() if reads is None else reads)

    def __getitem__(self, key: str) -> Any:
        value = self._tree[key]
        if isinstance(value, dict):
            return Config(value, self.reads, f"{self._path}{key}.")
        self.reads.add(self._path + key)
        return value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._tree:  # a copy asks before it has its tree
            raise AttributeError(f"no config key {vars(self).get('_path', '')}{key}")
        return self[key]

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("a config is frozen")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def tree(self) -> dict:
        """A plain copy, without counting as a read."""
        return json.loads(json.dumps(self._tree))

    def flat(self) -> dict[str, Any]:
        """{"group.key": value}, without counting as a read."""
        return flatten(self._tree)


def flatten(tree: Mapping, path: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        here = path + str(key)
        out |= flatten(value, f"{here}.") if isinstance(value, Mapping) else {here: value}
    return out


def current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.key": value} with present names for FORMER_KEYS."""
    return {FORMER_KEYS.get(key, key): value for key, value in flat.items()}


def nearest(name: str, names: Any) -> str:
    """ "did you mean x or y?"; where none is near the whole list, or the nearest of a long one."""
    names = sorted(names)
    if close := difflib.get_close_matches(name, names, 3, 0.5):
        return f"did you mean {' or '.join(close)}?"
    if len(names) <= FEW:
        return f"there are {', '.join(names)}"
    close = difflib.get_close_matches(name, names, 3, 0.0)
    return f"the nearest of {len(names)} are {', '.join(close)}"


@functools.lru_cache(maxsize=2)
def parsed(text: str) -> dict[str, Any]:
    """The presets in ``text`` of configs.yaml, parsed once, since that is slow: not to be changed.

    Raises YAMLError.
    """
    return YAML(typ="safe").load(text)


def sentences() -> dict[str, str]:
    """{"preset" or "defaults.group.key": its comment} of configs.yaml."""
    found, path = {}, []
    for line in CONFIGS.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)(\w+):.*?(?:\s# (.*))?$", line):
            del path[len(match[1]) // 2 :]
            path.append(match[2])
            found[".".join(path)] = match[3] or ""
    return found


def coerce(key: str, value: Any, default: Any, sentence: str) -> Any:
    """``value`` (a string, or what YAML made of it) as the type of ``default`` and within what
    ``sentence`` allows.
    """
    if value is True and not isinstance(default, bool):
        raise ConfigError(f"--{key} needs a value")
    if isinstance(default, str) and isinstance(value, list):
        words = " ".join(map(str, value))
        raise ConfigError(f"{key} takes one text, not {len(value)}: quote it, '{words}'")
    if isinstance(default, list):
        parts = value if isinstance(value, list) else re.split(r"[,\s]+", str(value).strip("[] "))
        return [coerce(key, part, default[0], sentence) for part in parts]
    kind = type(default)
    try:
        if kind is bool:
            out = {"true": True, "false": False}[str(value).lower()]
        elif kind is int:
            out = int(value if str(value).lstrip("+-").isdecimal() else float(value))
            if isinstance(value, bool) or float(out) != float(value):
                raise ValueError
        elif kind is float:
            out = float(value)
            if isinstance(value, bool) or not math.isfinite(out):
                raise ValueError
        else:
            out = str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(f"{key} is {value!r}; it must be {name}") from None
    if (match := re.search(r"One of: ([\w ]+)\.", sentence)) and out not in match[1].split():
        raise ConfigError(f"{key} is {out!r}; it can be {', '.join(match[1].split())}")
    for word, wrong in (("least", lambda a, b: a < b), ("most", lambda a, b: a > b)):
        if (match := re.search(rf"At {word} ([\d.]+)\.", sentence)) and wrong(out, float(match[1])):
            raise ConfigError(f"{key} is {out}; it must be at {word} {match[1]}")
    if kind is int and abs(out) > MOST:
        raise ConfigError(f"{key} is {out}; it must be a whole number of 64 bits, at most {MOST}")
    return out


def load_config(presets: list[str], overrides: Mapping[str, Any]) -> Config:
    """Presets stacked left to right over ``defaults``, then {"group.key": value} on top.

    Raises ConfigError for names that do not exist (with the nearest ones) and values of the wrong
    type.
    """
    try:
        blocks = parsed(CONFIGS.read_text(encoding="utf-8"))
    except (OSError, YAMLError) as error:
        raise ConfigError(f"cannot read {CONFIGS.name}: {str(error).splitlines()[0]}") from None
    help_by_key = sentences()
    flat = copy.deepcopy(flatten(blocks["defaults"]))  # lists are the caller's to change
    layers = []
    for name in presets:
        if name not in blocks:
            raise ConfigError(f"there is no preset {name!r}; {nearest(name, blocks)}")
        layers.append((f" (in preset {name})", flatten(blocks[name] if name != "defaults" else {})))
    for where, layer in [*layers, ("", current_names(overrides))]:
        for key, value in layer.items():
            if key not in flat:
                near = nearest(key, [*flat, *WORDS])
                raise ConfigError(f"there is no config key {key!r}{where}; {near}")
            flat[key] = coerce(key, value, flat[key], help_by_key[f"defaults.{key}"])
    return Config(unflatten(flat))


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{"group.key": value} -> {"group": {"key": value}}."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def dump_yaml(tree: Mapping) -> str:
    out = io.StringIO()
    YAML().dump(dict(tree), out)
    return out.getvalue()


class Args(NamedTuple):
    """A command line: --configs NAME ..., --resume PATH, --capacity NAME ..., --key value or
    --flag.
    """

    presets: list[str]
    overrides: dict[str, Any]
    resume: str
    capacity: list[str]


def parse(argv: list[str]) -> Args:
    """Raises ConfigError. A key without a value is True, which only flags accept."""
    lists: dict[str, list[str]] = {"configs": [], "capacity": []}
    overrides, i = {}, 0
    while i < len(argv):
        word = argv[i]
        if not word.startswith("--"):
            raise ConfigError(
                f"unexpected argument {word!r}; write --configs NAME ..., --resume PATH, "
                "--key value"
            )
        key, has_value, value = word[2:].partition("=")
        key, values = key.replace("-", "_"), [value] if has_value else []
        i += 1
        while not has_value and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        if key in lists:
            if not values:
                raise ConfigError(f"--{key} needs the name of a preset")
            lists[key] += values
        else:
            overrides[key] = values if len(values) > 1 else values[0] if values else True
    given = "resume" in overrides
    resume = overrides.pop("resume", "")
    if not isinstance(resume, str) or (given and not resume):  # as a shell's unset variable gives
        raise ConfigError("--resume needs one path")
    if resume and lists["capacity"]:
        raise ConfigError(
            "--capacity trains nothing and takes no --resume: give --configs and keys"
        )
    return Args(lists["configs"], overrides, resume, lists["capacity"])


def user_path(text: str | os.PathLike) -> Path:
    """A path that a user wrote, ``~`` and ``~NAME`` being homes. Raises ConfigError."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        raise ConfigError(f"{text}: no home is known for {name}; write the whole path") from None


def help_text(usage: str) -> str:
    """``usage``, the presets, and every key with its sentence and default."""
    help_by_key = sentences()
    defaults = load_config([], {}).flat()
    lines = [usage.strip(), "", "Presets, stacked left to right over the defaults:"]
    lines += [
        f"  {name:<22} {text}"
        for name, text in help_by_key.items()
        if "." not in name and name != "defaults"
    ]
    lines += [
        "",
        (
            "  --resume PATH          Continue a run, or start from another's weights, "
            "optimiser and episodes."
        ),
    ]
    lines += [
        "  --capacity NAME ...    Train nothing; "
        "print sizes and costs of --configs beside these presets'."
    ]
    lines += ["", "Keys, their sentences and defaults:"]
    for key, value in defaults.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        lines.append(f"  --{key:<24} {help_by_key[f'defaults.{key}']} [{shown}]")
    return "\n".join(lines)


# ---------------------------------------------------------------- seeding and schedules


def seed_all(seed: int) -> dict[str, np.random.Generator]:
    """Seed torch and return independent generators: "replay", "explore"."""
    import torch  # not above: --help and wrong arguments need not wait for it

    torch_seed, *others = np.random.SeedSequence(seed).spawn(3)
    torch.manual_seed(int(torch_seed.generate_state(1, np.uint64)[0] >> 1))
    return dict(zip(("replay", "explore"), map(np.random.default_rng, others), strict=True))


class Every:
    """Due whenever a step has passed another multiple of ``every`` since ``last``, the step of the
    last time.
    """

    def __init__(self, every: int):
        self.every, self.last = every, 0

    def due(self, step: int) -> bool:
        return step // self.every > self.last // self.every

    def done(self, step: int) -> None:
        self.last = max(self.last, step)
