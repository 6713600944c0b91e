"""A trained agent for programs and notebooks: ``hidreamer.load``, ``export``, ``push``, and the
dream as a Gymnasium environment. ``hidreamer`` hands these out by name (docs/library.md).
"""

from envs import EnvError
from hidreamer.checkpoint import FolderError
from library.agent import LoadedAgent, load
from library.dream_env import DreamEnv, VectorDreamEnv
from library.export import export, push
from tools import ConfigError

__all__ = ["ConfigError", "DreamEnv", "EnvError", "FolderError", "LoadedAgent", "VectorDreamEnv"]
__all__ += ["export", "load", "push"]
