"""What an agent learns from, judged by whole runs on MinAtar: default and each objective, seed by
seed.

    python benchmarks/objectives.py --games breakout --seeds 0 1 2 [--arms default ac_cpc ...]
        [--dynamics rssm] [--steps 30000] [--logdir runs/objectives] [--out results/F.json]
    python benchmarks/objectives.py --report --logdir runs/objectives [--out results/F.json]

Runs lie in LOGDIR/GAME/DYNAMICS/ARM/SEED and continue where they stopped. All arms of a seed come
before the next seed, so that a stop at any time leaves pairs. "passes 4" is the first thousand
frames in which training episodes return more than 4 on average.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from learning import curve, episodes, returns_in
from measure import ROOT

import dreamer
from comparison.runs import records
from hidreamer.provenance import STARTS, provenance

FREE = {"model.losses.decoder": 0}
ARMS: dict[str, dict[str, float]] = {
    "default": {},
    "ac_cpc": {"model.losses.ac_cpc": 1.0},
    "barlow": {"model.losses.barlow": 0.05, **FREE},
    "next_embed": {"model.losses.next_embed": 0.05, **FREE},
    "barlow_decoder": {"model.losses.barlow": 0.05},
    "next_embed_decoder": {"model.losses.next_embed": 0.05},
    "harmony": {"model.losses.harmony": 1.0},
}
GAMES = ("breakout", "freeway", "asterix", "seaquest", "space_invaders")
BAR, WIDTH = 4.0, 1000  # mean return that is to be passed, in so many frames


def words(game: str, dynamics: str, arm: str, seed: int, steps: int, folder: Path) -> list[str]:
    """The command line of one run, without the program."""
    found = ["--configs", "minatar", "--task", f"minatar_{game}", "--dynamics.type", dynamics]
    found += ["--seed", str(seed), "--steps", str(steps), "--logdir", str(folder)]
    found += ["--eval_episodes", "0", "--video", "false", "--threads", "1"]
    for key, value in ARMS[arm].items():
        found += [f"--{key}", str(value)]
    return found


def figures(folder: Path, steps: int) -> dict[str, Any]:
    """Of one run so far: frames, its curve, the return of the last 5,000 frames, when it passed."""
    ended = episodes(folder)
    at = int(ended[-1, 0]) if len(ended) else 0
    points = curve(folder, min(steps, at), WIDTH) if at else []
    passed = next((step for step, mean in points if mean > BAR), None)
    last = returns_in(ended, at - 5000, at) if at else np.zeros(0)
    starts = [start for start in records(folder / STARTS) if "commit" in start]
    return {
        "frames": at,
        "last_5000": round(float(last.mean()), 3) if len(last) else None,
        "passes_4": passed,
        "curve": points,
        "commits": list(dict.fromkeys(start["commit"] for start in starts)),
    }


def report(logdir: Path, steps: int) -> dict[str, Any]:
    """{game: {dynamics: {arm: {seed: figures}}}} of all runs that are there."""
    found: dict[str, Any] = {}
    for log in sorted(logdir.glob("*/*/*/*/metrics.jsonl")):
        game, dynamics, arm, seed = log.parent.relative_to(logdir).parts
        runs = found.setdefault(game, {}).setdefault(dynamics, {}).setdefault(arm, {})
        runs[seed] = figures(log.parent, steps)
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| game | state | arm | seed | frames | return, last 5,000 | passes 4 at |"]
    lines.append("|---|---|---|---|---|---|---|")
    for game, by_state in found.items():
        for dynamics, arms in by_state.items():
            for arm, runs in arms.items():
                for seed, run in runs.items():
                    passed = run["passes_4"] or "-"
                    cells = game, dynamics, arm, seed, run["frames"], run["last_5000"], passed
                    lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", nargs="+", choices=GAMES, default=["breakout"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dynamics", default="rssm")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--logdir", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    todo = (
        []
        if args.report
        else [(s, g, a) for s in args.seeds for g in args.games for a in args.arms]
    )
    for seed, game, arm in todo:
        folder = args.logdir / game / args.dynamics / arm / str(seed)
        status = dreamer.main(words(game, args.dynamics, arm, seed, args.steps, folder))
        if status:
            return status
    found = report(args.logdir, args.steps)
    print(table(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        body = provenance() | {"steps": args.steps, "arms": ARMS, "runs": found}
        args.out.write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
