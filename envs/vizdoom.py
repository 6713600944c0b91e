"""ViZDoom scenarios, each with the buttons of its own configuration."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import vizdoom
from gymnasium.spaces import Box, Dict, Discrete

from envs.base import Suite, resize, unknown

SCENARIOS = ("basic", "deadly_corridor", "defend_the_center", "health_gathering")
V = vizdoom.GameVariable
VARIABLES = [
    *(V.HEALTH, V.AMMO2, V.KILLCOUNT, V.DAMAGE_TAKEN),
    *(V.POSITION_X, V.POSITION_Y, V.POSITION_Z, V.ANGLE, V.VELOCITY_X, V.VELOCITY_Y, V.VELOCITY_Z),
]
SHARED = Path("/dev/shm")  # where Linux keeps the memory that ViZDoom shares with its games
# The game is a process of its own that waits for its controller for ever. Started through this, it
# is killed by the kernel when we are gone, whatever ended us (PR_SET_PDEATHSIG is 1, SIGKILL is
# 9).
LAUNCH = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(parent):  # else we were gone before
    os.execv(command[0], command)
"""


class ViZDoom(Suite):
    """One scenario. Observation: `image`. Actions: nothing, or one of the scenario's buttons (see
    `buttons`).

    The scenario's own rewards and time-out (a truncation). Doom shows no picture of an episode's
    end, so the last step of an episode repeats the picture before it.
    """

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        if name not in SCENARIOS:
            raise unknown("ViZDoom scenario", name, SCENARIOS)
        self._size, self._repeat = size, repeat
        game = self.game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, f"{name}.cfg"))
        game.set_window_visible(False)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        # twice the speed of the usual 320 x 240
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        # Doom would read and save an ini file where it starts,
        game.set_doom_config_path(os.devnull)
        # and makes a folder there
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            if sys.platform == "linux":
                game.set_vizdoom_path(_launcher(Path(folder, "doom")))
                _remove_shared(_abandoned())
            game.init()
        # now that both have it mapped it needs no name, and ends with the two of them
        if sys.platform == "linux":
            _remove_shared(_mapped(os.getpid()))
        self.buttons = ("NOTHING", *(button.name for button in game.get_available_buttons()))
        self.action_space = Discrete(len(self.buttons))
        self.observation_space = Dict(image=Box(0, 255, (*size, 3), np.uint8))
        self._screen = np.zeros((120, 160, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.game.set_seed(int(self.np_random.integers(2**31)))  # holds for the coming episode
        self.game.new_episode()
        return self._observe(), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        pressed = [button == action for button in range(1, len(self.buttons))]
        reward = self.game.make_action(pressed, self._repeat)
        over = self.game.is_episode_finished()
        late = over and self.game.is_episode_timeout_reached() and not self.game.is_player_dead()
        return self._observe(), reward, over and not late, late, {}

    def variables(self) -> dict[str, float]:
        """Doom's own numbers, each asked for by name: map units, degrees, points. They hold at an
        episode's end too.
        """
        return {variable.name: self.game.get_game_variable(variable) for variable in VARIABLES}

    def render(self) -> np.ndarray:
        """uint8 (120, 160, 3)"""
        return self._screen

    def close(self) -> None:
        self.game.close()

    def _observe(self) -> dict[str, np.ndarray]:
        state = self.game.get_state()
        if state is not None:
            self._screen = state.screen_buffer
        return {"image": resize(self._screen, self._size)}


def _launcher(path: Path) -> str:
    """-> what to start the game with: a script at `path`, or the game itself where no script may
    be run.
    """
    game = os.path.join(os.path.dirname(vizdoom.__file__), "vizdoom")
    command = shlex.join([sys.executable, "-IS", "-c", LAUNCH, str(os.getpid()), game])
    # The terminal's Ctrl-C is for us: the game ends with its controller, not before.
    path.write_text(f"#!/bin/sh\ntrap '' INT\nexec {command} \"$@\"\n", encoding="utf-8")
    path.chmod(0o700)
    # a folder for temporary files may be mounted noexec
    return str(path) if os.access(path, os.X_OK) else game


def _mapped(pid: int | str) -> set[str]:
    """Paths of ViZDoom's shared memory that a process uses."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # it ended meanwhile, or is another user's
        return set()
    prefix = str(SHARED / "ViZDoom")
    return {
        line[line.index("/") :]
        for line in lines
        if prefix in line and not line.endswith(" (deleted)")
    }


def _abandoned(age: float = 60.0) -> set[str]:
    """Paths of the shared memory that a killed start left: this user's, unused, and no start of
    now (`age` seconds).
    """
    found = set()
    for path in SHARED.glob("ViZDoom*"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            if stat.st_uid == os.geteuid() and time.time() - stat.st_mtime > age:
                found.add(str(path))
    if found:  # it is rare, and to ask every process takes a while
        for process in Path("/proc").glob("[0-9]*"):
            found -= _mapped(process.name)
    return found


def _remove_shared(paths: set[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
