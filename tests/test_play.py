"""Looking inside and playing: controls, the session behind the page, videos, the command."""

import re
import socket
import sys
import time
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from small_runs import one_line

import dreamer
import hidreamer
from conftest import ROOT
from envs import make_env
from play.__main__ import main
from play.controls import SPARE, Controls
from play.movie import Film, compose, record
from play.session import AHEAD, Session

CASES = [("rssm", "image"), ("hrssm", "grid"), ("hrvq", "vector"), ("hrvq", "multi")]
CASES += [("rssm", "continuous")]


# ---------------------------------------------------------------- controls


def env_of(task):
    block = {"size": [64, 64], "action_repeat": 1, "time_limit": 0}
    env = make_env(task, block, 0)
    env.close()
    return env


@pytest.mark.parametrize(
    ("task", "keys", "name"),
    [
        ("minatar_breakout", ["ArrowLeft"], "left"),
        ("minatar_space_invaders", ["Space"], "fire"),
        ("minatar_breakout", [], "nothing"),
        ("atari_pong", ["ArrowRight", "Space"], "rightfire"),
        ("atari_ms_pacman", ["ArrowUp", "ArrowLeft"], "upleft"),
        ("gym_CartPole-v1", ["ArrowRight"], "right"),
        ("gym_MountainCar-v0", [], "nothing"),
        ("dummy_vector", ["3"], "action 2"),
        ("dummy_multi", ["2"], "1: 2"),
    ],
)
def test_keys_mean_actions(task, keys, name):
    env = env_of(task)
    controls = Controls(env)
    vector = controls.vector(keys)
    env._decode(vector)  # raises for what is no action
    assert controls.name(vector) == name
    names = [choice.name for group in controls.groups for choice in group]
    every = [choice.keys for group in controls.groups for choice in group if choice.keys]
    assert len(set(every)) == len(every) and len(every) >= len(names) - len(controls.groups)


def test_keys_of_numbers():
    controls = Controls(env_of("dummy_continuous"))
    assert controls.vector(["ArrowLeft", "ArrowUp"]).tolist() == [-1, 1]
    assert controls.vector([]).tolist() == [0, 0] and controls.vector(["x"]).tolist() == [0, 0]
    assert len(controls.options()) == 5  # nothing, and both ways of both numbers


def test_without_a_key_for_nothing_the_last_action_goes_on():
    controls = Controls(env_of("gym_CartPole-v1"))
    assert controls.name(controls.vector(["ArrowRight"])) == "right"
    assert controls.name(controls.vector([])) == "right"


@pytest.mark.parametrize(
    "space", [Discrete(40), MultiDiscrete([30, 30]), Box(-1, 1, (30,))], ids=str
)
def test_many_actions(space):
    widths = {"Discrete": 40, "MultiDiscrete": 60, "Box": 30}
    suite = SimpleNamespace()
    size = widths[type(space).__name__]
    controls = Controls(SimpleNamespace(act_space=space, act_dim=size, suite=suite))
    for name, vector in controls.options():
        assert vector.shape == (size,) and name
    assert controls.vector(["1"]).shape == (size,)
    keys = [" ".join(entry["keys"]) for entry in controls.legend()]
    assert len(set(keys)) == len(keys) and not any(" " in key for key in keys)


# ---------------------------------------------------------------- the session


@pytest.fixture(params=CASES, ids="-".join)
def session(request, trained):
    session = Session(awake(hidreamer.load(trained(*request.param))), seed=3)
    yield session
    session.close()


def awake(agent):
    """Its continue head, of a few updates, shall not end dreams at random."""
    torch.nn.init.zeros_(agent.world_model.cont.out.weight)
    torch.nn.init.constant_(agent.world_model.cont.out.bias, 5.0)
    return agent


def test_a_dream_that_ends_begins_anew(trained):
    session = Session(awake(hidreamer.load(trained("rssm", "image"))))
    session.switch()
    session.step()
    assert session.now.step == 1 and not session.now.over
    torch.nn.init.constant_(session.agent.world_model.cont.out.bias, -5.0)
    session.step()
    assert session.now.step == 2 and session.now.over
    session.step()
    assert session.now.step == 0 and session.now.dreaming and not session.now.over


def seen(session):
    """All that a moment shows, to compare."""
    view = session.view()
    return [*(frame.tobytes() for _, frame in view.pictures.values()), view.numbers]


def test_a_view(session):
    for _ in range(2):
        for _ in range(3):
            session.step()
        view, dreaming = session.view(), session.now.dreaming
        names = list(view.pictures)
        assert names[:3] == ["real", "seen", "imagined"] and names[-1] == "level all"
        for title, frame in view.pictures.values():
            assert title and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        assert all(np.isfinite(x) for x in view.numbers.values())
        assert view.numbers["step"] == 3 and 0.0 <= view.numbers["cont"] <= 1.0
        for level in view.levels:
            assert 0.0 <= level.prior <= level.most and (level.post is None) == dreaming
        assert compose(view).shape[0] % 2 == compose(view).shape[1] % 2 == 0
        session.switch()


def test_the_agent_plays_as_its_policy(session):
    """The real part of a session is an episode of the policy."""
    session.agent.model.world_model.dynamics.observe = mode(session.agent.dynamics.observe)
    session.reset()
    session.env = session.agent.real_env(8)
    session.now = session._begin()
    rewards = []
    while not session.now.over:
        session.step()
        rewards.append(session.now.reward)
    expected = session.agent.collect(seed=8)
    assert np.allclose(rewards, expected["reward"][1:]) and len(rewards) == 20
    session.step()
    assert session.now.step == 0  # the next episode


def mode(observe):
    return lambda carry, embed, action, first, *_, **__: observe(carry, embed, action, first, False)


def test_back_is_where_it_was(session):
    """In the real environment and in the dream: the same view, and the same future."""
    for _ in range(3):
        session.step()
    views = [seen(session)]
    session.switch()
    for _ in range(3):
        session.step()
        views.append(seen(session))
    session.switch()
    session.step()
    for _ in range(2):
        session.back()
    torch.manual_seed(0)
    sampled = session.agent.config.dynamics.type == "hrssm"  # its coarse pictures are drawn anew
    assert session.now.dreaming and (sampled or seen(session) == views[-1])
    for view in views[-2:0:-1]:
        session.back()
        assert sampled or seen(session) == view
    session.back()
    session.back()
    assert not session.now.dreaming and (sampled or seen(session) == views[0])
    futures = []
    for _ in range(2):
        torch.manual_seed(5)
        session.step()
        futures.append([session.now.reward, *(x.tobytes() for x in images(session))])
        session.back()
    assert futures[0] == futures[1]
    for _ in range(10):
        session.back()
    assert session.message == "there is no earlier step"


def images(session):
    return [session.now.obs[key] for key in session.agent.obs_space]


def test_a_dream_leaves_the_real_environment_alone(session):
    session.step()
    before, obs = session.env.get_state(), session.now.obs
    session.switch()
    for _ in range(4):
        session.step()
    assert session.now.total == pytest.approx(
        sum(m.reward for m in [*session.past, session.now][3:])
    )
    session.reset()
    assert session.now.dreaming and session.now.step == 0
    session.switch()
    assert session.now.obs is obs and not session.now.dreaming and session.now.step == 1
    assert str(session.env.get_state()) == str(before)


def test_the_hand_acts(trained):
    """The cue is answered by keys: all that the task pays."""
    session = Session(hidreamer.load(trained("hrvq", "vector")), seed=3)
    session.hand = True
    while not session.now.over:
        session.held = {str(1 + int(session.now.obs["vector"].argmax()))}
        session.step()
    assert session.now.total == 2 * 20  # two frames a step


def test_the_hand_acts_in_the_dream(trained):
    agent = hidreamer.load(trained("rssm", "image"))
    session = Session(agent)
    session.hand, session.held = True, {"4"}
    session.switch()
    imagine = agent.dynamics.imagine
    agent.dynamics.imagine = lambda *args, generator=None: imagine(*args, False)
    session.step()
    expected = agent.dynamics.imagine(session.past[0].acting.carry, agent.action_vector([[3]]), 1)
    assert torch.equal(session.feat().deter, expected[1].deter[:, 1])
    assert session.now.action == "action 3"


def test_no_action_has_the_key_of_a_command():
    """Else it would take the command's place."""
    page = (ROOT / "play" / "page.html").read_text()
    (line,) = re.findall(r"const commands = {(.*)}", page)
    commands = re.findall(r'"?(\S)"?: "', line)
    assert len(commands) == 8 and not {*commands, "+", "-"} & set(SPARE)


def test_what_is_imagined_beside_the_real_environment(trained):
    """It knows the actions alone, and begins again after AHEAD steps."""
    session = Session(hidreamer.load(trained("rssm", "vector")))
    ahead = []
    for _ in range(AHEAD + 3):
        session.step()
        ahead.append(session.now.ahead)
    assert ahead == [*range(1, AHEAD + 1), 1, 2, 3]


def test_what_if(session):
    session.step()
    found = session.what_if(4)
    assert [option["name"] for option in found] == [name for name, _ in session.controls.options()]
    for option in found:
        assert len(option["frames"]) == 5
        assert all(np.isfinite(option[key]) for key in ("reward", "value", "cont"))
        assert np.array_equal(option["frames"][0], found[0]["frames"][0])
    assert len({option["reward"] for option in found}) > 1
    session.switch()
    session.step()
    assert len(session.what_if(2)) == len(found)


def test_an_environment_that_cannot_be_put_back(trained, monkeypatch):
    session = Session(awake(hidreamer.load(trained("hrssm", "grid"))))
    monkeypatch.setattr(session.env, "get_state", lambda: None)
    for act in (session.step, session.step, session.step):
        act()
    session.back()
    assert "cannot be put back" in session.message and session.now.step == 3
    session.switch()
    session.step()
    session.back()
    session.back()
    assert not session.now.dreaming and session.now.step == 3


def test_an_environment_that_fails(trained, monkeypatch):
    session = Session(hidreamer.load(trained("rssm", "image")))

    def fail(*args):
        raise RuntimeError("no more\nballs")

    monkeypatch.setattr(session.env, "step", fail)
    session.step()
    assert session.message == "the environment failed: no more balls"
    session.step()
    assert session.now.step == 0 and not session.now.over
    with monkeypatch.context() as patch:  # nor can it begin anew, by itself or by the user's wish
        patch.setattr(session.env, "reset", fail)
        for act in (session.reset, session.step):
            session.message = ""
            act()
            assert session.message == "the environment failed: no more balls" and session.now.over
    session.step()
    assert not session.now.over
    monkeypatch.setattr(session.env.suite, "render", fail)
    assert session.view().pictures["real"][1].std() > 0  # the observation instead
    assert "cannot be drawn" in session.message and "\n" not in session.message
    assert session.note == session.message  # a tab that is opened later is told as well


def test_fifteen_frames_a_second_on_one_core(tmp_path):
    """By the processor's clock: other programs do not count. The larger of the tiny presets."""
    words = ["--configs", "minatar", "tiny_hidreamer", "--steps", "40", "--logdir", str(tmp_path)]
    assert dreamer.main(words) == 0  # too short to learn, which costs nothing here
    from play.server import Player

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        player = Player(lambda: Session(hidreamer.load(tmp_path)), tmp_path)
        for dreaming in (False, True):
            if dreaming:
                player.session.switch()
            for step in range(25):
                if step == 5:
                    began = time.process_time()
                player._change(player.session.step)
            rate = 20 / (time.process_time() - began)
            print(f"{'dream' if dreaming else 'real'}: {rate:.0f} frames a second")
            assert rate > 15
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- videos and the command


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("how", [[], ["--dream"]], ids=["real", "dream"])
def test_a_video_without_a_page(case, how, trained, tmp_path, capsys):
    out = tmp_path / "deep" / "a.mp4"
    assert main([str(trained(*case)), "--record", str(out), "--steps", "24", *how]) == 0
    movie = iio.imread(out)
    assert len(movie) == 24 and movie.std(0).max() > 10  # something moves
    assert [path.name for path in out.parent.iterdir()] == ["a.mp4"]
    said = capsys.readouterr().out
    assert ("24 frames, sum of predicted rewards" if how else "24 frames, sum of rewards") in said


def test_an_agent_without_a_decoder_is_played_without_its_pictures(tmp_path):
    words = ["--configs", "debug", "--task", "dummy_vector", "--model.losses.decoder", "0"]
    words += ["--steps", "40", "--video", "false", "--eval_episodes", "0"]
    assert dreamer.main([*words, "--logdir", str(tmp_path / "run")]) == 0
    session = Session(hidreamer.load(tmp_path / "run"), seed=0)
    assert "--decoder.probe true" in session.message and session.note == session.message
    session.step()
    pictures = session.view().pictures
    assert pictures["imagined"][1].std() < pictures["real"][1].std()
    assert all(frame.ndim == 3 for option in session.what_if(2) for frame in option["frames"])
    session.close()


def test_a_film_has_the_returns_of_episodes_that_ended_alone(trained, tmp_path):
    session = Session(hidreamer.load(trained("rssm", "vector")), seed=1)
    seen, step = [], session.step
    session.step = lambda: (step(), seen.append(session.now))
    film = record(session, tmp_path / "a.mp4", 30)
    session.close()
    ended = [moment.total for moment in seen if moment.over]
    assert film.returns == ended and len(ended) > 0 and not seen[-1].over
    assert film.rewards == pytest.approx(sum(moment.reward for moment in seen if moment.step))
    assert f"{len(ended)} episode" in film.line(False)
    assert "no episode ended" in Film(3, [], 1.0).line(False)


def test_a_seed_fixes_what_is_played(trained):
    def played(dreaming, look=lambda session: None):
        session = Session(hidreamer.load(trained("hrssm", "grid")), seed=3)
        if dreaming:
            session.switch()
        for _ in range(6):
            look(session)
            session.step()
        found = session.view()
        session.close()
        return found

    for dreaming in (False, True):
        first, again = played(dreaming), played(dreaming)
        assert first.numbers == again.numbers
        for name, (_, picture) in first.pictures.items():
            np.testing.assert_array_equal(picture, again.pictures[name][1], name)
        # whoever looks changes nothing
        for look in (Session.view, lambda session: session.what_if(1)):
            assert played(dreaming, look).numbers == first.numbers


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "logdir"),
        (["nowhere"], "there is no folder nowhere"),
        ([str(ROOT / "docs")], "holds no agent"),
        (["RUN", "--record", "a.gif"], "must end in .mp4"),
        (["RUN", "--record", "a.mp4", "--steps", "0"], "--steps is 0"),
        (["RUN", "--port", "70000"], "--port is 70000"),
        (["RUN", "--port", "many"], "many"),
        (["RUN", "--seed", "-1"], "--seed is -1"),
        (["RUN", "--seed", str(2**63)], f"--seed is {2**63}"),
        (["~nobody-here/run"], "there is no folder ~nobody-here/run"),
        ([300 * "a"], "there is no folder aaa"),
        (["RUN", "--prot", "3"], "--prot"),
    ],
)
def test_bad_input_is_one_line(words, says, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(trained("rssm", "image"))
    assert main([run if word == "RUN" else word for word in words]) == 2
    one_line(capsys, says)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line(trained, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main([str(trained("rssm", "image")), "--port", port]) == 2
    one_line(capsys, f"port {port} cannot be used (Address already in use)", "--port")


def test_a_video_of_an_environment_that_failed_is_a_failure(trained, capsys, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("simulator lost")

    monkeypatch.setattr(Session, "_next", fail)
    out = tmp_path / "a.mp4"
    assert main([str(trained("rssm", "image")), "--record", str(out), "--steps", "5"]) == 1
    assert capsys.readouterr().err == "note: the environment failed: simulator lost\n"
    assert len(iio.imread(out)) == 5  # what there was to see


def test_a_video_that_cannot_be_written_is_one_line(trained, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = [str(trained("rssm", "image")), "--record", str(tmp_path / "file" / "a.mp4")]
    assert main(words) == 1
    one_line(capsys, "a file cannot be written")


def test_the_page_needs_its_extra(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "play.server", raising=False)
    monkeypatch.delattr("play.server", raising=False)  # where another test imported it
    assert main([str(trained("rssm", "image")), "--port", "0"]) == 2
    one_line(capsys, "pip install -e '.[play]'", "--record")
