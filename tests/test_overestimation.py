"""python -m analysis.overestimation: imagined rewards and values beside real ones."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import one_line

from analysis import overestimation
from analysis.overestimation import STARTS, WINDOWS, of_episode, summarise

HORIZON, ACTIONS, GAMMA = 2, 2, 0.5


class Oracle:
    """Knows what rewards follow each step of ``rows``. Of each it is promised ``more``, by its
    policy and its critic; ``known`` is the share of a reward that it tells when it is seen, and
    ``cont`` what its continue head says everywhere but at terminal steps.
    """

    def __init__(self, rows, more=0.0, known=1.0, cont=1.0):
        imag = SimpleNamespace(horizon=HORIZON, discount=GAMMA)
        self.config, self.rows, self.more = SimpleNamespace(imag=imag), rows, more
        self.known, self.goes_on = known, cont * (1.0 - rows["is_terminal"])
        self.asked, self.generators = {}, []

    def encode(self, rows, *, sample, generator):
        assert rows is self.rows and sample
        reward, value = rows["reward"].astype(float), np.zeros(len(rows["reward"]))
        for t in reversed(range(len(value) - 1)):
            value[t] = reward[t + 1] + GAMMA * (1 - rows["is_terminal"][t + 1]) * value[t + 1]
        found = {"value": value + self.more, "reward": reward * self.known}
        return SimpleNamespace(**{key: torch.from_numpy(x) for key, x in found.items()})

    def dream(self, latents, actor, horizon, *, start, generator):
        self.asked["policy" if actor is None else "taken"] = (np.asarray(start), actor)
        reward = np.concatenate([self.rows["reward"], np.full(horizon, 7.0)])
        goes_on = np.concatenate([self.goes_on, np.zeros(horizon)])
        index = np.asarray(start)[:, None] + np.arange(horizon + 1)
        cont = torch.from_numpy(goes_on[index])
        cont[:, 0] = 0.01  # the head's guess at a start, which is known to go on
        more = self.more if actor is None else 0.0
        return SimpleNamespace(reward=torch.from_numpy(reward[index] + more), cont=cont)


def rows(reward, ended, terminal=()):
    """terminal: steps within the episode at which a life ended."""
    count = len(reward)
    ends = np.zeros(count, bool)
    ends[[*terminal, *([-1] if ended else [])]] = True
    action = np.arange(count * ACTIONS, dtype=np.float32).reshape(count, ACTIONS)
    return {"reward": np.array(reward, np.float32), "is_terminal": ends, "prev_action": action}


def test_an_oracle_promises_what_comes():
    """Also behind an episode's end, where rewards that are imagined do not count."""
    episode = rows([0, 1, -1, 0, 2, -3], ended=True)
    found = of_episode(Oracle(episode), episode)
    assert found["ended"] and (found["return"], found["length"]) == (-1.0, 5)
    assert found["seen"]["recorded"] == found["seen"]["real"]
    for window in found["windows"]:
        assert window["policy"] == window["recorded"] == window["real"]
    # of the starts 0..4 the rewards 1 and 2, 3 and 4, 5 and 6 steps on
    near, middle, far = (window["real"] for window in found["windows"])
    assert near["reward"] == pytest.approx((0 - 1 + 2 - 1 - 3) / 10)
    assert near["gains"] == pytest.approx((1 + 2 + 2) / 10)
    assert near["losses"] == pytest.approx((-1 - 1 - 3 - 3) / 10)
    assert middle["reward"] == pytest.approx((2 - 1 - 3) / 10)
    assert far["reward"] == pytest.approx(-3 / 10)
    # of the steps 0..4, from the last: -3, 2 - 1.5, 0.25, -1 + 0.125, 1 - 0.4375
    assert found["value"] == pytest.approx(found["discounted_return"])
    assert found["value"] == pytest.approx((-3 + 0.5 + 0.25 - 0.875 + 0.5625) / 5)


def test_what_is_promised_too_much_is_found():
    """By the policy's dreams alone; the actions taken are those that led on."""
    episode = rows([0, 1, -1, 0] * 10, ended=False)
    agent = Oracle(episode, more=0.25)
    found = of_episode(agent, episode)
    for window in found["windows"]:
        assert window["policy"]["reward"] == pytest.approx(window["real"]["reward"] + 0.25)
        assert window["recorded"] == window["real"]
    starts, taken = agent.asked["taken"]
    steps = starts[:, None] + 1 + np.arange(WINDOWS * HORIZON)
    assert steps.max() == len(episode["reward"]) - 1  # nothing behind the cut
    assert (taken == episode["prev_action"][steps]).all()


def test_starts_are_of_the_whole_episode():
    episode = rows(np.zeros(1001), ended=False)
    agent = Oracle(episode)
    of_episode(agent, episode)
    (starts, _), last = agent.asked["policy"], 1000 - WINDOWS * HORIZON
    assert len(set(starts)) == STARTS and (starts[0], starts[-1]) == (0, last)
    assert np.diff(starts).max() - np.diff(starts).min() <= 1


def test_a_dream_that_may_have_ended_promises_less():
    """By what the head says of each step between; of the start it is known."""
    episode = rows([0] + [1] * 12, ended=False)
    (near, middle, far) = of_episode(Oracle(episode, cont=0.5), episode)["windows"]
    assert near["policy"]["reward"] == pytest.approx((1 + 0.5) / 2)
    assert middle["policy"]["reward"] == pytest.approx((0.25 + 0.125) / 2)
    assert far["recorded"]["reward"] == pytest.approx((2**-4 + 2**-5) / 2)
    assert near["real"]["reward"] == far["real"]["reward"] == 1.0


def test_a_life_that_ended_within_an_episode():
    """Dreams and values end there, so what came later is no part of what they promised."""
    episode = rows([0, 1, 1, 5, 5, 5, 5, 5, 5, 5], ended=True, terminal=[2])
    agent = Oracle(episode)
    found = of_episode(agent, episode)
    assert 2 not in agent.asked["policy"][0]
    for window in found["windows"]:
        assert window["policy"] == window["real"]
    assert found["value"] == pytest.approx(found["discounted_return"])
    assert found["windows"][1]["real"]["reward"] > 0


def test_a_cut_is_no_end():
    """What follows it is what the critic says there."""
    episode = rows([0] + [1] * 30, ended=False)
    latents = SimpleNamespace(value=torch.full((31,), 2.0), reward=torch.zeros(31))
    agent = Oracle(episode)
    agent.encode = lambda *args, **kwargs: latents
    found = of_episode(agent, episode)  # 1 + 1/2 + 1/4 ... is 2
    assert found["value"] == pytest.approx(2.0)
    assert found["discounted_return"] == pytest.approx(2.0)


def test_what_another_policy_did_is_not_held_against_this_one():
    episode = rows([0, 1, -1, 0] * 10, ended=False)
    found = of_episode(Oracle(episode, more=0.25), episode, own=False)
    assert all(set(window) == {"real", "recorded"} for window in found["windows"])
    assert "value" not in found
    text = overestimation.text(summarise([found, found], HORIZON, own=False))
    assert "own policy" not in text and "critic" not in text


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_short_episodes(ended, own):
    """One that was cut before a whole horizon has no dreams; all else is there."""
    episode = rows([0, 1, 1], ended)
    found = of_episode(Oracle(episode), episode, own)
    assert len(found["windows"]) == (WINDOWS if ended else 0)
    cells = summarise([found] * 5, HORIZON, own)
    assert [window["episodes"] for window in cells["windows"]] == [5] + [5 * ended] * WINDOWS
    assert cells["windows"][0]["reward"]["recorded"]["value"] == 1.0
    text = overestimation.text(cells)
    assert "nan" not in text and ("own policy" in text) is own


def test_what_is_not_told_when_it_is_seen():
    """A reward stands beside the head's word of its own step; of the first step nothing is told."""
    episode = rows([7, 1, -1, 0, 2, -3], ended=True)
    found = summarise([of_episode(Oracle(episode, known=0.5), episode)] * 2, HORIZON)["windows"][0]
    assert found["steps"] == [0, 0]
    assert found["gains"]["real"]["value"] == pytest.approx(3 / 5)
    assert found["gains"]["recorded - real"]["value"] == pytest.approx(-1.5 / 5)
    assert found["losses"]["recorded - real"]["value"] == pytest.approx(2 / 5)
    assert "policy" not in found["gains"]


def several(promises, levels=(0.0, 5.0, -9.0, 2.0, 1.0)):
    found = []
    for level, more in zip(levels, promises, strict=True):
        episode = rows(np.full(30, level), ended=False)
        found.append(of_episode(Oracle(episode, more), episode))
    return summarise(found, HORIZON)


def test_intervals_are_of_episodes_and_paired():
    """Episodes that differ more than the dreams from them leave a difference that is sure."""
    cells = several([0.1, 0.12, 0.11, 0.1, 0.12])["windows"][1]
    assert cells["steps"] == [1, HORIZON]
    gap, real = cells["reward"]["policy - real"], cells["reward"]["real"]
    assert gap["value"] == pytest.approx(0.11)
    # t of 4 degrees of freedom is 2.776, the deviation of these five 0.01
    assert gap["high"] - gap["value"] == pytest.approx(2.776 * 0.01 / math.sqrt(5), abs=1e-5)
    assert real["low"] < -5.0 < 5.0 < real["high"]


@pytest.mark.parametrize(
    ("promises", "reward", "value"),
    [
        ([0.1, 0.12, 0.11, 0.1, 0.12], "too high, by 0.110 [0.0976, 0.122]", "too high"),
        ([-0.1, -0.2, -0.1, -0.2, -0.1], "too low, by −0.140 [−0.208, −0.0720]", "too low"),
        ([-0.1, 0.2, -0.1, 0.2, -0.1], "no difference shown", "no difference shown"),
        ([0.0] * 5, "no difference shown", "no difference shown"),
    ],
)
def test_the_sentences(promises, reward, value):
    *table, empty, of_reward, of_value = overestimation.text(several(promises)).splitlines()
    assert of_reward.startswith(f"imagined reward, steps 1 to {HORIZON}: {reward}")
    assert of_value.startswith(f"value: {value}") and empty == ""
    assert len(table) == 2 + 3 * (WINDOWS + 1) + 1


def test_few_episodes_support_nothing():
    cells = several([0.1, 0.12], levels=(0.0, 1.0))
    assert overestimation.text(cells).count("unknown, of 2 episodes") == 2


def test_the_table():
    head, _, *lines = overestimation.table(several([0.1, 0.12, 0.11, 0.1, 0.12])).splitlines()
    assert head == (
        "|  | real | dreamt, own policy | minus real | dreamt, actions taken | minus real |"
    )
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[0] == f"steps 1 to {HORIZON}: reward a step"
    assert cells[1].startswith("−0.200 [") and cells[2].startswith("−0.0900 [")
    assert cells[3] == "+0.110 [+0.0976, +0.122]"
    assert cells[4] == cells[1] and cells[5] == "+0 [+0, +0]"
    assert lines[0].count("|") == head.count("|") == lines[-1].count("|")


@pytest.mark.parametrize("case", [("rssm", "image"), ("hrvq", "vector"), ("rssm", "continuous")])
def test_of_a_run(case, trained, tmp_path, capsys):
    """The same twice; its file has all that is shown; recorded episodes are others."""
    words = [str(trained(*case)), "--episodes", "3", "--seed", "4"]
    found = []
    for name in ("a", "b"):
        assert overestimation.main([*words, "--out", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[0] == found[1] and found[0]["source"] == "new"
    assert overestimation.text(found[0]) in capsys.readouterr().out
    assert len(found[0]["episodes"]) == 3 and len(found[0]["windows"]) == WINDOWS + 1
    assert overestimation.main([*words, "--recorded", "--out", str(tmp_path / "c")]) == 0
    other = json.loads((tmp_path / "c").read_text())
    assert other["source"] == "recorded" and "value" not in other
    assert all("policy" not in window["reward"] for window in other["windows"])
    assert [x["return"] for x in other["episodes"]] != [x["return"] for x in found[0]["episodes"]]


def test_new_episodes_are_apart_and_sampled(trained, monkeypatch):
    """Those of another seed are all others, and so is every episode of one."""
    from library.agent import LoadedAgent, load

    agent, asked = load(trained("rssm", "image"), device="cpu"), []
    episode = agent.collect(seed=0)

    def collect(self, *, seed, greedy):
        asked.append((seed, greedy))
        return episode

    monkeypatch.setattr(LoadedAgent, "collect", collect)
    for seed in (0, 1):
        assert len(list(overestimation.played(agent, 5, seed))) == 5
    assert len(set(asked)) == 10 and not any(greedy for _, greedy in asked)


def test_recorded_episodes_are_of_the_whole_run(trained):
    from library.agent import load

    agent = load(trained("rssm", "image"), device="cpu")
    files = agent.recorded()
    found = [rows["reward"] for rows in overestimation.recorded(agent, 2)]
    for reward, file in zip(found, (files[0], files[-1]), strict=True):
        assert (reward == np.load(file)["reward"]).all()


def test_an_export_has_no_recorded_episodes(trained, tmp_path, capsys):
    import hidreamer

    out = hidreamer.export(trained("hrvq", "vector"), tmp_path / "agent")
    assert overestimation.main([str(out), "--recorded"]) == 2
    one_line(capsys, "--recorded", "train_eps")


@pytest.mark.parametrize("change", ["damaged", "no is_terminal", "nan", "short", "no image"])
def test_an_episode_that_cannot_be_read_is_one_line(change, trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained("rssm", "image"), folder)
    file = min((folder / "train_eps").glob("*.npz"))
    arrays = dict(np.load(file))
    if change == "nan":
        arrays["reward"][1] = np.nan
    elif change == "short":
        arrays["reward"] = arrays["reward"][:-1]
    elif change.startswith("no "):
        del arrays[change.removeprefix("no ")]
    np.savez(file, **arrays)
    if change == "damaged":
        file.write_bytes(b"PK")
    assert overestimation.main([str(folder), "--recorded"]) == 2
    one_line(capsys, file.name)


def test_an_environment_that_fails_is_one_line(trained, monkeypatch, capsys):
    from library.agent import LoadedAgent

    def collect(self, **kwargs):
        raise RuntimeError("out of\nwork")

    folder = str(trained("rssm", "image"))
    monkeypatch.setattr(LoadedAgent, "collect", collect)
    assert overestimation.main([folder]) == 1
    one_line(capsys, "episode 1", "out of work")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "logdir"),
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--episodes", "0"], "0 is less than 1"),
        ([".", "--episodes", "x"], "invalid integer value"),
        ([".", "--seed", str(2**32)], "is more than"),
        ([".", "--sampled"], "--sampled"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    assert overestimation.main(words) == 2
    one_line(capsys, says)


def test_without_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(overestimation.importlib.util, "find_spec", lambda name: None)
    assert overestimation.main(["."]) == 2
    one_line(capsys, "compare")
