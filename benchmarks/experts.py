"""Are sparse experts worth it? Dense and sparse world models on the same tokens, in one table.

    python benchmarks/experts.py --configs pipeline_small --logdir FOLDER --out F.md [--key value]

FOLDER holds the finished stages up to ``tokenizer``. Every variant is a world_model stage of its
own in FOLDER/experts/NAME, with the same seed, batches and updates; the same command continues.
Dense comes in two sizes: that of the experts' active parameters, and that of all of theirs. Dreams
of all variants are timed in turn, so that a drifting machine drifts for all. Accuracies are means
over games.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import measure
import numpy as np
import torch
import variants

from hidreamer.experts import ByLevel, Routed
from pipeline import data, gate, token_model, tokenizer, world_model
from pipeline.token_model import Windows, tensors, token_rows
from tools import Config

EXPERTS = 4  # of a layer
ROUNDS = 7  # that imagination is timed for
STARTS, HORIZON = 64, 15  # dreams that are timed, and their steps
TABLES = ("Teacher-forced", "Free-running: tokens")


def changes(config: Config) -> dict[str, dict[str, Any]]:
    """{name: config keys}."""
    hidden, layers = config.dynamics.hidden, config.dynamics.hrvq.layers
    moe = {"dynamics.hrvq.ffn": "moe", "dynamics.hrvq.moe_top": 1}
    growing = [1 if i < layers / 3 else 2 if i < 2 * layers / 3 else 4 for i in range(layers)]
    found = {
        "dense": {},
        f"dense, {EXPERTS} x hidden": {"dynamics.hidden": EXPERTS * hidden},
        "by level": {"dynamics.hrvq.ffn": "level"},
        f"{EXPERTS} experts, top 1": moe | {"dynamics.hrvq.moe_experts": [EXPERTS]},
        f"{EXPERTS} experts, top 2": (
            moe | {"dynamics.hrvq.moe_experts": [EXPERTS], "dynamics.hrvq.moe_top": 2}
        ),
        " ".join(map(str, growing)) + " experts": moe | {"dynamics.hrvq.moe_experts": growing},
    }
    alone = {"pipeline.world_model.compare": ["none"]}
    return {name: alone | keys for name, keys in found.items()}


def active_parameters(module: torch.nn.Module) -> int:
    """Parameters that one row is multiplied with: of ``Experts`` as many as it passes."""
    total = sum(p.numel() for p in module.parameters())
    for part in module.modules():
        if isinstance(part, Routed | ByLevel):
            top = part.top if isinstance(part, Routed) else 1
            own = sum(p.numel() for p in part.experts.parameters())
            total -= own - own * top // part.experts.count
    return total


def dreamer(
    model: token_model.TokenWorldModel, batch: dict[str, torch.Tensor]
) -> Callable[[], object]:
    """A function that dreams HORIZON steps from each of STARTS windows."""
    with torch.no_grad():
        carry, post, _ = model.observe(batch)
        start = model.dynamics.starts(carry, post, 1)
    action = torch.zeros(len(batch["reward"]), HORIZON, model.dynamics.act_dim)
    action[..., 0] = 1.0
    imagine = torch.no_grad()(model.dynamics.imagine)
    return functools.partial(imagine, start, action.to(batch["reward"].device), HORIZON)


def columns(found: Mapping[str, variants.Variant], device: torch.device) -> variants.Columns:
    out: dict[str, dict[str, float | None]] = {}
    dreams = {}
    for name, (folder, config) in found.items():
        model = world_model.load(folder, config, device)
        recording = data.load(folder, config, config.pipeline.games[0])
        tokens = tokenizer.load_tokens(folder, recording)
        rows = token_rows(recording, tokens, world_model.actions_of(config), 0)
        length = config.pipeline.world_model.length
        windows = Windows([recording], [rows], STARTS, length, True)
        dreams[name] = dreamer(model, tensors(windows.sample(), device))
        transformer = model.dynamics.transformer
        out[name] = {
            "parameters": float(sum(p.numel() for p in transformer.parameters())),
            "active": float(active_parameters(transformer)),
        }
    for name, times in measure.interleaved(dreams, ROUNDS, device.type == "cuda").items():
        cpu, wall = (1000.0 * float(np.median(x)) for x in zip(*times, strict=True))
        label = f"({STARTS} x {HORIZON} steps), median"
        out[name][f"dream ms {label}"] = wall
        if device.type == "cpu":
            out[name][f"dream CPU ms {label}"] = cpu
    for name, (folder, _) in found.items():
        out[name] |= accuracies(gate.read(folder / "world_model"))
    return out


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    """Means over games of a gate's values and of what copying gets; of all levels."""
    values: dict[str, list[float]] = {}
    for table in found["tables"]:
        if table["title"] not in TABLES:
            continue
        for row in table["rows"]:
            name = row["metric"].split(": ", 1)[1]
            values.setdefault(name, []).append(row["value"])
            for who, x in row["baselines"].items():
                if who == "chance" or (name.endswith("changed") and who == "copy-last"):
                    continue  # known beforehand: 0.5 and 0
                values.setdefault(f"{name} ({who})", []).append(x)
    known = {name: [x for x in found if x is not None] for name, found in values.items()}
    return {name: float(np.mean(x)) if x else float("nan") for name, x in known.items()}


def main(argv: list[str]) -> int:
    kind = world_model.WorldModel
    return variants.run(argv, __doc__, kind, "experts", changes, columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
