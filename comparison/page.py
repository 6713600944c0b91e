"""A comparison's report: the same sections as one HTML page that opens offline, and as Markdown."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comparison import fairness, figures, page_seconds, parts, stats, words
from comparison.parts import Section, Table
from comparison.words import estimate, number
from hidreamer import checkpoint

Report = Mapping[str, Any]


def write(report: Report, folder: Path) -> None:
    """summary.json, report.md, report.html and, of runs, curves.png; each replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"summary.json": json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)}
    base = report["models"][0]
    legend = {
        f"{model} (baseline)" if model == base else model: colour
        for model, colour in figures.colours(report["models"]).items()
    }
    found = headline(report), legend, sections(report)
    for kind in ("html", "md"):
        pages[f"report.{kind}"] = parts.render(kind, ", ".join(report["models"]), *found)
    for name, text in pages.items():
        checkpoint.replace_text(folder / name, text)
    if not all(row["published"] for row in report["runs"]):
        figures.save_curves(report, folder / "curves.png")


def headline(report: Report) -> str:
    facts = [line for line in report["warnings"] if line.startswith(fairness.UNMATCHED)]
    if report["runs"]:
        done = sum(row["status"] == "complete" for row in report["runs"])
        lengths = sorted({f"{task['steps']:,}" for task in report["tasks"].values()})
        seeds = {row["seed"] for row in report["runs"]}
        facts += [words.count(len(seeds), "seed"), words.count(len(report["tasks"]), "task")]
        facts += [
            f"{' / '.join(lengths)} frames",
            f"{done} of {words.count(len(report['runs']), 'run')} complete",
        ]
    if report["offline"]:
        found = report["offline"]
        facts.append(
            f"world models: {words.count(found['seeds'], 'seed')} x {found['updates']:,} updates "
            "offline"
        )
    return " · ".join(facts)


def sections(report: Report) -> list[Section]:
    online: list[Callable[[Report], Section | None]] = [
        support,
        learning,
        page_seconds.section,
        aggregate,
        speed,
        tasks,
        levels,
    ]
    found = [fairness_section(report)]
    found += [build(report) for build in online] if report["runs"] else []
    found += [offline(report)] if report["offline"] else []
    found += [failures(report), *([runs(report)] if report["runs"] else []), provenance(report)]
    return [section for section in found if section is not None]


# ---------------------------------------------------------------- what was compared


def fairness_section(report: Report) -> Section:
    """The capacity table comes first: without it nothing below can be read."""
    columns = report["capacity"]
    known = {model: column for model, column in columns.items() if "error" not in column}
    rows = {label: key for key, label in fairness.SIZES.items()}
    rows |= {
        f"parameters of the {part}": part
        for part in ("dynamics", "encoder", "decoder", "actor", "critic")
    }
    rows |= {label: key for key, label in fairness.COSTS.items()}
    base = next(iter(known.values()), {})
    cells = []
    for label, key in rows.items():
        values = [capacity(column, key) for column in known.values()]
        if any(value is not None for value in values):
            first = capacity(base, key)
            cells.append([label, *(capacity_cell(key, value, first) for value in values)])
    medians = ""
    if any(label == "updates/s" for label, *_ in cells):
        medians = "; updates/s and memory are medians over the runs"
    note = f"Counted on {report['counted_on']}{medians}. In brackets: the ratio to the first model."
    section = Section(
        "Is the comparison fair?", tables=[Table(["", *known], cells, note)] if known else []
    )
    scored = sorted({row["model"] for row in report["runs"] if not row["known"]})
    section.warnings = list(report["warnings"])
    for model, column in columns.items():
        if "error" in column and model not in scored:  # of those one line below
            section.warnings.append(f"{model}: {column['error']}")
    if report["differences"]:
        header = ["config key", "differs besides the latent state"]
        rows = [[key, fairness.describe({key: by})] for key, by in report["differences"].items()]
        section.tables.append(Table(header, rows))
    elif report["varied"]:
        section.text.append(
            f"What is compared are values of {report['varied']}. The configs are the same in"
            " everything else but the latent state."
        )
    elif (report["runs"] or report["offline"]) and not scored:
        section.text.append("The configs are the same in everything but the latent state.")
    if scored:
        section.warnings.append(
            f"Of {', '.join(scored)} only scores are known, or a part of the config: whether"
            " configs, protocols and sizes are the same was not checked."
        )
    return section


def capacity(column: Mapping[str, Any], key: str) -> float | None:
    """A number of the capacity table: of the model, or of one of its parts."""
    return column.get(key, column.get("parts", {}).get(key))


def capacity_cell(key: str, x: float | None, first: float | None) -> str:
    """The number as text, with its ratio to the first model's where they differ."""
    if x is None:
        return "–"
    if key == "flops":
        text = f"{x / 1e9:.3g} G"
    elif key == "peak_mb":
        text = f"{x:,.0f} MB"
    elif key == "updates_per_s":
        text = number(x)
    else:
        text = f"{x:,.0f}"
    return text + (f" ({x / first:.3f})" if first and x != first else "")


def provenance(report: Report) -> Section:
    made, rows = report["made"], report["runs"]
    commits = sorted({(row["commit"], row["hardware"]) for row in rows})
    methods = [
        (
            "Final return: mean return of the training episodes that ended in the last"
            f" {stats.LAST:.0%} of a run; where none did, of the last one and those up to as long"
            " before it. The last checkpoint and the last window count, never the best."
        ),
        (
            f"Learning curve: mean return of the training episodes in each of {stats.BINS} equal"
            " parts of a run; the area under it is its mean."
        ),
        (
            "Normalised score: (return − random) / (human − random) for the games of Atari 100k;"
            " for other tasks 0 is random play (a return of 0 where that is unknown) and ±1 the"
            " final return of the run that got furthest from it."
        ),
        f"IQM, mean, probability of improvement, profile: {stats.BOOTSTRAP}. They describe.",
        (
            f"A difference is claimed if two things agree: its interval ({stats.TEST}) leaves out"
            " 0, and so does a test that shuffles the runs of each task between the two models"
            f" ({stats.SHUFFLES:,} shuffles), at the same level."
        ),
        (
            "Threshold: half way from random play to the mean final return of all runs of the task;"
            " parts of a run that began at random do not count."
        ),
        "Wall time: from the logged rates, of the work that was kept.",
    ]
    table = Table(["commit of the runs", "hardware"], [list(pair) for pair in commits])
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    text = [f"Report made from commit {made['commit']} on {made['hardware']}, with {versions}."]
    pre = [made["command"]]
    if not rows:
        return Section("How this was made", text, pre=pre)
    return Section(
        "How this was made", text, lists={"Definitions": methods}, tables=[table], pre=pre
    )


def failures(report: Report) -> Section | None:
    unfinished = [row for row in report["runs"] if row["status"] != "complete"]
    if not unfinished and not report["failed"]:
        return None
    rows = []
    for row in unfinished:
        name = f"{row['task']}/{row['model']}/{row['seed']}"
        rows.append([name, row["status"], f"{row['steps']:,} of {row['steps_asked']:,}"])
    section = Section(
        "What failed", tables=[Table(["run", "status", "frames"], rows)] if rows else []
    )
    section.pre = [
        f"{failed['name']}: {failed['reason']}\n{failed['log']}" for failed in report["failed"]
    ]
    return section


def runs(report: Report) -> Section:
    header = ["run", "status", "frames", "final return", "normalised", "area", "last evaluation"]
    header += ["frames/s", "updates/s", "wall time", "memory", "config", "commit"]
    rows = []
    for r in report["runs"]:
        last = r["eval_returns"][-1][1] if r["eval_returns"] else None
        wall = f"{r['wall_s'] / 60:,.1f} min" if r["wall_s"] else "–"
        cells = [r["status"], f"{r['steps']:,}", number(r["final_return"])]
        cells += [number(r["normalised"]), number(r["area"]), number(last)]
        cells += [number(r["frames_per_s"]), number(r["updates_per_s"]), wall]
        cells += [f"{r['peak_mb']:,.0f} MB" if r["peak_mb"] else "–", r["config_hash"], r["commit"]]
        rows.append([f"{r['task']}/{r['model']}/{r['seed']}", *cells])
    note = "Runs with one config hash differ in nothing but their seed."
    return Section("Every run", tables=[Table(header, rows, note)], folded=True)


# ---------------------------------------------------------------- what was found


def support(report: Report) -> Section:
    drawing = figures.picture(
        lambda ax: figures.differences(ax, report), 0.9 + 0.35 * len(report["comparisons"])
    )
    lists = {
        "Is there a difference?": words.verdicts(report),
        "How probably is a run better?": words.improvements(report),
        "What this cannot show": words.limits(report),
    }
    return Section(
        "What the data support", lists=lists, figures=[drawing] if report["comparisons"] else []
    )


def learning(report: Report) -> Section | None:
    if all(row["published"] for row in report["runs"]):
        return None
    text = [
        "Thin lines are single seeds, dashed where a run is incomplete; "
        "thick ones their IQM with its 95% band."
    ]
    return Section(
        "Learning curves",
        text,
        figures=[figures.picture(draw) for _, draw in figures.panels(report)],
    )


def aggregate(report: Report) -> Section | None:
    found = report["aggregates"]
    if not found:
        return None
    names = list(next(iter(found.values())))
    rows = []
    for name in names:
        rows.append([name, *(estimate(by[name]) for by in found.values())])
    better = {
        model: estimate(entry["improvement"]) for model, entry in report["comparisons"].items()
    }
    if better:
        rows.append(["probability of improvement", *(better.get(model, "–") for model in found)])
    rows.append(["seeds", *(str(report["seeds"][model]) for model in found)])
    drawings = [figures.picture(lambda ax: figures.profiles(ax, report))]
    if better:
        draw = functools.partial(figures.improvements, summary=report)
        drawings.append(figures.picture(draw, 0.9 + 0.35 * len(better)))
    note = (
        "Normalised scores. With few seeds these intervals are too narrow: they describe, "
        "and claim nothing."
    )
    return Section("Over all tasks", figures=drawings, tables=[Table(["", *found], rows, note)])


def speed(report: Report) -> Section | None:
    timed = []
    for task, by_model in report["per_task"].items():
        timed += [task] if any("reached" in entry for entry in by_model.values()) else []
    if not timed:
        return None
    rows = []
    for task in timed:
        facts, steps = report["tasks"][task], report["tasks"][task]["steps"]
        timed_models = {m: e for m, e in report["per_task"][task].items() if "reached" in e}
        for model, entry in timed_models.items():
            reached = f"{entry['reached']} of {entry['runs']}"
            rows.append([f"{task}, {model}", reached, median(entry["steps_to"], steps)])
        rows[-len(timed_models)][0] += f" (threshold {number(facts['threshold'])})"
    text = [
        "Frames until a part of the run first averages the threshold, half way from random play to"
        " the mean final return of all runs. An open triangle at the edge is a run that never"
        " reached it: all that is known is that it takes longer."
    ]
    drawings = []
    for task in timed:
        draw = functools.partial(figures.reaching, summary=report, task=task)
        drawings.append(figures.picture(draw, 0.9 + 0.35 * len(report["models"])))
    return Section(
        "Steps to the threshold",
        text,
        figures=drawings,
        tables=[Table(["", "runs that reached it", "median frames"], rows)],
    )


def median(found: Mapping[str, Any], steps: int) -> str:
    """A median of censored times; what lies beyond the run is only known to be more."""
    show = lambda x: f"> {steps:,}" if x > steps else f"{x:,.0f}"
    between = "" if found["low"] is None else f" [{show(found['low'])}, {show(found['high'])}]"
    return show(found["value"]) + between


def tasks(report: Report) -> Section:
    base, rows = report["models"][0], []
    for task, by_model in report["per_task"].items():
        human = report["tasks"][task]["normalisation"] == "human"
        for model, entry in by_model.items():
            difference = entry.get("difference")
            shown = "" if difference is None else estimate(difference, sign=True)
            normal = number(entry["normalised"]) + (" human" if human else "")
            cells = [str(entry["runs"]), estimate(entry["final"]), estimate(entry["iqm"]), normal]
            cells += [estimate(entry["last_evaluation"]), shown]
            rows.append([f"{task}, {model}", *cells])
        facts = report["tasks"][task]
        known = "published" if human else "–"
        episodes = facts["random_episodes"]
        at_random = facts["random_play"] if episodes or human else None
        cells = [f"{episodes} episodes" if episodes else known, number(at_random)]
        cells += ["", "", "", ""]
        rows.append([f"{task}, random play", *cells])
    header = ["", "runs", "final return", "its IQM", "normalised", "last evaluation"]
    header += [f"normalised, minus {base}"]
    note = (
        "Raw returns, mean over seeds. The last column has 95% t intervals of its own, not"
        " corrected for the number of tasks: not claims."
    )
    return Section("Task by task", tables=[Table(header, rows, note)])


def levels(report: Report) -> Section | None:
    kinds = figures.level_kinds(report)
    if not kinds:
        return None
    rows, drawings = [], []
    for model, found in report["levels"].items():
        for name, entry in found.items():
            rows.append([f"{model}, {name}", estimate(entry["last"])])
    for kind in kinds:
        draw = functools.partial(figures.level_curves, summary=report, kind=kind)
        drawings.append(figures.picture(draw))
    text = [
        "Level 0 is the coarsest. KL: nats by which the posterior of a level departs from its "
        "prior, before free bits."
    ]
    return Section(
        "Per level", text, figures=drawings, tables=[Table(["", "mean of the last 10%"], rows)]
    )


def offline(report: Report) -> Section:
    found = report["offline"]
    base, others = found["models"][0], found["models"][1:]
    rows = []
    for name, metric in found["metrics"].items():
        cells = [number(metric["values"][base])]
        for model in others:
            value, low, high = metric["differences"][model]
            difference = {"value": value, "low": low, "high": high}
            cells += [number(metric["values"][model]), estimate(difference, sign=True)]
        rows.append([name, number(metric["baseline"]), *cells])
    header = ["", found["baseline"], base]
    for model in others:
        header += [model, f"{model} − {base}"]
    text = [
        f"Every model's world model was trained for {found['updates']:,} updates on the same"
        f" {found['train_episodes']} recorded episodes with the same batches,"
        f" {words.count(found['seeds'], 'seed')} each; differences are paired on"
        f" {found['held_out']} held-out episodes. No luck in exploration enters. Intervals:"
        f" {found['method']}."
    ]
    drawn = len(others) * sum(metric["better"] == "lower" for metric in found["metrics"].values())
    drawing = figures.picture(lambda ax: figures.offline(ax, found), 0.9 + 0.2 * drawn)
    lists = {"What the paired differences show": words.offline(found)}
    return Section(
        "World models on the same episodes",
        text,
        lists=lists,
        figures=[drawing] if others else [],
        tables=[Table(header, rows, found["note"])],
    )
