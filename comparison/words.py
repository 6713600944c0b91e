"""What the data support and what they do not, in sentences. They are made from intervals,
never from means alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comparison import stats

MOST = 10.0  # times the baseline's score: beyond, it is next to nothing beside a difference
TARGET = 0.2  # the difference, relative to the baseline, that a plan for more seeds aims at


def number(x: float | None, sign: bool = False) -> str:
    """Three digits that matter, or a dash."""
    if x is None or not math.isfinite(x):
        return "–"
    rounded = float(f"{x:.3g}")  # 0.0999... is 0.100, not 0.1000
    digits = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(abs(rounded))))
    hidden = 0 < abs(rounded) < 5e-6  # by five decimals
    text = f"{x:{'+' if sign else ''},.{'2e' if hidden else f'{min(digits, 5)}f'}}"
    return text.replace("-", "−")


def interval(low: float | None, high: float | None, sign: bool = False) -> str:
    return "" if low is None or high is None else f"[{number(low, sign)}, {number(high, sign)}]"


def estimate(x: Mapping[str, Any] | None, sign: bool = False) -> str:
    """'value [low, high]'."""
    return (
        "–"
        if x is None
        else f"{number(x['value'], sign)} {interval(x['low'], x['high'], sign)}".strip()
    )


def percent(x: float) -> str:
    return f"{100 * x:,.0f}%"


def count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def verdicts(
    summary: Mapping[str, Any], what: str = "normalised final returns", within: str = ""
) -> list[str]:
    """One sentence per model: whether a difference from the baseline is shown. The comparisons are
    those of `summary`, or of a part of it that has comparisons of its own.

    within: what the scores are limited by, the first words of each sentence.
    """
    base, lines = summary["models"][0], []
    for model in summary["models"][1:]:
        line = verdict(model, base, summary["comparisons"].get(model), what)
        lines.append(
            f"{within}{line[0].lower() if within and line[0] in 'N' else line[0]}{line[1:]}"
        )
    return lines


def verdict(model: str, base: str, found: Mapping[str, Any] | None, what: str) -> str:
    """Whether a difference between two models is shown."""
    if found is None:
        return (
            f"Nothing can be said about {model}: no seed of it, or of {base}, finished every task."
        )
    if found["value"] is None:
        return (
            f"Nothing can be said about {model}: no episode of a run of it, or of {base},"
            " had ended."
        )
    value, between = found["value"], interval(found["low"], found["high"], sign=True)
    if found["claimed"]:
        share = relative_to(found, abs(value))
        share = f", {share}" if share else ""
        return (
            f"{model} scores {'higher' if value > 0 else 'lower'} than {base}: the difference of"
            f" {what} is {number(value, sign=True)} {between}{share}."
        )
    if found["low"] is None:
        return f"Nothing can be concluded about {model} and {base}: single runs have no interval."
    if found["low"] <= 0 <= found["high"]:
        return (
            f"No difference between {model} and {base} is shown: it lies in {between}, "
            "which includes 0."
        )
    but = (
        f"runs that change places at random differ as much with probability {number(found['p'])};"
        f" {number(found['alpha'])} is asked for"
    )
    if found["runs"] < stats.LEAST:
        but = f"{found['runs']} runs of a model on a task are too few for a claim"
    return (
        f"No difference between {model} and {base} is shown: its interval {between} leaves out 0,"
        f" but {but}."
    )


def relative_to(found: Mapping[str, Any], size: float) -> str:
    """A difference as a share of the baseline's score; "" where that is next to nothing."""
    base = found["baseline"]
    return f"{percent(size / base)} of the baseline's score" if size < MOST * base else ""


def improvements(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per model: how probably a run of it scores more than one of the baseline."""
    base, lines = summary["models"][0], []
    for model, entry in summary["comparisons"].items():
        found = entry["improvement"]
        if found["value"] is None:  # a run has no score, as its verdict says
            continue
        line = f"A run of {model} scores more than one of {base} with probability"
        if found["low"] is None:
            lines.append(f"{line} {number(found['value'])}; single runs have no interval.")
            continue
        half = "includes" if found["low"] <= 0.5 <= found["high"] else "leaves out"
        lines.append(
            f"{line} {estimate(found)}; the interval {half} one half. It describes these runs and"
            " claims nothing: with few seeds it is too narrow."
        )
    return lines


def limits(summary: Mapping[str, Any]) -> list[str]:
    """What cannot be seen with so few seeds, and what a reader should not conclude."""
    lines, tasks, base_model = [], len(summary["tasks"]), summary["models"][0]
    for model, found in summary["comparisons"].items():
        if found["detectable"] is None:
            continue
        # the comparison has all finished runs of a task, whatever became of their seeds elsewhere
        entries = summary["per_task"].values()
        own, others = (min(x[name]["runs"] for x in entries) for name in (model, base_model))
        seeds = min(own, others)
        size, base, more = found["detectable"], found["baseline"], ""
        share = relative_to(found, size)
        if share and size > TARGET * base:
            enough_seeds = max(
                stats.seeds_for(found, TARGET * base, seeds), enough(found["alpha"], tasks)
            )
            more = f" About {enough_seeds:,} seeds would show {percent(TARGET)}."
        if own < stats.LEAST or others < stats.LEAST:
            lines.append(
                f"{model}: of {own} runs against {others} nothing can be claimed; {stats.LEAST} of"
                " each are the least."
            )
            continue
        lines.append(
            f"{model}, {count(seeds, 'seed')}: an effect below about {number(size)}"
            f"{f' ({share})' if share else ''} cannot be seen here; the spread between seeds would"
            f" hide it more than one time in five.{more}"
        )
        if found["least_p"] > found["alpha"]:
            lines.append(
                f"{model}: {own} runs against {others} on {count(tasks, 'task')} separate"
                f" completely by chance with probability {number(found['least_p'])}, so no"
                f" difference of any size can be claimed; {enough(found['alpha'], tasks)} seeds"
                " could."
            )
    if any(found["claimed"] for found in summary["comparisons"].values()):
        lines.append(
            "What is claimed is right at its level where runs of both models scatter alike. Where"
            " those of one are rarely far better and the others steady, models that are as good on"
            " average are told apart more often (docs/statistics.md)."
        )
    lost = [row for row in summary["runs"] if row["status"] != "complete"]
    if lost:
        why = "they did not finish"
        if ended := sum(row["status"] != "incomplete" for row in lost):
            why = "no episode of theirs ended"
            why = why if ended == len(lost) else f"they did not finish or {why}"
        lines.append(
            f"{len(lost)} of {count(len(summary['runs']), 'run')} are left out because {why}."
            " If failing goes with learning badly, what is left looks too good."
        )
    if summary.get("differences"):
        lines.append(
            f"The configs differ outside the latent state ({', '.join(summary['differences'])}): no"
            " difference of returns can be put down to the latent state alone."
        )
    names = ", ".join(summary["tasks"])
    lines.append(
        f"The intervals are about other seeds on {names}; they say nothing about other tasks."
    )
    return lines


def enough(alpha: float, tasks: int) -> int:
    """The smallest number of seeds with which complete separation is as rare as ``alpha``."""
    seeds = stats.LEAST
    while 2.0 / math.comb(2 * seeds, seeds) ** tasks > alpha:
        seeds += 1
    return seeds


def offline(found: Mapping[str, Any]) -> list[str]:
    """What the paired comparison on recorded episodes shows."""
    lines = []
    for model in found["models"][1:]:
        shown, total = [], 0
        for name, metric in found["metrics"].items():
            value, low, high = metric["differences"][model]
            total += low is not None
            if low is not None and (low > 0 or high < 0):
                better = (value < 0) == (metric["better"] == "lower")
                shown.append(
                    f"{name} is {'better' if better else 'worse'} "
                    f"({relative(metric, found['models'][0], model)})"
                )
        if not total:
            lines.append(f"{model}: nothing can be concluded from one seed or one episode.")
        elif shown:
            lines.append(
                f"{model}: "
                + "; ".join(shown)
                + f". {len(shown)} of {total} intervals leave out 0; chance alone makes "
                f"about {number(total * (1 - stats.LEVEL))} do so."
            )
        else:
            lines.append(f"{model}: no difference is shown; all {total} intervals include 0.")
    return lines


def relative(metric: Mapping[str, Any], base: str, model: str) -> str:
    """A paired difference and its interval, in percent of the baseline where that is an error."""
    value, low, high = metric["differences"][model]
    level = metric["values"][base]
    if metric["better"] == "lower" and level:
        pct = lambda x: None if x is None else 100 * x / level
        shown = estimate({"value": pct(value), "low": pct(low), "high": pct(high)}, sign=True)
        return f"{shown} %"
    return estimate({"value": value, "low": low, "high": high}, sign=True)
