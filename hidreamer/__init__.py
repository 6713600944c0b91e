"""hidreamer: DreamerV3 with a latent state that is chosen by config.

    agent = hidreamer.load(LOGDIR)

is the one door upwards, to what stands above this library (docs/library.md); it opens when a name
of ``LIBRARY`` is asked for. All else here imports downwards only.

Floors (a file imports only from lower ones):
0 ``nets distributions returns optim replay spaces`` and more; 1 ``quantizer transformer mask``;
2 ``dynamics.base``; 3 ``dynamics.rssm hrssm hrvq``; 4 ``dynamics``.
"""

import gymnasium

__version__ = "0.2.0"
LIBRARY = ("DreamEnv", "LoadedAgent", "VectorDreamEnv", "export", "load", "push")

gymnasium.register(
    "hidreamer/Dream-v0",
    entry_point="hidreamer:DreamEnv",
    vector_entry_point="hidreamer:VectorDreamEnv",
)


def __getattr__(name: str) -> object:
    """What ``library`` has of these names. Raises ForeignModule, see ``hidreamer.app.enter``."""
    if name not in LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hidreamer import app

    app.enter()
    import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LIBRARY})
