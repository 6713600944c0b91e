"""What each choice inside hrvq does to a world model: all are trained on the same batches of recorded episodes.

    python benchmarks/quantisers.py minatar --episodes RUN [--rows sampled nearest ...] [--seeds 0 1] [--updates 2000]
        [--out results/hrvq/minatar.json]

Judged on held-out episodes, whole episodes apart. The number that ranks is the open loop: what is right 1, 3, 7 and 15
steps after the last observation. Trainings go to runs/quantisers/ and continue where they stopped. --out writes the
figures, and a table of them beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import ball_cell
from measure import ROOT

import models
import tools
from envs import EnvError
from hidreamer.provenance import provenance
from hidreamer.quantizer import per_level
from hidreamer.report import heldout, offline

# name: presets, task.
WORLDS = {"minatar": (["minatar"], "minatar_breakout"), "pong": (["demo", "tiny_hidreamer"], "atari_pong")}
# Each row differs from the first in one thing; the last two are the other latent states at the same size.
ROWS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "nearest": {"hrvq.posterior": "nearest"},
    "fsq": {"hrvq.posterior": "fsq"},
    "frozen": {"hrvq.posterior": "frozen"},
    "flat": {"hrvq.levels": 1},  # and as many more groups: equal bits
    "independent": {"hrvq.chain": False},
    "barrier": {"hrvq.mask": "barrier"},
    "causal": {"hrvq.mask": "causal"},
    "rssm": {"type": "rssm"},
    "hrssm": {"type": "hrssm"},
}
# How the trained first row dreams: the temperature of its codes by level.
DREAMS = {f"sampled, fine at {fine}": [1.0, fine, fine] for fine in (0.5, 0.1)} | {"sampled, all at 0.1": [0.1]}
CONTEXT, HORIZONS = 8, (1, 3, 7, 15)
PIECES, AT_ONCE = 384, 32  # held-out chunks that are looked at, and how many at a time


def make_config(world: str, row: str, seed: int, folder: Path) -> tools.Config:
    presets, task = WORLDS[world]
    values = {"task": task, "seed": seed, "logdir": str(folder), "dynamics.type": "hrvq"}
    values |= {f"dynamics.{key}": value for key, value in ROWS[row].items()}
    if row == "flat":
        block = tools.load_config(presets, {}).dynamics.hrvq
        values["dynamics.hrvq.groups"] = block.levels * block.groups
    return tools.load_config(presets, values)


@torch.no_grad()
def judge(trainer: offline.Trainer, files: list[Path]) -> dict[str, Any]:
    """Figures on held-out chunks of whole length, per step; lists are by level, coarse to fine."""
    length, model = trainer.config.replay.length, trainer.agent.world_model
    held = [rows for path in files[offline.EVERY - 1 :: offline.EVERY] if (rows := trainer.load(path)) is not None]
    pieces = [heldout.chunks(rows, length) for rows in held if len(rows["reward"]) >= length]
    if not pieces:
        raise tools.ConfigError(f"no held-out episode has the {length} steps of a sequence: record longer ones")
    rows = {key: np.concatenate([x[key] for x in pieces]) for key in pieces[0]}
    picks = np.random.default_rng(0).permutation(len(rows["reward"]))[:PIECES]
    sums: dict[str, list[float]] = {}
    posts = []
    for i, some in enumerate(np.array_split(picks, max(1, len(picks) // AT_ONCE))):
        batch = trainer.batch({key: x[some] for key, x in rows.items()})
        torch.manual_seed(i)
        _, post, _ = model.observe(models.networks.prepare(batch))
        truth, said = model.open_loop(batch, CONTEXT)
        now = model.show(post.feat)[0]
        found = dict(zip(("reconstruction", "moving"), heldout.errors(now, truth, slice(1, None)), strict=True))
        for h in HORIZONS:
            at = CONTEXT - 1 + h
            found[f"open loop {h}, moving"] = heldout.errors(said, truth, slice(at, at + 1))[1]
            if trainer.config.task == "minatar_breakout":
                here = ball_cell(truth["grid"][:, at])
                right = lambda cell, here=here: (cell == here).float().mean().item()
                found[f"ball {h}"] = right(ball_cell(said["grid"][:, at]))
                found[f"ball {h}, copy"] = right(ball_cell(truth["grid"][:, CONTEXT - 1]))
        for name, x in found.items():
            sums.setdefault(name, []).append(x)
        posts.append(post._replace(feat=None))
    out: dict[str, Any] = {name: float(np.mean(x)) for name, x in sums.items()}
    return {"chunks": len(picks), "episodes": len(pieces)} | out | tokens(model.dynamics, posts)


def tokens(dynamics: Any, posts: list[Any]) -> dict[str, Any]:
    """Nats a step to tell the state given the prior, and for codes how well each level is predicted and used."""
    total = sum(len(post.levels[0].post) for post in posts)
    metrics: dict[str, float] = {}
    for post in posts:  # the parts are chunks: means of them, weighted
        for name, x in dynamics.loss(post)[1].items():
            metrics[name] = metrics.get(name, 0.0) + x.item() * len(post.levels[0].post) / total
    if getattr(dynamics, "quantizer", None) is not None:  # use of codes cannot be averaged: all chunks at once
        index = torch.cat([post.aux.codes.index for post in posts])
        metrics |= {name: x.item() for name, x in dynamics.quantizer.usage(index).items()}
    names = ["kl", "accuracy", "accuracy_copy", "accuracy_changed", "perplexity", "dead"]
    by_level = {
        name: [metrics[f"{name}_{i}"] for i in range(len(dynamics.shapes))] for name in names if f"{name}_0" in metrics
    }
    return {"nats": sum(by_level["kl"])} | by_level


def table(found: dict[str, dict[int, dict[str, Any]]], ball: bool) -> str:
    """Markdown: one line a row, every seed."""
    seeds = lambda by, fmt: " / ".join(fmt(x) for x in by.values())
    level = lambda name, x: " ".join(f"{v:.2f}" for v in x[name]) if name in x else "–"
    tens = lambda name: lambda x: f"{1000 * x[name]:.2f}"
    columns = {"reconstruction (×10⁻³)": tens("reconstruction"), "moving (×10⁻³)": tens("moving")}
    if ball:
        columns |= {f"ball, {h}": lambda x, h=h: f"{x[f'ball {h}']:.2f}" for h in HORIZONS}
    else:
        columns |= {f"open loop {h}, moving (×10⁻³)": tens(f"open loop {h}, moving") for h in HORIZONS}
    columns |= {"nats a step": lambda x: f"{x['nats']:.2f}"}
    names = {"perplexity": "perplexity", "dead": "unused", "accuracy": "accuracy", "accuracy_copy": "copy last"}
    names |= {"accuracy_changed": "changed"}
    columns |= {title: lambda x, name=name: level(name, x) for name, title in names.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, by in found.items():
        lines.append(f"| {row} | " + " | ".join(seeds(by, fmt) for fmt in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--episodes", nargs="+", required=True, help="run folders whose episodes are used")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the figures to this file, and the table beside it")
    args = parser.parse_args()
    try:
        files = offline.find(args.episodes)
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for seed in args.seeds:
            for row in args.rows:
                folder = ROOT / "runs" / "quantisers" / args.world / row / str(seed)
                trainer = offline.Trainer(
                    make_config(args.world, row, seed, folder), files, folder, torch.device("cpu")
                )
                trainer.resume(args.updates)
                trainer.train(args.updates)
                found.setdefault(row, {})[seed] = judge(trainer, files)
                print(
                    row,
                    seed,
                    {k: v if isinstance(v, list) else round(v, 4) for k, v in found[row][seed].items()},
                    flush=True,
                )
                for name, temperature in DREAMS.items() if row == "sampled" else ():
                    dynamics = trainer.agent.world_model.dynamics
                    dynamics.temperature = per_level(temperature, dynamics.levels, "temperature")
                    found.setdefault(name, {})[seed] = judge(trainer, files)
    except (tools.ConfigError, tools.CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(found, args.world == "minatar")
    print(text)
    if args.out:
        report = provenance() | {"updates": args.updates, "episodes": args.episodes, "context": CONTEXT, "rows": found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        seeds, context = " / ".join(map(str, args.seeds)), f"{CONTEXT} steps seen, then dreamt on with the real actions"
        note = (
            f"Held-out episodes, seeds {seeds}, levels coarse to fine; open loop: {context}. Nats: KL of posterior to "
        )
        note += "prior, a step; unused: codes of each group. Copy last: what "
        note += "repeating the last code scores; changed: accuracy where it is another."
        args.out.with_suffix(".md").write_text(f"`{report['command']}`, {report['commit']}\n\n{note}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
