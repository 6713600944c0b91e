"""Several runs of each model in one set of numbers, and what they support, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from analysis import information
from analysis.latents import HORIZONS, STILL

Report = Mapping[str, Any]
Cell = dict[str, float | None]  # value, low, high over seeds
# of the same shape before training: {baseline: the part of it that is read}
UNTRAINED = {"untrained model": "all", "untrained encoder": "encoder"}


def over_seeds(values: Sequence[float | None]) -> Cell:
    """Mean and its 95% t interval; None for the interval of a single seed."""
    x = np.array([v for v in values if v is not None and math.isfinite(v)], float)
    if not len(x):
        return {"value": None, "low": None, "high": None}
    mean = float(x.mean())
    if len(x) < 2:
        return {"value": mean, "low": None, "high": None}
    half = float(scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return {"value": mean, "low": mean - half, "high": mean + half}


def by_model(report: Report) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for run in report["runs"].values():
        out.setdefault(run["model"], []).append(run)
    return out


def probe_table(runs: Sequence[Mapping[str, Any]], kind: str, horizon: int) -> dict[str, Any]:
    """{part: {factor: Cell}} of a model's runs; the untrained one's parts are "untrained PART"."""
    out: dict[str, Any] = {}
    for who, prefix in (("untrained", "untrained "), ("trained", "")):
        for part, scores in runs[0]["probes"][who][str(horizon)].items():
            cells = {}
            for factor in scores[kind]:
                seen = [run["probes"][who][str(horizon)][part][kind][factor] for run in runs]
                cells[factor] = over_seeds(seen)
            out[prefix + part] = cells
    return out


def mean_score(cells: Mapping[str, Any]) -> float | None:
    """Over factors: R2, those below 0 counting as 0."""
    values = [x["value"] if isinstance(x, Mapping) else x for x in cells.values()]
    known = [max(x, 0.0) for x in values if x is not None]
    return float(np.mean(known)) if known else None


def means(runs: Sequence[Mapping[str, Any]], who: str, part: str, kind: str, horizon: int) -> Cell:
    """R2 of a probe, its mean over factors, then over seeds.

    runs: one entry of the report for each seed. who: "trained" or "untrained". part: of the state,
    such as "deter", "L0" or "all". kind: "linear" or "mlp". horizon: steps imagined.
    """
    return over_seeds([mean_score(run["probes"][who][str(horizon)][part][kind]) for run in runs])


def baselines(report: Report, model: str, kind: str) -> dict[str, dict[str, float | None]]:
    """{baseline: {factor: R2}} that the observed states of a model are judged beside."""
    cells = report["models"][model]["probes"][kind]
    found = {"raw observation": dict(report["baseline"]["0"][kind])}
    for name, part in UNTRAINED.items():
        found[name] = {f: cell["value"] for f, cell in cells[f"untrained {part}"].items()}
    return found


def strongest(found: Mapping[str, Mapping[str, float | None]]) -> dict[str, tuple[str, float]]:
    """{factor: (baseline, R2)}: the best of each; "the mean" where none explains anything."""
    best: dict[str, tuple[str, float]] = {}
    for name, scores in found.items():
        for factor, x in scores.items():
            if x is None:
                continue
            before = best.setdefault(factor, ("the mean", 0.0))
            if x > before[1]:
                best[factor] = name, x
    return best


def models(report: Report) -> dict[str, Any]:
    """What the tables and curves show: {model: {"seeds", "probes", "open loop"}}."""
    out = {}
    for model, runs in by_model(report).items():
        entry: dict[str, Any] = {"seeds": len(runs), "levels": runs[0]["levels"]}
        if "probes" in runs[0]:
            entry["probes"] = {kind: probe_table(runs, kind, 0) for kind in ("linear", "mlp")}
            curve = [means(runs, "trained", "all", "linear", h) for h in HORIZONS]
            entry["open loop"] = {}
            for key in curve[0]:
                entry["open loop"][key] = [cell[key] for cell in curve]
            still = [means(runs, "trained", STILL, "linear", h)["value"] for h in HORIZONS[1:]]
            entry["open loop"]["still"] = [curve[0]["value"], *still]
            entry["means"], entry["untrained"] = {}, {name: {} for name in UNTRAINED}
            for kind in ("linear", "mlp"):
                parts = runs[0]["probes"]["trained"]["0"]
                entry["means"][kind] = {
                    part: means(runs, "trained", part, kind, 0) for part in parts
                }
                for name, part in UNTRAINED.items():
                    entry["untrained"][name][kind] = means(runs, "untrained", part, kind, 0)
        out[model] = entry
    return out


# ---------------------------------------------------------------- sentences


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def score(x: float | None, sign: str = "") -> str:
    """Two decimals, or a dash."""
    return "–" if x is None or not math.isfinite(x) else f"{x:{sign}.2f}".replace("-", "−")


def estimate(cell: Mapping[str, Any] | None) -> str:
    """ "value [low, high]", the interval where there is one."""
    if cell is None or cell["low"] is None:
        return score(cell and cell["value"])
    return f"{score(cell['value'])} [{score(cell['low'])}, {score(cell['high'])}]"


def read_lines(report: Report) -> list[str]:
    """What can be read, for how many factors each baseline is beaten, and where the strongest is
    not.
    """
    lines = []
    for model, entry in report["models"].items():
        trained = {f: x["value"] for f, x in entry["probes"]["linear"]["all"].items()}
        compared = baselines(report, model, "linear")
        best = strongest(compared)
        known = [f for f in best if trained[f] is not None]
        above = lambda x, floor: max(x, 0.0) > max(floor or 0.0, 0.0)
        beside = []
        for name, scores in compared.items():
            behind = [f for f in known if not above(trained[f], scores[f])]
            which = f" (not for {listed(behind)})" if 0 < len(behind) < len(known) else ""
            beside.append(
                f"more than from the {name}, {mean_score(scores) or 0:.0%}, for"
                f" {len(known) - len(behind)} of {len(known)} factors{which}"
            )
        lines.append(
            f"{model}: a line reads {mean_score(trained) or 0:.0%} of the factors' variance from"
            f" the whole state: {'; '.join(beside)}."
        )
        behind = [f for f in known if not above(trained[f], best[f][1])]
        if behind:
            pairs = [f"{f} {score(trained[f])} ({best[f][0]} {score(best[f][1])})" for f in behind]
            lines.append(
                f"{model}: the strongest baseline of the factor is not beaten on {listed(pairs)}."
            )
    return lines


def information_lines(report: Report) -> list[str]:
    """Which levels tell something of which factor, run by run, and which of that an untrained model
    tells as well.
    """
    lines = []
    for name, run in report["runs"].items():
        for level, cells in run["information"]["levels"].items():
            shown = [f for f, cell in cells.items() if cell["p"] <= information.LEVEL]
            if shown:
                best = max(shown, key=lambda f: cells[f]["bits"] - cells[f]["chance"])
                share = cells[best]["bits"] / max(run["information"]["entropy"][best], 1e-9)
                which = "every factor" if len(shown) == len(cells) else listed(shown)
                lines.append(
                    f"{name}, {level}: information about {which} is shown; most about"
                    f" {best}, {cells[best]['bits']:.2f} bits ({share:.0%} of its entropy;"
                    f" {cells[best]['chance']:.2f} bits by chance, {cells[best]['untrained']:.2f}"
                    " of an untrained model)."
                )
                if taught := [f for f in shown if cells[f]["bits"] <= cells[f]["untrained"]]:
                    lines[-1] += f" An untrained model tells as much of {listed(taught)}."
            else:
                lines.append(f"{name}, {level}: no information about any factor is shown.")
    return lines


def contrast_lines(report: Report) -> list[str]:
    """Whether the levels tell ego from world, run by run."""
    lines = []
    for name, run in report["runs"].items():
        whole = run["contrast"]
        if whole is None:
            lines.append(f"{name} has one level: there is nothing to contrast.")
            continue
        if whole["value"] is None:
            lines.append(
                f"{name}: all factors of this task are of one kind, so ego and world cannot be"
                " distinguished here."
            )
            continue
        lines += [contrast_line(name, found) for found in (whole, *whole.get("pairs", ()))]
    return lines


def contrast_line(name: str, found: Mapping[str, Any]) -> str:
    """Of one pair of levels."""
    top, bottom = found["top"], found["bottom"]
    signed = lambda *x: ", ".join(score(each, "+") for each in x)
    where = f"{signed(found['value'])} [{signed(found['low'], found['high'])}],"
    where += f" shuffled controls [{signed(*found['control'])}]"
    kinds = [cell["kind"] for cell in found["factors"].values()]
    of = f"{kinds.count('ego')} ego, {kinds.count('world')} world factors"
    first, second = ("ego", "world") if found["value"] > 0 else ("world", "ego")
    if found["divided"]:
        finding = (
            f"supported, the levels divide the factors: {top} alone holds more of {first},"
            f" {bottom} alone more of {second}"
        )
    elif found["supported"]:
        finding = (
            f"supported, {top} is worth more for {first} than for {second}, compared with"
            f" {bottom}; not supported, that the levels divide them, for it is not shown that"
            " each holds more of one kind"
        )
    else:
        finding = (
            f"not supported, that {top} and {bottom} differ in what they hold of ego and world"
        )
    return f"{name}: {finding} (contrast {where}; {of}).{before(found)}{both(found)}"


def before(found: Mapping[str, Any]) -> str:
    """Says what the contrast was before training: levels of a random network differ, too."""
    if "untrained" not in found:
        return ""
    value, low, high = found["untrained"]
    alike = found["supported"] and found["low"] <= high and low <= found["high"]
    shown = f"{score(value, '+')} [{score(low, '+')}, {score(high, '+')}]"
    return f" Before training {shown}{', from which it is not told apart' if alike else ''}."


def both(found: Mapping[str, Any]) -> str:
    """Says so where one level is shown to hold more of everything."""
    gaps = [cell["difference"][1:] for cell in found["factors"].values()]
    gaps = [gap for gap in gaps if None not in gap]
    ways = (
        ("top", "bottom", min(low for low, _ in gaps) > 0),
        ("bottom", "top", max(high for _, high in gaps) < 0),
    )
    for one, other, more in ways:
        if more:
            return f" {found[one]} alone holds more of every factor than {found[other]} alone."
    return ""


def limit_lines(report: Report) -> list[str]:
    """What a reader should not conclude."""
    single = [m for m, entry in report["models"].items() if entry["seeds"] < 2]
    lines = []
    if single:
        lines.append(
            f"One seed of {listed(single)}: what is shown is true of these trained networks, and no"
            " interval says how another training would come out."
        )
    if differing := report.get("differing"):
        lines.append(
            f"The runs differ in more than latent state and seed ({differing}): what is shown of a"
            " model may be due to that, and an interval over such runs is none over seeds."
        )
    if "baseline" in report:
        lines += [
            (
                "A probe shows that something can be read, not that the agent makes use of it; a"
                " low score of a level may mean that the memory (deter) holds it instead."
            ),
            (
                "A level's bits are those of its best single variable: a lower bound, and an easier"
                " one to raise for levels with more variables."
            ),
        ]
    for model, runs in by_model(report).items():
        sizes = [x["variables"] for x in runs[0]["codes"].values()]
        if len(set(sizes)) > 1:
            lines.append(
                f"The levels of {model} have {listed([str(n) for n in sizes])} variables: top minus"
                " bottom compares what they hold, not how well they use it."
            )
    return lines
