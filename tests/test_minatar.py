"""All five MinAtar games: that the planes show the game as it is after the step, and what random
play returns.
"""

import numpy as np
import pytest
from test_envs import GAMES, build, sample

# planes of each game, in its own words
PLANES = {
    "asterix": ["player", "enemy", "trail", "gold"],
    "breakout": ["paddle", "ball", "trail", "brick"],
    "freeway": ["chicken", "car", *(f"speed{i}" for i in range(1, 6))],
    "seaquest": [
        *("sub_front", "sub_back", "friendly_bullet", "trail", "enemy_bullet", "enemy_fish"),
        *("enemy_sub", "oxygen_guage", "diver_guage", "diver"),
    ],
    "space_invaders": [
        *("cannon", "alien", "alien_left", "alien_right", "friendly_bullet", "enemy_bullet"),
    ],
}
ACTIONS = {"asterix": 5, "breakout": 3, "freeway": 3, "seaquest": 6, "space_invaders": 4}


def cells(plane):
    return {tuple(map(int, cell)) for cell in np.argwhere(plane)}


def asterix(game, planes):
    assert cells(planes["player"]) == {(game.player_y, game.player_x)}
    here = [entity for entity in game.entities if entity is not None]
    assert cells(planes["gold"]) == {(y, x) for x, y, _, gold in here if gold}
    assert cells(planes["enemy"]) == {(y, x) for x, y, _, gold in here if not gold}
    behind = {(y, x + (-1 if right else 1)) for x, y, right, _ in here}
    assert cells(planes["trail"]) == {(y, x) for y, x in behind if 0 <= x < 10}


def breakout(game, planes):
    assert cells(planes["paddle"]) == {(9, game.pos)}
    assert cells(planes["ball"]) == {(game.ball_y, game.ball_x)}
    assert cells(planes["trail"]) == {(game.last_y, game.last_x)}
    assert np.array_equal(planes["brick"], game.brick_map.astype(bool))


def freeway(game, planes):
    assert cells(planes["chicken"]) == {(game.pos, 4)}
    assert cells(planes["car"]) == {(car[1], car[0]) for car in game.cars}
    for x, y, _, speed in game.cars:
        behind = (x - 1) % 10 if speed > 0 else (x + 1) % 10
        assert planes[f"speed{abs(speed)}"][y, behind]


def seaquest(game, planes):
    back = game.sub_x - 1 if game.sub_or else game.sub_x + 1
    assert cells(planes["sub_front"]) == {(game.sub_y, game.sub_x)}
    assert cells(planes["sub_back"]) == {(game.sub_y, back)}
    assert cells(planes["diver"]) == {(diver[1], diver[0]) for diver in game.divers}
    assert cells(planes["enemy_fish"]) == {(fish[1], fish[0]) for fish in game.e_fish}
    assert planes["oxygen_guage"][9].sum() == max(0, game.oxygen) * 10 // 200
    assert not planes["oxygen_guage"][:9].any()


def space_invaders(game, planes):
    assert cells(planes["cannon"]) == {(9, game.pos)}
    aliens = game.alien_map.astype(bool)
    assert np.array_equal(planes["alien"], aliens)
    side, other = ("left", "right") if game.alien_dir < 0 else ("right", "left")
    assert np.array_equal(planes[f"alien_{side}"], aliens) and not planes[f"alien_{other}"].any()
    assert np.array_equal(planes["friendly_bullet"], game.f_bullet_map.astype(bool))


@pytest.mark.parametrize("name", GAMES)
def test_minatar_observes_the_game_as_it_is_now(name):
    env = build(f"minatar_{name}", seed=3)
    assert env.obs_space["grid"].shape == (10, 10, len(PLANES[name]))
    assert env.act_dim == ACTIONS[name]
    inner = env.suite.game.env
    assert sorted(inner.channels, key=inner.channels.get) == PLANES[name]
    check, rng, output = globals()[name], np.random.default_rng(3), {"is_last": True}
    for _ in range(300):
        output = env.reset() if output["is_last"] else env.step(sample(env.act_space, rng))
        if not output["is_last"]:
            check(inner, dict(zip(PLANES[name], output["grid"].transpose(2, 0, 1), strict=True)))


# mean and standard deviation of the returns of 40 episodes of random play (sticky 0.1, minimal
# actions, seed 0), measured once with MinAtar 1.0.15; Freeway's are always 2,501 steps
RANDOM = {
    "asterix": (0.35, 0.65),
    "breakout": (0.32, 0.57),
    "freeway": (0.30, 0.60),
    "seaquest": (0.15, 0.53),
    "space_invaders": (3.78, 3.30),
}


@pytest.mark.parametrize("name", GAMES)
def test_minatar_random_play_returns_what_it_always_did(name):
    """Of other seeds than the measured ones; four standard errors of the difference are allowed."""
    mean, deviation = RANDOM[name]
    episodes = 4 if name == "freeway" else 40
    env, rng, returns = build(f"minatar_{name}", seed=7), np.random.default_rng(7), []
    for _ in range(episodes):
        env.reset()
        total, steps, last = 0.0, 0, False
        while not last:
            output = env.step(sample(env.act_space, rng))
            total, steps, last = total + float(output["reward"]), steps + 1, output["is_last"]
        returns.append(total)
        assert output["is_terminal"] == (name != "freeway")
        assert name != "freeway" or steps == 2501
    error = deviation * np.sqrt(1 / episodes + 1 / 40)
    assert abs(np.mean(returns) - mean) < 4 * error
    assert min(returns) >= 0 and (max(returns) > 0 or name == "freeway")
