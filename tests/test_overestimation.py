"""python -m analysis.overestimation: imagined rewards and values beside real ones."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import one_line

from analysis import overestimation
from analysis.overestimation import WINDOWS, discounted, of_episode, reach, summarise

HORIZON, ACTIONS = 3, 2


class Oracle:
    """Knows what rewards follow each step of ``rows``, and promises ``more`` than that."""

    def __init__(self, rows, more=0.0, discount=0.5):
        imag = SimpleNamespace(horizon=HORIZON, discount=discount)
        self.config, self.rows, self.more = SimpleNamespace(imag=imag), rows, more
        self.asked, self.tells = {}, 1.0  # how much of a reward that is seen

    def encode(self, rows, *, sample, generator):
        assert rows is self.rows and sample
        value = discounted(rows["reward"].astype(float), self.config.imag.discount)
        told = torch.from_numpy(rows["reward"]) * self.tells
        return SimpleNamespace(value=torch.from_numpy(value) + self.more, reward=told)

    def dream(self, latents, actor, horizon, *, start, generator):
        self.asked["policy" if actor is None else "taken"] = (start, actor)
        reward = np.concatenate([self.rows["reward"], np.full(horizon, 7.0)])
        alive = np.arange(len(reward)) < len(self.rows["reward"]) - 1
        index = np.asarray(start)[:, None] + np.arange(horizon + 1)
        more = self.more if actor is None else 0.0
        return SimpleNamespace(
            reward=torch.from_numpy(reward[index] + more),
            cont=torch.from_numpy(alive[index].astype(float)),
        )


def rows(reward, ended):
    count = len(reward)
    ends = np.zeros(count, bool)
    ends[-1] = ended
    action = np.arange(count * ACTIONS, dtype=np.float32).reshape(count, ACTIONS)
    return {"reward": np.array(reward, np.float32), "is_terminal": ends, "prev_action": action}


def test_an_oracle_promises_what_comes():
    """Also behind an episode's end, where rewards that are imagined do not count."""
    episode = rows([0, 1, -1, 0, 2, -3], ended=True)
    found = of_episode(Oracle(episode), episode)
    assert found["ended"] and (found["return"], found["length"]) == (-1.0, 5)
    assert len(found["windows"]) == WINDOWS + 1
    assert found["windows"][0]["recorded"] == found["windows"][0]["real"]
    for window in found["windows"][1:]:
        assert window["policy"] == window["recorded"] == window["real"]
    # of starts 0..4 the three rewards that follow: (1 -1 0) (-1 0 2) (0 2 -3) (2 -3) (-3)
    real = found["windows"][1]["real"]
    assert real["reward"] == pytest.approx((0 + 1 - 1 - 1 - 3) / 15)
    assert real["gains"] == pytest.approx((1 + 2 + 2 + 2) / 15)
    assert real["losses"] == pytest.approx((-1 - 1 - 3 - 3 - 3) / 15)
    assert found["value"] == pytest.approx(found["discounted_return"])
    # of steps 0..4 with discount 1/2, from the last: -3, 2-1.5, 0+.25, -1+.125, 1-.4375
    assert found["value"] == pytest.approx((-3 + 0.5 + 0.25 - 0.875 + 0.5625) / 5)


def test_what_is_promised_too_much_is_found():
    """By the policy's dreams and the critic alone; the actions taken are those that led on."""
    episode = rows([0, 1, -1, 0] * 10, ended=False)
    agent = Oracle(episode, more=0.25)
    found = of_episode(agent, episode)
    for window in found["windows"][1:]:
        assert window["policy"]["reward"] == pytest.approx(window["real"]["reward"] + 0.25)
        assert window["recorded"] == window["real"]
    assert found["value"] == pytest.approx(found["discounted_return"] + 0.25)
    starts, taken = agent.asked["taken"]
    steps = np.asarray(starts)[:, None] + 1 + np.arange(WINDOWS * HORIZON)
    assert steps.max() == len(episode["reward"]) - 1  # nothing behind the cut
    assert (taken == episode["prev_action"][steps]).all()


def test_what_is_not_told_when_it_is_seen():
    """Step 0 has a reward's own step, and nothing of the policy."""
    episode = rows([7, 1, -1, 0, 2, -3], ended=True)  # of the first observation nothing is told
    agent = Oracle(episode)
    agent.tells = 0.5
    found = summarise([of_episode(agent, episode)] * 2, HORIZON)["windows"][0]
    assert found["steps"] == [0, 0]
    assert found["gains"]["real"]["value"] == pytest.approx(3 / 5)
    assert found["gains"]["recorded - real"]["value"] == pytest.approx(-1.5 / 5)
    assert found["losses"]["recorded - real"]["value"] == pytest.approx(2 / 5)
    assert "policy" not in found["gains"]


def test_what_another_policy_did_is_not_held_against_this_one():
    episode = rows([0, 1, -1, 0] * 10, ended=False)
    found = of_episode(Oracle(episode, more=0.25), episode, own=False)
    assert all(set(window) == {"real", "recorded"} for window in found["windows"])
    assert found["value"] is None
    text = overestimation.text(summarise([found, found], HORIZON))
    assert "own policy" not in text and "critic" not in text


@pytest.mark.parametrize("ended", [True, False])
def test_short_episodes(ended):
    """One that was cut before a whole horizon says nothing; one that ended says all."""
    episode = rows([0, 1, 1], ended)
    found = of_episode(Oracle(episode), episode)
    assert len(found["windows"]) == (WINDOWS + 1 if ended else 1)  # what is seen needs no horizon
    assert (found["value"] is not None) is ended
    cells = summarise([found, found], HORIZON)
    assert (cells["value"]["value"] is not None) is ended
    assert (cells["windows"][1]["reward"]["real"]["value"] is not None) is ended
    text = overestimation.text(cells)
    assert ("unknown" in text) is not ended and "nan" not in text


def test_a_cut_episode_counts_while_most_of_a_return_lies_before_the_cut():
    assert reach(0.5) == 5 and 0.5**5 < overestimation.REST < 0.5**4
    assert math.isinf(reach(1.0))
    episode = rows([0] * 7 + [8.0], ended=False)
    assert of_episode(Oracle(episode), episode)["discounted_return"] == pytest.approx(
        8 * (0.5**6 + 0.5**5 + 0.5**4) / 3
    )


def test_intervals_are_of_episodes_and_paired():
    """Episodes that differ more than the dreams from them leave a difference that is sure."""
    found = []
    for level, more in ((0.0, 0.1), (5.0, 0.12), (-9.0, 0.11)):
        episode = rows(np.full(30, level), ended=False)
        found.append(of_episode(Oracle(episode, more), episode))
    cells = summarise(found, HORIZON)["windows"][1]
    assert cells["steps"] == [1, HORIZON]
    gap, real = cells["reward"]["policy - real"], cells["reward"]["real"]
    assert gap["value"] == pytest.approx(0.11) and 0.08 < gap["low"] < gap["high"] < 0.14
    assert real["low"] < -9.0 < 5.0 < real["high"]
    # t of 2 degrees of freedom is 4.303, of values 0.1 0.11 0.12 the deviation 0.01
    assert gap["high"] - gap["value"] == pytest.approx(4.303 * 0.01 / math.sqrt(3), abs=1e-5)
    assert "too high, by 0.1" in overestimation.text(summarise(found, HORIZON))


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
    assert other["source"] == "recorded"
    assert [x["return"] for x in other["episodes"]] != [x["return"] for x in found[0]["episodes"]]


def test_an_export_has_no_recorded_episodes(trained, tmp_path, capsys):
    import hidreamer

    out = hidreamer.export(trained("hrvq", "vector"), tmp_path / "agent")
    assert overestimation.main([str(out), "--recorded"]) == 2
    one_line(capsys, "--recorded", "train_eps")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "logdir"),
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--episodes", "0"], "0 is less than 1"),
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
