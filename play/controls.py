"""Which keys mean which action of a task, and what a "what if" tries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Box, Discrete

from envs.base import Env

UP, DOWN, LEFT, RIGHT, FIRE = "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Space"
WORDS = {"up": UP, "forward": UP, "down": DOWN, "backward": DOWN, "left": LEFT, "right": RIGHT}
WORDS |= {"fire": FIRE, "attack": FIRE, "use": FIRE, "do": FIRE, "jump": FIRE}
NOTHING = ("noop", "nothing", "none")
SPARE = "1234567890qwetyuiofghjkl"  # keys of actions without a direction; no command of the page
BUTTON = "#"  # begins the name of a key that no keyboard has, of actions beyond SPARE
AXES = ((LEFT, RIGHT), (DOWN, UP), ("1", "2"), ("3", "4"), ("5", "6"), ("7", "8"), ("9", "0"))
MOST = 18  # actions that a "what if" tries
GYM = {  # names of actions that Gymnasium has only in its documentation
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "nothing", "right"),
    "Acrobot": ("left", "nothing", "right"),
    "LunarLander": ("nothing", "left", "up", "right"),
    "FrozenLake": ("left", "down", "right", "up"),
    "Taxi": ("down", "up", "right", "left", "pick up", "drop off"),
}
MINATAR = {"n": "nothing", "l": "left", "u": "up", "r": "right", "d": "down", "f": "fire"}


class Choice(NamedTuple):
    """One value of one choice of an action."""

    name: str
    keys: frozenset[str]  # all of them are held for it
    vector: np.ndarray  # (A,) with zeros where it says nothing


class Controls:
    """Keys of a task's actions.

    groups: of choices that are made side by side; one group for a single choice, one of two
    directions for each number of a continuous action.
    """

    def __init__(self, env: Env):
        self.space, self.size = env.act_space, env.act_dim
        self.last: list[Choice | None] = []
        if isinstance(self.space, Box):
            self.groups = [self._axis(i) for i in range(min(self.size, len(AXES)))]
        elif isinstance(self.space, Discrete):
            self.groups = [self._choices(names(env, int(self.space.n)), 0, iter(SPARE))]
        else:
            spare, offset, self.groups = iter(SPARE), 0, []
            for i, count in enumerate(self.space.nvec.tolist()):
                labels = [f"{i + 1}: {value}" for value in range(count)]
                labels[0] = "nothing"
                self.groups.append(self._choices(labels, offset, spare))
                offset += count
        self.last = [None] * len(self.groups)

    def _axis(self, i: int) -> list[Choice]:
        found = []
        for key, value in zip(AXES[i], (-1.0, 1.0), strict=True):
            vector = np.zeros(self.size, np.float32)
            vector[i] = value
            found.append(Choice(f"{i + 1}: {value:+.0f}", frozenset([key]), vector))
        return found

    def _choices(self, labels: list[str], offset: int, spare: Any) -> list[Choice]:
        found, used = [], set()
        for i, label in enumerate(labels):
            words = re.findall("|".join(WORDS), label.lower())
            keys = frozenset(WORDS[word] for word in words)
            if label.lower() in NOTHING:
                keys = frozenset()
            elif not keys or keys in used:
                keys = frozenset([next(spare, f"{BUTTON}{offset + i}")])
            used.add(keys)
            vector = np.zeros(self.size, np.float32)
            vector[offset + i] = 1.0
            found.append(Choice(label, keys, vector))
        return found

    def vector(self, held: Iterable[str]) -> np.ndarray:
        """The action (A,) of the keys that are held. Without any it is the choice that needs none,
        else the last one.
        """
        held, total = set(held), np.zeros(self.size, np.float32)
        for g, group in enumerate(self.groups):
            fitting = [choice for choice in group if choice.keys <= held]
            if isinstance(self.space, Box):
                total += sum((choice.vector for choice in fitting), np.zeros_like(total))
                continue
            best = max(fitting, key=lambda choice: len(choice.keys), default=None)
            self.last[g] = best or self.last[g] or group[0]
            total += self.last[g].vector
        return total

    def name(self, vector: np.ndarray) -> str:
        """Of an action (A,), for people."""
        if isinstance(self.space, Box):
            return " ".join(f"{x:+.2f}" for x in vector[:8])
        taken = [
            choice.name
            for group in self.groups
            for choice in group
            if vector[choice.vector.argmax()] > 0.5
        ]
        return ", ".join(name for name in taken if name != "nothing") or "nothing"

    def legend(self) -> list[dict[str, Any]]:
        """{"name", "keys"} of every choice that has keys."""
        every = [choice for group in self.groups for choice in group if choice.keys]
        return [{"name": choice.name, "keys": sorted(choice.keys)} for choice in every]

    def options(self) -> list[tuple[str, np.ndarray]]:
        """(name, action) of what a "what if" tries: each choice, the other groups at rest."""
        rest = np.zeros(self.size, np.float32)
        if isinstance(self.space, Box):
            found = [("nothing", rest)]
            found += [(choice.name, choice.vector) for group in self.groups for choice in group]
            return found[:MOST]
        found, seen = [], set()
        for g, group in enumerate(self.groups):
            for choice in group:
                others = [other[0].vector for i, other in enumerate(self.groups) if i != g]
                vector = sum(others, choice.vector)
                if vector.tobytes() not in seen:
                    seen.add(vector.tobytes())
                    found.append((choice.name, vector))
        return found[:MOST]


def names(env: Env, count: int) -> list[str]:
    """Of the actions of a single choice."""
    suite = env.suite
    kind = type(suite).__name__
    if kind == "Atari":
        found = [action.name for action in suite.actions]
    elif kind == "MinAtar":
        found = [MINATAR[suite.game.env.action_map[i]] for i in suite.actions]
    elif kind == "ViZDoom":
        found = [name.lower().replace("_", " ") for name in suite.buttons]
    elif kind == "Crafter":
        import crafter

        found = [name.replace("_", " ") for name in crafter.constants.actions]
    else:
        spec = getattr(getattr(suite, "_env", None), "spec", None)
        known = GYM.get(spec.name if spec else "", ())
        found = list(known) if len(known) == count else [f"action {i}" for i in range(count)]
    return [name.lower() for name in found]
