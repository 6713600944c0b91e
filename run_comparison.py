"""Which latent structure is better? Runs every model on every task with every seed,
and reports what the data support.

    python run_comparison.py --steps 50000 --seeds 3        train, then report
    python run_comparison.py --from FOLDER [FOLDER ...]     report on runs that exist
    python run_comparison.py --paired-offline FOLDER        world models on the same episodes

The same command again continues: finished runs are kept, interrupted ones resume, failed ones get
another try.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import tools
from envs import EnvError
from hidreamer import app
from hidreamer.provenance import provenance
from tools import Config, ConfigError

try:
    from analysis import heldout, offline, probes
    from comparison import backends, fairness, page, runs, summary
    from comparison.matrix import Job, Matrix
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"error: a comparison needs its extra: pip install -e '.[compare]' ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

# What a suite needs to be itself; the models' presets are stacked on it. Atari's is the 100k
# benchmark.
SUITES = {"atari": "atari100k", "dmc": "dmc_vision", "crafter": "crafter", "vizdoom": "vizdoom"}
SUITES |= {"minatar": "minatar", "gym": "gym"}

# {option: (default, its sentence)}; anything else on the command line is a config key, for all
# runs.
OPTIONS: dict[str, tuple[Any, str]] = {
    "models": (
        ["tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer"],
        "Presets to compare; the first is the baseline.",
    ),
    "task": (
        ["minatar_breakout"],
        "Tasks that every model is trained on, each with its suite's preset.",
    ),
    "seeds": (3, "Number of seeds; 3 means 0, 1, 2. At least 1."),
    "seed_list": ([], "The seeds by name, instead."),
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
    "backend": ("local", "Who runs them. One of: local ray slurm."),
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
    "from": ([], "Folders with runs to report on, of any machine; trains nothing."),
}


# ---------------------------------------------------------------- command line


def parse(argv: list[str]) -> tuple[SimpleNamespace, list[str], dict[str, Any]]:
    """-> options, presets for all runs, config values for all runs. Raises ConfigError."""
    args = tools.parse(argv)
    values, options = tools.current_names(args.overrides), {}
    if args.resume or args.capacity:
        raise ConfigError(
            "--resume and --capacity belong to dreamer.py; here the same command again continues"
        )
    for key, (default, sentence) in OPTIONS.items():
        options[key] = default
        if key in values:
            given, like = values.pop(key), default
            if isinstance(default, list):
                given, like = given if isinstance(given, list) else [given], default or [""]
            switched_on = given is True and default is False
            options[key] = switched_on or tools.coerce(key, given, like, sentence)
    if options["from"] and options["paired_offline"]:
        raise ConfigError("--from trains nothing and --paired-offline does: leave one of them out")
    known = tools.load_config([], {}).flat()
    for key in values:
        if key == "seed":
            raise ConfigError("--seed is one run's; write --seeds 3 or --seed-list 7 11 13")
        if key not in known:
            raise ConfigError(
                f"there is no option {key!r}; {tools.nearest(key, [*known, *OPTIONS])}"
            )
    return SimpleNamespace(**options), args.presets, values


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


def help_text() -> str:
    train, ours = (" ".join(app.command(module)) for module in ("dreamer", "run_comparison"))
    lines = [__doc__.strip().replace("python run_comparison.py", ours), ""]
    for key, (default, sentence) in OPTIONS.items():
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default).lower()
        lines.append(f"  --{key.replace('_', '-'):<18} {sentence} [{shown}]")
    lines += [
        "  --configs NAME ...   Presets stacked on the suite's for all runs, below the model's.",
        f"  --key value          Any config key ({train} --help), for all runs.",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- the matrix


class Content(NamedTuple):
    """What a report is made of."""

    models: list[str]  # the first is the baseline
    runs: list[runs.Run]
    capacity: dict[str, dict[str, Any]]  # by model
    task: str  # that the capacity was counted on
    differences: fairness.Differences  # of configs, outside the latent state
    failed: list[dict[str, str]]  # name, reason and log of jobs that failed twice
    offline: dict[str, Any] | None = None  # the paired comparison of world models


class Plan(NamedTuple):
    """What is to be run, once it is known to be fair and possible."""

    stacks: dict[tuple[str, str], list[str]]  # presets, by task and model
    configs: dict[tuple[str, str], Config]
    values: dict[str, Any]  # config values for all
    differences: fairness.Differences
    capacity: dict[str, dict[str, Any]]  # by model, on the first task


def make_plan(options: SimpleNamespace, presets: list[str], values: dict[str, Any]) -> Plan:
    for key in ("models", "task"):
        if len(set(names := getattr(options, key))) < len(names):
            raise ConfigError(f"--{key} names one twice: {' '.join(names)}")
    stacks, configs, differing = {}, {}, {}
    for task in options.task:
        suite = [SUITES[kind]] if (kind := task.partition("_")[0]) in SUITES else []
        for model in options.models:
            stacks[task, model] = [*suite, *presets, model]
            configs[task, model] = tools.load_config(stacks[task, model], {**values, "task": task})
        differing |= fairness.unfair(
            {model: configs[task, model].flat() for model in options.models}
        )
    refuse(differing, options)
    counted = {
        model: fairness.capacity(configs[options.task[0], model]) for model in options.models
    }
    return Plan(stacks, configs, values, differing, counted)


def command(plan: Plan, task: str, model: str, seed: int, folder: Path) -> list[str]:
    """What dreamer.py and a paired-offline job have in common."""
    words = ["--configs", *plan.stacks[task, model], "--task", task]
    words += ["--seed", str(seed), "--logdir", str(folder)]
    for key, value in plan.values.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def train(options: SimpleNamespace, plan: Plan, folder: Path) -> tuple[int, Content]:
    """Run all jobs. -> the signal that stopped it, or 0; what there is to report."""
    jobs = []
    for seed, task, model in itertools.product(seeds(options), options.task, options.models):
        home, steps = folder / task / model / str(seed), plan.configs[task, model].steps
        words = [sys.executable, str(app.ROOT / "dreamer.py")]
        words += command(plan, task, model, seed, home)
        done = functools.partial(runs.finished, home, steps)
        jobs.append(Job(f"{task}/{model}/{seed}", words, home, steps, done, {"model": model}))
    signum, failed = run(jobs, options, plan, folder)
    found = [runs.read(job.folder) for job in jobs if (job.folder / "metrics.jsonl").exists()]
    return signum, Content(
        options.models, found, plan.capacity, options.task[0], plan.differences, failed
    )


def train_offline(options: SimpleNamespace, plan: Plan, folder: Path) -> tuple[int, Content]:
    """The same for world models on recorded episodes;
    compared are the seeds that all models finished.
    """
    if len(options.task) > 1:
        raise ConfigError("--paired-offline compares on one --task, that of the episodes")
    jobs, (task,), updates = {}, options.task, options.updates
    sources = [str(Path(source).expanduser().resolve()) for source in options.paired_offline]
    offline.check(offline.find(sources), plan.configs[task, options.models[0]])
    for seed, model in itertools.product(seeds(options), options.models):
        home = folder / task / model / str(seed)
        words = [sys.executable, "-m", "analysis.offline", *command(plan, task, model, seed, home)]
        words += ["--episodes", *sources, "--updates", str(updates)]
        done = functools.partial(offline.finished, home, updates)
        jobs[model, seed] = Job(
            f"{task}/{model}/{seed}", words, home, updates, done, {"model": model}, "updates"
        )
    signum, failed = run(list(jobs.values()), options, plan, folder)
    results = {model: [] for model in options.models}
    for seed in seeds(options):
        of_seed = [jobs[model, seed] for model in options.models]
        if all(job.finished() for job in of_seed):
            for job, model in zip(of_seed, options.models, strict=True):
                results[model].append(offline.read(job.folder))
    note = heldout.NOTE
    if probes.possible(plan.configs[task, options.models[0]]):
        note += f" {probes.NOTE}"
    about = {"sceptic": heldout.BASELINE, "note": note, "task": task, "sources": sources}
    found = summary.paired(results, about) if any(results.values()) else None
    return signum, Content(options.models, [], plan.capacity, task, plan.differences, failed, found)


def run(
    jobs: list[Job], options: SimpleNamespace, plan: Plan, folder: Path
) -> tuple[int, list[dict[str, str]]]:
    """-> the signal that stopped it, or 0; what failed."""
    backend = make_backend(options, plan.configs[options.task[0], options.models[0]].device, folder)
    signum = Matrix(jobs, backend, Console()).run()
    failed = []
    for job in jobs:
        if job.state == "failed":
            failed.append({"name": job.name, "reason": job.reason, "log": job.last_lines()})
    return signum, failed


def make_backend(options: SimpleNamespace, device: str, folder: Path) -> Any:
    given = resources(options)
    if options.backend == "ray":
        return backends.Ray(options.jobs, device, options.per_gpu, given)
    if options.backend == "slurm":
        return backends.Slurm(options.jobs, device, given, folder / "slurm")
    if given:
        raise ConfigError(
            "--resources are for --backend ray or slurm; local runs share what the machine has"
        )
    return backends.Local(options.jobs, device, options.per_gpu)


def refuse(differing: fairness.Differences, options: SimpleNamespace) -> None:
    if differing and not options.allow_differences:
        raise ConfigError(
            f"the configs differ in more than the latent state: {fairness.describe(differing)}; "
            "make them the same, or add --allow-differences and the report records it"
        )


# ---------------------------------------------------------------- the report


def collect(options: SimpleNamespace) -> Content:
    """Runs that exist; unless --models says otherwise the flat state is the baseline."""
    found = runs.find(map(Path, getattr(options, "from")))
    kinds = {run.model: run.config["dynamics.type"] for run in found}
    order = sorted(kinds, key=lambda model: (kinds[model] != "rssm", kinds[model], model))
    if options.models != OPTIONS["models"][0]:
        if missing := [model for model in options.models if model not in kinds]:
            raise ConfigError(
                f"--models: there is no run of {missing[0]!r}; {tools.nearest(missing[0], kinds)}"
            )
        order = options.models
    found = [run for run in found if run.model in order]
    differing = fairness.unfair_runs(found)
    refuse(differing, options)
    task = found[0].task
    counted = {}
    for run in found:
        if run.task == task and run.model not in counted:
            try:
                counted[run.model] = fairness.capacity(Config(tools.unflatten(run.config)))
            # a game, a structure, a key that this machine does not have
            except (ConfigError, AttributeError) as error:
                counted[run.model] = {"error": str(error)}
    return Content(order, found, counted, task, differing, [])


def write(what: Content, folder: Path, argv: list[str]) -> None:
    """summary.json, report.md, report.html and curves.png."""
    report = summary.summarise(what.runs, what.models)
    known = {model: what.capacity.get(model, {}) | report["costs"][model] for model in what.models}
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "rliable")
    }
    made = provenance() | {
        "command": shlex.join([*app.command("run_comparison"), *argv]),
        "versions": versions,
    }
    warnings = fairness.warnings(
        {model: column for model, column in known.items() if "error" not in column}
    )
    report |= {
        "made": made,
        "capacity": known,
        "counted_on": what.task,
        "warnings": warnings,
        "offline": what.offline,
    }
    page.write(
        summary.plain(report | {"differences": what.differences, "failed": what.failed}), folder
    )


# ---------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    """-> exit status: 0 all runs are complete, 1 some failed, 2 bad arguments,
    128 + signal after a signal.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        options, presets, values = parse(argv)
        folder = Path(options.logdir).expanduser().resolve()
        if sources := getattr(options, "from"):
            signum, what = 0, collect(options)
            if options.logdir == OPTIONS["logdir"][0]:
                folder = Path(sources[0]).resolve()
        elif options.paired_offline:
            folder /= "offline"
            signum, what = train_offline(options, make_plan(options, presets, values), folder)
        else:
            signum, what = train(options, make_plan(options, presets, values), folder)
        if signum:
            line = "stopped; the same command continues"
            if not options.paired_offline:
                line += f", and --from {folder} reports on what there is"
            print(line)
            return 128 + signum
        for failed in what.failed:
            print(f"\n{failed['name']}: {failed['reason']}\n{failed['log']}\n", file=sys.stderr)
        write(what, folder, argv)
        print(f"report: {folder / 'report.html'}")
        return 1 if what.failed else 0
    except (ConfigError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that is not ours, a cluster that is silent
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(app.run(main))
