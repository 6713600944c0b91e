"""Environments of `envs.vector.Envs` that break. Processes import this file: it loads little."""

import contextlib
import ctypes
import time

from envs import make_env

NEVER = 1000  # seconds: far more than any test waits


def maker(task, **overrides):
    config = {"size": [64, 64], "action_repeat": 1, "time_limit": 0} | overrides
    return lambda index, restart: make_env(task, config, 10 * index + restart)


def faulty(method, fault, restarts=1, after=0, index=0):
    """`make` of dummies of which number `index` breaks: its `method` calls `fault` first,
    from the call `after` on.
    """

    class Faulty:
        def __init__(self, number, restart):
            self.env, self.calls = maker("dummy_vector")(number, restart), 0
            self.broken = number == index and restart < restarts
            if self.broken and method == "construct":
                fault()

        def __getattr__(self, name):
            if name != method or not self.broken:
                return getattr(self.env, name)
            self.calls += 1
            return getattr(self.env, name) if self.calls <= after else fault

    return Faulty


def sleep(*_):
    while True:
        with contextlib.suppress(Exception):  # as one that waits for a server
            time.sleep(NEVER)


def stuck(*_):
    ctypes.PyDLL(None).sleep(NEVER)  # in C, and no other thread of Python may run
