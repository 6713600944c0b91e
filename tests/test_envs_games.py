"""Atari, MinAtar and ViZDoom: their actions, ends, pictures and private readings."""

import numpy as np
import pytest
from test_envs import build, hold, one_hot, play, same, sample, until

import tools
from envs import EnvError, make_env
from training import make_envs

# -------------------------------------------------------------------------------------------- Atari


def atari(name, repeat=4, size=(64, 64), time_limit=0, seed=0, **options):
    config = {"action_repeat": repeat, "size": size, "time_limit": time_limit}
    return build(f"atari_{name}", seed, **config, atari={"noops": 0} | options)


def test_atari_actions_are_the_games_own_or_all():
    needed, every = atari("pong"), atari("pong", actions="all")
    names = [action.name for action in needed.suite.actions]
    assert (
        names == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"] and every.act_dim == 18
    )
    with pytest.raises(EnvError, match=r"atari.actions 'al'; nearest: all"):
        atari("pong", actions="al")
    for env in (needed, every):  # the paddle's byte falls when it goes right, that is up
        names = [action.name for action in env.suite.actions]
        env.reset()
        hold(env, 0, 30)
        before = int(env.suite.ram()[51])
        hold(env, names.index("RIGHT"), 4)
        up = int(env.suite.ram()[51])
        hold(env, names.index("LEFT"), 10)
        assert up < before < int(env.suite.ram()[51])


def test_atari_image_is_the_maximum_of_the_last_two_frames():
    skipping, single = atari("pong", 4, (210, 160)), atari("pong", 1, (210, 160))
    skipping.reset(), single.reset()
    differ = 0
    for _ in range(60):
        frames = [single.step(one_hot(single, 2))["image"] for _ in range(4)]
        image = skipping.step(one_hot(skipping, 2))["image"]
        assert np.array_equal(image, np.maximum(frames[2], frames[3]))
        assert np.array_equal(skipping.render(), frames[3])
        differ += not np.array_equal(frames[2], frames[3])
    assert differ > 10


def test_atari_grayscale_and_size():
    output = atari("pong", size=(48, 96), grayscale=True).reset()
    assert output["image"].shape == (48, 96, 1) and output["image"].std() > 0
    assert atari("pong", size=(48, 96)).reset()["image"].shape == (48, 96, 3)


def test_atari_noops_are_drawn_from_zero_to_most():
    env = atari("pong", 1, noops=3)
    counts = {env.reset() and env.suite.ale.getEpisodeFrameNumber() for _ in range(60)}
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize("lives", ["unused", "discount", "reset"])
def test_atari_lives(lives):
    env = atari("breakout", lives=lives)
    env.reset()
    env.step(one_hot(env, 1))  # serve
    if lives == "unused":
        outputs = [
            output
            for _ in range(5)
            for output in (*hold(env, 1, 1), *hold(env, 0, 80))
            if env.suite.ale.lives()
        ]
        assert len(outputs) > 100 and not any(
            output["is_terminal"] or output["is_last"] for output in outputs
        )
        return
    output = until(env, 0, "is_terminal")
    assert (
        output["is_terminal"]
        and output["is_last"] == (lives == "reset")
        and env.suite.ale.lives() == 4
    )
    if lives == "discount":
        assert not hold(env, 0, 1)[0]["is_terminal"]  # once a life


def test_atari_lives_that_reset_go_on_with_the_next_life():
    env, whole = atari("breakout", 1, lives="reset"), atari("breakout", 1)
    env.reset(), whole.reset()
    rng, lives, returns = np.random.default_rng(0), [], []
    for _ in range(6):  # the fifth is game over, the sixth begins another game
        lives.append(env.suite.ale.lives())
        total, output = 0.0, {"is_last": False}
        while not output["is_last"]:
            action = one_hot(env, rng.integers(env.act_dim))
            output, other = env.step(action), whole.step(action)
            assert (
                np.array_equal(output["image"], other["image"])
                and output["reward"] == other["reward"]
            )
            total += output["reward"]
        assert output["is_terminal"] and other["is_last"] == (len(lives) == 5)
        returns.append(total)
        first = env.reset()
        other = (
            whole.reset() if other["is_last"] else whole.step(one_hot(whole, 0))
        )  # a no-op begins the next life
        assert (
            first["is_first"]
            and not first["reward"]
            and np.array_equal(first["image"], other["image"])
        )
    assert lives == [5, 4, 3, 2, 1, 5] and sum(returns[:5]) > 0
    limited = atari("breakout", 1, time_limit=10, lives="reset")
    limited.reset()
    hold(limited, 0, 10)
    assert (
        limited.reset()["is_first"] and limited.suite.ale.getEpisodeFrameNumber() == 0
    )  # out of time: a new game


def test_atari_state_between_two_lives():
    env = atari("breakout", lives="reset", sticky=0.25)
    env.reset(), env.step(one_hot(env, 1))
    assert until(env, 0, "is_last")["is_terminal"]
    other = atari("breakout", lives="reset", sticky=0.25, seed=5)
    other.set_state(env.get_state())
    assert same([env.reset()], [other.reset()]) and other.suite.ale.lives() == 4
    assert same(
        play(env, 100, output={"is_last": False}), play(other, 100, output={"is_last": False})
    )
    state = env.get_state()
    del state["suite"]["goes_on"]  # as checkpoints were before
    other.set_state(state)


def test_atari_evaluation_plays_whole_games():
    config = {
        "size": [64, 64],
        "action_repeat": 4,
        "time_limit": 0,
        "atari": {"noops": 0, "lives": "reset"},
    }
    assert make_env("atari_breakout", config, 0).suite._lives == "reset" == config["atari"]["lives"]
    run = tools.load_config(
        ["debug"], {"task": "atari_breakout", "env.atari.lives": "reset", "env.action_repeat": "4"}
    )
    for evaluating, ends in ((False, 5), (True, 1)):
        envs = make_envs(run, 1, 0, evaluating=evaluating)
        episodes, over, output = 0, False, envs.step(None)
        for step in range(2000):
            output = envs.step(np.eye(4, dtype=np.float32)[[int(step % 20 == 0)]])
            episodes += int(output["is_last"][0])
            over = envs._workers[0]._env.suite.ale.game_over()
            if over:
                break
        assert over and episodes == ends
        envs.close()


def test_atari_game_over_is_terminal_and_sticky_actions_stick():
    env = atari("breakout")
    env.reset()
    outputs = [output for _ in range(6) for output in (*hold(env, 1, 1), *hold(env, 0, 80))]
    end = next(output for output in outputs if output["is_last"])
    assert end["is_terminal"]
    env = atari("pong", 1, sticky=0.25)
    env.reset()
    kept, rng = [], np.random.default_rng(0)
    for _ in range(2000):
        before, action = env.suite._held, sample(env.act_space, rng)
        env.step(action)
        wanted = env.suite.actions[action.argmax()]
        if wanted != before:
            kept.append(env.suite._held == before)
    assert 0.2 < np.mean(kept) < 0.3


def test_atari_ram_tells_the_score():
    env = atari("pong", noops=30)
    outputs = play(env, 300)
    ram = env.suite.ram()
    assert ram.dtype == np.uint8 and ram.shape == (128,)
    assert sum(output["reward"] for output in outputs) == int(ram[14]) - int(ram[13]) < 0


# ------------------------------------------------------------------------------------------ MinAtar


def test_minatar_actions_ends_and_picture():
    env = build("minatar_breakout", minatar={"sticky": 0.0})
    assert env.act_dim == 3 and build("minatar_breakout", minatar={"actions": "all"}).act_dim == 6
    place = [int(env.reset()["grid"][9, :, 0].argmax())]
    place += [
        int(env.step(one_hot(env, index))["grid"][9, :, 0].argmax()) for index in (0, 1, 1, 2)
    ]
    assert place == [4, 4, 3, 2, 3]  # no-op, left, left, right
    assert until(env, 0, "is_last")["is_terminal"]
    freeway = build("minatar_freeway")
    freeway.reset()
    assert not until(freeway, 0, "is_last")["is_terminal"]  # its only end is the clock
    picture = env.render()
    assert picture.shape == (160, 160, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) >= 4


def test_minatar_sticky_actions_stick():
    def kept(sticky):
        env = build("minatar_freeway", minatar={"sticky": sticky})
        env.reset()
        return sum(
            hold(env, step % 2, 1) and env.suite.game.last_action != env.suite.actions[step % 2]
            for step in range(999)
        )

    assert kept(0.0) == 0 and 30 < kept(0.1) < 150


# ------------------------------------------------------------------------------------------ ViZDoom

BUTTONS = {
    "basic": "MOVE_LEFT MOVE_RIGHT ATTACK",
    "deadly_corridor": "MOVE_LEFT MOVE_RIGHT ATTACK MOVE_FORWARD MOVE_BACKWARD TURN_LEFT "
    "TURN_RIGHT",
    "defend_the_center": "TURN_LEFT TURN_RIGHT ATTACK",
    "health_gathering": "TURN_LEFT TURN_RIGHT MOVE_FORWARD",
}
EFFECTS = {  # button -> the variable it moves and the sign, when the player looks along +x
    "MOVE_LEFT": ("POSITION_Y", 1),
    "MOVE_RIGHT": ("POSITION_Y", -1),
    "ATTACK": ("AMMO2", -1),
    "MOVE_FORWARD": ("POSITION_X", 1),
    "MOVE_BACKWARD": ("POSITION_X", -1),
    "TURN_LEFT": ("ANGLE", 1),
    "TURN_RIGHT": ("ANGLE", -1),
}


@pytest.mark.parametrize("scenario", BUTTONS)
def test_vizdoom_buttons_do_what_their_names_say(scenario, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = build(f"vizdoom_{scenario}", action_repeat=1)
    assert env.suite.buttons == ("NOTHING", *BUTTONS[scenario].split())
    for index, button in enumerate(env.suite.buttons):
        env.reset()
        hold(env, 0, 20)  # the corridor begins with the gun down
        before = env.suite.variables()
        hold(env, index, 8)
        after = env.suite.variables()
        moved = {
            name: (after[name] - before[name] + 180) % 360 - 180 for name, _ in EFFECTS.values()
        }
        if scenario == "health_gathering":  # the player starts looking anywhere
            x, y, turn = moved["POSITION_X"], moved["POSITION_Y"], np.deg2rad(before["ANGLE"])
            moved["POSITION_X"] = x * np.cos(turn) + y * np.sin(turn)
        if button == "NOTHING":
            assert abs(moved["ANGLE"]) < 1 and moved["AMMO2"] == 0
        else:
            name, sign = EFFECTS[button]
            assert moved[name] * sign > 0.5, button
    env.close()
    assert not any(tmp_path.iterdir())  # Doom likes to leave a folder and an ini file


def test_vizdoom_basic_is_solved_by_looking_and_shooting():
    env = build("vizdoom_basic", action_repeat=4)
    for _ in range(3):
        output, total = env.reset(), 0.0
        while not output["is_last"]:
            image = env.render().astype(int)[
                50:75
            ]  # the monster is the reddest thing at the height of the eyes
            red = np.clip((image[..., 0] - image[..., 2]).max(axis=0) - 60, 0, None)
            column = int(np.convolve(red, np.ones(5), "same").argmax())
            output = env.step(one_hot(env, 1 if column < 77 else 2 if column > 83 else 3))
            total += output["reward"]
        assert total > 50 and output["is_terminal"]  # -300 when nobody shoots


def test_vizdoom_time_is_truncation_and_death_is_not():
    env = build("vizdoom_basic", action_repeat=4)
    first = env.reset()
    assert env.suite.variables()["HEALTH"] == 100 and first["image"].std() > 10
    output = until(env, 0, "is_last")
    assert not output["is_terminal"] and output["image"].std() > 10  # no black picture at the end
    env = build("vizdoom_defend_the_center", action_repeat=4)
    env.reset()
    output = until(env, 0, "is_last")
    assert output["is_terminal"] and output["reward"] == -1 and env.suite.variables()["HEALTH"] <= 0
