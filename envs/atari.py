"""Atari 2600 games through the Arcade Learning Environment. The cartridges come with ale-py."""

from __future__ import annotations

from typing import Any, ClassVar

import ale_py
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from envs.base import Suite, resize, unknown

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
NOOP = ale_py.Action.NOOP
# Four cartridges are for two players, and loading one would end the process.
GAMES = set(ale_py.roms.get_all_rom_ids()) - {"combat", "joust", "maze_craze", "warlords"}


class Atari(Suite):
    """One game, by its snake_case name. Observation: `image`, the maximum over the last two frames
    of the step.

    noops: each episode starts after 0 to `noops` frames of doing nothing. sticky: chance that a
    frame keeps the action of the frame before. actions: `needed` by this game or `all` of the
    console's. grayscale: (H, W, 1) in place of RGB.
    lives: a lost life is `unused`, or ends value but not the episode (`discount`), or is the end
    of it (`reset`).
    After `reset` the game continues: the next episode starts with a no-op in the next life, its
    frames counted anew for `env.time_limit`, and only after game over (or out of time) from the
    beginning, as with OpenAI baselines' EpisodicLifeEnv.
    A last life that the game counts as none left belongs to the episode of the life before, as
    there. Evaluation plays whole games.
    """

    evaluation: ClassVar[dict[str, Any]] = {"lives": "unused"}  # see `make_env`

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        repeat: int,
        noops: int = 30,
        sticky: float = 0.0,
        lives: str = "unused",
        actions: str = "needed",
        grayscale: bool = False,
    ):
        if name not in GAMES:
            raise unknown("Atari game", name, GAMES)
        if lives not in ("unused", "discount", "reset"):
            raise unknown("atari.lives", lives, ("unused", "discount", "reset"))
        if actions not in ("needed", "all"):
            raise unknown("atari.actions", actions, ("needed", "all"))
        self._rom = ale_py.roms.get_rom_path(name)
        self._size, self._repeat, self._noops, self._sticky, self._lives = (
            size,
            repeat,
            noops,
            sticky,
            lives,
        )
        self.ale = ale_py.ALEInterface()
        # Stickiness is ours: the emulator keeps the held action where no saved state reaches it.
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(self._rom)
        self._screen = self.ale.getScreenGrayscale if grayscale else self.ale.getScreenRGB
        self.actions = (
            self.ale.getMinimalActionSet() if actions == "needed" else self.ale.getLegalActionSet()
        )
        self.action_space = Discrete(len(self.actions))
        self.observation_space = Dict(image=Box(0, 255, (*size, 1 if grayscale else 3), np.uint8))
        self._held = NOOP  # the action that the console saw last
        self._lives_left = 0
        self._goes_on = False  # the episode is over and the game is not
        self._picture: np.ndarray | None = None  # what `render` shows right after `set_state`

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self._goes_on and seed is None:
            image, _, over, _ = self._frames(0)
            if not over:
                self._goes_on = False
                return {"image": image}, {}
        self._goes_on = False
        if seed is not None:  # ALE reads its own seed when a cartridge is inserted
            self.ale.setInt("random_seed", int(self.np_random.integers(2**31)))
            self.ale.loadROM(self._rom)
        self.ale.reset_game()
        for _ in range(self.np_random.integers(self._noops + 1)):
            self.ale.act(NOOP)
            if self.ale.game_over(with_truncation=False):
                self.ale.reset_game()
        self._held, self._lives_left, self._picture = NOOP, self.ale.lives(), None
        return {"image": resize(self._screen(), self._size)}, {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        image, reward, over, lost = self._frames(action)
        self._goes_on = self._lives == "reset" and lost and not over and self._lives_left > 0
        is_terminal = lost if self._lives == "discount" else self._goes_on
        return {"image": image}, reward, over or self._goes_on, False, {"is_terminal": is_terminal}

    def _frames(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """`repeat` frames, or until the game or a life that counts ends. -> image, reward, game
        over, life lost.
        """
        reward, screens, self._picture = 0.0, [], None
        for frame in range(self._repeat):
            if self.np_random.random() >= self._sticky:
                self._held = self.actions[action]
            reward += self.ale.act(self._held)
            lost = self.ale.lives() < self._lives_left and self._lives != "unused"
            self._lives_left = self.ale.lives()
            over = self.ale.game_over(with_truncation=False)
            if over or lost or frame >= self._repeat - 2:
                screens.append(self._screen())
            if over or lost:
                break
        return resize(np.maximum.reduce(screens), self._size), reward, over, lost

    def render(self) -> np.ndarray:
        """uint8 (210, 160, 3), up to 250 rows in some games: the last frame alone."""
        return self.ale.getScreenRGB() if self._picture is None else self._picture

    def ram(self) -> np.ndarray:
        """uint8 (128,): the console's memory."""
        return np.array(self.ale.getRAM())

    def get_state(self) -> dict[str, Any]:
        console = self.ale.cloneState(include_rng=True).serialize()
        return {
            "console": np.frombuffer(console, np.uint8),
            "picture": self.render(),  # ALE does not restore its screen
            "held": self._held.value,
            "lives": self._lives_left,
            "goes_on": self._goes_on,
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.ale.restoreState(ale_py.ALEState(state["console"].tobytes()))
        self._picture, self._lives_left = state["picture"], state["lives"]
        self._held = ale_py.Action(state["held"])
        self._goes_on = state.get("goes_on", False)  # older checkpoints lack it
        self.np_random.bit_generator.state = state["random"]
