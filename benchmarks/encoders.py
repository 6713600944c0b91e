"""What do the encoder's objectives keep? One table of them, an untrained network and raw pixels.

    python benchmarks/encoders.py --configs pipeline_small --logdir FOLDER --out F.md [--key value]

FOLDER holds a finished ``collect``. Every objective is an encoder stage of its own in
FOLDER/encoders/NAME, with the same seed and frames; the same command continues. The lineage's
metrics stand beside the linear probes of the same variables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
import variants

from pipeline import gate
from pipeline.encoder import Encoder

OBJECTIVES = ("lineage", "infonce", "reconstruction", "both")
CONTROLS = ("untrained", "pixels")  # the same for all objectives


def columns(found: Mapping[str, variants.Variant], device: torch.device) -> variants.Columns:
    """Of every objective's gate, and of the controls in it."""
    out: dict[str, dict[str, float | None]] = {name: {} for name in (*found, *CONTROLS)}
    for name, variant in found.items():
        for table in gate.read(variant.folder / "encoder")["tables"]:
            game = "" if table["title"] == "Geometry" else table["title"].split(":")[0] + ": "
            for row in table["rows"]:
                out[name][game + row["metric"]] = row["value"]
                for who in CONTROLS:
                    out[who][game + row["metric"]] = row["baselines"].get(who)
    return out


def main(argv: list[str]) -> int:
    changes = lambda config: {name: {"pipeline.encoder.objective": name} for name in OBJECTIVES}
    return variants.run(argv, __doc__, Encoder, "encoders", changes, columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
