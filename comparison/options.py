"""The command line of run_comparison.py, which loads nothing that takes seconds."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import tools
from hidreamer import app
from tools import ConfigError

# Settings that change neither what a run learns nor how its figures are measured.
HOUSEKEEPING = {"logdir", "device", "compile", "logger", "video", "decode_levels"}
HOUSEKEEPING |= {"log_every", "checkpoint_every", "eval_every", "threads", "env.parallel"}
HOUSEKEEPING |= {"env.timeout", "replay.store", "replay.keep_episodes"}

# {option: (default, its sentence)}; anything else on the command line is a config key, for all
# runs.
OPTIONS: dict[str, tuple[Any, str]] = {
    "models": (
        ["tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer", "tiny_hidreamer_gru"],
        "Presets to compare; the first is the baseline.",
    ),
    "task": (
        ["minatar_breakout"],
        "Tasks that every model is trained on, each with its suite's preset.",
    ),
    "seeds": (3, "Number of seeds; 3 means 0, 1, 2. At least 1. At most 1000."),
    "seed_list": ([], "The seeds themselves, such as 3 5 8, instead of their number."),
    "logdir": (
        "runs/comparison",
        "Folder of runs and report (in its offline/ with --paired-offline, in --from with that).",
    ),
    "jobs": (
        0,
        (
            "Runs at a time; 0 means half the cores, --per-gpu on each GPU, or all on a cluster. "
            "At least 0."
        ),
    ),
    "per_gpu": (1, "Runs that share a GPU. At least 1."),
    "side_by_side": (False, "Train all seeds of a model and task in one process, as one job."),
    "backend": ("local", "Where runs are started. One of: local ray slurm."),
    "resources": (
        [],
        (
            "KEY=VALUE ... for each run on a cluster: num_cpus, memory (ray), slurm_partition "
            "(slurm), ..."
        ),
    ),
    "allow_differences": (
        False,
        "Compare although configs differ outside the latent state; the report says so.",
    ),
    "paired_offline": (
        [],
        "Folders of recorded episodes (a run's): trains world models only, on the same batches.",
    ),
    "updates": (2000, "Updates of each world model, for --paired-offline. At least 1."),
    "vary": (
        [],
        (
            "KEY VALUE VALUE ...: compares values of a config key, the first being the baseline, "
            "for the first of --models or for each that is named."
        ),
    ),
    "from": (
        [],
        (
            "Folders with runs to report on, of any machine, and files of scores (--export's, or "
            "published ones of Atari 100k); trains nothing."
        ),
    ),
    "until": (
        0,
        "With --from, compare the first so many frames of every run; 0 means all. At least 0.",
    ),
    "export": ("", "File that gets the raw scores of every run, from which all can be recomputed."),
}
NOT_VARIED = {  # key: why not
    "seed": "write --seeds 3 or --seed-list 7 11 13",
    "task": "write --task A B",
    "steps": "returns are compared after equally many frames",
}


class Arm(NamedTuple):
    """One thing that is compared with the others: a model's preset, and its value of --vary."""

    preset: str
    values: dict[str, Any]


def parse(argv: list[str]) -> tuple[SimpleNamespace, list[str], dict[str, Any]]:
    """-> options, presets for all runs, config values for all runs. Raises ConfigError."""
    args = tools.parse(argv)
    current, options = tools.current_names(args.overrides), {"named": set()}
    values = dict(current)
    if args.resume or args.capacity:
        raise ConfigError(
            "--resume and --capacity belong to dreamer.py; here the same command again continues"
        )
    for key, (default, sentence) in OPTIONS.items():
        options[key] = default
        if key in values:
            options["named"].add(key)
            given, like = values.pop(key), default
            if isinstance(default, list):
                given, like = given if isinstance(given, list) else [given], default or [""]
            switched_on = given is True and default is False
            options[key] = switched_on or tools.coerce(key, given, like, sentence)
    check_together(options, list(current), args.presets)
    given = SimpleNamespace(**options)
    seeds(given)
    if resources(given) and options["backend"] == "local":
        raise ConfigError(
            "--resources are for --backend ray or slurm; local runs share what the machine has"
        )
    known = tools.load_config([], {}).flat()
    if options["vary"]:
        check_vary(options, values, known)
    for key in values:
        if key == "seed":
            raise ConfigError("--seed is one run's; write --seeds 3 or --seed-list 7 11 13")
        if key not in known:
            raise ConfigError(
                f"there is no option {key!r}; {tools.nearest(key, [*known, *OPTIONS])}"
            )
    return given, args.presets, values


def check_together(options: dict[str, Any], named: list[str], presets: list[str]) -> None:
    """Raises ConfigError for options that exclude each other. named: those of the command line."""
    if options["from"] and options["paired_offline"]:
        raise ConfigError("--from trains nothing and --paired-offline does: leave one of them out")
    if options["side_by_side"] and (options["from"] or options["paired_offline"]):
        raise ConfigError("--side-by-side is for seeds that are trained in an environment")
    if options["until"] and not options["from"]:
        raise ConfigError("--until is for runs that exist (--from); a new one has --steps")
    if options["from"]:  # the runs are what they are
        taken = {"from", "models", "until", "logdir", "export", "allow_differences", "vary"}
        ignored = [key for key in named if key not in taken]
        ignored += ["configs"] * bool(presets)
        if ignored:
            raise ConfigError(
                f"--from reports on runs that exist, and --{ignored[0]} would change nothing: leave"
                " it out (--models chooses among the runs, --until the frames that are compared)"
            )
    if options["export"] and options["paired_offline"]:
        raise ConfigError("--export is for returns, of which --paired-offline has none")
    if options["export"] and tools.user_path(options["export"]).is_dir():
        raise ConfigError(f"--export {options['export']} is a folder; name a file in it")
    if options["export"] and any(same_file(options["export"], x) for x in options["from"]):
        raise ConfigError(f"--export {options['export']} is read by --from: name another file")
    if options["export"]:  # before hours of work
        export = tools.user_path(options["export"]).absolute()
        there = [x for x in export.parents if x.exists()]
        if not there[0].is_dir() or not os.access(there[0], os.W_OK):
            raise ConfigError(f"--export {options['export']}: {there[0]} cannot be written to")


def same_file(one: str, other: str) -> bool:
    return tools.user_path(one).resolve() == tools.user_path(other).resolve()


def check_vary(options: dict[str, Any], values: dict[str, Any], known: dict[str, Any]) -> None:
    """Raises ConfigError where ``options["vary"]``, [key, value, value, ...], cannot be varied.

    values: the other keys that the command line gives. known: all keys with their defaults.
    """
    key, *given = options["vary"]
    if options["from"]:
        raise ConfigError("--vary trains; --from reports on what exists: leave one of them out")
    if key in NOT_VARIED:
        raise ConfigError(f"--vary cannot vary {key}: {NOT_VARIED[key]}")
    if key in HOUSEKEEPING:
        raise ConfigError(f"--vary cannot vary {key}: it changes nothing that is learned")
    if key not in known:
        raise ConfigError(f"--vary: there is no key {key!r}; {tools.nearest(key, known)}")
    if key in values:
        raise ConfigError(f"--{key} and --vary {key} contradict each other: leave one of them out")
    if len(given) < 2:
        raise ConfigError(f"--vary {key} needs two values or more")


def arms_of(options: SimpleNamespace) -> dict[str, Arm]:
    """What is compared, by name: the models, or each with every value of --vary."""
    if not options.vary:
        return {model: Arm(model, {}) for model in options.models}
    key, *given = options.vary
    models = options.models if "models" in options.named else options.models[:1]
    found = {}
    for model, value in itertools.product(models, given):
        prefix = f"{model}," if len(models) > 1 else ""
        found[f"{prefix}{key}={value}"] = Arm(model, {key: value})
    if len({name.replace("/", "_") for name in found}) < len(models) * len(given):
        raise ConfigError(
            f"--vary names one value twice, or two whose folders have one name: {' '.join(given)}"
        )
    return found


def seeds(options: SimpleNamespace) -> list[int]:
    found = [tools.coerce("seed_list", x, 0, "At least 0.") for x in options.seed_list]
    found = found or list(range(options.seeds))
    if len(set(found)) < len(found):
        raise ConfigError(f"--seed-list names a seed twice: {' '.join(map(str, found))}")
    return found


def resources(options: SimpleNamespace) -> dict[str, Any]:
    """{"num_cpus": 2} of ["num_cpus=2"]."""
    found = {}
    for word in options.resources:
        key, _, value = word.partition("=")
        try:
            found[key] = YAML(typ="safe").load(value)
        except YAMLError:
            value = ""
        if not value:
            raise ConfigError(f"--resources has {word!r}; write KEY=VALUE ...")
    return found


def help_text(about: str) -> str:
    train, ours = (" ".join(app.command(module)) for module in ("dreamer", "run_comparison"))
    lines = [about.strip().replace("python run_comparison.py", ours), ""]
    for key, (default, sentence) in OPTIONS.items():
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default).lower()
        lines.append(f"  --{key.replace('_', '-'):<18} {sentence} [{shown}]")
    lines += [
        "  --configs NAME ...   Presets stacked on the suite's for all runs, below the model's.",
        f"  --key value          Any config key ({train} --help), for all runs.",
    ]
    return "\n".join(lines)
