"""Mutual information with known values, its null, and levels whose contents are known."""

import numpy as np
import pytest

from analysis import information, levels, readout, summary

RNG = np.random.default_rng


def uniform(n, kinds, seed):
    return RNG(seed).integers(0, kinds, n)


def drifting(lengths, kinds, stay, seed):
    """Each step keeps the value before it with probability ``stay``; episodes are independent."""
    rng, out = RNG(seed), []
    for length in lengths:
        x = rng.integers(0, kinds, length)
        for t in range(1, length):
            x[t] = x[t - 1] if rng.random() < stay else x[t]
        out.append(x)
    return np.concatenate(out)


# ---------------------------------------------------------------- the estimator


def test_identical_variables_have_their_entropy():
    x = uniform(4000, 8, 0)
    assert information.mutual_information(x[:, None], x)[0] == pytest.approx(3.0, abs=0.01)


def test_a_noisy_channel_has_its_capacity():
    """A bit that is flipped with probability 0.11: 1 - H(0.11) = 0.5 bits."""
    x = uniform(40_000, 2, 0)
    y = x ^ (RNG(1).random(len(x)) < 0.11)
    assert information.mutual_information(x[:, None], y)[0] == pytest.approx(0.5, abs=0.015)


def test_the_correction_takes_the_bias_away():
    """Independent: 32 x 8 values of 1,000 steps have 0.15 bits by plugging in, 0 in truth."""
    plugin, corrected = [], []
    for seed in range(20):
        x, y = uniform(1000, 32, seed), uniform(1000, 8, 100 + seed)
        share = np.histogram2d(x, y, (32, 8))[0] / 1000
        outer = share.sum(1, keepdims=True) * share.sum(0)
        plugin.append((share * np.log2(np.where(share > 0, share / outer, 1.0))).sum())
        corrected.append(information.mutual_information(x[:, None], y)[0])
    assert np.mean(plugin) > 0.12
    assert abs(np.mean(corrected)) < 0.1 * np.mean(plugin)


def test_entropy_by_hand():
    """Plug-in ln 2 nats, and (2 - 1) / (2 x 4) for two values in four steps."""
    assert information.entropy(np.array([2, 2])) == pytest.approx((np.log(2) + 1 / 8) / np.log(2))
    assert information.entropy(np.array([5, 0])) == 0.0


def test_each_variable_is_alone_and_missing_factors_are_left_out():
    x, y = np.stack([uniform(2000, 4, 0), uniform(2000, 4, 1)], 1), uniform(2000, 4, 0)
    y[:1000] = -1
    found = information.mutual_information(x, y)
    assert found[0] == pytest.approx(2.0, abs=0.02) and abs(found[1]) < 0.05
    assert (information.mutual_information(x, np.full(2000, -1)) == 0).all()


def test_factors_are_cut_where_they_are_many():
    x = RNG(0).normal(size=1000)
    x[:100] = np.nan
    classes = information.discretise(x)
    assert (classes[:100] == -1).all() and set(classes[100:]) == set(range(information.BINS))
    assert np.bincount(classes[100:]).min() > 100  # quantiles
    assert information.discretise(np.array([3.0, 3.0, 7.0])).tolist() == [0, 0, 1]


# ---------------------------------------------------------------- the null


def test_no_episode_keeps_its_own():
    lengths = [5, 3, 8, 2]
    own = np.repeat(np.arange(4), lengths)
    for seed in range(50):
        other = information.other_episodes(lengths, RNG(seed))
        assert len(other) == 18 and (own[other] != own).all()
        for i in range(4):  # each of them runs on from its first step
            steps = other[own == i]
            start = np.flatnonzero(own == own[steps[0]])[0]
            assert (steps - start == np.arange(len(steps)) % lengths[own[start]]).all()


def test_drift_is_no_information():
    """Series that drift by themselves: whole episodes find nothing, shuffled steps would."""
    lengths, claims, naive = [60] * 12, 0, 0
    for seed in range(60):
        x, y = drifting(lengths, 4, 0.97, seed), drifting(lengths, 4, 0.97, 1000 + seed)
        found = information.table({"L0": x[:, None]}, {"f": y}, lengths, permutations=60)
        claims += found.p[0, 0] <= information.LEVEL
        rng = RNG(seed)
        null = [
            information.mutual_information(x[:, None], rng.permutation(y))[0] for _ in range(60)
        ]
        naive += found.bits[0, 0] > np.quantile(null, 0.95)
    assert claims <= 8 and naive > 40  # of 60


def test_the_whole_table_claims_one_time_in_twenty():
    """Twelve cells without anything in them: the chance that any is claimed stays small."""
    lengths, wrong = [40] * 12, 0
    for seed in range(40):
        codes = {f"L{i}": drifting(lengths, 6, 0.9, 10 * seed + i)[:, None] for i in range(3)}
        factors = {str(i): drifting(lengths, 5, 0.9, 5000 + 10 * seed + i) for i in range(4)}
        wrong += (information.table(codes, factors, lengths, permutations=60).p <= 0.05).any()
    assert wrong <= 6  # of 40; 2 are expected


def test_what_is_planted_is_found():
    lengths = [50] * 12
    slow, fast = drifting(lengths, 8, 0.95, 0), uniform(600, 10, 1)
    noisy = np.where(RNG(3).random(600) < 0.3, uniform(600, 10, 2), fast)
    codes = {"L0": slow[:, None], "L1": noisy[:, None]}
    factors = {"scene": slow, "sprite": fast.astype(float)}
    found = information.table(codes, factors, lengths)
    assert (np.diag(found.p) <= 0.05).all() and found.p[0, 1] > 0.05 and found.p[1, 0] > 0.05
    assert found.bits[0, 0] == pytest.approx(found.entropy[0], abs=0.05)
    assert found.bits[1, 1] < found.entropy[1]


def test_one_episode_cannot_be_exchanged():
    with pytest.raises(ValueError, match="two"):
        information.other_episodes([10], RNG(0))


# ---------------------------------------------------------------- levels


def world(seed, episodes=30, length=40):
    """Two slow scene-like factors and two fast sprite-like ones, and their episodes."""
    lengths = [length] * episodes
    coarse = {f"scene {i}": drifting(lengths, 6, 0.95, 10 * seed + i) for i in range(2)}
    fine = {f"sprite {i}": drifting(lengths, 8, 0.3, 10 * seed + 5 + i) for i in range(2)}
    return coarse | fine, np.repeat(np.arange(episodes), length)


def codes_of(factors, names, seed, noise=0.15):
    """A level with a variable for each named factor, sometimes wrong, and two of noise."""
    rng, out = RNG(seed), []
    for name in names:
        x = factors[name]
        out.append(np.where(rng.random(len(x)) < noise, rng.integers(0, 8, len(x)), x))
    count = len(next(iter(factors.values())))
    return np.stack([*out, *rng.integers(0, 8, (2, count))], 1)


def hot(codes):
    return np.eye(8)[codes].reshape(len(codes), -1)


def judged(codes, factors, episode):
    y = np.stack(list(factors.values()), 1).astype(float)
    first = [name.startswith("scene") for name in factors]
    # Which of eight values it is, by its place, so that a straight line has something to find.
    return levels.contrast(hot(codes["L0"]), hot(codes["L1"]), y, first, episode)


def test_planted_levels_are_found():
    factors, episode = world(0)
    coarse, fine = list(factors)[:2], list(factors)[2:]
    codes = {"L0": codes_of(factors, coarse, 1), "L1": codes_of(factors, fine, 2)}
    found = levels.disentangle(codes, (8, 8), factors, episode)
    assert found.top.tolist() == [0, 0, 1, 1]
    assert (found.mig > 0.4).all() and (found.mig_p <= 0.05).all()
    assert (found.completeness > 0.9).all()
    planted = found.importance_p <= 0.05
    assert planted.tolist() == [[True, True, False, False], [False, False, True, True]]
    verdict = judged(codes, factors, episode)
    assert verdict.supported and verdict.divided and verdict.value > 0.5
    swapped = judged({"L0": codes["L1"], "L1": codes["L0"]}, factors, episode)
    assert swapped.supported and swapped.value == pytest.approx(-verdict.value)


def test_levels_that_hold_the_same_are_no_hierarchy():
    """Everything in both: nothing is told apart, however much is known."""
    factors, episode = world(1)
    codes = {f"L{i}": codes_of(factors, list(factors), i) for i in range(2)}
    found = levels.disentangle(codes, (8, 8), factors, episode)
    assert (found.informative_p <= 0.05).all()
    assert (found.mig < 0.1).all()
    assert (found.completeness[np.isfinite(found.completeness)] < 0.5).all()
    assert abs(judged(codes, factors, episode).value) < 0.1


def test_without_structure_none_is_claimed():
    """Levels that drift by themselves: in ten worlds next to nothing is claimed."""
    contrasts, cells = 0, 0
    for seed in range(10):
        factors, episode = world(seed)
        lengths = np.bincount(episode)
        codes = {}
        for i in range(2):
            parts = [drifting(lengths, 8, 0.9, 900 + 50 * seed + 10 * i + j) for j in range(3)]
            codes[f"L{i}"] = np.stack(parts, 1)
        found = levels.disentangle(codes, (8, 8), factors, episode, permutations=40)
        cells += (found.mig_p <= 0.05).any() + (found.importance_p <= 0.05).any()
        contrasts += judged(codes, factors, episode).supported
    assert contrasts <= 1 and cells <= 3


def test_mig_and_dci_by_hand():
    bits = np.array([[2.0, 0.5], [1.0, 0.5]])
    assert levels.mig(bits, np.array([2.0, 1.0])) == pytest.approx([0.5, 0.0])
    assert levels.mig(bits[:1], np.array([2.0, 1.0])) == pytest.approx([1.0, 0.5])  # a single level
    apart, complete = levels.dci(np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    assert apart == pytest.approx([1.0, 1.0 - np.log(2) / np.log(3)])
    assert complete == pytest.approx([1.0, 1.0, 1.0])
    assert np.isnan(levels.dci(np.array([[0.0, 0.0], [1.0, 1.0]]))[0][0])


def test_a_contrast_is_supported_beyond_its_control_alone():
    nothing = np.zeros((2, 3))
    found = levels.Contrast(nothing, nothing, nothing, 0.2, 0.05, 0.3, (-0.1, 0.1), nothing)
    assert not found.supported and found._replace(low=0.15).supported
    below = found._replace(low=-0.3, high=-0.05)
    assert not below.supported and below._replace(high=-0.15).supported


def test_a_group_without_factors_has_no_contrast():
    factors, episode = world(2, episodes=10)
    codes = {f"L{i}": codes_of(factors, list(factors), i) for i in range(2)}
    y = np.stack(list(factors.values()), 1).astype(float)
    found = levels.contrast(hot(codes["L0"]), hot(codes["L1"]), y, [True] * 4, episode, shuffles=2)
    assert found.value is None and not found.supported and not found.divided


# ---------------------------------------------------------------- probes


def read(x, y, episode):
    return readout.scores(x, y[:, None] if y.ndim == 1 else y, episode)


def walk(seed=0, episodes=25, length=60):
    """Features that hold a position on a ring, which moves by one step in either direction."""
    rng = RNG(seed)
    place = np.concatenate(
        [np.cumsum(rng.choice([-1, 1], length)) + rng.integers(12) for _ in range(episodes)]
    )
    angle = 2 * np.pi * place / 12
    x = np.stack([np.sin(angle), np.cos(angle)], 1) + 0.05 * rng.normal(size=(len(place), 2))
    return x, np.sin(angle), np.repeat(np.arange(episodes), length)


def test_a_network_is_no_worse_than_the_line_and_the_mean_that_it_contains():
    """On Pong's screen it read the enemy's score with an R2 of -2.78, a line with .99."""
    rng = RNG(3)
    episode = np.repeat(np.arange(15), 20)
    x = rng.normal(size=(300, 400)) * (rng.random((300, 400)) < 0.05)  # few steps, rare numbers
    x[:, 0] = rng.normal(size=300) * 3.0
    y = np.stack([x[:, 0], rng.normal(size=300)], 1)
    found = read(x, y, episode)
    assert found["linear"][0] > 0.4
    assert (found["mlp"] > found["linear"] - 0.05).all() and found["mlp"][1] > -0.1, found


def test_a_label_shifted_by_one_step_is_read_worse():
    x, y, episode = walk()
    right = read(x, y, episode)
    for shift in (-1, 1):
        shifted = read(x, np.roll(y, shift), episode)
        for kind in ("linear", "mlp"):
            assert right[kind][0] > 0.95 and shifted[kind][0] < right[kind][0] - 0.1, (kind, shift)


def test_what_is_not_there_is_not_read():
    x, _, episode = walk()
    y = walk(seed=9)[1]
    found = read(x, y, episode)
    assert found["linear"][0] < 0.1 and found["mlp"][0] < 0.1


def test_a_network_reads_what_a_line_cannot():
    rng = RNG(0)
    x = rng.normal(size=(2400, 3))
    found = read(x, x[:, 0] * x[:, 1], np.repeat(np.arange(40), 60))
    assert found["linear"][0] < 0.1 and found["mlp"][0] > 0.6


def test_episodes_never_stand_on_two_sides():
    """Features that name their episode, and a label of each episode's own, cannot be learned."""
    rng, episode = RNG(0), np.repeat(np.arange(25), 40)
    found = read(np.eye(25)[episode], rng.normal(size=25)[episode], episode)
    assert found["linear"][0] < 0.3 and found["mlp"][0] < 0.3
    by = readout.split(episode)
    for i in range(25):
        assert sum(side[episode == i].any() for side in by) == 1


def test_features_beyond_their_number_and_missing_values():
    """More features than steps, labels at some steps only, features at some steps only."""
    rng, episode = RNG(0), np.repeat(np.arange(20), 20)
    wide = rng.normal(size=(400, 600))
    y = np.stack([wide[:, 0], wide[:, 1], np.full(400, np.nan), np.full(400, 3.0)], 1)
    y[::2, 1] = np.nan
    x = np.concatenate([5.0 * wide[:, :2], 0.01 * wide[:, 2:]], 1)
    x[:20] = np.nan
    few = readout.scores(x[:, :2], y, episode)["linear"]
    assert few[0] > 0.99 and few[1] > 0.99 and np.isnan(few[2:]).all()
    assert np.isfinite(readout.scores(x, y, episode)["linear"][:2]).all()
    constant = readout.scores(np.ones((400, 3)), y, episode)["linear"]
    assert constant[0] == 0.0 and np.isnan(constant[2])


def test_a_factor_that_is_there_at_some_steps_is_read_at_those():
    """Features whose mean is another where the factor is: without an intercept of its own a
    regression on these steps spends its weights on the mean.
    """
    rng, episode = RNG(0), np.repeat(np.arange(40), 50)
    place, there = rng.uniform(size=2000), rng.uniform(size=2000) < 0.6
    x = np.where(there, 2.0 + place, 0.0)[:, None]
    y = np.where(there, place, np.nan)[:, None]
    assert read(x, y, episode)["linear"][0] > 0.99
    error, total = readout.cross_fitted(x, y, episode, penalty=1.0)
    assert 1.0 - error.sum() / total.sum() > 0.98


def test_a_line_says_which_information_is_an_untrained_models_too():
    cell = {"bits": 0.3, "chance": 0.1, "p": 0.01}
    cells = {"ball x": cell | {"untrained": 0.1}, "ball y": cell | {"untrained": 0.3}}
    entropy = {"ball x": 1.0, "ball y": 2.0}
    run = {"information": {"levels": {"L0": cells}, "entropy": entropy}}
    (line,) = summary.information_lines({"runs": {"hrvq/0": run}})
    assert "every factor is shown" in line
    assert line.endswith("An untrained model tells as much of ball y.")


def test_ridge_is_sklearns():
    from sklearn.linear_model import Ridge

    rng, episode = RNG(0), np.repeat(np.arange(20), 30)
    x, y = rng.normal(size=(600, 12)), rng.normal(size=(600, 1))
    y[:, 0] += x[:, 0]
    by = readout.split(episode)
    z = (x - x[by.train].mean(0)) / x[by.train].std(0)
    fits = [Ridge(alpha=a).fit(z[by.train], y[by.train, 0]) for a in readout.PENALTIES]
    errors = [np.square(fit.predict(z[by.valid]) - y[by.valid, 0]).sum() for fit in fits]
    expected = fits[int(np.argmin(errors))].score(z[by.test], y[by.test, 0])
    # scikit-learn's score is about the test mean, ours about the training mean
    test, mean = y[by.test, 0], y[by.train, 0].mean()
    rest = (1.0 - expected) * np.square(test - test.mean()).sum()
    assert read(x, y[:, 0], episode)["linear"][0] == pytest.approx(
        1.0 - rest / np.square(test - mean).sum(), abs=1e-3
    )
