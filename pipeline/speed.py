"""How fast ``collect`` records, beside ale-py alone."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import ale_py
import cv2
import numpy as np

from envs import make_env
from pipeline.collect import play, random_player
from tools import Config

STEPS = 400  # that are timed for the gate
ROUNDS = 3
SHARE = 0.8  # of ale-py's own, which is asked for


def speeds(config: Config, game: str) -> tuple[float, float]:
    """Steps of random play a second of a thread's processor time, which other processes do not
    disturb: recorded as the stage does (compressing has a thread of its own), and by a bare loop
    over ale-py.
    """
    block = config.env.tree() | {"time_limit": 0}  # resets are not stepping
    env = make_env(f"atari_{game}", block, 0)
    rng, best = np.random.default_rng(0), [0.0, 0.0]
    choose = random_player(env, rng)
    play(env, choose, 1)
    with ThreadPoolExecutor(1) as writer:
        for _ in range(ROUNDS):  # by turns, so that other load hits both
            start = time.thread_time()
            steps, pending = 0, []
            while steps < STEPS:
                rows = play(env, choose, STEPS - steps).rows
                steps += len(rows["reward"]) - 1
                pending.append(writer.submit(compress, rows))
            for future in pending:
                future.result()
            best[0] = max(best[0], steps / (time.thread_time() - start))
            best[1] = max(best[1], bare_speed(config, game))
    env.close()
    return best[0], best[1]


def compress(rows: Mapping[str, np.ndarray]) -> None:
    np.savez_compressed(io.BytesIO(), **rows)


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
