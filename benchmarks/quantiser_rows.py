"""The rows of the tables of benchmarks/quantisers.py: what differs between its world models, and
which returns agents with the same choice had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tools

# Each row differs from the first in one thing; the last two are the other latent states at the
# same size.
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
# The minatar preset has two levels; its table began when it had three, of as many bits.
THREE = {"dynamics.hrvq.levels": 3, "dynamics.hrvq.groups": 4}
TWO = {"two levels": {"hrvq.levels": 2, "hrvq.groups": 6}}
# On Pong groups are the positions of the encoder's map; the same bits, and tiny_hidreamer's,
# without that:
WHOLE = {"whole image": {"hrvq.spatial": False}}
WHOLE |= {"tiny_hidreamer": WHOLE["whole image"] | {"hrvq.groups": 4, "hrvq.code_dim": 32}}
PLACES = {"dynamics.hrvq.spatial": True, "dynamics.hrvq.groups": 16, "dynamics.hrvq.code_dim": 16}

# The memories, what the posterior sees, and what the levels code; "flat" stands beside all of them.
GRU = {"hrvq.memory": "gru"}
SEEN = GRU | {"hrvq.posterior_sees": "memory", "hidden": 128}
MEMORIES = {
    "stacked": {"hrvq.memory": "stacked"},
    "gru": GRU,
    "gru, memory seen": SEEN,
    "stacked, one level": {"hrvq.memory": "stacked", "hrvq.levels": 1},
    "gru, memory seen, one level": SEEN | {"hrvq.levels": 1},
    "gru, memory seen, two levels": SEEN | {"hrvq.levels": 2, "hrvq.groups": 6},
    "stacked, coarse": {"hrvq.memory": "stacked", "hrvq.memory_reads": "coarse"},
    "gru, memory seen, coarse": SEEN | {"hrvq.memory_reads": "coarse"},
    "gru, memory seen, expected": SEEN | {"hrvq.residual": "expected"},
    "gru, memory seen, innovation": SEEN | {"hrvq.residual": "innovation"},
    "gru, memory seen, copy": SEEN | {"hrvq.copy": True},
    "gru, memory seen, noise": SEEN | {"hrvq.noise": 0.1},
    "stacked, copy": {"hrvq.memory": "stacked", "hrvq.copy": True},
    "stacked, noise": {"hrvq.memory": "stacked", "hrvq.noise": 0.1},
    "noise": {"hrvq.noise": 0.1},
}
# The presets that the comparison uses.
TINY: dict[str, dict[str, Any]] = {
    "stacked": {"preset": "tiny_hidreamer_stacked"},
    "rssm": {"preset": "tiny_dreamerv3"},
    "hrssm": {"preset": "tiny_hdreamer"},
    "interleaved": {"preset": "tiny_hidreamer"},
    "gru, memory seen": {"preset": "tiny_hidreamer_gru"},
    "gru": {"preset": "tiny_hidreamer_gru", "hrvq.posterior_sees": "frame"},
}
HEARD = {f"{row}, action x 8": TINY[row] | {"action_scale": 8.0} for row in ("rssm", "gru")}
HEARD["stacked, action x 1"] = TINY["stacked"] | {"action_scale": 1.0}  # its preset has 8


class World(NamedTuple):
    """What all trainings on a game have in common, and the rows of its table."""

    presets: list[str]
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    thing: tuple[str, int] | None = None  # the thing whose cell is judged, and its plane


WORLDS = {
    "minatar": World(["minatar"], THREE, ROWS | TWO | MEMORIES, ("ball", 1)),
    # The cannon goes where actions send it: does a dream obey them?
    "space_invaders": World(
        ["minatar", "tiny_dreamerv3"],
        {"task": "minatar_space_invaders"},
        TINY | HEARD,
        ("cannon", 0),
    ),
    # Small objects want many updates rather than large ones: one sequence a batch.
    "pong": World(
        ["demo_atari", "tiny_hidreamer"],
        {"replay.batch": 1} | PLACES,
        ROWS | WHOLE | {row: MEMORIES[row] for row in ("stacked", "stacked, noise", "gru")},
    ),
}
# Other temperatures to imagine a trained row at: the row, and the codes' temperature by level.
DREAMS = {f"sampled, fine at {fine}": ("sampled", [1.0, fine, fine]) for fine in (0.5, 0.1)}
DREAMS |= {f"{row}, all at 0.1": (row, [0.1]) for row in ("sampled", "flat", "independent")}


def make_config(world: str, row: str, seed: int, folder: Path) -> tools.Config:
    presets, settings = WORLDS[world].presets, WORLDS[world].settings
    values = settings | {"seed": seed, "logdir": str(folder)}
    values |= {f"dynamics.{key}": x for key, x in row_settings(world, row).items()}
    return tools.load_config(presets, values)


def row_settings(world: str, row: str) -> dict[str, Any]:
    """{key: value} of a row's latent state, without "dynamics."; of a row of DREAMS as well."""
    if row in DREAMS:
        base, temperature = DREAMS[row]
        return row_settings(world, base) | {"hrvq.temperature": temperature}
    presets, settings, rows, _ = WORLDS[world]
    values = {"type": "hrvq"} | rows[row]
    if preset := values.pop("preset", None):
        state = tools.load_config([*presets, preset], settings).dynamics.flat()
        values = state | {key: x for key, x in values.items() if key != "type"}
    if row == "flat" or row.endswith("one level"):
        block = tools.load_config(presets, settings).dynamics.hrvq
        values["hrvq.groups"] = block.levels * block.groups
        if block.spatial:  # a map has no more positions
            values["hrvq.spatial"] = False
    return values


def spatial_note(world: str, rows: list[str]) -> list[str]:
    """A sentence about spatial tokens, or none where no row has them."""
    states = {row: make_config(world, row, 0, Path()).dynamics for row in rows}
    spatial = {row: state.hrvq.spatial for row, state in states.items() if state.type == "hrvq"}
    others = [row for row, yes in spatial.items() if not yes]
    if len(others) == len(spatial):
        return []
    return [
        f"Groups are positions of the encoder's map{', but in ' * bool(others)}{', '.join(others)}."
    ]


def returns(world: str, files: list[Path]) -> dict[str, tuple[list[float], str]]:
    """{row: each seed's mean return before 20,000 frames,
    and what else was set} from reports of learning.py.

    A row is known by the config of its latent state. Raises ConfigError where a file is no such
    report of MinAtar.
    """
    found: dict[str, tuple[list[float], str]] = {}
    presets, settings = WORLDS[world].presets, WORLDS[world].settings
    for path in files:
        try:
            report = json.loads(path.read_text())
            scores = [run["figures"]["return_at_20000"] for run in report["runs"].values()]
            given = tools.parse(report["more"]).overrides
            kind, control = report["dynamics"], report["negative_control"]
            # there since the preset has two levels, not three
            latent = dict(report.get("latent", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise tools.ConfigError(
                f"--returns {path} is no report of benchmarks/learning.py minatar "
                f"({type(error).__name__}: {error})"
            ) from None
        own = {key: x for key, x in given.items() if key.startswith("dynamics.")}
        own["dynamics.type"] = kind
        # keys that came after a report have the values of today's presets
        state = tools.load_config(presets, settings | own).dynamics.flat() | latent
        others = " ".join(f"--{key} {x}" for key, x in given.items() if key not in own)
        for row in [*WORLDS[world].rows, *DREAMS] if not control else ():
            settings_of_row = make_config(world, row, 0, path).dynamics.flat()
            if all(state.get(key) == x for key, x in settings_of_row.items()):
                found[row] = scores, others
    return found
