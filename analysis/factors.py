"""Named factors of a task: numbers that are true of a moment and that no model is told.

Atari: bytes of the console's RAM. MinAtar: objects in the planes. ViZDoom: Doom's own variables.
DMC: positions and velocities of the joints. Classic control: the state. Each is ``EGO``, what the
agent moves, or ``WORLD``, the rest; angles are a sine and a cosine. NaN: not there at that moment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

EGO, WORLD = "ego", "world"

# Bytes of the RAM (AtariARI, Anand et al. 2019). A ball's byte is 0 while it is not in play.
BYTES = {
    "atari_pong": {
        "ball x": 49,
        "ball y": 54,
        "player y": 51,
        "enemy y": 50,
        "player score": 14,
        "enemy score": 13,
    },
    "atari_breakout": {"ball x": 99, "ball y": 101, "player x": 72, "blocks hit": 77, "score": 84},
    "atari_ms_pacman": (
        {"player x": 10, "player y": 16, "dots": 119, "score": 120, "lives": 123}
        | {f"ghost {i + 1} x": 6 + i for i in range(4)}
        | {f"ghost {i + 1} y": 12 + i for i in range(4)}
    ),
}

# MinAtar: {plane: (name, what is read)}. "xy", "x", "y": where the one object is; "count": how many
# cells; "group": how many, and their mean place.
PLANES = {
    "breakout": {0: ("paddle", "x"), 1: ("ball", "xy"), 3: ("bricks", "count")},
    "asterix": {0: ("player", "xy"), 1: ("enemies", "group"), 3: ("gold", "group")},
    "freeway": {0: ("chicken", "y"), 1: ("cars", "rows")},
    "seaquest": {
        0: ("submarine", "xy"),
        2: ("own bullets", "count"),
        4: ("enemy bullets", "group"),
        5: ("fish", "group"),
        6: ("enemy submarines", "group"),
        7: ("oxygen", "count"),
        8: ("divers on board", "count"),
        9: ("divers", "group"),
    },
    "space_invaders": {
        0: ("cannon", "x"),
        1: ("aliens", "group"),
        4: ("own bullets", "count"),
        5: ("enemy bullets", "group"),
    },
}
OWN = ("player", "paddle", "chicken", "submarine", "cannon", "own")  # names begin like this
LANES = range(1, 9)  # rows of freeway's board that have a car each

DOOM_WORLD = ("killcount",)  # of ViZDoom's variables, those that are not the agent's own
DRIVEN_NOT = ("ball", "hinge", "target", "object")  # joints of DMC that no motor moves

CLASSIC = {  # names of the state of Gymnasium's classic control
    "CartPole": ("cart position", "cart velocity", "pole angle", "pole angular velocity"),
    "MountainCar": ("position", "velocity"),
    "Pendulum": ("angle", "angular velocity"),
    "Acrobot": ("angle 1", "angle 2", "angular velocity 1", "angular velocity 2"),
}
CLASSIC["MountainCarContinuous"] = CLASSIC["MountainCar"]
TURNS = {"Pendulum": ("angle",), "Acrobot": ("angle 1", "angle 2")}  # angles that go round

Values = dict[str, float]
Reader = Callable[[Mapping[str, np.ndarray]], Values]  # the observation of a moment -> its factors


def reader(env: Any, task: str) -> Reader | None:
    """What reads the factors of ``env`` (``envs.base.Env``) as it is now; None where none has a
    name.
    """
    suite, _, name = task.partition("_")
    if suite == "atari" and task in BYTES:
        return lambda obs: ram(env.suite.ram(), BYTES[task])
    if suite == "minatar":
        return lambda obs: planes(obs["grid"], name)
    if suite == "vizdoom":
        return lambda obs: doom(env.suite.variables())
    if suite in ("dmc", "gym") and (suite == "dmc" or classic(name)):
        read = functools.partial(state, name) if suite == "gym" else dict
        return lambda obs: read(env.suite.variables())
    return None


def kind(task: str, name: str) -> str:
    """EGO or WORLD."""
    suite = task.partition("_")[0]
    if suite == "vizdoom":
        return WORLD if name.startswith(DOOM_WORLD) else EGO
    if suite == "gym":
        return (
            WORLD if name.startswith("pole") else EGO
        )  # which hangs on the cart and is not driven
    if suite == "dmc":
        return WORLD if name.startswith(DRIVEN_NOT) else EGO
    own = name.removeprefix("number of ").startswith(OWN)
    return EGO if own and "score" not in name else WORLD


def ram(memory: np.ndarray, names: Mapping[str, int]) -> Values:
    """Bytes (128,) by name."""
    out = {}
    for name, byte in names.items():
        absent = name.startswith("ball") and memory[byte] == 0
        out[name] = math.nan if absent else float(memory[byte])
    return out


def planes(grid: np.ndarray, game: str) -> Values:
    """Objects of a MinAtar board (10, 10, C) bool, in cells from the upper left."""
    out: Values = {}
    for plane, (name, how) in PLANES[game].items():
        y, x = np.nonzero(grid[..., plane])
        if how == "rows":  # one object in each row
            for row in LANES:
                found = x[y == row]
                out[f"{name} x, row {row}"] = float(found[0]) if len(found) else math.nan
            continue
        if how in ("count", "group"):
            out[f"number of {name}"] = float(len(x))
        if how != "count":
            for axis, at in (("x", x), ("y", y)):
                if axis in how or how == "group":
                    out[f"{name} {axis}"] = float(at.mean()) if len(at) else math.nan
    if game == "breakout":  # the trail is where the ball was: together they show where it goes
        before = np.argwhere(grid[..., 2])
        for i, axis in ((1, "x"), (0, "y")):
            known = len(before) == 1
            out[f"ball d{axis}"] = out[f"ball {axis}"] - before[0][i] if known else math.nan
    return out


def doom(variables: Mapping[str, float]) -> Values:
    """Doom's variables by name; the angle, in degrees, as sine and cosine."""
    return turned(
        {name.lower().replace("_", " "): x for name, x in variables.items()}, {"angle": 1 / 360}
    )


def classic(name: str) -> str:
    """The classic control environment that a Gymnasium id is, or ""."""
    base = name.rpartition("-")[0]
    return base if base in CLASSIC else ""


def state(name: str, variables: Mapping[str, float]) -> Values:
    """The state of a classic control environment by name."""
    base = classic(name)
    named = dict(zip(CLASSIC[base], variables.values(), strict=True))
    return turned(named, dict.fromkeys(TURNS.get(base, ()), 1 / math.tau))


def turned(values: Mapping[str, float], rounds: Mapping[str, float]) -> Values:
    """``values`` with those named in ``rounds`` {name: rounds per unit} as sine and cosine."""
    out = {}
    for name, x in values.items():
        if name in rounds:
            angle = math.tau * x * rounds[name]
            out |= {f"{name} sine": math.sin(angle), f"{name} cosine": math.cos(angle)}
        else:
            out[name] = float(x)
    return out
