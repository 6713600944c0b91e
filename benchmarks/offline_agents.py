"""What dreams teach: whole agents trained on the same recorded episodes, then played.

    python benchmarks/offline_agents.py space_invaders --episodes RUN [RUN ...]
        [--rows stacked gru ...] [--seeds 0 1] [--updates 1000] [--out results/hrvq/NAME.json]

The worlds and rows are those of benchmarks/quantisers.py. No agent explores, so what differs is
what each model makes of the same steps and what its actor and critic learn in its dreams: a test of
minutes. It says nothing about exploring, and another set of episodes may rank the rows otherwise.
Every 500 updates, and after the last, the policy plays 64 episodes (actions drawn, as in training).
Figures are kept under runs/offline_agents/ (or --runs), no weights: the same command by the same
commit trains only what is missing. --out writes the figures, and tables of them beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, argument_parser, cpu_seconds, write_table
from quantiser_rows import WORLDS, make_config

import tools
from analysis import offline
from envs import EnvError, make_env
from envs.vector import Envs
from hidreamer import evaluation
from hidreamer.checkpoint import CheckpointError
from hidreamer.provenance import provenance

EVERY, EPISODES, ENVS = 500, 64, 16
SEED = 715_517  # of the environments that are played in: no row's own
LOSSES = ("grid_loss", "dyn_loss", "reward_loss", "imag_return", "actor_entropy")  # shown
Found = dict[str, dict[str, list[dict[str, float]]]]  # {row: {seed: figures by time}}


def play(trainer: offline.Trainer) -> list[float]:
    """Returns of EPISODES episodes; torch's own random numbers are left as they were."""
    config = trainer.config
    make = lambda index, restarts: make_env(config.task, config.env.tree(), SEED + index)
    drawing, limit = torch.Generator().manual_seed(SEED), evaluation.time_limit(config)
    with contextlib.closing(Envs(make, ENVS, False)) as envs:
        played = evaluation.play(
            trainer.agent, envs, EPISODES, "train", limit=limit, generator=drawing
        )
    return [episode["return"] for episode in played.episodes]


def train(trainer: offline.Trainer, updates: int) -> Iterator[dict[str, float]]:
    """Whole updates of the agent -> figures every EVERY of them and after the last.

    Losses are means since the last figures; seconds are of the updates alone.
    """
    agent, metrics, seconds = trainer.agent, [], 0.0
    for update in range(1, updates + 1):
        before = cpu_seconds()
        metrics.append(agent.update(trainer.batch(trainer.replay.sample())))
        seconds += cpu_seconds() - before
        if update % EVERY and update != updates:
            continue
        means = torch.stack(metrics).mean(0).tolist()
        named = dict(zip(agent.metric_names, means, strict=True))
        returns, metrics = play(trainer), []
        yield {
            "updates": update,
            "return": float(np.mean(returns)),
            "error": float(np.std(returns, ddof=1) / len(returns) ** 0.5),
            "cpu_s": seconds / update,
        } | {name: named[name] for name in LOSSES if name in named}


def figures(args: argparse.Namespace, rows: list[str], commit: str) -> Found:
    """Of every seed and row, as far as they are not kept from an earlier call of this commit."""
    files, found = offline.find(args.episodes), {}
    for seed in map(str, args.seeds):
        for row in rows:
            folder = args.runs / args.world / row / seed
            config = make_config(args.world, row, int(seed), folder)
            trainer = offline.Trainer(config, files, folder, torch.device("cpu"))
            kept = folder / f"{args.updates}_{trainer.same}_{commit}.json"
            if kept.exists() and not commit.endswith("+changes"):
                found.setdefault(row, {})[seed] = json.loads(kept.read_text())
                continue
            steps = found.setdefault(row, {})[seed] = []
            for step in train(trainer, args.updates):
                steps.append(step)
                print(row, seed, {key: round(x, 3) for key, x in step.items()}, flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(steps))
    return found


def page(found: Found) -> str:
    """Markdown: returns by updates, and the losses on the way to the last."""
    seeds = next(iter(found.values()))
    steps = next(iter(seeds.values()))
    columns = [f"return after {step['updates']:,}" for step in steps]
    shown = [name for name in LOSSES if name in steps[-1]]
    titles = [*columns, *(name.replace("_", " ") for name in shown), "CPU s an update"]
    lines = ["|  | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 1) + "|"]
    for row, by_seed in found.items():
        cells = []
        for i in range(len(steps)):
            texts = [f"{x[i]['return']:.2f} ± {x[i]['error']:.2f}" for x in by_seed.values()]
            cells.append(" / ".join(texts))
        for name in (*shown, "cpu_s"):
            cells.append(" / ".join(f"{x[-1][name]:.3g}" for x in by_seed.values()))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    note = (
        f"Seeds {' / '.join(seeds)}; {EPISODES} episodes each, ± the standard error over them:"
        " not that over seeds, which is larger. Losses are means of the updates since the figures"
        " before."
    )
    return f"{note}\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("world", choices=[world for world in WORLDS if world != "pong"])
    parser.add_argument("--episodes", nargs="+", required=True, help="folders of runs or episodes")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="the world's; all, if none named")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "offline_agents")
    parser.add_argument("--out", type=Path, help="write the figures here, and tables beside it")
    args = parser.parse_args()
    made_by = provenance()  # before anything is written that would count as a change
    there = WORLDS[args.world].rows
    rows = args.rows or list(there)
    if wrong := set(rows) - there.keys():
        parser.error(
            f"{args.world} has no row {' or '.join(map(repr, sorted(wrong)))}; its rows:"
            f" {', '.join(there)}"
        )
    if args.updates < 1:
        parser.error(f"--updates is {args.updates}; it must be at least 1")
    torch.set_num_threads(1)
    try:
        found = figures(args, rows, made_by["commit"])
    except (tools.ConfigError, CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = made_by | {"episodes": args.episodes, "rows": found}
    write_table(report, page(found), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
