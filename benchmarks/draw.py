"""Pictures of what was measured.

    python benchmarks/draw.py learning results/learning/*.json --out results/learning/curves.png
    python benchmarks/draw.py run FOLDER kl_0 kl_1 --note 'commit, command' \
        --out results/hrssm/pong.png
    python benchmarks/draw.py masks --out docs/masks.png

The second also writes the drawn numbers beside the picture, as JSON; the third draws the masks
that hrvq trains with.
Needs matplotlib: pip install -e ".[compare]"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import measure
from learning import TASKS, latent

import tools
from hidreamer.mask import KINDS, visible

COLOURS = {"rssm": "#444444", "hrssm": "#0072b2", "hrvq": "#d55e00"}
plt.rcParams |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.hashsalt": "0",
}


def learning(paths: list[Path], out: Path) -> None:
    """One panel a task: every seed's line, the thresholds as ticks, random play; negative controls
    dotted, variants dashed.
    """
    reports = [json.loads(path.read_text()) for path in paths]
    tasks = sorted({report["task"] for report in reports})
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        of_task = [report for report in reports if report["task"] == task]
        usual = tools.load_config(TASKS[task]["configs"], {}).dynamics.flat()
        for report in of_task:
            name, seeds = report["dynamics"], len(report["runs"])
            changed = latent(report["more"]).items()
            variant = " ".join(x for key, x in changed if x != str(usual[key]))
            label, dash = f"{name} {variant}".strip() + f", {seeds} seeds", "--" if variant else "-"
            if report["negative_control"]:
                label, dash = f"{name}, rewards shuffled", ":"
            style = {"ls": dash, "color": COLOURS[name], "lw": 1.2, "alpha": 0.85}
            for i, run in enumerate(report["runs"].values()):
                steps, returns = zip(*run["curve"], strict=True)
                ax.plot(steps, returns, label=None if i else label, **style)
        for name, least in of_task[0]["thresholds"].items():
            where = [int(word) for word in name.split("_") if word.isdigit()]
            if name.startswith("return_at"):
                ax.plot(
                    where[0], least, "k_", ms=14, label="threshold" if where[0] == 20_000 else None
                )
            elif name.startswith("last"):
                ax.axhline(least, color="k", lw=0.8, label="threshold, last 10 episodes")
        ax.axhline(of_task[0]["random_return"], color="0.6", lw=0.8, ls="--", label="random play")
        ax.set(title=task, xlabel="environment frames", ylabel="training return")
        ax.legend(frameon=False, fontsize=7)
    save(figure, out)


def monitor(folder: Path, keys: list[str], note: str, out: Path) -> None:
    """One panel a metric of one run's log. ``note`` says what run it was: commit, command,
    hardware.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for key in keys:
        found[key] = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    missing = [key for key, points in found.items() if not points]
    if missing:
        sys.exit(f"error: {folder / 'metrics.jsonl'} has no {', '.join(missing)}")
    figure, axes = plt.subplots(
        1, len(keys), figsize=(3 * len(keys), 2.4), squeeze=False, layout="constrained"
    )
    for ax, (key, points) in zip(axes[0], found.items(), strict=True):
        ax.plot(*zip(*points, strict=True), color=COLOURS["hrssm"], lw=1.2)
        ax.set(title=key, xlabel="environment frames")
    save(figure, out)
    out.with_suffix(".json").write_text(json.dumps({"note": note, "metrics": found}) + "\n")


def masks(out: Path, steps: int = 2, levels: int = 3) -> None:
    figure, axes = plt.subplots(1, len(KINDS), figsize=(12, 4.2), layout="constrained")
    names = []
    for t in range(steps):
        names += [f"L{i}$_{t}$" for i in range(levels)] + [f"A$_{t}$"]
    for ax, kind in zip(axes, KINDS, strict=True):
        ax.imshow(visible(kind, steps, levels), cmap="Blues", vmin=0, vmax=1.4)
        ax.set(title=kind, xlabel="is seen", xticks=range(len(names)), yticks=range(len(names)))
        ax.set_xticklabels(names)
        ax.set_yticklabels(names)
        for lines in (ax.axhline, ax.axvline):
            for x in range(1, len(names)):
                step = x % (levels + 1) == 0
                lines(x - 0.5, color="black" if step else "white", lw=0.8 if step else 1.5)
        ax.tick_params(length=0)
    axes[0].set_ylabel("sees")
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(out)


def main() -> int:
    parser = measure.argument_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    many = kinds.add_parser("learning", help="learning curves from learning.py's files")
    many.add_argument("paths", nargs="+", type=Path)
    one = kinds.add_parser("run", help="metrics of one run")
    one.add_argument("folder", type=Path)
    one.add_argument("keys", nargs="+")
    one.add_argument("--note", required=True, help="which run that was: commit, command, hardware")
    picture = kinds.add_parser("masks", help="who attends to whom")
    for kind in (many, one, picture):
        kind.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.kind == "learning":
        learning(args.paths, args.out)
    elif args.kind == "run":
        monitor(args.folder, args.keys, args.note, args.out)
    else:
        masks(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
