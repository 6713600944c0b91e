"""Objectives that benchmarks compare, by the keys that they change."""

from __future__ import annotations

import argparse
from typing import Any

# Weights are those of the sources. Without a decoder's weight there is one for the pictures and for
# --offline, which changes nothing else.
FREE: dict[str, Any] = {"model.losses.decoder": 0, "decoder.probe": True}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "ac_cpc": {"model.losses.ac_cpc": 1.0},
    "barlow": {"model.losses.barlow": 0.05, **FREE},
    "next_embed": {"model.losses.next_embed": 1.0, **FREE},
    "harmony": {"model.losses.harmony": 1.0},
    "replay_loss": {"critic.replay_loss": 0.3},
    "barlow_decoder": {"model.losses.barlow": 0.05},
    "next_embed_decoder": {"model.losses.next_embed": 1.0},
}
SINGLE = list(ARMS)[:6]  # default and each objective


def keys(arm: str) -> dict[str, Any]:
    """Of an arm, or of several with a plus between them. Raises ArgumentTypeError."""
    found: dict[str, Any] = {}
    for name in arm.split("+"):
        if name not in ARMS:
            raise argparse.ArgumentTypeError(
                f"there is no arm {name!r}; there are {', '.join(ARMS)}"
            )
        found |= ARMS[name]
    return found
