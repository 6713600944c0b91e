"""Are sparse experts worth it? Dense and sparse world models on the same tokens, in one table.

    python benchmarks/experts.py --configs pipeline_small --logdir FOLDER --out F [--key value ...]

FOLDER holds the finished stages up to ``tokenizer``. Every variant is a world_model stage of its
own in FOLDER/experts/NAME, with the same seed, batches and updates; the same command continues.
Dense comes in two sizes: that of the experts' active parameters, and that of all of theirs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import tools
from hidreamer import checkpoint
from hidreamer.experts import active_parameters
from pipeline import __main__ as command
from pipeline import data, gate, stage, token_model, tokenizer, world_model
from pipeline.token_model import Windows, tensors, token_rows

INPUTS = ("collect", "encoder", "tokenizer")
EXPERTS = 4  # of a layer
ROUNDS = 5  # that imagination is timed for
STARTS, HORIZON = 64, 15  # dreams that are timed, and their steps


def variants(config: tools.Config) -> dict[str, dict[str, Any]]:
    """{name: config keys}."""
    hidden, layers = config.dynamics.hidden, config.dynamics.hrvq.layers
    moe = {"dynamics.hrvq.ffn": "moe", "dynamics.hrvq.moe_top": 1}
    growing = [1 if i < layers / 3 else 2 if i < 2 * layers / 3 else 4 for i in range(layers)]
    return {
        "dense": {},
        f"dense, {EXPERTS} x hidden": {"dynamics.hidden": EXPERTS * hidden},
        "by level": {"dynamics.hrvq.ffn": "level"},
        f"{EXPERTS} experts, top 1": moe | {"dynamics.hrvq.moe_experts": [EXPERTS]},
        f"{EXPERTS} experts, top 2": (
            moe | {"dynamics.hrvq.moe_experts": [EXPERTS], "dynamics.hrvq.moe_top": 2}
        ),
        " ".join(map(str, growing)) + " experts": moe | {"dynamics.hrvq.moe_experts": growing},
    }


def folder(root: Path, name: str) -> Path:
    """Of a variant: the finished stages are linked into it."""
    here = root / "experts" / name.replace(" ", "_").replace(",", "")
    here.mkdir(parents=True, exist_ok=True)
    for stage_name in INPUTS:
        if not (here / stage_name).exists():
            (here / stage_name).symlink_to((root / stage_name).resolve())
    return here


@torch.no_grad()
def dream_ms(model: token_model.TokenWorldModel, batch: dict[str, torch.Tensor]) -> float:
    """Milliseconds of STARTS dreams of HORIZON steps, the fastest of ROUNDS."""
    carry, post, _ = model.observe(batch)
    start = model.dynamics.starts(carry, post, 1)
    action = torch.zeros(len(batch["reward"]), HORIZON, model.dynamics.act_dim)
    action[..., 0] = 1.0
    action, best = action.to(batch["reward"].device), float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        _, feat, _ = model.dynamics.imagine(start, action, HORIZON)
        float(feat.deter.sum())  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 1000.0 * best


def measure(root: Path, config: tools.Config, device: torch.device) -> dict[str, float]:
    """Of a finished variant."""
    model = world_model.load(root, config, device)
    recording = data.load(root, config, config.pipeline.games[0])
    tokens = tokenizer.load_tokens(root, recording)
    rows = token_rows(recording, tokens, world_model.actions_of(config), 0)
    windows = Windows([recording], [rows], STARTS, config.pipeline.world_model.length, True)
    found = {
        "parameters": float(sum(p.numel() for p in model.dynamics.transformer.parameters())),
        "active": float(active_parameters(model.dynamics.transformer)),
        f"dream ms ({STARTS} x {HORIZON})": dream_ms(model, tensors(windows.sample(), device)),
    }
    values: dict[str, list[float]] = {}
    for table in gate.read(root / "world_model")["tables"]:
        if table["title"] in ("Teacher-forced", "Free-running: tokens"):
            for row in table["rows"]:
                name = row["metric"].split(": ", 1)[1]
                values.setdefault(name, []).append(row["value"])
                for who, x in row["baselines"].items():
                    values.setdefault(f"{name} ({who})", []).append(x)
    shown = [name for name in values if name.startswith("L0")]
    for name in shown:
        known = [x for x in values[name] if x is not None]
        found[name] = float(np.mean(known)) if known else float("nan")
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown, a variant a column."""
    names = list(columns)
    lines = [f"|  | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for metric in next(iter(columns.values())):
        cells = [gate.number(columns[name][metric]) for name in names]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    args = tools.parse(argv)
    out = Path(str(args.overrides.pop("out")))
    base, _ = command.configured("world_model", args)
    root, device = Path(base.logdir), models.pick_device(base)
    columns = {}
    for name, changes in variants(base).items():
        both = {"pipeline.world_model.compare": ["none"]} | changes
        config = tools.load_config([], base.flat() | both)
        here = folder(root, name)
        stage.run(world_model.WorldModel, config, here, device, lambda: None)
        columns[name] = measure(here, config, device)
        text = table(columns)
        checkpoint.replace_file(out, lambda path, text=text: path.write_text(text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
