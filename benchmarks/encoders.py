"""What do the encoder's objectives keep? One table of them, an untrained network and raw pixels.

    python benchmarks/encoders.py --configs pipeline_small --logdir FOLDER --out F [--key value ...]

FOLDER holds a finished ``collect``. Every objective is an encoder stage of its own in
FOLDER/encoders/NAME, with the same seed and frames; the same command continues. The lineage's
metrics stand beside the linear probes of the same variables.
"""

from __future__ import annotations

import sys
from pathlib import Path

import models
import tools
from hidreamer import checkpoint
from pipeline import __main__ as command
from pipeline import gate, stage
from pipeline.encoder import Encoder

OBJECTIVES = ("lineage", "infonce", "reconstruction", "both")


def folder(root: Path, name: str) -> Path:
    """Of an objective: the finished ``collect`` is linked into it."""
    here = root / "encoders" / name
    here.mkdir(parents=True, exist_ok=True)
    if not (here / "collect").exists():
        (here / "collect").symlink_to((root / "collect").resolve())
    return here


def table(gates: dict[str, dict]) -> str:
    """Markdown, an objective a column; the untrained network and pixels are the same for all."""
    first = next(iter(gates.values()))
    whos = ("untrained", "pixels")
    lines = [f"|  | {' | '.join([*gates, *whos])} |", "| --- |" + " ---: |" * (len(gates) + 2)]
    for i, part in enumerate(first["tables"]):
        game = "" if part["title"] == "Geometry" else part["title"].split(":")[0] + ": "
        for j, row in enumerate(part["rows"]):
            cells = [
                gate.number(found["tables"][i]["rows"][j]["value"]) for found in gates.values()
            ]
            cells += [gate.number(row["baselines"].get(who)) for who in whos]
            lines.append(f"| {game}{row['metric']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    args = tools.parse(argv)
    out = Path(str(args.overrides.pop("out")))
    base, _ = command.configured("encoder", args)
    root, device, gates = Path(base.logdir), models.pick_device(base), {}
    for name in OBJECTIVES:
        config = tools.load_config([], base.flat() | {"pipeline.encoder.objective": name})
        gates[name] = stage.run(Encoder, config, folder(root, name), device, lambda: None)
    text = table(gates)
    checkpoint.replace_file(out, lambda path: path.write_text(text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
