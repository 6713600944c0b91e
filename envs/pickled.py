"""Exact states of environments written in Python, as the bytes of a pickle that can build nothing
but parts of the environment's own package.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

# what holds no state, and may hold functions that cannot be pickled
CONSTANT = (gymnasium.Space, EnvSpec)
ARRAYS = {"scalar", "_reconstruct", "_frombuffer"}
PLAIN = {
    "numpy": {"ndarray", "dtype"},
    "numpy.dtypes": {name for name in vars(np.dtypes) if name.endswith("DType")},
    **{
        f"numpy.{core}.{part}": ARRAYS
        for core in ("core", "_core")
        for part in ("multiarray", "numeric")
    },
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice", "object"},
    "collections": {"OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
}


class _Pickler(pickle.Pickler):
    """Writes the environment and its spaces as names, and generators as what `PCG64` calls their
    state.
    """

    def __init__(self, file: io.BytesIO, env: gymnasium.Env, constants: dict[int, str]):
        super().__init__(file, protocol=5)
        self._env, self._constants = env, constants

    def persistent_id(self, value: Any) -> tuple | None:
        if value is self._env:
            return ("env",)
        if id(value) in self._constants:
            return "constant", self._constants[id(value)]
        if isinstance(value, np.random.Generator):
            # its identity, since several objects may draw from one generator
            return "generator", id(value), value.bit_generator.state
        return None


class _Unpickler(pickle._Unpickler):  # in Python: what BUILD may change has to be looked at
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO, env: gymnasium.Env):
        super().__init__(file)
        self._env = env
        self._generators: dict[int, np.random.Generator] = {}
        # of the environment and what it is derived from
        self._packages = {base.__module__.partition(".")[0] for base in type(env).__mro__}
        self._packages -= {"builtins", "gymnasium", "typing", "abc"}

    def persistent_load(self, name: tuple) -> Any:
        match name:
            case ("env",):
                return self._env
            case ("constant", key):
                return vars(self._env)[key]
            case ("generator", identity, state):
                if identity not in self._generators:
                    self._generators[identity] = np.random.Generator(np.random.PCG64())
                    self._generators[identity].bit_generator.state = state
                return self._generators[identity]
        raise pickle.UnpicklingError(f"unknown name {name!r}")

    def find_class(self, module: str, name: str) -> Any:
        if name in PLAIN.get(module, ()):
            return super().find_class(module, name)
        # a module that is not there yet would run as it is imported
        if module.partition(".")[0] in self._packages and module in sys.modules:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__.partition(".")[0] in self._packages:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an environment's state")

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("a class is no part of an environment's state")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def freeze(env: gymnasium.Env) -> np.ndarray | None:
    """uint8 (N,): all attributes of an unwrapped environment but its spaces; None where one of
    them cannot be pickled, or `thaw` would refuse it.
    """
    variables = vars(env)
    constants = {id(x): key for key, x in variables.items() if isinstance(x, CONSTANT)}
    kept = {key: x for key, x in variables.items() if id(x) not in constants}
    file = io.BytesIO()
    try:
        _Pickler(file, env, constants).dump(kept)
        _Unpickler(io.BytesIO(file.getvalue()), env).load()
    except Exception:  # of any class: what is not understood cannot be kept
        return None
    return np.frombuffer(file.getvalue(), np.uint8)


def thaw(env: gymnasium.Env, state: np.ndarray) -> None:
    """Gives an unwrapped environment of the same kind the attributes that `freeze` took.

    A state from elsewhere can at most build objects of classes that the environment's own package
    defines: other names in it raise UnpicklingError before anything of theirs is called.
    """
    kept = _Unpickler(io.BytesIO(state.tobytes()), env).load()
    for key in [key for key in vars(env) if key not in kept]:
        if not isinstance(vars(env)[key], CONSTANT):
            delattr(env, key)
    vars(env).update(kept)
