"""ViZDoom scenarios, each with the buttons of its own configuration."""

from __future__ import annotations

import contextlib
import os
import tempfile

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


class ViZDoom(Suite):
    """One scenario. Observation: `image`. Actions: nothing, or one of the scenario's buttons (see `buttons`).

    The scenario's own rewards and time-out (a truncation). Doom shows no picture of an episode's end, so the last
    step of an episode repeats the picture before it.
    """

    def __init__(self, name: str, size: tuple[int, int], repeat: int):
        if name not in SCENARIOS:
            raise unknown("ViZDoom scenario", name, SCENARIOS)
        self._size, self._repeat = size, repeat
        game = self.game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, f"{name}.cfg"))
        game.set_window_visible(False)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)  # twice the speed of the usual 320 x 240
        game.set_doom_config_path(os.devnull)  # Doom would read and save an ini file where it starts,
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # and makes a folder there
            game.init()
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
        """Doom's own numbers, each asked for by name: map units, degrees, points. They hold at an episode's end too."""
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
