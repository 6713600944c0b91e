"""How often the agent is updated, and who chooses the actions until then:
counted in whole runs of the loop.
"""

import itertools

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

import dreamer
import models
from envs.base import Env, Suite

ROWS = 21  # of an episode of the dummy tasks: the first observation and 20 steps


def run(folder, monkeypatch, prepare=lambda agent: None, **overrides):
    """A whole run on dummy_vector whose updates cost and change nothing.
    -> its last checkpoint's counters.
    """

    def make_update(agent, compiled, generator, report):
        prepare(agent)
        agent.metric_names = ("nothing",)
        return lambda batch: torch.zeros(1)

    monkeypatch.setattr(models.Agent, "make_update", make_update)
    settings = {
        "task": "dummy_vector",
        "eval_episodes": 0,
        "video": "false",
        "logdir": folder,
        **overrides,
    }
    settings |= {f"{name}_every": 10**6 for name in ("log", "eval", "checkpoint")}
    words = [word for key, x in settings.items() for word in (f"--{key}", str(x))]
    assert dreamer.main(["--configs", "debug", *words]) == 0
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["counters"]


def episodes(folder):
    """Rows of all finished episodes in order, as they were recorded."""
    paths = sorted((folder / "train_eps").glob("*.npz"))
    parts = [dict(np.load(path)) for path in paths]
    assert all(len(part["reward"]) == ROWS for part in parts)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize(
    ("ratio", "count", "repeat", "pretrain"),
    [
        (1, 1, 1, 0),
        (4, 1, 2, 1),
        (16, 1, 1, 0),
        (16, 3, 1, 5),
        (16, 2, 4, 0),
        (40, 1, 2, 3),
        (64, 2, 1, 1),
        (0, 1, 1, 2),
    ],
)
def test_updates_are_counted_exactly(ratio, count, repeat, pretrain, tmp_path, monkeypatch):
    """Replayed steps per agent step, not per frame;
    none before the replay is filled, none for a reset.
    """
    steps, prefill, batch = 300 * repeat, 50, 16  # batch: 2 sequences of 8 steps
    due, rows, taken, started = 0.0, 0, 0, False
    for t in itertools.count():
        if taken * repeat >= steps:
            break
        new = 0 if t % ROWS == 0 else count
        rows, taken = rows + count, taken + new
        if rows >= prefill:
            due = due if started else float(pretrain)
            started = True
            due += new * ratio / batch
    settings = {
        "env.count": count,
        "env.action_repeat": repeat,
        "replay.ratio": ratio,
        "replay.pretrain": pretrain,
    }
    found = run(tmp_path, monkeypatch, steps=steps, **settings, **{"replay.prefill": prefill})
    assert found["updates"] == int(due)
    assert found["step"] == taken * repeat


def test_prefill_is_random_and_then_the_policy_acts(tmp_path, monkeypatch):
    """The policy is certain of one action; until the replay is filled, all four are taken alike."""

    def prepare(agent):
        agent.behavior.actor.out.weight.data.zero_()
        agent.behavior.actor.out.bias.data[2] = 80.0

    run(tmp_path, monkeypatch, prepare, steps=800, **{"replay.prefill": 200, "actor.net.unimix": 0})
    rows = episodes(tmp_path)
    action, first = rows["action"], rows["is_first"]
    assert (action[first] == 0).all() and (first == (np.arange(len(first)) % ROWS == 0)).all()
    filled = np.arange(len(first)) >= 200  # an action leads to the row after those that were there
    assert (action[~first & filled].argmax(-1) == 2).all() and (~first & filled).sum() > 150
    taken = action[~first & ~filled]
    assert (taken.sum(-1) == 1).all()
    assert taken.mean(0) == pytest.approx([0.25] * 4, abs=4 * np.sqrt(0.25 * 0.75 / len(taken)))
    # Each reward answers the action of its own row: the cue was shown in the row before.
    met = action[1:].argmax(-1) == rows["vector"][:-1].argmax(-1)
    assert (rows["reward"][1:] == np.where(first[1:], 0.0, 2.0 * met)).all()
    # These episodes end by time.
    assert not rows["is_terminal"].any() and (rows["discount"] == 1).all()


class Scripted(Suite):
    """Ends by itself after 4 agent steps; gives the number of the step as reward,
    and shows the action it got.
    """

    observation_space = Dict({"vector": Box(-np.inf, np.inf, (2,), np.float32)})
    action_space = Box(np.array([0, -4], np.float32), np.array([2, 4], np.float32))

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return {"vector": np.zeros(2)}, {}

    def step(self, action):
        self.steps += 1
        return (
            {"vector": action},
            float(self.steps),
            self.steps == 4,
            False,
            {"is_terminal": self.steps == 2},
        )


@pytest.mark.parametrize(
    ("limit", "length", "terminal"), [(0, 4, True), (9, 3, False), (6, 2, True), (3, 1, False)]
)
def test_ends_and_time_limits(limit, length, terminal):
    """The limit counts frames, three a step, and cuts at the first step that reaches it;
    only real ends are terminal.

    At step 2 the suite itself says that no value follows though the episode goes on (a lost life).
    """
    env = Env(Scripted(), 3, limit, 0)
    for _ in range(2):
        rows = [env.reset()]
        while not rows[-1]["is_last"]:
            rows.append(env.step(np.array([0.5, -0.25], np.float32)))
        assert [row["is_first"] for row in rows] == [True] + [False] * length
        assert [row["is_last"] for row in rows] == [False] * length + [True]
        assert [row["reward"] for row in rows] == list(range(length + 1))
        assert [row["is_terminal"] for row in rows[:-1]] == [t == 2 for t in range(length)]
        assert rows[-1]["is_terminal"] == terminal
        assert all(row["vector"].tolist() == [1.5, -1.0] for row in rows[1:])
