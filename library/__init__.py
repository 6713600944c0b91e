"""A trained agent for programs and notebooks: ``hidreamer.load``, ``export``, ``push``, and the
dream as a Gymnasium environment. ``hidreamer`` hands these out by name (docs/library.md).
"""

from library.agent import LoadedAgent, load
from library.dream_env import DreamEnv, VectorDreamEnv
from library.export import export, push

__all__ = ["DreamEnv", "LoadedAgent", "VectorDreamEnv", "export", "load", "push"]
