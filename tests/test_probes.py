"""RAM probes: the console's memory of recorded episodes,
and what regressions find of it in features.
"""

import numpy as np
import pytest
import torch

import tools
from analysis import offline, probes
from envs import make_env
from hidreamer.episodes import load_episode, save_episode

QUICK = {"task": "atari_breakout", "env.time_limit": 240, "replay.length": 16}


def config(**values):
    return tools.load_config(["atari100k", "debug"], QUICK | values)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """10 episodes of Breakout, played at random, and the RAM along each: {path: (T, 128)}."""
    folder, rng, found = tmp_path_factory.mktemp("recorded"), np.random.default_rng(0), {}
    env = make_env("atari_breakout", config().env.tree(), 3)
    for i in range(10):
        action, out = np.zeros(env.act_dim, np.float32), env.reset()
        steps, ram = [out | {"prev_action": action}], [env.suite.ram()]
        while not out["is_last"]:
            # Often a new ball, so that there is one to find.
            action = np.eye(env.act_dim, dtype=np.float32)[
                rng.choice(env.act_dim, p=(0.1, 0.3, 0.3, 0.3))
            ]
            out = env.step(action)
            steps.append(out | {"prev_action": action}), ram.append(env.suite.ram())
        path = folder / f"{i:07d}-00-{len(steps)}.npz"
        save_episode(path, {key: np.stack([step[key] for step in steps]) for key in steps[0]})
        found[path] = np.stack(ram)
    return found


def test_the_memory_is_recovered(recorded, tmp_path):
    columns = list(probes.BYTES["atari_breakout"].values())
    for path, truth in list(recorded.items())[:4]:
        found = probes.cached(path, load_episode(path), config(), tmp_path)
        assert np.array_equal(found[:, columns], truth[:, columns])
        assert np.array_equal(probes.cached(path, load_episode(path), config(), tmp_path), found)
    assert len(list(tmp_path.iterdir())) == 4 and len(np.unique(truth[:, 72])) > 5


def test_another_picture_is_not_taken_for_this_one(recorded, tmp_path):
    path = next(iter(recorded))
    rows = load_episode(path)
    rows["image"][20, 3, 3] += 1
    assert probes.recover(rows, config()) is None
    assert probes.cached(path, rows, config(), tmp_path) is None
    assert not probes.possible(config(**{"env.atari.sticky": 0.25})) and not probes.possible(
        config(task="atari_alien")
    )


def test_probes_find_what_is_there_and_nothing_else():
    """Features that hold a byte explain it; noise explains nothing;
    a ball counts only while it is in play.
    """
    rng = np.random.default_rng(0)
    ram = rng.integers(1, 200, (6, 4, 25, 128)).astype(np.uint8)
    ram[:, :, ::2, 99] = 0
    ram[:, :, :, 84] = 7
    chunks = [{"ram": x} for x in ram]
    knows = lambda chunk: (
        chunk["ram"].reshape(-1, 128)[:, [72, 99]] @ np.array([[1.0, 1.0], [1.0, -1.0]])
    )
    noise = lambda chunk: np.random.default_rng(int(chunk["ram"].sum())).normal(size=(100, 5))
    names = probes.BYTES["atari_breakout"]
    found = probes.errors({"knows": knows, "noise": noise}, chunks[:4], [*chunks[4:], None], names)
    for name in ("player x", "ball x"):
        assert found["knows"][name][:2].max() < 0.01 and np.isnan(found["knows"][name][2])
        assert found["noise"][name][:2].min() > 0.7
    assert found["knows"]["blocks hit"][:2].min() > 0.7
    assert np.isnan(found["knows"]["score"]).all()  # it never changes
    compared = probes.compare(
        {"model": found["noise"], "pixels": found["knows"], "untrained": found["noise"]}
    )
    assert np.array_equal(compared["model/RAM ball x"], found["noise"]["ball x"], equal_nan=True)
    assert np.array_equal(compared["baseline/RAM ball x"], found["knows"]["ball x"], equal_nan=True)


def test_a_code_that_never_changed_in_training_says_nothing():
    """Its noise of rounding, scaled to deviations of one,
    would make R2 of -1e11 where it does change.
    """
    rng = np.random.default_rng(0)
    ram = rng.integers(1, 200, (6, 4, 25, 128)).astype(np.uint8)
    chunks = [{"ram": x, "code": 0.5 if i < 4 else -0.5} for i, x in enumerate(ram)]
    still = lambda chunk: chunk["code"] + 1e-8 * rng.normal(size=(100, 3))
    found = probes.errors({"still": still}, chunks[:4], chunks[4:], {"player x": 72})
    assert np.abs(found["still"]["player x"] - 1.0).max() < 0.3


def test_a_job_probes_its_model(recorded, tmp_path):
    folder = next(iter(recorded)).parent
    home = tmp_path / "tiny" / "0"
    home.mkdir(parents=True)
    trainer = offline.Trainer(config(), offline.find([str(folder)]), home, torch.device("cpu"))
    trainer.train(2)
    found = trainer.evaluate()
    for name in ("player x", "ball x", "ball y"):
        assert (
            found[f"model/RAM {name}"].shape == (2,)
            and np.isfinite(found[f"model/RAM {name}"]).all()
        )
        assert np.isfinite(found[f"baseline/RAM {name}"]).all()
    assert len(list((tmp_path / "ram").iterdir())) == 10
