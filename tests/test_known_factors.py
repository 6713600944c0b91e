"""The world of known factors: what it is, and that only what is in codes is said of them."""

import json
import sys

import numpy as np
import pytest
from test_information import drifting

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import factors as benchmark


def episodes(count, predictable, seed=0):
    rng = np.random.default_rng(seed)
    return [benchmark.episode(rng, predictable) for _ in range(count)]


def test_the_board_shows_every_factor():
    rows, known = episodes(1, 0.9)[0]
    assert rows["grid"].shape == (benchmark.LENGTH, 10, 10, 4)
    for t in range(benchmark.LENGTH):
        assert np.argwhere(rows["grid"][t, ..., 2]).tolist() == [
            [known["sprite y"][t], known["sprite x"][t]]
        ]
        assert np.argwhere(rows["grid"][t, ..., 3]).tolist() == [[9, known["own x"][t]]]
    for plane, name in enumerate(
        ("scene", "season")
    ):  # one pattern for each value, and half the cells
        boards = {x: rows["grid"][known[name] == x][..., plane] for x in set(known[name])}
        assert all(
            (board == board[0]).all() and 0.3 < board.mean() < 0.7 for board in boards.values()
        )


def test_the_dial_is_how_often_factors_do_as_they_should():
    for predictable in (0.5, 0.9):
        right, stays, own = [], [], []
        for rows, known in episodes(60, predictable):
            right.append((known["sprite x"][1:] - known["sprite x"][:-1]) % 10 == 1)
            stays.append(known["scene"][1:] == known["scene"][:-1])
            move = rows["prev_action"][1:].argmax(1) - 1
            own.append((known["own x"][1:] - known["own x"][:-1] - move) % 10 == 0)
        for seen in (right, own):  # one value in ten comes out right by chance
            assert np.mean(seen) == pytest.approx(predictable + (1 - predictable) / 10, abs=0.03)
        slow = 1 - (1 - predictable) / 10
        assert np.mean(stays) == pytest.approx(slow + (1 - slow) / 6, abs=0.02)


def onehot(codes, classes):
    return np.eye(classes)[codes].reshape(len(codes), -1)


def judged(codes, known, episode, classes=12):
    ends = [onehot(codes["L0"], classes), onehot(codes["L1"], classes)]
    return benchmark.judge_codes(codes, [classes] * 2, known, episode, ends)


@pytest.fixture(scope="module")
def world():
    data = episodes(benchmark.HELD, 0.9)
    known = {name: np.concatenate([x[name] for _, x in data]) for name in benchmark.FACTORS}
    return known, np.repeat(np.arange(benchmark.HELD), benchmark.LENGTH)


def noise(known, names, seed):
    rng, out = np.random.default_rng(seed), []
    for name in names:
        x = known[name]
        wrong = rng.random(len(x)) < 0.2
        out.append(np.where(wrong, rng.integers(0, 12, len(x)), x))
    return np.stack(out, 1)


COARSE = [name for name, (_, coarse) in benchmark.FACTORS.items() if coarse]
FINE = [name for name in benchmark.FACTORS if name not in COARSE]


def test_planted_levels_are_said(world):
    known, episode = world
    found = judged({"L0": noise(known, COARSE, 1), "L1": noise(known, FINE, 2)}, known, episode)
    assert found["says"][-1].startswith("divided: L0 holds more of coarse, L1 of fine (contrast +")
    json.dumps(found)  # plain numbers alone
    assert found["says"][0] == "L0 holds scene, season"
    assert found["says"][1] == "L1 holds sprite x, sprite y, own x"
    best = {name: x["best level"] for name, x in found["factors"].items()}
    assert best == dict.fromkeys(COARSE, "L0") | dict.fromkeys(FINE, "L1")
    assert all(x["MIG p"] <= 0.05 for x in found["factors"].values())


def test_levels_that_hold_everything_are_not_said_to_divide_it(world):
    """In eight pairs of levels at most one comes out divided: intervals are of 95%."""
    known, episode = world
    everything, divided = list(known), 0
    y, coarse = benchmark.onehots(known)
    for seed in range(8):
        codes = [noise(known, everything, 100 * seed + i) for i in range(2)]
        ends = [onehot(x, 12) for x in codes]
        divided += benchmark.levels.contrast(*ends, y, coarse, episode, shuffles=4).supported
    assert divided <= 1
    found = judged(dict(zip(("L0", "L1"), codes, strict=True)), known, episode)
    assert found["says"][-1].startswith("no division of coarse and fine is shown")
    assert all(line.endswith(", ".join(everything)) for line in found["says"][:2])
    assert max(x["MIG"] for x in found["factors"].values()) < 0.1


def test_more_of_one_kind_in_the_same_level_is_no_division(world):
    """L0 holds everything, L1 a little of the fine factors: they divide nothing."""
    known, episode = world
    rng = np.random.default_rng(5)
    vague = {
        name: np.where(rng.random(len(x)) < 0.5, rng.permutation(x), x) for name, x in known.items()
    }
    codes = {"L0": noise(known, list(known), 1), "L1": noise(vague, FINE, 2)}
    found = judged(codes, known, episode)
    json.dumps(found)
    assert found["says"][-1].startswith(
        "L0 holds more of coarse and of fine than L1, most of coarse,"
        " the levels do not divide the factors"
    )


def test_a_negative_contrast_says_which_level_holds_more(tmp_path):
    """More of the coarse in L1 is not more of the fine in L0; stored figures are reworded so."""
    cell = {"R2": 0.9, "p": 0.01}
    contrast = {"value": -0.13, "supported": True, "divided": False}
    contrast |= {"coarse": [-0.13, -0.15, -0.11], "fine": [0.0, 0.0, 0.0002]}
    levels = {name: {"holds": {"scene": cell}} for name in ("L0", "L1")}
    found = {"levels": levels, "factors": {}, "contrast": contrast, "says": ["L0 leans to fine"]}
    run = {"dynamics": "hrssm", "predictable": 0.5, "seed": 0}
    report = {"made": {"command": "a", "commit": "b", "hardware": "c"}, "runs": [run]}
    run |= {"trained": found, "untrained": found}
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(report))
    assert benchmark.main(["--reword", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert "L1 holds more of coarse than L0, the levels do not divide the factors" in text
    assert "leans" not in text and "a`, commit b" in text
    contrast |= {"coarse": [0.0, -0.01, 0.01], "fine": [0.13, 0.11, 0.15]}
    assert "L0 holds more of fine than L1, the levels" in benchmark.sentences(found)[2]


def test_codes_that_only_drift_hold_nothing(world):
    known, episode = world
    lengths = np.bincount(episode)
    codes = {
        f"L{i}": np.stack([drifting(lengths, 12, 0.95, 77 + 10 * i + j) for j in range(4)], 1)
        for i in range(2)
    }
    found = judged(codes, known, episode)
    assert found["says"][:2] == [f"L{i} holds nothing that is shown" for i in range(2)]
    assert found["says"][2].startswith("no division of coarse and fine is shown")


def test_what_no_level_holds_is_said(world):
    """A contrast alone would read as if one of them held the fine factors."""
    known, episode = world
    codes = {"L0": noise(known, COARSE, 1), "L1": noise(known, COARSE[:1], 2)}
    assert judged(codes, known, episode)["says"][-1] == "no level holds anything fine"


def test_the_table_has_every_run(world, tmp_path):
    known, episode = world
    found = judged({"L0": noise(known, COARSE, 1), "L1": noise(known, FINE, 2)}, known, episode)
    for cell in found["factors"].values():
        cell["R2 with memory"] = 0.5
    run = {"dynamics": "hrssm", "predictable": 0.9, "seed": 0, "trained": found, "untrained": found}
    made = {"command": "python benchmarks/factors.py", "commit": "abc", "hardware": "a machine"}
    text = benchmark.table({"runs": [run], "made": made})
    assert text.count("| hrssm, ") == 2 and "abc" in text


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", ["rssm", "hrssm", "hrvq"])
def test_a_trained_state_holds_the_scene(dynamics):
    """Minutes: after 2,000 updates the scene, which most cells depend on, is told by the codes."""
    data = episodes(benchmark.EPISODES + benchmark.HELD, 0.9)
    train = [rows for rows, _ in data[: benchmark.EPISODES]]
    held, known = (list(x) for x in zip(*data[benchmark.EPISODES :], strict=True))
    scores = {}
    for updates in (0, 2000):
        model = benchmark.train(dynamics, train, updates, 0).world_model
        scores[updates] = benchmark.judge(model, held, known)["factors"]["scene"]
    assert scores[2000]["p"] <= 0.05
    assert scores[2000]["R2 of all levels"] > scores[0]["R2 of all levels"] + 0.2
