"""What stands beside this package, under its own name: ``hidreamer.root.models`` is ``models.py``.

``tools`` and ``models`` are names that other people's files have as well. A process that merely
loads an agent keeps its own: here our modules are imported as parts of this one, and when they
import each other they get each other (docs/decisions/014-installed.md).
"""

from __future__ import annotations

import builtins
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from hidreamer import app

__path__ = [str(app.ROOT)]  # what makes this module a package
NAMES = frozenset(app.modules()) - {"hidreamer"}


def import_(
    name: str,
    globals: Any = None,
    locals: Any = None,
    fromlist: Any = (),
    level: int = 0,
) -> ModuleType:
    """``__import__`` of the modules below: a name of ours is ours, whoever else has it."""
    first = name.partition(".")[0]
    if level or first not in NAMES:
        return builtins.__import__(name, globals, locals, fromlist, level)
    found = builtins.__import__(f"{__name__}.{name}", globals, locals, fromlist or ("*",))
    return found if fromlist else sys.modules[f"{__name__}.{first}"]


class Loader(SourceFileLoader):
    """Gives a module ``import_`` for its import statements, those inside functions as well."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": import_}
        super().exec_module(module)


class Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(__name__ + "."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder)
importlib.invalidate_caches()
