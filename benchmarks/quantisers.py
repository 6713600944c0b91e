"""What each choice inside hrvq does to a world model:
all are trained on the same batches of recorded episodes.

    python benchmarks/quantisers.py minatar --episodes RUN [--rows sampled nearest ...]
        [--seeds 0 1] [--updates 2000] [--out results/hrvq/minatar.json]
        [--returns results/learning/minatar_*.json] [--picture FILE.png]
    python benchmarks/quantisers.py minatar --from results/hrvq/minatar.json --returns ... --out ...

Judged on held-out episodes, whole episodes apart. The number that ranks is the open loop: what is
right 1, 3, 7 and 15 steps after the last observation. On Atari also what a ridge regression finds
of the console's memory in the features.
Trainings go to runs/quantisers/ (or --runs) and continue where they stopped, as does the judging:
the same command again takes up what is missing. --out writes the figures, and
tables of them beside it; --returns adds those that agents with the same choice had in whole runs
(benchmarks/learning.py), with --from to what an earlier call judged; --picture shows frames of a
held-out episode as the first row has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from counted import CONTEXT, HORIZONS, LATE, Table, cells, pieces
from measure import ROOT, argument_parser, write_table
from quantiser_rows import DREAMS, WORLDS, make_config, returns, spatial_note

import models
import tools
from analysis import heldout, offline
from envs import EnvError
from hidreamer import evaluation
from hidreamer.checkpoint import CheckpointError
from hidreamer.dynamics.base import kl_losses
from hidreamer.provenance import provenance
from hidreamer.quantizer import per_level

Found = dict[str, dict[str, dict[str, Any]]]  # {row: {seed: figures}}
LAST = "last frame seen"  # the row of repeating it
COUNTED = "counted, no model"  # the row of benchmarks/counted.py
FRAMES = (4, 7, 8, 9, 10, 12, 14, 18, 22)  # of a picture; the first CONTEXT are seen
AT_ONCE = 32  # held-out chunks that are looked at together


@torch.no_grad()
def judge(trainer: offline.Trainer, thing: tuple[str, int] | None = None) -> dict[str, Any]:
    """Figures on held-out chunks of whole length, per step; lists are by level, coarse to fine.

    thing: of whose cell is judged where it is dreamt, and its plane in the grid.
    """
    length, model = trainer.config.replay.length, trainer.agent.world_model
    rows, late, episodes = pieces(trainer.load(trainer.held_files).values(), length)
    if thing:
        grids = [x["grid"] for x in trainer.load(trainer.train_files).values()]
        table = Table(grids, thing[1], HORIZONS)
    sums: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}  # of late chunks
    posts = []
    for i, some in enumerate(np.array_split(np.arange(len(late)), max(1, len(late) // AT_ONCE))):
        batch = trainer.batch({key: x[some] for key, x in rows.items()})
        torch.manual_seed(i)
        _, post, _ = model.observe(models.networks.preprocess(batch))
        truth, predicted = model.open_loop(batch, CONTEXT)
        error, moving = heldout.errors(model.decode(post.feat)[0], truth, slice(1, None))
        found = {"reconstruction": error, "moving": moving}
        last = {key: x[:, CONTEXT - 1 : CONTEXT].expand_as(x) for key, x in truth.items()}
        for h in HORIZONS:
            at = CONTEXT - 1 + h
            for name, what in (("", predicted), (", copy", last)):
                moving = heldout.errors(what, truth, slice(at, at + 1))[1]
                found[f"open loop {h}, moving{name}"] = moving
                if thing:
                    place = cells(truth["grid"][:, at], thing[1])
                    guesses = {name: cells(what["grid"][:, at], thing[1])}
                    if not name:
                        seen = cells(rows["grid"][some, CONTEXT - 2 : CONTEXT], thing[1])
                        guesses[", counted"] = torch.as_tensor(table(*seen.T, h))
                    for who, guess in guesses.items():
                        right = (guess == place.to(guess.device)).float()
                        found[f"{thing[0]} {h}{who}"] = right.mean().item()
                        hits.setdefault(f"{thing[0]} {h} late{who}", []).extend(right[late[some]])
        for name, x in found.items():
            sums.setdefault(name, []).append(x)
        posts.append(post._replace(feat=None))
    out: dict[str, Any] = {name: float(np.mean(x)) for name, x in sums.items()}
    if late.any():
        out |= {"late": int(late.sum())}
        out |= {name: float(np.mean(x)) for name, x in hits.items()}
    return {"chunks": len(late), "episodes": episodes} | out | tokens(model.dynamics, posts)


@torch.no_grad()
def picture(trainer: offline.Trainer) -> np.ndarray:
    """(rows, frames, 3) uint8: steps of the middle of the first held-out episode,
    the same decoded, and the open loop.
    """
    pieces = heldout.chunks(next(iter(trainer.held().values())), trainer.config.replay.length)
    middle = len(pieces["reward"]) // 2
    batch = trainer.batch({key: x[middle : middle + 1] for key, x in pieces.items()})
    model = trainer.agent.world_model
    torch.manual_seed(0)
    _, post, _ = model.observe(models.networks.preprocess(batch))
    truth, predicted = model.open_loop(batch, CONTEXT)
    rows = [truth, model.decode(post.feat)[0], predicted]
    frames = evaluation.board(rows)  # (T, 3 H, W, 3), enlarged
    return np.concatenate(frames[list(FRAMES)], 1)


def memory(trainer: offline.Trainer) -> dict[str, list[float]]:
    """{"RAM BYTE": R2 on held-out episodes from this model's features,
    its untrained self's, and raw pixels}.
    """
    found = trainer.probe(trainer.held())
    out = {}
    for name in found["model"]:
        out[f"RAM {name}"] = [found[who][name].r2 for who in ("model", "untrained", "pixels")]
    return out


def tokens(dynamics: Any, posts: list[Any]) -> dict[str, Any]:
    """KL of posterior to prior, nats a step; for codes, how each level is predicted and used."""
    total = sum(len(post.levels[0].post) for post in posts)
    metrics: dict[str, float] = {}
    for post in posts:  # the parts are chunks: means of them, weighted
        # Nothing foresees the first step of a chunk.
        later = []
        for level in post.levels:
            later.append(level._make(x[:, 1:] for x in level))
        for name, x in (
            dynamics.loss(post)[1] | kl_losses(tuple(later), dynamics.kl_config)[1]
        ).items():
            metrics[name] = metrics.get(name, 0.0) + x.item() * len(post.levels[0].post) / total
    # use of codes cannot be averaged: all chunks at once
    if getattr(dynamics, "quantizer", None) is not None:
        index = torch.cat([post.aux.codes.index for post in posts])
        metrics |= {name: x.item() for name, x in dynamics.quantizer.usage(index).items()}
    names = ["kl", "accuracy", "accuracy_copy", "accuracy_changed", "perplexity", "dead"]
    by_level = {}
    for name in names:
        if f"{name}_0" in metrics:
            by_level[name] = [metrics[f"{name}_{i}"] for i in range(len(dynamics.shapes))]
    return {"nats": sum(by_level["kl"])} | by_level


def table(found: Found, names: dict[str, str]) -> str:
    """Markdown: a line a row, every seed; ``names``: the columns. Empty ones are left out."""
    used = {}
    for name, title in names.items():
        if any(cell(by_seed, name) != "–" for by_seed in found.values()):
            used[name] = title
    rows = [["", *used.values()], ["---"] * (len(used) + 1)]
    for row, by_seed in found.items():
        cells = [cell(by_seed, name) for name in used]
        if set(cells) != {"–"}:
            rows.append([row, *cells])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def cell(by_seed: dict[str, dict[str, Any]], name: str) -> str:
    """A figure of every seed that has it; figures by level are a list, counts are whole."""
    scale = 1000.0 if "moving" in name or name == "reconstruction" else 1.0
    texts = []
    for figures_of_seed in by_seed.values():
        if name in figures_of_seed:
            values = figures_of_seed[name]
            values = values if isinstance(values, list) else [values]
            one = lambda x: str(x) if isinstance(x, int) else f"{scale * x:.2f}"
            texts.append(" ".join(map(one, values)))
    return " / ".join(texts) or "–"


SHOWN = {"reconstruction": "reconstruction (×10⁻³)", "moving": "moving (×10⁻³)"}
THINGS = [world.thing[0] for world in WORLDS.values() if world.thing]
SHOWN |= {f"{thing} {h}": f"{thing}, {h}" for thing in THINGS for h in HORIZONS}
SHOWN |= {f"{thing} {h} late": f"{thing}, {h}, late" for thing in THINGS for h in HORIZONS}
SHOWN |= {"late": "late chunks"}
SHOWN |= {f"open loop {h}, moving": f"open loop {h}, moving (×10⁻³)" for h in HORIZONS}
SHOWN |= {
    "nats": "nats a step",
    "perplexity": "perplexity",
    "dead": "unused",
    "accuracy": "accuracy",
}
SHOWN |= {"accuracy_copy": "copy last", "accuracy_changed": "changed", "returns": "return"}
NOTES = {
    "late": f"Late: chunks that begin after {LATE:.0f} points of their episode.",
    "nats": "Nats: KL of posterior to prior, a step; unused: codes of each codebook.",
    "accuracy": (
        "Copy last: what repeating the last code scores; changed: accuracy where it is another."
    ),
    "returns": (
        "Return: of the agent's episodes between 18,000 and 20,000 frames, each seed, from"
        " {returns}; set besides the latent state: {others}."
    ),
}
RAM_NOTE = (
    "R² on held-out episodes of a ridge regression on the features for bytes of the console's"
    " memory, trained world model, the same one untrained, raw pixels:"
)


def figures(args: argparse.Namespace, rows: list[str], commit: str) -> Found:
    """Train, or continue where it stopped, and judge by the code of ``commit``."""
    files, thing = offline.find(args.episodes), WORLDS[args.world].thing
    found: Found = {}
    for seed in map(str, args.seeds):
        for row in rows:
            folder = args.runs / args.world / row / seed
            trainer = offline.Trainer(
                make_config(args.world, row, int(seed), folder), files, folder, torch.device("cpu")
            )
            trainer.resume(args.updates)
            trainer.train(args.updates)
            if args.picture and not found:
                args.picture.parent.mkdir(parents=True, exist_ok=True)
                iio.imwrite(args.picture, picture(trainer))
            # a later call of the same code does not judge again
            kept = folder / f"judged_{args.updates}_{commit}.json"
            if kept.exists() and not commit.endswith("+changes"):
                found.setdefault(row, {})[seed] = json.loads(kept.read_text())
            else:
                found.setdefault(row, {})[seed] = judge(trainer, thing) | memory(trainer)
                kept.write_text(json.dumps(found[row][seed]))
            rounded = {key: np.round(x, 4).tolist() for key, x in found[row][seed].items()}
            print(row, seed, rounded, flush=True)
            for name, (base, temperature) in DREAMS.items():
                if base != row:
                    continue
                dynamics = trainer.agent.world_model.dynamics
                dynamics.temperature = per_level(temperature, dynamics.levels, "temperature")
                found.setdefault(name, {})[seed] = judge(trainer, thing)
    first = found[rows[0]][str(args.seeds[0])]
    for row, end in ((COUNTED, ", counted"), (LAST, ", copy")):  # the same for all
        by = {name.removesuffix(end): x for name, x in first.items() if name.endswith(end)}
        found |= {row: {str(args.seeds[0]): by}} if by else {}
    return found


def judged(world: str, path: Path) -> dict[str, Any]:
    """The report of an earlier call, without returns.
    Raises ConfigError where a file is none of this world.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"commit", "command", "rows"} - report.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if wrong := report["rows"].keys() - {*WORLDS[world].rows, *DREAMS, COUNTED, LAST}:
            raise ValueError(f"{world} has no row {' or '.join(map(repr, sorted(wrong)))}")
        for by_seed in report["rows"].values():
            for found in by_seed.values():
                found.pop("returns", None)
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise tools.ConfigError(
            f"--from {path} is no report of benchmarks/quantisers.py "
            f"({type(error).__name__}: {error})"
        ) from None


def page(world: str, found: Found, others: dict[str, str], files: list[Path]) -> str:
    """Markdown of figures. others: what was set, besides the latent state, for agents' returns."""
    first = next(iter(found.values()))
    seeds = " / ".join(first)
    context = f"{CONTEXT} steps observed, then imagined with the real actions"
    first = next(iter(first.values()))
    columns = SHOWN
    if WORLDS[world].thing:  # where a thing's cell is known, errors of pixels are less telling
        columns = {k: title for k, title in SHOWN.items() if not k.startswith("open loop")}
    present = set()
    for by_seed in found.values():
        present = present.union(*by_seed.values())
    notes = [note for name, note in NOTES.items() if name in present]
    notes += spatial_note(world, [row for row in found if row in WORLDS[world].rows])
    text = (
        f"Held-out episodes, seeds {seeds}, levels coarse to fine; open loop: {context}. "
        f"{' '.join(notes)}\n\n"
    )
    by_others: dict[str, list[str]] = {}
    for row in [row for row in found if row in others]:
        by_others.setdefault(others[row] or "nothing", []).append(row)
    set_besides = "; ".join(f"{what} in {', '.join(rows)}" for what, rows in by_others.items())
    text = text.format(returns=", ".join(map(str, files)), others=set_besides) + table(
        found, columns
    )
    if ram := {name: name.removeprefix("RAM ") for name in first if name.startswith("RAM ")}:
        text += f"\n{RAM_NOTE}\n\n" + table(found, ram)
    return text


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("world", choices=WORLDS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--episodes", nargs="+", help="run folders whose episodes are used")
    source.add_argument(
        "--from",
        dest="given",
        type=Path,
        help="an earlier --out: train nothing, only add --returns",
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="the world's; all, if none are named"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="0 and 1, if none are named")
    parser.add_argument("--updates", type=int, help="2000, if not given")
    parser.add_argument(
        "--out", type=Path, help="write the figures to this file, and the tables beside it"
    )
    parser.add_argument(
        "--returns", type=Path, nargs="+", default=[], help="learning.py's reports of whole runs"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quantisers")
    parser.add_argument(
        "--picture", type=Path, help="write frames, the same decoded, and the open loop"
    )
    args = parser.parse_args()
    made_by = provenance()  # before anything is written that would count as a change
    if args.given and any(
        x is not None for x in (args.rows, args.seeds, args.updates, args.picture)
    ):
        parser.error(
            "--from trains and judges nothing: "
            "--rows, --seeds, --updates and --picture do not go with it"
        )
    args.seeds = args.seeds or [0, 1]
    args.updates = 2000 if args.updates is None else args.updates
    rows = args.rows or list(WORLDS[args.world].rows)
    if wrong := set(rows) - WORLDS[args.world].rows.keys():
        there = ", ".join(WORLDS[args.world].rows)
        parser.error(
            f"{args.world} has no row {' or '.join(map(repr, sorted(wrong)))}; its rows: {there}"
        )
    try:
        scores = returns(args.world, args.returns)
        if args.given:
            report = judged(args.world, args.given) | {"returns": made_by}
        else:
            report = made_by | {
                "updates": args.updates,
                "episodes": args.episodes,
                "context": CONTEXT,
            }
            report["rows"] = figures(args, rows, made_by["commit"])
    except (tools.ConfigError, CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = report["rows"]
    for row in found.keys() & scores.keys():
        next(iter(found[row].values()))["returns"] = scores[row][0]
    text = page(
        args.world, found, {row: others for row, (_, others) in scores.items()}, args.returns
    )
    added = f"; returns added by `{made_by['command']}`, {made_by['commit']}" if args.given else ""
    write_table(report, text, args.out, added)
    return 0


if __name__ == "__main__":
    sys.exit(main())
