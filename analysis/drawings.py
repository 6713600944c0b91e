"""The figures of the page, drawn from the numbers in its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from analysis.latents import HORIZONS
from comparison.figures import COLOURS, SOFT, STYLES

# White to one blue: nothing to everything.
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#cfe3f2", "#5fa3d0", "#0b4f86"])
BASELINES = {"raw observation": "#8a8f98", "untrained": "#cfd3da"}


def heatmap(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    shade: np.ndarray | None = None,
    faint: np.ndarray | None = None,
    title: str = "",
    line: int = 0,
) -> None:
    """Numbers (rows, columns) in cells, darker for more.

    shade: (rows, columns) in [0, 1], by default the values themselves; faint: which numbers mean
    nothing; line: column before which a line is drawn.
    """
    shade = values if shade is None else shade
    shade = np.clip(np.where(np.isfinite(shade), shade, 0.0), 0.0, 1.0)
    faint = np.zeros(values.shape, bool) if faint is None else faint
    shade = np.where(faint, 0.0, shade)
    ax.pcolormesh(shade, cmap=BLUES, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=1.5)
    for (i, j), x in np.ndenumerate(values):
        text = f"{x:.2f}".replace("-", "−") if math.isfinite(x) else "–"
        colour = "white" if shade[i, j] > 0.62 else "#23272f"
        if faint[i, j] or not math.isfinite(x):
            colour = "#a9aeb8"
        place = {"ha": "center", "va": "center"}
        ax.text(j + 0.5, i + 0.5, text, fontsize=7, color=colour, **place)
    if line:
        ax.axvline(line, color="#23272f", lw=0.8)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    bare(ax)
    ax.set_title(title)


def bare(ax: Axes) -> None:
    """Cells from above, without axes."""
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def open_loop(
    ax: Axes,
    models: Mapping[str, Mapping[str, Any]],
    baseline: Sequence[float | None],
    colours: Mapping[str, str],
) -> None:
    """Mean R2 over factors by imagined steps. models: {name: {"value", "low", "high", "still"}}."""
    x = np.arange(len(HORIZONS))
    look = {"color": BASELINES["raw observation"], "lw": 1.6, "ls": "--", "marker": "o", "ms": 3}
    ax.plot(x, baseline, **look, label="last frame seen")
    for model, found in models.items():
        ax.plot(x, found["value"], color=colours[model], lw=2.2, marker="o", ms=4, label=model)
        ax.plot(x, found["still"], color=colours[model], lw=1.4, ls=":")
        if all(v is not None for v in found["low"]):
            ax.fill_between(x, found["low"], found["high"], color=colours[model], alpha=0.14, lw=0)
    ax.set_xticks(x, ["observed", *(f"{h}" for h in HORIZONS[1:])])
    ax.set(xlabel="imagined steps", ylabel="mean R²", title="read from the open loop", ylim=(0, 1))
    ax.legend(fontsize=7)


def differences(ax: Axes, found: Mapping[str, Any], title: str) -> None:
    """Top minus bottom level of every factor with its interval, ego above world.

    found: what ``study.ego`` measured of one run.
    """
    order = sorted(found["factors"].items(), key=lambda item: (item[1]["kind"] != "ego", item[0]))
    for i, (_, cell) in enumerate(order):
        value, low, high = cell["difference"]
        colour = COLOURS[1] if cell["kind"] == "ego" else COLOURS[2]
        if value is None:
            continue
        ax.plot([low, high], [i, i], color=colour, lw=2, solid_capstyle="round")
        ax.plot(value, i, "o", color=colour, ms=5)
    ax.axvline(0.0, color=SOFT, lw=0.8)
    ax.set_yticks(
        range(len(order)), [f"{name} ({cell['kind']})" for name, cell in order], fontsize=8
    )
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set(xlabel=f"R² of {found['top']} minus {found['bottom']}", title=title)


def disagreement(ax: Axes, kl: np.ndarray, names: Sequence[str], colour: str, title: str) -> None:
    """KL of posterior from prior along an episode (T, levels), nats, a line for each level."""
    for i, name in enumerate(names):
        ax.plot(kl[:, i], STYLES[i % len(STYLES)], color=colour, lw=1.2, label=name)
    ax.set(xlabel="step of the episode", ylabel="KL, nats", title=title, ylim=(0, None))
    if len(names) > 1:
        ax.legend(fontsize=7, ncols=len(names))


def attention(ax: Axes, found: Mapping[str, Any], layer: int, title: str) -> None:
    """Share of attention by the level of row and column; in brackets if all weighed the same.

    found: the report's "attention" of a run. layer: of the transformer, from 0.
    """
    weight, equal = np.array(found["by level"])[layer], np.array(found["by level, equal weights"])
    names = found["names"]
    ax.pcolormesh(weight, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for i in range(len(names)):
        for j in range(len(names)):
            colour = "white" if weight[i, j] > 0.62 else "#23272f"
            text = f"{weight[i, j]:.2f}\n({equal[i, j]:.2f})"
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(np.arange(len(names)) + 0.5, names)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    bare(ax)
    ax.set(xlabel="looks at", ylabel="position", title=title)


def distance(ax: Axes, found: Mapping[str, Any], layer: int, title: str) -> None:
    """Share of attention by steps back, a line for each level of position. Arguments as of
    ``attention``.
    """
    weight, names = np.array(found["by distance"])[layer], found["names"]
    for i, name in enumerate(names):
        ax.plot(
            weight[i], STYLES[i % len(STYLES)], color=COLOURS[i % len(COLOURS)], lw=1.6, label=name
        )
    equal = np.array(found["by distance, equal weights"])
    ax.plot(equal.mean(0), color=BASELINES["untrained"], lw=3, zorder=0, label="equal weights")
    ax.set(xlabel="steps back", ylabel="share of attention", title=title, ylim=(0, None))
    ax.legend(fontsize=7)
