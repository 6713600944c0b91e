"""The section of a report that looks at returns by the seconds that they took."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from comparison import figures, words
from comparison.parts import Section, Table
from comparison.seconds import CPU, GPU, WALL
from comparison.words import estimate, number

WHAT = {
    CPU: "CPU seconds are those of a run's process, all threads together and evaluations among"
    " them; environments in processes of their own are not counted.",
    GPU: "GPU seconds are those during which a run held its GPU; runs side by side on one share"
    " them.",
    WALL: "These runs logged no CPU seconds: wall-clock time depends on what else the machine did.",
}


def section(report: Mapping[str, Any]) -> Section | None:
    """Curves, areas and differences by seconds; None where runs have no common clock."""
    found = report["seconds"]
    if not found or not found["aggregates"]:
        return None
    facts = next(iter(report["tasks"].values()))
    clock, several = facts["clock"], len(report["tasks"]) > 1
    budgets = ", ".join(f"{number(x['budget'])} s on {t}" for t, x in report["tasks"].items())
    models = list(found["aggregates"])
    rows = []
    for name in next(iter(found["aggregates"].values())):
        rows.append([name, *(estimate(found["aggregates"][model][name]) for model in models)])
    better = {m: estimate(entry["improvement"]) for m, entry in found["comparisons"].items()}
    if better:
        rows.append(["probability of improvement", *(better.get(m, "–") for m in models)])
    by_task = []
    for task, by_model in report["per_task"].items():
        for model, entry in by_model.items():
            cells = [estimate(entry["final_s"]), estimate(entry["area_s"])]
            by_task.append([f"{task}, {model}", *cells, f"{entry['seconds']:,.0f} s"])
    text = [
        f"Returns within as many {clock} seconds as the run that took the fewest had: {budgets}."
        f" {WHAT[clock]}"
    ]
    draw = [functools.partial(figures.seconds_curves, summary=report)] if several else []
    for task in report["tasks"]:
        draw.append(functools.partial(figures.seconds_curves, summary=report, task=task))
    part = {"models": report["models"], "comparisons": found["comparisons"]}
    within = f"Within equal {clock} seconds "
    lists = {
        "Is there a difference?": words.verdicts(part, "normalised returns", within),
        "How probably is a run better?": words.improvements(part),
    }
    header = ["", "return at the end of the seconds", "area", "a whole run"]
    tables = [
        Table(["", *models], rows, "Normalised scores. A second look at the same runs: not more."),
        Table(header, by_task, "Raw returns, mean over seeds."),
    ]
    figure = [figures.picture(one) for one in draw]
    return Section(f"Return a {clock} second", text, lists=lists, figures=figure, tables=tables)
