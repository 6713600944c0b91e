"""Imports that leave out what a package would only need for something else."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Imports in this block find none of the packages ``names`` that are not loaded yet.

    What they have to say about that is dropped.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    # Not logging.disable: the function would still install a handler for all that the program logs.
    warning, logging.warning = logging.warning, lambda *_, **__: None
    try:
        yield
    finally:
        logging.warning = warning
        for name in hidden:
            del sys.modules[name]
