"""The seeds that a command line asks for."""

from __future__ import annotations

from typing import Any

import tools
from tools import ConfigError


def member_seeds(overrides: dict[str, Any]) -> list[int]:
    """What --seeds or --population asks for, taken out of ``overrides``. Raises ConfigError."""
    named, count = overrides.pop("seeds", None), overrides.pop("population", None)
    if named is None and count is None:
        return []
    if named is not None and (count is not None or "seed" in overrides):
        raise ConfigError("--seeds names all seeds: leave out --seed and --population")
    if named is None:
        first = tools.coerce("seed", overrides.pop("seed", 0), 0, "At least 0.")
        named = range(first, first + tools.coerce("population", count, 1, "At least 1."))
    try:
        named = [
            tools.coerce("seeds", x, 0, "At least 0.")
            for x in ([named] if isinstance(named, str | bool) else named)
        ]
    except ConfigError as error:
        raise ConfigError(f"{error}: --seeds 0 1 2, or --population 3") from None
    if len(set(named)) < len(named):
        raise ConfigError(f"--seeds names a seed twice: {' '.join(map(str, named))}")
    return named
