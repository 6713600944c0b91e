"""How fast ``collect`` recorded, beside ale-py alone."""

from __future__ import annotations

import time

import ale_py
import cv2
import numpy as np

from pipeline.gate import HIGHER, Row, Table
from tools import Config

STEPS = 1200  # of the bare loop
SHARE = 0.8  # of ale-py's own, which is asked for


def table(config: Config, game: str, steps: int, seconds: float) -> Table:
    """Of the gate. seconds: what the stage itself took for its ``steps`` of random play, resets and
    seeds of episodes included, as the playing thread's processor time, which other processes do not
    disturb (compressing has a thread of its own).
    """
    ours, bare = steps / seconds, bare_speed(config, game)
    note = (
        f"All {steps:,} recorded steps of {game}, starts of episodes included, a second of the"
        f" playing thread's processor time, beside a bare loop ({STEPS:,} steps) over ale-py's act,"
        f" its screen and OpenCV's resize: at least {SHARE:.0%} of that is asked for. Loading the"
        " cartridge, once for each start of the stage, is left out of both."
    )
    rows = [Row("steps/s", ours, {f"{SHARE:.0%} of ale-py": SHARE * bare}, HIGHER)]
    return Table("Speed", [*rows, Row("share of ale-py's own", ours / bare)], note)


def bare_speed(config: Config, game: str) -> float:
    """Steps a second of ale-py alone, with as many frames, screens and pixels a step."""
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", config.env.atari.sticky)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    screen = ale.getScreenGrayscale if config.env.atari.grayscale else ale.getScreenRGB
    actions, rng = ale.getMinimalActionSet(), np.random.default_rng(0)
    size, repeat = tuple(config.env["size"])[::-1], config.env.action_repeat
    start = time.thread_time()
    for _ in range(STEPS):
        action, screens = actions[rng.integers(len(actions))], []
        for frame in range(repeat):
            ale.act(action)
            if frame >= repeat - 2:
                screens.append(screen())
        cv2.resize(np.maximum.reduce(screens), size, interpolation=cv2.INTER_AREA)
        if ale.game_over():
            ale.reset_game()
    return STEPS / (time.thread_time() - start)
