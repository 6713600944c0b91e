"""What does a level hold, where the answer is known? A world of known factors, each latent state
trained on it, MIG and DCI by level beside a permutation null.

    python benchmarks/factors.py [--dynamics rssm hrssm hrvq] [--predictable 0.9] [--updates 2000]
        [--seeds 0] [--out results/analysis/factors.json]
    python benchmarks/factors.py --reword results/analysis/factors.json  # measures nothing

Coarse factors are slow and scene-like: half of all cells change with them. Fine ones are fast and
sprite-like: one cell of a hundred. ``predictable`` is the dial: the probability that a fine factor
moves on as it should, and (nine tenths of the way to 1) that a coarse one stays. A
training takes minutes; the untrained model is judged beside the trained one, and both beside
chance, which is what the factors of other episodes give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from measure import argument_parser

import models
import networks
import tools
from analysis import latents, levels, readout
from hidreamer.provenance import provenance
from hidreamer.replay import Replay, Rows, row_spec
from hidreamer.update import train_model

SIDE = 10
# {name: (number of values, whether it is coarse)}
FACTORS = {
    "scene": (6, True),
    "season": (4, True),
    "sprite x": (SIDE, False),
    "sprite y": (SIDE, False),
    "own x": (SIDE, False),
}
SPACE = {"grid": spaces.Box(0, 1, (SIDE, SIDE, 4), np.bool_)}
ACTIONS = spaces.Discrete(3)  # left, stay, right
EPISODES, HELD, LENGTH = 200, 60, 40
LEVEL = 0.05


def episode(rng: np.random.Generator, predictable: float) -> tuple[Rows, dict[str, np.ndarray]]:
    """One episode of LENGTH steps: its rows, and its factors (LENGTH,) by name."""
    patterns = np.random.default_rng(0).random((10, SIDE, SIDE)) < 0.5  # the same in every world
    stay = 1.0 - (1.0 - predictable) / 10.0
    now = {name: int(rng.integers(n)) for name, (n, _) in FACTORS.items()}
    step = {"sprite x": 1, "sprite y": int(rng.choice([-1, 1]))}
    factors: dict[str, list[int]] = {name: [] for name in FACTORS}
    grids, actions = [], []
    for t in range(LENGTH):
        action = int(rng.integers(3))
        if t:
            for name, (n, coarse) in FACTORS.items():
                moves = action - 1 if name == "own x" else step.get(name, 0)
                as_it_should = rng.random() < (stay if coarse else predictable)
                now[name] = (now[name] + moves) % n if as_it_should else int(rng.integers(n))
        grid = np.zeros(SPACE["grid"].shape, bool)
        grid[..., 0], grid[..., 1] = patterns[now["scene"]], patterns[6 + now["season"]]
        grid[now["sprite y"], now["sprite x"], 2] = True
        grid[-1, now["own x"], 3] = True
        grids.append(grid)
        actions.append(np.eye(3, dtype=np.float32)[action] * (t > 0))
        for name, x in now.items():
            factors[name].append(x)
    rows = {"grid": np.stack(grids), "prev_action": np.stack(actions)}
    rows |= {"reward": np.zeros(LENGTH, np.float32), "is_terminal": np.zeros(LENGTH, bool)}
    rows |= {"is_first": np.arange(LENGTH) == 0, "is_last": np.arange(LENGTH) == LENGTH - 1}
    return rows, {name: np.array(x) for name, x in factors.items()}


def train(dynamics: str, episodes: list[Rows], updates: int, seed: int) -> models.Agent:
    """A world model (the agent's actor and critic are never used) of the size of MinAtar's."""
    config = tools.load_config(["minatar"], {"dynamics.type": dynamics, "seed": seed})
    rng = tools.seed_all(seed)["replay"]
    agent = models.Agent(SPACE, ACTIONS, int(ACTIONS.n), config)
    agent.make_optimizers()
    sizes = {"batch": config.replay.batch, "length": config.replay.length}
    total = sum(len(rows["reward"]) for rows in episodes)
    replay = Replay(row_spec(SPACE, int(ACTIONS.n)), capacity=total, streams=1, rng=rng, **sizes)
    for rows in episodes:
        replay.streams[0].extend(rows)
    for _ in range(updates):
        batch = {key: x for key, x in replay.sample().items() if key != "is_last"}
        train_model(agent, networks.preprocess(agent.tensors(batch)))
    return agent.eval()


def judge(
    model: models.WorldModel, held: list[Rows], factors: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """MIG, DCI and the contrast of coarse and fine, on episodes that were not trained on."""
    codes, parts = [], []
    for i, rows in enumerate(held):
        batch = {key: torch.from_numpy(x)[None] for key, x in rows.items() if key != "is_last"}
        found = latents.read(model, networks.preprocess(batch), i)
        codes.append(found.codes)
        parts.append(latents.parts(model.dynamics, found.feat[0]))
    names = latents.names(model.dynamics)
    pooled = {name: np.concatenate([x[name] for x in codes]) for name in names}
    known = {name: np.concatenate([x[name] for x in factors]) for name in FACTORS}
    feature = lambda name: np.concatenate([x[name].numpy() for x in parts])
    episode = np.repeat(np.arange(len(held)), LENGTH)
    classes = [k for _, k in model.dynamics.shapes]
    ends = [feature(names[0]), feature(names[-1])]
    out = judge_codes(pooled, classes, known, episode, ends)
    error, total = readout.cross_fitted(feature("all"), onehots(known)[0], episode, levels.PENALTY)
    start = 0
    for name, (count, _) in FACTORS.items():  # what the model knows at all, its memory included
        here = slice(start, start + count)
        out["factors"][name]["R2 with memory"] = 1.0 - float(
            error[:, here].sum() / total[:, here].sum()
        )
        start += count
    return out


def judge_codes(
    codes: dict[str, np.ndarray],
    classes: list[int],
    known: dict[str, np.ndarray],
    episode: np.ndarray,
    ends: list[np.ndarray],
) -> dict[str, Any]:
    """Of codes {level: (N, S)} and the features (N, F) of the coarsest and the finest level."""
    found = levels.disentangle(codes, classes, known, episode)
    out: dict[str, Any] = {"factors": {}, "levels": {}}
    for j, name in enumerate(known):
        out["factors"][name] = {
            "best level": list(codes)[found.top[j]],
            "MIG": float(found.mig[j]),
            "MIG p": float(found.mig_p[j]),
            "completeness": number(found.completeness[j]),
            "R2 of all levels": float(found.informativeness[j]),
            "p": float(found.informative_p[j]),
        }
    for i, level in enumerate(codes):
        cells = zip(known, found.importance[i], found.importance_p[i], strict=True)
        held = {name: {"R2": float(r2), "p": float(p)} for name, r2, p in cells}
        out["levels"][level] = {"disentanglement": number(found.disentanglement[i]), "holds": held}
    out["contrast"] = None
    if len(codes) > 1:
        y, coarse = onehots(known)
        got = levels.contrast(*ends, y, coarse, episode)
        out["contrast"] = {"value": got.value, "low": got.low, "high": got.high}
        out["contrast"] |= {"control": list(got.control), "supported": got.supported}
        out["contrast"] |= dict(zip(("coarse", "fine"), got.groups.tolist(), strict=True))
        out["contrast"]["divided"] = got.divided
    out["says"] = sentences(out)
    return out


def onehots(known: dict[str, np.ndarray]) -> tuple[np.ndarray, list[bool]]:
    """(N, all values of all factors), and whether each is one of a coarse factor."""
    parts, coarse = [], []
    for name, x in known.items():
        count, slow = FACTORS[name]
        parts.append(np.eye(count)[x])
        coarse += [slow] * count
    return np.concatenate(parts, 1), coarse


def number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def sentences(found: dict[str, Any]) -> list[str]:
    """What is claimed: nothing that chance would give, and no hierarchy without a contrast."""
    lines, anywhere = [], set()
    for level, entry in found["levels"].items():
        cells = entry["holds"].items()  # held: better than chance, and than the mean alone
        held = [name for name, cell in cells if cell["p"] <= LEVEL and cell["R2"] > 0.0]
        anywhere |= {FACTORS[name][1] for name in held}
        lines.append(f"{level} holds {', '.join(held) if held else 'nothing that is shown'}")
    contrast = found["contrast"]
    if contrast is None:
        lines.append("one level: no hierarchy can be shown")
    else:
        way = ("coarse", "fine") if contrast["value"] > 0 else ("fine", "coarse")
        top, *_, bottom = found["levels"]
        value = f"(contrast {contrast['value']:+.2f})"
        if contrast["divided"]:
            lines.append(f"divided: {top} holds more of {way[0]}, {bottom} of {way[1]} {value}")
        elif contrast["supported"]:
            what = holds_more(contrast, top, bottom)
            lines.append(f"{what}, the levels do not divide the factors {value}")
        else:
            lines.append(f"no division of coarse and fine is shown {value}")
    for kind, coarse in (("coarse", True), ("fine", False)):
        if anywhere and coarse not in anywhere:
            lines.append(f"no level holds anything {kind}")
    return lines


def holds_more(contrast: dict[str, Any], top: str, bottom: str) -> str:
    """Which of two levels is shown to hold more of which kind, where they divide nothing.

    A contrast alone does not say: it is as negative where the bottom holds more of the coarse
    factors as where the top holds more of the fine ones.
    """
    more: dict[tuple[str, str], list[str]] = {(top, bottom): [], (bottom, top): []}
    for kind in ("coarse", "fine"):
        _, low, high = contrast[kind]
        if low > 0.0 or high < 0.0:
            more[(top, bottom) if low > 0.0 else (bottom, top)].append(kind)
    for (one, other), kinds in more.items():
        if kinds:
            above = max(kinds, key=lambda kind: abs(contrast[kind][0]))
            most = f", most of {above}" if len(kinds) > 1 else ""
            return f"{one} holds more of {' and of '.join(kinds)} than {other}{most}"
    return f"{top} and {bottom} differ, neither is shown to hold more of coarse or of fine"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = ["state", "predictable", "seed", "best level and MIG by factor"]
    header += ["R² of all levels (with the memory)", "says"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for run in report["runs"]:
        for who in ("trained", "untrained"):
            found = run[who]
            cells = found["factors"].items()
            gaps = []
            for name, x in cells:
                chance = "" if x["MIG p"] <= LEVEL else " (chance)"
                gaps.append(f"{name}: {x['best level']} {x['MIG']:.2f}{chance}")
            read = [
                f"{name} {x['R2 of all levels']:.2f} ({x['R2 with memory']:.2f})"
                for name, x in cells
            ]
            row = [f"{run['dynamics']}, {who}", str(run["predictable"]), str(run["seed"])]
            row += ["; ".join(gaps), "; ".join(read), "; ".join(found["says"])]
            lines.append(f"| {' | '.join(row)} |")
    made = report["made"]
    lines += ["", f"`{made['command']}`, commit {made['commit']}, {made['hardware']}."]
    if worded := report.get("worded"):
        lines[-1] += f" Words by `{worded['command']}`, commit {worded['commit']}."
    lines.append("")
    return "\n".join(lines)


def reword(path: Path) -> None:
    """What is said of the figures in ``path`` anew, there and in the table beside it."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for run in report["runs"]:
        for who in ("trained", "untrained"):
            run[who]["says"] = sentences(run[who])
    report["worded"] = provenance()
    save(report, path)


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(table(report))


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--dynamics", nargs="+", default=["rssm", "hrssm", "hrvq"])
    parser.add_argument("--predictable", type=float, nargs="+", default=[0.9])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, help="write the figures here, and a table as .md beside"
    )
    parser.add_argument("--reword", type=Path, help="a file of figures: only its sentences anew")
    args = parser.parse_args(argv)
    if args.reword:
        reword(args.reword)
        return 0
    report: dict[str, Any] = {"made": provenance(), "updates": args.updates, "runs": []}
    for predictable in args.predictable:
        rng = np.random.default_rng(0)
        data = [episode(rng, predictable) for _ in range(EPISODES + HELD)]
        train_rows = [rows for rows, _ in data[:EPISODES]]
        held, known = (list(x) for x in zip(*data[EPISODES:], strict=True))
        for dynamics in args.dynamics:
            for seed in args.seeds:
                run = {"dynamics": dynamics, "predictable": predictable, "seed": seed}
                for who, updates in (("untrained", 0), ("trained", args.updates)):
                    agent = train(dynamics, train_rows, updates, seed)
                    run[who] = judge(agent.world_model, held, known)
                    print(dynamics, predictable, seed, who, "; ".join(run[who]["says"]), flush=True)
                report["runs"].append(run)
                if args.out:  # after each, so that nothing is lost
                    save(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
