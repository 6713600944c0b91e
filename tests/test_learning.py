"""Does it learn?

A toy task in half a minute each; whole runs of a quarter of an hour and more: pytest -m slow.

Last results of those: results/learning/.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

import dreamer
from conftest import ROOT
from hidreamer.carries import WriteBack
from hidreamer.dynamics import TYPES
from hidreamer.replay import Replay

# Tiny networks at thirty times the usual learning rate. Two bits are to be known of each
# observation, so three nats are free; dreams are short, because each action is answered at the next
# step.
TOY = [
    "--configs",
    "gym",
    "debug",
    "--task",
    "dummy_vector",
    "--steps",
    "2000",
    "--seed",
    "0",
    "--video",
    "false",
]
TOY += [
    "--log_every",
    "2000",
    "--eval_every",
    "2000",
    "--eval_episodes",
    "10",
    "--checkpoint_every",
    "2000",
    "--env.count",
    "8",
]
TOY += [
    "--replay.batch",
    "16",
    "--replay.length",
    "4",
    "--replay.ratio",
    "32",
    "--replay.prefill",
    "200",
]
TOY += [
    "--replay.capacity",
    "3000",
    "--model.lr",
    "3e-3",
    "--actor.lr",
    "3e-3",
    "--critic.lr",
    "3e-3",
]
TOY += [
    "--actor.entropy",
    "3e-3",
    "--imag.horizon",
    "3",
    "--imag.discount",
    "0.9",
    "--encoder.units",
    "32",
]
TOY += [
    "--decoder.units",
    "32",
    "--dynamics.deter",
    "32",
    "--dynamics.hidden",
    "32",
    "--dynamics.free",
    "3",
]
TOY += [
    "--dynamics.rssm.stoch",
    "4",
    "--dynamics.rssm.classes",
    "8",
    "--dynamics.hrssm.stoch",
    "2",
    "2",
]
TOY += ["--dynamics.hrssm.classes", "8", "8", "--dynamics.hrvq.codes", "8"]


def play_toy(kind, folder):
    """-> mean return of the episodes played at random,
    and of ten greedy ones at the end; the best is 20.
    """
    assert dreamer.main([*TOY, "--dynamics.type", kind, "--logdir", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    early = [
        line["train_return"] for line in lines if "train_return" in line and line["step"] <= 200
    ]
    return sum(early) / len(early), [
        line["eval_return"] for line in lines if "eval_return" in line
    ][-1]


KINDS = ["rssm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hrssm", "hrvq"))]


@pytest.mark.timeout(3600)  # half a minute of CPU; the clock says more where others compute, too
@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_task_is_learned(kind, tmp_path):
    """Answer the cue that is shown, one of four: from 5 of 20 at random to 18 and more."""
    random, learned = play_toy(kind, tmp_path)
    assert 3.0 < random < 7.0 and learned >= 18.0


@pytest.mark.timeout(3600)  # half a minute of CPU; the clock says more where others compute, too
@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_task_is_not_learned_from_shuffled_rewards(kind, tmp_path, monkeypatch):
    """The same run, but for the order in which a batch's rewards come:
    two of four cues may be answered by luck.
    """
    read, shuffled = Replay.read, []

    def shuffle(replay, *args, **kwargs):
        batch = read(replay, *args, **kwargs)
        order = replay.rng.permutation(batch["reward"].size)
        shuffled.append(len(order))
        return batch | {"reward": batch["reward"].ravel()[order].reshape(batch["reward"].shape)}

    monkeypatch.setattr(Replay, "read", shuffle)
    _, learned = play_toy(kind, tmp_path)
    assert len(shuffled) > 800 and learned < 14.0


def test_the_negative_control_shuffles_what_is_learned_from(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from learning import Shuffled

    spec = {"reward": ((), np.dtype(np.float32)), "is_terminal": ((), np.dtype(bool))}
    spec["is_first"] = (), np.dtype(bool)
    rows, found = np.arange(50, dtype=np.float32), []
    for kind in (Replay, Shuffled):
        rng = np.random.default_rng(0)
        replay = kind(spec, capacity=50, batch=4, length=8, streams=1, rng=rng)
        for x in rows:
            none = np.zeros(1, bool)
            replay.add({"reward": x[None], "is_terminal": none, "is_first": none})
        found.append(WriteBack().sample(replay, None)["reward"])
    assert not np.array_equal(*found)
    assert np.array_equal(*(np.sort(x.ravel()) for x in found))


def status(*words):
    """Exit status of benchmarks/learning.py: 0 if every bar is met, or,
    for the negative control, missed.
    """
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "learning.py"), *words]
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
@pytest.mark.parametrize("dynamics", TYPES)
def test_it_learns(task, dynamics):
    # Tokens as their results were measured: docs/decisions/012.
    tokens = {
        "cartpole": ["--imag.starts", "8", "--actor.entropy", "1e-3"],
        "minatar": ["--actor.entropy", "3e-3"],
    }
    more = ["--", *tokens[task]] if dynamics == "hrvq" else []
    assert status(task, "--dynamics", dynamics, *more) == 0


def test_a_longer_run_is_not_judged_as_a_short_one(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    assert not learning.longer(tmp_path, 100)
    (tmp_path / "config.yaml").write_text("steps: 200\n")
    assert not learning.longer(tmp_path, 200) and learning.longer(tmp_path, 100)
    assert "give --steps 200" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
def test_the_negative_control_does_not(task):
    assert status(task, "--seeds", "0", "--steps", "20000", "--negative-control") == 0
