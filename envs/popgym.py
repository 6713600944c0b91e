"""POPGym: small tasks that need memory."""

from __future__ import annotations

import gymnasium
import popgym  # registers all ids

from envs.errors import EnvError, unknown
from envs.gym import Gym

__all__ = ["POPGym", "popgym"]


class POPGym(Gym):
    """One id of POPGym, such as `RepeatPreviousEasy`. Observations as in `Gym`; the agent sees its
    last action anyway, which POPGym's own baselines need a wrapper for. States are exact.

    Ids that need mazes (Labyrinth...) want the package mazelib beside it. Their states cannot be
    saved, and their mazes are drawn from random numbers that all environments of a process share.
    """

    suite = "popgym"
    pickled = True

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        full = f"popgym-{name}-v0"
        if full not in gymnasium.registry and name not in gymnasium.registry:
            known = [key for key in gymnasium.registry if key.startswith("popgym-")]
            short = [key.removeprefix("popgym-").removesuffix("-v0") for key in known]
            hint = "; mazes need the package mazelib" if name.startswith("Labyrinth") else ""
            raise EnvError(f"{unknown('POPGym task', name, short)}{hint}")
        super().__init__(full if full in gymnasium.registry else name, size, repeat)
