"""hidreamer: DreamerV3 with a latent state that is chosen by config.

    agent = hidreamer.load(LOGDIR)

is the one door upwards, to what stands above this library (docs/library.md); it opens when a name
of ``LIBRARY`` is asked for. All else here imports downwards only, in the layers of
tests/test_layers.py.
"""

import gymnasium

__version__ = "0.2.0.dev0"
LIBRARY = ("DreamEnv", "LoadedAgent", "VectorDreamEnv", "export", "load", "push")
LIBRARY += ("ConfigError", "EnvError", "FolderError")
_library = None  # the module, once it has been asked for

gymnasium.register(
    "hidreamer/Dream-v0",
    entry_point="hidreamer:DreamEnv",
    vector_entry_point="hidreamer:VectorDreamEnv",
)


def __getattr__(name: str) -> object:
    """What ``library`` has of these names, imported when the first of them is asked for."""
    global _library
    if name not in LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _library is None:
        from hidreamer import app

        if app.foreign():  # ``tools`` and the like are not ours to take in this process
            from hidreamer.root import library
        else:
            import library
        _library = library
    return getattr(_library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LIBRARY})
