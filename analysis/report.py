"""The page of an analysis: its sections, made from the JSON and from strips of frames."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import drawings, information, readout, summary
from analysis.latents import CONTEXT, HORIZONS, STILL
from analysis.summary import UNTRAINED, Report, estimate, listed, mean_score, score
from comparison import figures, parts
from comparison.parts import Section, Strip, Table
from comparison.words import count, number
from hidreamer import checkpoint

Strips = Mapping[str, Sequence[Strip]]
NAME = "analysis"  # of both files


def write(report: Report, strips: Strips, folder: Path) -> None:
    """analysis.html and analysis.json in ``folder``, each replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Inside {listed(list(report['models']))}"
    legend = figures.colours(list(report["models"]))
    page = parts.render("html", title, headline(report), legend, sections(report, strips))
    data = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    for name, text in ((f"{NAME}.html", page), (f"{NAME}.json", data)):
        checkpoint.replace_text(folder / name, text)


def headline(report: Report) -> str:
    facts = [report["task"], count(len(report["runs"]), "run")]
    steps = sorted({f"{run['steps']:,}" for run in report["runs"].values()})
    facts.append(f"{' / '.join(steps)} frames of training")
    held = report["episodes"]
    facts.append(f"{count(held['count'], 'new episode')}, {count(held['steps'], 'step')}")
    return " · ".join(facts)


def sections(report: Report, strips: Strips) -> list[Section]:
    found = []
    if report["factors"]:
        found += [
            support(report),
            compared(report),
            probes(report),
            open_loop(report),
            informed(report),
            *([ego(report)] if any(run["contrast"] for run in report["runs"].values()) else []),
        ]
    else:
        found.append(Section("What this page lacks", warnings=[report["lacks"]]))
    found += pictures(report, strips)
    found += [every_score(report)] if report["factors"] else []
    return [*found, provenance(report)]


# ---------------------------------------------------------------- numbers


def support(report: Report) -> Section:
    lists = {
        "Read from the state": summary.read_lines(report),
        "Information in the codes": summary.information_lines(report),
        "What the agent moves, and the rest": summary.contrast_lines(report),
        "What this cannot show": summary.limit_lines(report),
    }
    return Section("What the data support", lists=lists)


def compared(report: Report) -> Section:
    """All models in one table: means over factors."""
    known, kinds = report["models"], {"linear": "linear", "mlp": "MLP"}
    columns = [(model, kind) for model in known for kind in kinds]
    header = ["", *(f"{model}, {kinds[kind]}" for model, kind in columns)]
    base = report["baseline"]["0"]
    rows = [["raw observation", *(score(mean_score(base[kind])) for _, kind in columns)]]
    for name in UNTRAINED:
        rows.append([name, *(estimate(known[m]["untrained"][name][k]) for m, k in columns)])
    best = [summary.strongest(summary.baselines(report, m, k)) for m, k in columns]
    whole = ["strongest baseline of each factor"]
    for found in best:
        whole.append(score(mean_score({factor: x for factor, (_, x) in found.items()})))
    rows.append(whole)
    wanted = dict.fromkeys(part for entry in known.values() for part in entry["means"]["linear"])
    for part in ordered(list(wanted)):
        rows.append([part, *(estimate(known[m]["means"][k].get(part)) for m, k in columns)])
    rows.append(["seeds", *(str(known[model]["seeds"]) for model, _ in columns)])
    note = (
        "Mean R² over factors on held-out episodes; in brackets the 95% t interval over seeds. The"
        " first rows are baselines; the untrained ones are of each model's own shape."
        " deter is the memory, L0 the coarsest level, all is everything that the heads read."
    )
    return Section("The models side by side", tables=[Table(header, rows, note)])


def ordered(names: Sequence[str]) -> list[str]:
    """Encoder and memory first, then levels, then levels together, then all."""
    rank = {"encoder": 0, "deter": 1, "all": 4, STILL: 5}
    return sorted(
        names, key=lambda name: (rank.get(name, 3 if "+" in name else 2), len(name), name)
    )


def probes(report: Report) -> Section:
    """A heat map of R2 for each model: factors by parts of the state, baselines on the left."""
    text = (
        "R² on held-out episodes, read by a line from the state after each observation. Left of the"
        " line the baselines: the raw observation, the untrained model of the same shape, and its"
        " encoder. A dash: the factor hardly varies on the test episodes."
    )
    names, drawn = list(report["factors"]), []
    for model, entry in report["models"].items():
        cells = entry["probes"]["linear"]
        columns = {"raw observation": report["baseline"]["0"]["linear"]}
        columns |= {name: cells[f"untrained {key}"] for name, key in UNTRAINED.items()}
        columns |= {part: cells[part] for part in own_parts(cells)}
        values = np.empty((len(names), len(columns)))
        for j, column in enumerate(columns.values()):
            values[:, j] = [value(column[name]) for name in names]
        draw = functools.partial(
            drawings.heatmap, values=values, rows=names, columns=list(columns), title=model, line=3
        )
        drawn.append(figures.picture(draw, 1.2 + 0.27 * len(names)))
    return Section("How well can factors be read?", [text], figures=drawn)


def own_parts(cells: Mapping[str, Any]) -> list[str]:
    return ordered([part for part in cells if not part.startswith("untrained ")])


def every_score(report: Report) -> Section:
    """Each probe of each part and factor, folded away."""
    names, tables = list(report["factors"]), []
    for kind, label in (("linear", "linear"), ("mlp", "MLP")):
        rows = [["raw observation", *(score(report["baseline"]["0"][kind][f]) for f in names)]]
        for model, entry in report["models"].items():
            cells = entry["probes"][kind]
            for name, key in UNTRAINED.items():
                rows.append(
                    [f"{model}: {name}", *(estimate(cells[f"untrained {key}"][f]) for f in names)]
                )
            for part in own_parts(cells):
                rows.append([f"{model}: {part}", *(estimate(cells[part][f]) for f in names)])
        tables.append(Table([f"{label}, observed", *names], rows))
    for horizon in HORIZONS[1:]:
        base = report["baseline"][str(horizon)]["linear"]
        rows = [["last frame seen", *(score(base[f]) for f in names)]]
        for model, runs in summary.by_model(report).items():
            cells = summary.probe_table(runs, "linear", horizon)
            rows.append(
                [f"{model}, untrained", *(estimate(cells["untrained all"][f]) for f in names)]
            )
            for part in own_parts(cells):
                rows.append([f"{model}: {part}", *(estimate(cells[part][f]) for f in names)])
        tables.append(Table([f"linear, +{horizon} steps", *names], rows))
    for name, run in report["runs"].items():
        rows = []
        for level, cells in run["information"]["levels"].items():
            bits = []
            for cell in (cells[f] for f in names):
                beside = f"({cell['chance']:.2f}, {cell['untrained']:.2f})"
                bits.append(f"{cell['bits']:.2f} {beside}, p {cell['p']:.3f}")
            rows.append([f"{name}, {level}", *bits])
        tables.append(Table(["bits (by chance, untrained), p", *names], rows))
    return Section("Every score", tables=tables, folded=True)


def value(cell: Any) -> float:
    x = cell["value"] if isinstance(cell, Mapping) else cell
    return float("nan") if x is None else x


def open_loop(report: Report) -> Section:
    """R2 over the length of a dream, a curve for each model, beside the last frame seen."""
    # None where too few steps lie that far in an episode: not measured, which is no R² of 0
    baseline = [mean_score(report["baseline"][str(h)]["linear"]) for h in HORIZONS]
    curves = {model: entry["open loop"] for model, entry in report["models"].items()}
    colours = figures.colours(list(report["models"]))
    draw = functools.partial(drawings.open_loop, models=curves, baseline=baseline, colours=colours)
    text = (
        "The world model is given the actions, not the observations. Probes are fitted anew on the"
        f" imagined states, from step {CONTEXT} of an episode on; means over factors. Dotted: the"
        " state before the dream, as old as the dream is long, probes fitted anew as well: what the"
        " dream adds lies above that. Dashed: the last frame seen, which has no memory."
    )
    return Section("And after imagined steps?", [text], figures=[figures.picture(draw)])


def informed(report: Report) -> Section:
    """A heat map of mutual information for each run: factors by levels."""
    names, drawn = list(report["factors"]), []
    for name, run in report["runs"].items():
        found = run["information"]
        levels = found["levels"]
        bits, p, untrained = np.empty((3, len(names), len(levels)))
        for j, cells in enumerate(levels.values()):
            for table, key in ((bits, "bits"), (p, "p"), (untrained, "untrained")):
                table[:, j] = [cells[name][key] for name in names]
        silent = (p > information.LEVEL) | (bits <= untrained)
        total = np.array([[found["entropy"][f]] for f in names])
        draw = functools.partial(
            drawings.heatmap,
            values=np.concatenate([bits, total], 1),
            rows=names,
            columns=[*levels, "all there is"],
            shade=np.concatenate([bits / np.maximum(total, 1e-9), 0.0 * total], 1),
            faint=np.concatenate([silent, np.zeros_like(silent[:, :1])], 1),
            title=name,
            line=len(levels),
        )
        drawn.append(figures.picture(draw, 1.0 + 0.27 * len(names)))
    first = next(iter(report["runs"].values()))["information"]
    text = (
        f"Bits that the best single variable of a level tells of a factor ({first['estimator']}"
        f" corrected; factors of many values are cut into {information.BINS} quantiles), darker for"
        " a larger share of all there is. Faint: no more than codes of an untrained model of the"
        " same shape tell (those of a board tell something of it), or than chance, which is what"
        f" exchanging whole episodes gives ({first['permutations']} exchanges,"
        f" {information.LEVEL:.0%} for a run's whole table). Shuffled steps would not do, as"
        " successive ones are alike: whatever drifts would seem to tell of whatever else drifts."
    )
    return Section("Mutual information of codes and factors", [text], figures=drawn)


def ego(report: Report) -> Section:
    """Top minus bottom level by factor, for each run that has levels."""
    drawn = []
    for name, run in report["runs"].items():
        if found := run["contrast"]:
            draw = functools.partial(drawings.differences, found=found, title=name)
            drawn.append(figures.picture(draw, 0.9 + 0.26 * len(found["factors"])))
    text = [
        (
            "How much better a line reads a factor from the coarsest level alone than from the"
            " finest alone, every episode predicted from the others; bars are 95% over episodes,"
            " the same for all runs. The contrast is the mean over ego factors minus that over"
            " world factors; below it is that of every pair of levels, at 95% jointly, beside that"
            " of the same levels before training. The controls repeat it with every episode's"
            " factors replaced by another's."
        )
    ]
    lists = {"Supported or not": summary.contrast_lines(report)}
    return Section("What the agent moves, and the rest", text, lists=lists, figures=drawn)


# ---------------------------------------------------------------- pictures


CAPTIONS = {
    "decodes": (
        "What each level adds",
        "Decoded from the coarsest level, then with each finer one, beside the truth. The memory"
        " (deter) is part of every row: what L0 shows need not be in its codes.",
    ),
    "resampled": ("One level drawn anew", ""),
    "dreams": (
        "The same moment, other actions",
        "Dreams from one state, one action held all the way. Noise is the same in every row.",
    ),
    "codes": (
        "Frames that share a code",
        "The variable of the coarsest level that uses most of its classes: its most frequent"
        " classes, frames drawn at random from all episodes, their mean first.",
    ),
    "surprises": (
        "Where posterior and prior disagree",
        "The moments of the longest episode that the world model was most wrong about.",
    ),
    "raster": (
        "Codes over time",
        "Along the longest episode; every colour is a class. Coarse codes that are slow show"
        " longer stripes.",
    ),
}


def pictures(report: Report, strips: Strips) -> list[Section]:
    out = []
    for key, (title, text) in CAPTIONS.items():
        section = Section(title, [text] if text else [], strips=list(strips.get(key, ())))
        if key == "raster":
            section.tables = [code_table(report)]
        if key == "surprises":
            section.figures = disagreements(report)
        if section.strips or section.figures or key == "raster":
            out.append(section)
    return [*out, *attended(report)]


def code_table(report: Report) -> Table:
    """Use, changes, KL and entropy of each level of each run."""
    header = [
        "",
        "variables",
        "classes",
        "perplexity",
        "changed per step",
        "KL, nats",
        "entropy, nats",
    ]
    rows = []
    for name, run in report["runs"].items():
        for level, x in run["codes"].items():
            changed = "–" if x["changed"] is None else f"{100 * x['changed']:.0f}%"
            cells = [str(x["variables"]), str(x["classes"]), number(x["perplexity"]), changed]
            rows.append(
                [f"{name}, {level}", *cells, number(x["kl"]), number(x["posterior entropy"])]
            )
    note = (
        "Perplexity: how many classes a variable uses, as if all were used alike. KL: of posterior"
        " from prior. Entropy: of the posterior; what is drawn from a vague posterior changes by"
        " itself."
    )
    return Table(header, rows, note)


def disagreements(report: Report) -> list[str]:
    """Figures of KL along the longest episode, for the runs that have it."""
    drawn, colours = [], figures.colours(list(report["models"]))
    for name, run in report["runs"].items():
        if "kl" in run:
            draw = functools.partial(
                drawings.disagreement,
                kl=np.array(run["kl"]),
                names=run["levels"],
                colour=colours[run["model"]],
                title=name,
            )
            drawn.append(figures.picture(draw, 2.1))
    return drawn


def attended(report: Report) -> list[Section]:
    """A section of attention by level and by distance; none where no run has a transformer."""
    drawn = []
    for name, run in report["runs"].items():
        if found := run.get("attention"):
            for layer in range(len(found["by level"])):
                title = f"{name}, layer {layer + 1}"
                for draw in (drawings.attention, drawings.distance):
                    fill = functools.partial(draw, found=found, layer=layer, title=title)
                    drawn.append(figures.picture(fill, 2.9))
    text = [
        (
            "Each row of a table is a position of one step (A: the action); numbers are shares of"
            " its attention, in brackets what equal weights over all that it may see would give."
        )
    ]
    return [Section("Attention, by level and by distance", text, figures=drawn)] if drawn else []


# ---------------------------------------------------------------- how


def provenance(report: Report) -> Section:
    """Commits, hardware, episodes, definitions, and the command that made the page."""
    made, held = report["made"], report["episodes"]
    rows = [
        [name, f"{run['steps']:,}", run["commit"], run["hardware"]]
        for name, run in report["runs"].items()
    ]
    acted = ", ".join(f"{name} {n}" for name, n in held["by"].items())
    text = [f"Made from commit {made['commit']} on {made['hardware']}, torch {made['torch']}."]
    methods = [
        (
            f"Episodes: {held['count']} new ones, at most {held['longest']} steps each, environment"
            f" seed {held['seed']}, actions sampled; the runs' policies took turns ({acted}), and"
            " every run is judged on all of them."
        ),
    ]
    probing = [
        (
            f"Probes: of every {readout.FOLD} episodes one is for testing and one for choosing the"
            f" penalty or the epoch; at most {readout.FIT} steps are fitted on. Linear: ridge"
            f" regression. Small network: {readout.UNITS} hidden units, or the line or the mean"
            " where that does better on the episodes to choose by."
        ),
        "R²: explained share of the variance about the training mean; 0 is what the mean does.",
    ]
    methods += probing if report["factors"] else []
    methods.append("States are drawn, as in training and acting, with the same seeds for all runs.")
    if report.get("dropped"):
        methods.append(f"Left out, because they hardly vary here: {listed(report['dropped'])}.")
    table = Table(["run", "frames", "commit", "hardware"], rows)
    return Section(
        "How this was made",
        text,
        lists={"Definitions": methods},
        tables=[table],
        pre=[made["command"]],
    )
