"""Which latent structure is better? Runs every model on every task with every seed,
and reports what the data support.

    python run_comparison.py --steps 50000 --seeds 3        train, then report
    python run_comparison.py --from FOLDER [FOLDER ...]     report on runs that exist
    python run_comparison.py --paired-offline FOLDER        world models on the same episodes
    python run_comparison.py --vary KEY VALUE VALUE ...     values of a config key

The same command again continues: finished runs are kept, interrupted ones resume, failed ones get
another try.
"""

# ruff: noqa: E402  what needs no torch is done before it is loaded

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import tools
from comparison.options import Arm, arms_of, help_text, parse, resources, seeds
from hidreamer import app
from tools import Config, ConfigError


def answer(argv: list[str]) -> int | None:
    """--help and wrong arguments need nothing that takes seconds to load. -> exit status, None
    where there is more to do.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(__doc__))
        return 0
    try:
        parse(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return None


if __name__ == "__main__" and (status := app.run(answer)) is not None:
    sys.exit(status)

from rich.console import Console

from envs import EnvError
from hidreamer.provenance import note_start, provenance

try:
    from analysis import heldout, offline, probes
    from comparison import backends, fairness, page, runs, scores, seconds, summary
    from comparison.matrix import Job, Matrix
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"error: a comparison needs its extra: {app.install_line('compare')} ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

# What a suite needs to be itself; the models' presets are stacked on it. Atari's is the 100k
# benchmark.
SUITES = {"atari": "atari100k", "dmc": "dmc_vision", "crafter": "crafter", "vizdoom": "vizdoom"}
SUITES |= {suite: suite for suite in ("minatar", "gym", "minigrid", "pinpad", "popgym")}

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
    unmatched: Sequence[str] = ()  # capacity on other tasks, a line each


class Plan(NamedTuple):
    """What is to be run, once it is known to be fair and possible. What is called a model is an
    arm, by its name: a model, with its value of --vary where there is one.
    """

    arms: dict[str, Arm]
    stacks: dict[tuple[str, str], list[str]]  # presets, by task and model
    configs: dict[tuple[str, str], Config]
    values: dict[str, Any]  # config values for all
    differences: fairness.Differences
    capacity: dict[str, dict[str, Any]]  # by model, on the first task
    unmatched: list[str]  # capacity on other tasks, a line each


def make_plan(options: SimpleNamespace, presets: list[str], values: dict[str, Any]) -> Plan:
    """What is to be trained, checked: the config of every task and model.

    options: of run_comparison.py. presets, values: of --configs and of config keys, for all runs.
    Raises ConfigError.
    """
    for key in ("models", "task"):
        if len(set(names := getattr(options, key))) < len(names):
            raise ConfigError(f"--{key} names one twice: {' '.join(names)}")
    compared = arms_of(options)
    stacks, configs, differing = {}, {}, {}
    for task in options.task:
        suite = [SUITES[kind]] if (kind := task.partition("_")[0]) in SUITES else []
        for model, arm in compared.items():
            stacks[task, model] = [*suite, *presets, arm.preset]
            own = {**values, **arm.values, "task": task}
            configs[task, model] = tools.load_config(stacks[task, model], own)
        flat = {model: configs[task, model].flat() for model in compared}
        if options.vary:
            key, *given = options.vary
            if len({str(config[key]) for config in flat.values()}) < len(given):
                raise ConfigError(f"--vary names one value twice: {' '.join(given)}")
        differing |= fairness.unfair(flat, options.vary[:1])
    refuse(differing, options)
    counted = {model: fairness.capacity(configs[options.task[0], model]) for model in compared}
    by_task = {}
    for task in options.task:
        by_task[task] = {model: configs[task, model] for model in compared}
    unmatched = fairness.elsewhere(by_task)
    return Plan(compared, stacks, configs, values, differing, counted, unmatched)


def command(plan: Plan, task: str, model: str, folder: Path, *seed: str) -> list[str]:
    """What dreamer.py and a paired-offline job have in common. seed: --seed or --seeds."""
    words = ["--configs", *plan.stacks[task, model], "--task", task]
    words += [*seed, "--logdir", str(folder)]
    for key in plan.values | plan.arms[model].values:
        value = plan.configs[task, model].flat()[key]
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def note(plan: Plan, model: str) -> dict[str, Any]:
    """What a run's folder says of its place in the comparison."""
    varied = plan.arms[model].values
    if not varied:
        return {"model": model}
    return {"model": model, "varied": next(iter(varied)), "arm": list(plan.arms).index(model)}


def train(options: SimpleNamespace, plan: Plan, folder: Path) -> tuple[int, Content]:
    """Run all jobs. -> the signal that stopped it, or 0; what there is to report."""
    jobs, homes, numbers = [], [], seeds(options)
    dreamer = [sys.executable, str(app.ROOT / "dreamer.py")]
    for task, model in itertools.product(options.task, plan.arms):
        config = plan.configs[task, model]
        above, steps = folder / task / model.replace("/", "_"), config.steps
        asked = {"steps": steps, "config": config}
        done = [functools.partial(runs.finished, above / str(seed), **asked) for seed in numbers]
        name, about = f"{task}/{model}", note(plan, model)
        if options.side_by_side:
            words = [*dreamer, *command(plan, task, model, above, "--seeds", *map(str, numbers))]
            whole = lambda done=done: all(finished() for finished in done)
            for seed, finished in zip(numbers, done, strict=True):
                if not finished():  # the job's own note is above
                    (above / str(seed)).mkdir(parents=True, exist_ok=True)
                    note_start(above / str(seed), about)
            first = above / str(numbers[0])
            jobs.append(Job(name, words, above, steps, whole, about, watched=first))
        for seed, finished in zip(numbers, done, strict=True):
            homes.append(above / str(seed))
            if not options.side_by_side:
                words = [*dreamer, *command(plan, task, model, homes[-1], "--seed", str(seed))]
                jobs.append(Job(f"{name}/{seed}", words, homes[-1], steps, finished, about))
    by_seed = lambda home: numbers.index(int(home.name))
    homes.sort(key=by_seed)
    if not options.side_by_side:  # the first seed of all models before the second of any
        jobs.sort(key=lambda job: by_seed(job.folder))
    signum, failed = run(jobs, options, plan, folder)
    found = [runs.read(home) for home in homes if (home / "metrics.jsonl").exists()]
    # runs of an earlier command may have been trained in another precision, say
    differing = fairness.unfair_runs(found)
    differing.pop("steps", None)  # of the longer ones only as many frames are compared
    counted = plan.capacity, options.task[0], differing | plan.differences
    return signum, Content(list(plan.arms), found, *counted, failed, unmatched=plan.unmatched)


def train_offline(options: SimpleNamespace, plan: Plan, folder: Path) -> tuple[int, Content]:
    """The same for world models on recorded episodes;
    compared are the seeds that all models finished.
    """
    if len(options.task) > 1:
        raise ConfigError("--paired-offline compares on one --task, that of the episodes")
    jobs, (task,), updates = {}, options.task, options.updates
    compared = list(plan.arms)
    sources = [str(tools.user_path(source).resolve()) for source in options.paired_offline]
    files = offline.find(sources)
    offline.check(files, plan.configs[task, compared[0]])
    for seed, model in itertools.product(seeds(options), compared):
        home = folder / task / model.replace("/", "_") / str(seed)
        words = [sys.executable, "-m", "analysis.offline"]
        words += command(plan, task, model, home, "--seed", str(seed))
        words += ["--episodes", *sources, "--updates", str(updates)]
        asked = {"config": plan.configs[task, model], "files": files}
        done = functools.partial(offline.finished, home, updates, **asked)
        jobs[model, seed] = Job(
            f"{task}/{model}/{seed}", words, home, updates, done, note(plan, model), "updates"
        )
    signum, failed = run(list(jobs.values()), options, plan, folder)
    results = {model: [] for model in compared}
    for seed in seeds(options):
        of_seed = [jobs[model, seed] for model in compared]
        if all(job.finished() for job in of_seed):
            for job, model in zip(of_seed, compared, strict=True):
                results[model].append(offline.read(job.folder))
    notes = heldout.NOTE
    if probes.possible(plan.configs[task, compared[0]]):
        notes += f" {probes.NOTE}"
    about = {"baseline": heldout.BASELINE, "note": notes, "task": task, "sources": sources}
    found = summary.paired(results, about) if any(results.values()) else None
    return signum, Content(compared, [], plan.capacity, task, plan.differences, failed, found)


def run(
    jobs: list[Job], options: SimpleNamespace, plan: Plan, folder: Path
) -> tuple[int, list[dict[str, str]]]:
    """-> the signal that stopped it, or 0; what failed."""
    backend = make_backend(
        options, plan.configs[options.task[0], next(iter(plan.arms))].device, folder
    )
    signum = Matrix(jobs, backend, Console()).run()
    failed = []
    for job in jobs:
        if job.state == "failed":
            failed.append({"name": job.name, "reason": job.reason, "log": job.last_lines()})
    return signum, failed


def make_backend(options: SimpleNamespace, device: str, folder: Path) -> Any:
    """Of --backend, for runs on ``device``. Raises ConfigError."""
    given = resources(options)
    if options.backend == "ray":
        return backends.Ray(options.jobs, device, options.per_gpu, given)
    if options.backend == "slurm":
        return backends.Slurm(options.jobs, device, given, folder / "slurm")
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
    found = scores.find(map(tools.user_path, getattr(options, "from")))
    if options.until:
        found = [seconds.cut(run, options.until) for run in found]
    kinds = {run.model: run.config["dynamics.type"] for run in found}
    arms = {run.model: run.start.get("arm", 0) for run in found}  # values of --vary, as given
    key = lambda model: (arms[model], kinds[model] != "rssm", kinds[model], model)
    order = sorted(kinds, key=key)
    if "models" in options.named:
        if len(set(options.models)) < len(options.models):
            raise ConfigError(f"--models names a model twice: {' '.join(options.models)}")
        if missing := [model for model in options.models if model not in kinds]:
            raise ConfigError(
                f"--models: there is no run of {missing[0]!r}; {tools.nearest(missing[0], kinds)}"
            )
        order = options.models
    given = {run.task for run in found}
    found = scores.beside([run for run in found if run.model in order])
    if left := len(given - {run.task for run in found}):
        print(f"published scores on {left} other games are left out")
    differing = fairness.unfair_runs([run for run in found if not run.published])
    refuse(differing, options)
    task = found[0].task
    counted, configs = {}, {task: {}}
    for run in sorted(found, key=lambda run: order.index(run.model)):
        of_task = configs.setdefault(run.task, {})
        if run.known and run.model not in of_task:
            of_task[run.model] = Config(tools.unflatten(run.config))
        if run.task != task or run.model in counted:
            continue
        try:
            if not run.known:
                raise ConfigError("only scores are known, not what it is made of")
            counted[run.model] = fairness.capacity(of_task[run.model])
        # a game, a structure, a key that this machine does not have
        except (ConfigError, AttributeError) as error:
            counted[run.model] = {"error": str(error)}
    unmatched = fairness.elsewhere(configs)
    return Content(order, found, counted, task, differing, [], unmatched=unmatched)


def write(what: Content, folder: Path, argv: list[str]) -> None:
    """summary.json, report.md, report.html and curves.png."""
    report = summary.summarise(what.runs, what.models)
    for row in report["runs"]:  # no machine's path in what may be published
        row["folder"] = os.path.relpath(row["folder"], folder)
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
    warnings += [*what.unmatched, *fairness.origins(what.runs), *fairness.timed(what.runs)]
    warnings += fairness.lives(what.runs)
    report |= {
        "made": made,
        "capacity": known,
        "counted_on": what.task,
        "warnings": warnings,
        "offline": what.offline,
        "varied": ", ".join(sorted({x.start["varied"] for x in what.runs if "varied" in x.start})),
    }
    page.write(
        summary.plain(report | {"differences": what.differences, "failed": what.failed}), folder
    )


# ---------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    """-> exit status: 0 all runs are complete, 1 some failed, 2 bad arguments,
    128 + signal after a signal.
    """
    if (status := answer(argv)) is not None:
        return status
    try:
        options, presets, values = parse(argv)
        folder = tools.user_path(options.logdir).resolve()
        if sources := getattr(options, "from"):
            signum, what = 0, collect(options)
            if "logdir" not in options.named:
                folder = tools.user_path(sources[0]).resolve()
                folder = folder.with_name(f"{folder.stem}-report") if folder.is_file() else folder
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
        if options.export:
            scores.write(what.runs, tools.user_path(options.export))
            print(f"scores: {options.export}")
        print(f"report: {folder / 'report.html'}")
        return 1 if what.failed else 0
    except (ConfigError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that is not ours, a cluster that is silent
        elsewhere = f": choose another --logdir than {folder}" if error.filename else ""
        print(f"error: {error}{elsewhere}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
