"""The pictures of a report, drawn from its summary alone. Each is as wide as a phone can show."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from comparison import stats

# after Okabe and Ito
COLOURS = ("#3b4252", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", ":", "-.")  # of levels, coarse -> fine
WIDTH, HEIGHT = 4.6, 2.7  # inches
SOFT = "#8a8f98"
LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": "#444a55",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e7e9ee",
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": "#444a55",
    "ytick.labelcolor": "#444a55",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hidreamer",
    "figure.constrained_layout.use": True,
}


def colours(models: list[str]) -> dict[str, str]:
    return {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}


def wrapped(text: str, width: int = 22) -> str:
    """In lines of at most ``width`` characters where it can be broken: behind ``, / = _``, a blank,
    or a dot before a letter. Names of --vary's arms are longer than a picture is wide.
    """
    lines = [""]
    for piece in re.split(r"(?<=[,/=_ ])|(?<=\.)(?=[a-z])", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def picture(draw: Callable[[Axes], None], height: float = HEIGHT) -> str:
    """One drawing as inline SVG whose text is text."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return out.getvalue()[out.getvalue().index("<svg") :]


def panels(summary: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    """(name, drawing) of the learning curves: over all tasks where there are several, then each
    task's.
    """
    if len(summary["tasks"]) > 1:
        yield "all tasks", lambda ax: mean_curves(ax, summary)
    for task in summary["tasks"]:
        yield task, lambda ax, task=task: task_curves(ax, summary, task)


def save_curves(summary: Mapping[str, Any], path: Any) -> None:
    """All learning curves in one PNG."""
    drawings = list(panels(summary))
    columns = min(3, len(drawings))
    rows = math.ceil(len(drawings) / columns)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.35), dpi=160)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, (_, draw) in zip(axes, drawings, strict=False):
            draw(ax)
        for ax in axes[len(drawings) :]:
            ax.set_axis_off()
        lines = [
            matplotlib.lines.Line2D([], [], color=c, lw=2.2, label=m)
            for m, c in colours(summary["models"]).items()
        ]
        add_legend(figure, lines)
        figure.savefig(path)


def add_legend(figure: Figure, lines: list[matplotlib.lines.Line2D]) -> None:
    """Above all panels, in as many rows as it needs to be no wider than they."""
    for rows in range(1, len(lines) + 1):
        columns = math.ceil(len(lines) / rows)
        legend = figure.legend(handles=lines, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))


# ---------------------------------------------------------------- learning


def band(ax: Axes, x: np.ndarray, found: Mapping[str, Any], colour: str) -> None:
    ax.plot(x, np.array(found["value"], float), color=colour, lw=2.2)
    if found["low"] is not None:
        ax.fill_between(
            x, *(np.array(found[k], float) for k in ("low", "high")), color=colour, alpha=0.14, lw=0
        )


def mean_curves(ax: Axes, summary: Mapping[str, Any]) -> None:
    """The IQM over all tasks and seeds of each model, with its 95% band, along the run."""
    x = 100.0 * stats.part_ends(1)
    for model, colour in colours(summary["models"]).items():
        if model in summary["curves"]:
            band(ax, x, summary["curves"][model], colour)
    ax.set(
        title=f"all {len(summary['tasks'])} tasks",
        xlabel="% of the run",
        ylabel="normalised score (IQM)",
    )


def task_curves(ax: Axes, summary: Mapping[str, Any], task: str) -> None:
    """Every seed thin (dashed where the run is incomplete), their IQM thick with its band."""
    facts = summary["tasks"][task]
    x = stats.part_ends(facts["steps"])
    for model, colour in colours(summary["models"]).items():
        for row in summary["runs"]:
            if (row["task"], row["model"]) == (task, model):
                style = "-" if row["status"] == "complete" else "--"
                ax.plot(x, np.array(row["curve"], float), style, color=colour, lw=0.8, alpha=0.45)
        if model in summary["per_task"][task]:
            band(ax, x, summary["per_task"][task][model]["curve"], colour)
    random_play(ax, facts)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(
        title=task, xlabel="environment frames", ylabel="training return", xlim=(0, facts["steps"])
    )


def random_play(ax: Axes, facts: Mapping[str, Any]) -> None:
    """A line at what random play returns, where that is known."""
    if not facts["random_episodes"] and facts["normalisation"] != "human":
        return
    ax.axhline(facts["random_play"], color=SOFT, lw=0.9, ls=":")
    ax.annotate(
        "random play",
        (0.995, facts["random_play"]),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7,
        color=SOFT,
    )


def seconds_curves(ax: Axes, summary: Mapping[str, Any], task: str = "") -> None:
    """Return by seconds up to the budget: of one task in raw returns, every seed thin; of all
    tasks in normalised scores.
    """
    colour = colours(summary["models"])
    if not task:
        for model, found in summary["seconds"]["curves"].items():
            band(ax, 100.0 * stats.part_ends(1), found, colour[model])
        label = "% of the seconds"
        ax.set(title=f"all {len(summary['tasks'])} tasks", ylabel="normalised score (IQM)")
    else:
        facts = summary["tasks"][task]
        x = stats.part_ends(facts["budget"])
        for row in summary["runs"]:
            if row["task"] == task and "curve_s" in row:
                values = np.array(row["curve_s"], float)
                ax.plot(x, values, color=colour[row["model"]], lw=0.8, alpha=0.45)
        for model, entry in summary["per_task"][task].items():
            band(ax, x, entry["curve_s"], colour[model])
        random_play(ax, facts)
        label = f"{facts['clock']} seconds"
        ax.set(title=task, ylabel="training return", xlim=(0, facts["budget"]))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel=label)


def reaching(ax: Axes, summary: Mapping[str, Any], task: str) -> None:
    """When each run reached the threshold; an open triangle at the edge is one that never did."""
    facts = summary["tasks"][task]
    for i, (model, colour) in enumerate(colours(summary["models"]).items()):
        key = (task, model, "complete")
        rows = [r for r in summary["runs"] if (r["task"], r["model"], r["status"]) == key]
        rows = [r for r in rows if not r["published"]]
        steps_to = [r["steps_to"] for r in rows]
        times = np.array([np.inf if step is None else step for step in steps_to], float)
        shift = np.zeros(len(times))
        if len(times) < 6:  # few enough to lie side by side
            shift = 0.12 * (np.arange(len(times)) - (len(times) - 1) / 2)
        never = ~np.isfinite(times)
        ax.plot(times[~never], i + shift[~never], "o", color=colour, ms=6, alpha=0.8)
        edge = np.full(never.sum(), facts["steps"] * 1.04)
        ax.plot(edge, i + shift[never], ">", color=colour, ms=7, mfc="none", clip_on=False)
    names = summary["models"]
    ax.set(
        title=task,
        xlabel="frames to the threshold",
        xlim=(0, facts["steps"] * 1.06),
        ylim=(len(names) - 0.5, -0.5),
    )
    ax.axvline(facts["steps"], color=SOFT, lw=0.9, ls=":")
    ax.set_yticks(range(len(names)), list(map(wrapped, names)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid(axis="y", visible=False)


# ---------------------------------------------------------------- aggregates


def forest(
    ax: Axes,
    rows: list[tuple[str, str, float, float | None, float | None]],
    zero: float,
    label: str,
) -> None:
    """Points with their intervals beside a line of no difference. rows: name, colour, value, low,
    high.
    """
    for i, (_, colour, value, low, high) in enumerate(rows):
        if low is not None:
            ax.plot([low, high], [i, i], color=colour, lw=4, alpha=0.35, solid_capstyle="round")
        ax.plot(value, i, "o", color=colour, ms=6)
    ax.axvline(zero, color="#444a55", lw=1)
    ax.set_yticks(range(len(rows)), [wrapped(name) for name, *_ in rows])
    ax.set(xlabel=wrapped(label, 44), ylim=(len(rows) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


def differences(ax: Axes, summary: Mapping[str, Any]) -> None:
    colour = colours(summary["models"])
    rows = [
        (m, colour[m], d["value"], d["low"], d["high"]) for m, d in summary["comparisons"].items()
    ]
    forest(ax, rows, 0.0, f"score minus that of {summary['models'][0]}")
    ax.set_title("difference of normalised final returns")


def improvements(ax: Axes, summary: Mapping[str, Any]) -> None:
    colour = colours(summary["models"])
    found = {model: d["improvement"] for model, d in summary["comparisons"].items()}
    rows = [(m, colour[m], d["value"], d["low"], d["high"]) for m, d in found.items()]
    forest(ax, rows, 0.5, f"that a run scores more than one of {summary['models'][0]}")
    ax.set(title="probability of improvement", xlim=(-0.02, 1.02))


def profiles(ax: Axes, summary: Mapping[str, Any]) -> None:
    """Performance profiles (Agarwal et al. 2021): share of runs above each score, with bands."""
    for model, colour in colours(summary["models"]).items():
        if model in summary["profile"]["models"]:
            band(
                ax, np.array(summary["profile"]["tau"]), summary["profile"]["models"][model], colour
            )
    ax.set(
        title="performance profile",
        xlabel="normalised score τ",
        ylabel="share of runs above τ",
        ylim=(-0.02, 1.02),
    )


def level_kinds(summary: Mapping[str, Any]) -> list[str]:
    """Which per-level figures the runs logged: "kl", "perplexity"."""
    kinds = set()
    for found in summary["levels"].values():
        kinds |= {name.rpartition("_")[0] for name in found}
    return sorted(kinds)


def level_curves(ax: Axes, summary: Mapping[str, Any], kind: str) -> None:
    """A per-level metric along the run, a line for each model and level. kind: of
    ``level_kinds``.
    """
    x, colour = 100.0 * stats.part_ends(1), colours(summary["models"])
    for model, found in summary["levels"].items():
        for name, curves in found.items():
            if name.rpartition("_")[0] == kind:
                level = int(name.rpartition("_")[2])
                label = f"{model}, level {level}"
                style = STYLES[level % len(STYLES)]
                ax.plot(
                    x,
                    np.array(curves["curve"], float),
                    style,
                    color=colour[model],
                    lw=1.8,
                    label=label,
                )
    ax.legend(fontsize=7)
    ax.set(
        title=f"{kind} per level",
        xlabel="% of the run",
        ylabel="nats" if kind == "kl" else kind,
        ylim=(0, None),
    )


def offline(ax: Axes, found: Mapping[str, Any]) -> None:
    """Paired differences of the errors, relative to the baseline's."""
    colour, rows, base = colours(found["models"]), [], found["models"][0]
    for name, metric in found["metrics"].items():
        level = metric["values"][base]
        if metric["better"] == "lower" and level:
            for model, difference in metric["differences"].items():
                relative = [None if x is None else 100.0 * x / level for x in difference]
                rows.append((name if model == found["models"][1] else "", colour[model], *relative))
    forest(ax, rows, 0.0, f"% of the error of {base}; left is better")
    ax.set_title("paired differences")
