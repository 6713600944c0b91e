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
    first, second = list(recorded)[:2]  # as long as each other: another one under the same name
    found = probes.cached(first, load_episode(second), config(), tmp_path)
    assert np.array_equal(found[:, columns], recorded[second][:, columns])


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
    encoders = {"knows": knows, "noise": noise}
    found = probes.squares(encoders, chunks[:4], [*chunks[4:], None], names)
    shares = {who: {name: x.shares for name, x in by.items()} for who, by in found.items()}
    for name in ("player x", "ball x"):
        assert shares["knows"][name][:2].max() < 0.01 and np.isnan(shares["knows"][name][2])
        assert shares["noise"][name][:2].min() > 0.7
        assert found["knows"][name].r2 > 0.99 and found["noise"][name].r2 < 0.1
    assert shares["knows"]["blocks hit"][:2].min() > 0.7
    assert np.isnan(shares["knows"]["score"]).all()  # it never changes
    assert np.isnan(found["knows"]["score"].r2)
    compared = probes.compare(
        {"model": found["noise"], "pixels": found["knows"], "untrained": found["noise"]}
    )
    for who, by in (("model", shares["noise"]), ("baseline", shares["knows"])):
        assert np.array_equal(compared[f"{who}/RAM ball x"], by["ball x"], equal_nan=True)


def test_r2_of_the_training_mean_is_zero_whatever_varies_where():
    """A score that is nearly still on held-out episodes is no merit of any probe: in units of the
    variance in training a constant would explain most of it. Steps count alike, not episodes.
    """
    rng = np.random.default_rng(0)
    sizes = (60, 60, 60, 30, 90)  # the last two are held out, 5 and 45 above the training mean
    spans = ((0, 200), (0, 200), (0, 200), (104, 106), (144, 146))
    parts = [rng.integers(*span, (1, n, 128)) for n, span in zip(sizes, spans, strict=True)]
    chunks = [{"ram": x.astype(np.uint8)} for x in parts]
    still = lambda chunk: np.ones((chunk["ram"].shape[1], 1))
    (found,) = probes.squares({"still": still}, chunks[:3], chunks[3:], {"score": 84})[
        "still"
    ].values()
    assert found.r2 == pytest.approx(0.0, abs=1e-6)
    assert found.shares[0] < 0.1 and found.steps.tolist() == [30, 90]
    assert found.each == pytest.approx([0.0, 0.0], abs=1e-6)
    mean = np.concatenate([x[0, :, 84] for x in parts[:3]]).mean()
    assert found.about == pytest.approx([np.square(x[0, :, 84] - mean).sum() for x in parts[3:]])


def test_as_many_steps_are_fitted_on_as_are_asked_for():
    """2,000 were the most, whatever pipeline.probe_steps said."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3500, 100)).round(2)
    ram = np.zeros((3500, 128), np.uint8)
    ram[:, 72] = (128 + 8 * x[:, :20].sum(1) / 20**0.5 + rng.normal(size=3500) * 24).clip(1, 255)
    sides = slice(3000), slice(3000, None)
    train, held = [{"ram": ram[None, side], "x": x[side]} for side in sides]
    encoders = {"who": lambda chunk: chunk["x"]}
    score = lambda *n: probes.squares(encoders, [train], [held], {"player x": 72}, *n)["who"]
    few, default, many = (score(*n)["player x"].r2 for n in ((200,), (), (3000,)))
    assert few < default < many


def test_the_penalty_is_that_of_other_episodes():
    """Features that tell episodes apart, and in each where it is: of the episodes that are fitted
    on they hold the byte, of others nothing. Chosen by single steps, whose neighbours stay, the
    penalty is the smallest, and R2 on other episodes far below 0.
    """
    rng = np.random.default_rng(0)
    chunks = []
    for _ in range(12):
        drift = rng.normal(size=(40, 60)).cumsum(0) + 5 * rng.normal(size=60)  # nothing in common
        byte = (128 + rng.normal(size=40).cumsum() * 6).clip(1, 255).astype(np.uint8)
        ram = np.zeros((1, 40, 128), np.uint8)
        ram[..., 72] = byte
        chunks.append({"ram": ram, "x": drift})
    encoders = {"who": lambda chunk: chunk["x"]}
    (found,) = probes.squares(encoders, chunks[:9], chunks[9:], {"player x": 72})["who"].values()
    assert found.r2 > -0.2
    fold = probes.folds(np.array([3, 3, 8, 8, 9, 9, 9]))
    assert fold.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert probes.folds(np.zeros(10, int)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_penalties_are_those_of_a_search_by_folds():
    """Beside scikit-learn's, with more features than steps and with fewer."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    rng = np.random.default_rng(0)
    fold = np.arange(60) % 5
    for count in (8, 90):
        x = rng.normal(size=(60, count))
        y = np.stack([x[:, 0] + rng.normal(size=60), rng.normal(size=60)], 1)
        errors = []
        for alpha in probes.ALPHAS:
            out = cross_val_predict(Ridge(alpha), x, y, cv=PredefinedSplit(fold))
            errors.append(np.square(out - y).sum(0))
        expected = probes.ALPHAS[np.argmin(errors, 0)]
        assert np.array_equal(probes.penalties(x, y, fold), expected)


def test_a_code_that_never_changed_in_training_says_nothing():
    """Its noise of rounding, scaled to deviations of one,
    would make R2 of -1e11 where it does change.
    """
    rng = np.random.default_rng(0)
    ram = rng.integers(1, 200, (6, 4, 25, 128)).astype(np.uint8)
    chunks = [{"ram": x, "code": 0.5 if i < 4 else -0.5} for i, x in enumerate(ram)]
    still = lambda chunk: chunk["code"] + 1e-8 * rng.normal(size=(100, 3))
    found = probes.squares({"still": still}, chunks[:4], chunks[4:], {"player x": 72})
    assert np.abs(found["still"]["player x"].shares - 1.0).max() < 0.3


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
