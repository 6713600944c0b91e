"""The numbers of a report, by hand and against rliable and scipy; what it claims;
the page in a real browser.
"""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import scipy.stats
from rliable import library, metrics

import run_comparison
import tools
from comparison import fairness, figures, runs, stats, summary, words
from hidreamer.provenance import note_start

MODELS = ("tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def write_run(folder, returns, model, seed, task="dummy_vector", steps=1000, **overrides):
    """A run folder as dreamer.py leaves it (without checkpoints),
    its episodes ending at even intervals.
    """
    values = {
        "task": task,
        "seed": seed,
        "steps": steps,
        "replay.prefill": steps // 20,
        "env.action_repeat": 1,
    }
    config = tools.load_config(["debug", model], values | overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(tools.dump_yaml(config.tree()))
    (folder / "starts.jsonl").write_text(
        json.dumps({"model": model, "commit": "abc", "hardware": "a machine"}) + "\n"
    )
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for i, value in enumerate(returns, 1):
            record = {"step": i * steps // len(returns), "train_return": float(value)}
            file.write(json.dumps(record) + "\n")
            rates = {
                "perf/frames_per_s": 50.0,
                "perf/updates_per_s": 5.0,
                "perf/peak_mb": 300.0 + seed,
            }
            file.write(json.dumps({"step": record["step"], "kl_0": 3.0, **rates}) + "\n")
        file.write(json.dumps({"step": steps, "eval_return": float(value)}) + "\n")


def report(folder, *args):
    status = run_comparison.main(
        ["--from", str(folder), "--logdir", str(folder / "report"), *map(str, args)]
    )
    path = folder / "report" / "summary.json"
    return status, json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------- statistics


def test_one_run_by_hand():
    episodes = np.array([[100, 1.0], [500, 2.0], [920, 4.0], [1000, 8.0], [1010, 99.0]])
    assert stats.final_return(episodes, 1000) == 6.0  # of those in (900, 1000]
    assert stats.final_return(episodes[:2], 1000) == 2.0  # none ended late: the last one
    together = np.array([[100, 9.0], [796, 1.0], [800, 2.0], [804, 6.0]])  # of three environments
    assert stats.final_return(together, 1000) == 3.0
    assert np.isnan(stats.final_return(np.zeros((0, 2)), 1000))
    curve = stats.curve(episodes, 1000)
    assert curve.tolist() == [1.0] * 9 + [2.0] * 9 + [
        4.0,
        8.0,
    ]  # parts of 50 frames; empty ones repeat the last
    assert (
        stats.steps_to(curve, 1.0, 1000) == 50.0 and stats.steps_to(curve, 1.0, 1000, 50.0) == 100.0
    )
    assert stats.steps_to(curve, 3.0, 1000) == 950.0 and stats.steps_to(curve, 9.0, 1000) == np.inf
    # one long episode tells nothing of the parts before its end, though they are drawn like it
    late = stats.curve(np.array([[620.0, 5.0]]), 1000)
    assert (late == 5.0).all() and stats.steps_to(late, 1.0, 1000, 50.0, 620.0) == 650.0
    # seconds: an episode at the very end of a budget that is no whole number is in the last part
    budgets = np.random.default_rng(0).uniform(1.0, 1e5, 100).tolist()
    last = [stats.curve(np.array([[0.1, 0.0], [budget, 1.0]]), budget)[-1] for budget in budgets]
    assert last == [1.0] * 100


def test_a_part_with_several_episodes_has_their_mean():
    found = stats.curve(np.array([[10, 1.0], [40, 3.0], [120, 5.0]]), 1000)
    assert found.tolist() == [2.0] * 2 + [5.0] * 18


def test_what_could_have_been_seen_by_hand():
    """Power 80% at the interval's own level, of errors that are not 1."""
    found = stats.compare([np.array([3.0, 4.0, 6.0])], [np.array([1.0, 2.0, 2.5, 0.0])], 1)
    t = lambda p: scipy.stats.t.ppf(p, found.freedom)
    error = (found.high - found.value) / t(0.975)
    assert found.detectable == pytest.approx((t(0.975) + t(0.8)) * error)


def test_a_median_of_censored_times_is_never_half_way_to_nowhere():
    assert stats.median_steps(np.array([100.0, np.inf]), 1000)["value"] > 1000
    assert stats.median_steps(np.array([100.0, 200.0, np.inf]), 1000)["value"] == 200.0


def test_aggregates_are_rliables():
    x = np.random.default_rng(0).normal(size=(4, 3))
    assert stats.iqm(x[..., None]) == pytest.approx(metrics.aggregate_iqm(x))
    found = stats.estimate(x, metrics.aggregate_iqm)
    np.random.seed(0)
    fn = lambda s: np.array([metrics.aggregate_iqm(s)])
    points, intervals = library.get_interval_estimates({"m": x}, fn, reps=2000)
    assert (found["low"], found["high"]) == tuple(intervals["m"][:, 0]) and found[
        "value"
    ] == points["m"][0]
    taus = np.linspace(-2, 2, 9)
    assert stats.profile(x, taus)["value"] == pytest.approx([(x > tau).mean() for tau in taus])


@pytest.mark.parametrize(("runs", "others", "tasks"), [(1, 4, 3), (3, 7, 2), (8, 8, 1), (5, 5, 5)])
def test_what_is_bootstrapped_are_rliables_statistics(runs, others, tasks):
    """With ties."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 6, (n, tasks)).astype(float) for n in (runs, others))
    assert stats.AGGREGATES["IQM"](x) == pytest.approx(metrics.aggregate_iqm(x))
    expected = metrics.probability_of_improvement(x, y)
    assert stats.probability_of_improvement(x, y) == pytest.approx(expected)


def test_the_global_random_state_is_left_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    stats.estimate(np.arange(3.0)[:, None], np.mean)
    assert np.array_equal(np.random.get_state()[1], before)


def test_probability_of_improvement_by_hand():
    found = stats.improvement(np.array([[3.0], [1.0]]), np.array([[0.0], [1.0]]))
    assert found["value"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)  # the tie counts half
    assert found["low"] <= found["value"] <= found["high"]


def test_single_runs_have_no_interval():
    assert stats.estimate(np.ones((1, 2)), np.mean)["low"] is None
    found = stats.compare([np.ones(1)], [np.zeros(3)], 1)
    assert found.low is None and not found.claimed


def test_the_difference_is_welchs():
    x, y = np.array([3.0, 4.0, 6.0]), np.array([1.0, 2.0, 2.5, 0.0])
    found = stats.compare([x], [y], 1)
    expected = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    wider = stats.compare([x], [y], 2)  # Bonferroni
    expected = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.975)
    assert (wider.low, wider.high) == pytest.approx(tuple(expected))


def test_two_tasks_are_strata_by_hand():
    """The difference is the mean of the tasks' and its variance a quarter of the sum of theirs."""
    x, y = (
        [np.array([1.0, 3.0]), np.array([10.0, 12.0])],
        [np.array([0.0, 2.0]), np.array([10.0, 10.0])],
    )
    found = stats.compare(x, y, 1)
    variances = np.array([2.0, 2.0, 2.0, 0.0]) / 2.0 / 4.0
    freedom = variances.sum() ** 2 / (variances**2).sum()  # one degree each
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum())
    assert found.value == 1.0 and (found.low, found.high) == pytest.approx((1.0 - half, 1.0 + half))


def test_the_permutation_test_counts_every_split():
    x, y = np.array([5.0, 7.0, 6.5]), np.array([1.0, 6.0, 3.0])
    pool, seen = np.concatenate([x, y]), x.mean() - y.mean()
    splits = [set(c) for c in itertools.combinations(range(6), 3)]
    means = [
        np.mean(pool[list(s)]) - np.mean(pool[[i for i in range(6) if i not in s]]) for s in splits
    ]
    exact = np.mean(np.abs(means) >= abs(seen) - 1e-9)
    assert stats.permutation([x], [y]) == pytest.approx(exact, abs=0.01)
    assert stats.least([x], [y]) == pytest.approx(0.1)  # 2 of 20 splits
    assert stats.permutation([x + 100.0], [y]) == pytest.approx(0.1, abs=0.01)
    assert words.enough(0.05, 1) == 4  # 2 of 70


def test_seeds_for():
    """The power of a t test with known spread, solved for the number of runs."""
    t, normal = scipy.stats.t.ppf, scipy.stats.norm.ppf

    def needed(n, effect):  # of standard deviation 1
        freedom = 2 * (n - 1)
        return t(0.975, freedom) + t(0.8, freedom) <= effect / np.sqrt(2 / n)

    for seeds, effect in itertools.product((2, 3, 8), (0.5, 1.0, 2.0)):
        freedom = 2 * (seeds - 1)
        detectable = (t(0.975, freedom) + t(0.8, freedom)) * np.sqrt(2 / seeds)
        found = {"detectable": detectable, "freedom": freedom, "alpha": 0.05}
        exact = next(n for n in range(2, 200) if needed(n, effect))
        assert stats.seeds_for(found, effect, seeds) == exact
    asymptotic = 2 * (normal(0.975) + normal(0.8)) ** 2 / 0.01**2
    assert stats.seeds_for(found, 0.01, 8) == pytest.approx(asymptotic, rel=0.001)


def test_a_trained_agents_episode_is_no_random_play():
    """It was taken for it on MinAtar Freeway, whose first episodes end long after the prefill."""
    ends = np.array([[150, 1.0], [300, 2.0], [390, 3.0], [2500, 9.0]])
    returns = {0: [1.0], 1: [2.0, 3.0], 3: []}
    for first, expected in returns.items():
        run = SimpleNamespace(
            config={"replay.prefill": 100, "env.action_repeat": 2},
            get={"train_return": ends[first:]}.get,
        )
        assert summary.random_returns(run).tolist() == expected
    for until, frames in (
        (2000, 2000),
        (0, 3000),
        (50, 200),
    ):  # a run that goes on at random, or to the end
        expl = {"expl.behavior": "random", "expl.until": until, "steps": 3000}
        run = SimpleNamespace(config={"replay.prefill": 100, "env.action_repeat": 2} | expl)
        assert summary.random_until(run) == frames


def test_a_small_number_is_not_shown_as_none():
    shown = {0.0999999: "0.100", 1.8e-7: "1.80e−07", -3e-9: "−3.00e−09", 0.0: "0"}
    assert {x: words.number(x) for x in shown} == shown


def test_the_least_p_of_unequal_numbers_of_runs():
    """Three against four: no other split is as far as the complete one, so p is 1 of 35."""
    x, y = [np.array([10.0, 11.0, 12.0])], [np.array([0.0, 1.0, 2.0, 3.0])]
    assert stats.least(x, y) == pytest.approx(1 / 35)
    assert stats.permutation(x, y) == pytest.approx(1 / 35, abs=0.005)
    found = stats.compare(x, y, 1)
    assert found.claimed and found.least_p <= found.alpha


def takes_off(rng, n):
    """Runs that either learn or do not: nothing like a normal distribution."""
    return (rng.random(n) < 0.5) * 5.0 + 0.2 * rng.normal(size=n)


@pytest.mark.parametrize(
    "kind", [lambda rng, n: rng.normal(size=n), takes_off], ids=["normal", "takes off"]
)
@pytest.mark.parametrize("seeds", [4, 6])
def test_without_an_effect_none_is_claimed(kind, seeds, monkeypatch):
    """At most one in twenty comparisons of three equal models claims anything;
    with an effect nearly all do.
    """
    monkeypatch.setattr(stats, "SHUFFLES", 1000)
    rng, trials = np.random.default_rng(seeds), 1000
    claims = lambda x, y: stats.compare(x, y, 2).claimed
    false = 0
    for _ in range(trials):
        base, *others = ([kind(rng, seeds)] for _ in range(3))
        false += any(claims(x, base) for x in others)
    assert false / trials <= 0.05
    found = [claims([kind(rng, 6) + 20.0], [kind(rng, 6)]) for _ in range(50)]
    assert np.mean(found) > 0.9


def test_settings_of_an_objective_without_a_weight_make_no_difference():
    """A run from before a default of theirs changed can stand beside one from after it."""
    config = lambda weight, units: {"model.losses.ac_cpc": weight, "model.ac_cpc.units": units}
    found = lambda one, other: set(fairness.differences({"a": config(*one), "b": config(*other)}))
    assert found((0.0, 512), (0.0, 0)) == set()
    assert found((1.0, 512), (1.0, 0)) == {"model.ac_cpc.units"}
    assert found((1.0, 512), (0.0, 0)) == {"model.losses.ac_cpc"}  # as --vary compares them


def test_two_samples_by_hand():
    """Mean squares: seeds 24, episodes 14, what is left 2."""
    x = np.array([[0.0, 2.0, 4.0], [4.0, 4.0, 10.0]])
    of_seeds, of_episodes = scipy.stats.t.ppf(0.975, [1, 2])
    half = math.sqrt((of_seeds**2 * 24 + of_episodes**2 * (14 - 2)) / 6)
    assert stats.two_way(x) == pytest.approx((4.0, 4.0 - half, 4.0 + half))


def test_a_model_that_is_too_small_is_not_matched_either():
    of = lambda size: fairness.warnings({"a": {"parameters": 100}, "b": {"parameters": size}})
    assert of(96) == of(104) == []
    assert ["−6%" in line for line in of(94)] == ["+6%" in line for line in of(106)] == [True]


def test_levels_are_of_the_last_tenth():
    run = {"seed": 0, "levels": {"kl_0": [9.0] * 18 + [1.0, 3.0]}}
    assert summary.level_means({"task": {"m": [run]}}, "m")["kl_0"]["last"]["value"] == 2.0


def test_paired_differences():
    exact = stats.two_way(np.full((3, 4), 2.0))
    assert exact == pytest.approx((2.0, 2.0, 2.0))
    # Without an effect of seeds or of their meeting episodes it is the paired t test over episodes.
    episodes = np.array([1.0, 2.0, 4.0, 3.0])
    low, high = scipy.stats.t.interval(0.95, 3, episodes.mean(), scipy.stats.sem(episodes))
    assert stats.two_way(np.tile(episodes, (3, 1))) == pytest.approx((2.5, low, high))
    rng, false = np.random.default_rng(0), 0
    for _ in range(1000):
        x = (
            0.3 * rng.normal(size=(3, 1))
            + 0.7 * rng.normal(size=(1, 20))
            + 0.7 * rng.normal(size=(3, 20))
        )
        _, low, high = stats.two_way(x)
        false += low > 0 or high < 0
    assert false / 1000 <= 0.05


# ---------------------------------------------------------------- reports of synthetic runs


def returns(rng, top):
    """40 episodes that rise from 0 to about ``top``."""
    return top / (1.0 + np.exp(-(np.arange(40) - rng.uniform(8, 12)) / 3.0)) + 0.3 * rng.normal(
        size=40
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Five seeds on two tasks: tiny_hidreamer is better by half, tiny_hdreamer is not;
    one of its runs fell short.
    """
    folder, rng = tmp_path_factory.mktemp("known"), np.random.default_rng(0)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(stats, "REPS", 200)  # rliable's bootstrap is slow
    for task, model, seed in itertools.product(("dummy_vector", "atari_pong"), MODELS, range(5)):
        curve = returns(rng, 15.0 if model == "tiny_hidreamer" else 10.0) - (
            21.0 if task == "atari_pong" else 0.0
        )
        short = (task, model, seed) == ("dummy_vector", "tiny_hdreamer", 4)
        write_run(folder / task / model / str(seed), curve, model, seed, task)
        if short:
            path = folder / task / model / str(seed) / "metrics.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    status, summary = report(folder)
    monkeypatch.undo()
    assert status == 0
    return folder / "report", summary


def test_a_known_effect_is_found(known):
    found = known[1]["comparisons"]
    assert found["tiny_hidreamer"]["claimed"] and found["tiny_hidreamer"]["low"] > 0
    assert found["tiny_hidreamer"]["improvement"]["value"] > 0.9
    assert not found["tiny_hdreamer"]["claimed"]
    text = (known[0] / "report.md").read_text()
    assert "tiny_hidreamer scores higher than tiny_dreamerv3" in text
    assert "No difference between tiny_hdreamer and tiny_dreamerv3 is shown" in text
    assert "cannot be seen here" in text and "1 of 30 runs are left out" in text


def test_scores_are_normalised(known):
    """Pong as Atari 100k does it, (return + 20.7) / (14.6 + 20.7)."""
    row = next(r for r in known[1]["runs"] if r["task"] == "atari_pong")
    assert row["normalised"] == pytest.approx((row["final_return"] + 20.7) / 35.3)
    others = [
        r["normalised"]
        for r in known[1]["runs"]
        if r["task"] == "dummy_vector" and r["status"] == "complete"
    ]
    assert max(others) == pytest.approx(1.0)


def test_the_summary_has_every_run(known):
    rows = known[1]["runs"]
    assert len(rows) == 30 and len({row["config_hash"] for row in rows}) == 6
    unfinished = [row for row in rows if row["status"] != "complete"]
    assert [(r["model"], r["seed"], r["steps"]) for r in unfinished] == [("tiny_hdreamer", 4, 500)]
    assert all(row["commit"] == "abc" and row["peak_mb"] == 300.0 + row["seed"] for row in rows)
    assert all(
        {"value", "low", "high", "method"} <= x.keys()
        for x in known[1]["aggregates"]["tiny_hdreamer"].values()
    )


def test_three_seeds_of_one_task_claim_nothing(tmp_path, monkeypatch):
    """Even far apart: complete separation of 3 and 3 happens by chance in one
    of ten comparisons.
    """
    monkeypatch.setattr(stats, "REPS", 200)
    for model, seed in itertools.product(MODELS[:2], range(3)):
        top = 10.0 if model == MODELS[0] else 100.0
        write_run(
            tmp_path / model / str(seed), returns(np.random.default_rng(seed), top), model, seed
        )
    _, summary = report(tmp_path)
    assert not summary["comparisons"]["tiny_hdreamer"]["claimed"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "no difference of any size can be claimed; 4 seeds could" in text
        and "scores higher" not in text
    )


def test_runs_copied_together_must_differ_and_be_fair(tmp_path, capsys):
    curve = returns(np.random.default_rng(0), 10.0)
    write_run(tmp_path / "here" / "0", curve, "tiny_dreamerv3", 0)
    write_run(tmp_path / "there" / "0", curve, "tiny_dreamerv3", 0)
    assert (
        report(tmp_path)[0] == 2
        and "are both dummy_vector/tiny_dreamerv3/0" in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "there")
    write_run(tmp_path / "there" / "1", curve, "tiny_hdreamer", 0, **{"actor.lr": 1.0})
    assert report(tmp_path)[0] == 2
    err = capsys.readouterr().err
    assert (
        "actor.lr: 3e-05 (dummy_vector/tiny_dreamerv3/0), 1.0 (dummy_vector/tiny_hdreamer/0)" in err
    )
    status, summary = report(tmp_path, "--allow-differences")
    assert status == 0 and list(summary["differences"]) == ["actor.lr"]
    assert "no difference of returns can be put down to the latent state alone" in (
        tmp_path / "report" / "report.md"
    ).read_text().replace("\n", " ")


def test_runs_without_a_name_are_named_after_their_latent_state(tmp_path):
    for i, model in enumerate(MODELS[:2]):
        write_run(tmp_path / str(i), [1.0, 2.0], model, 0)
        (tmp_path / str(i) / "starts.jsonl").unlink()
    assert [run.model for run in runs.find([tmp_path])] == ["rssm", "hrssm"]


def test_a_continued_run_names_every_commit_and_machine_that_it_saw(tmp_path):
    write_run(tmp_path / "0", [1.0, 2.0], MODELS[0], 0)
    for commit, machine in (("abc", "another"), ("def", "another")):
        note_start(tmp_path / "0", {"commit": commit, "hardware": machine})
    start = runs.read(tmp_path / "0").start
    assert (start["commit"], start["hardware"], start["model"]) == (
        "abc, def",
        "a machine; another",
        MODELS[0],
    )


def test_half_a_line_is_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n{"step": 2, "kl')
    assert runs.records(tmp_path / "x.jsonl") == [{"step": 1}]


# ---------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """Collects what a browser would load, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in ("meta", "br", "path", "use", "rect", "image", "img") else [tag]
        self.loads += [
            v
            for k, v in attrs
            if k in ("src", "href", "xlink:href", "srcset", "data") and v[:1] != "#"
        ]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else(known):
    text = (known[0] / "report.html").read_text()
    page = Page(text)
    assert page.loads == [] and not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert page.tags.count("svg") >= 8 and page.open == []
    assert (known[0] / "curves.png").stat().st_size > 20_000


# Opens the report in a frame as wide as a phone, and writes down how it came out.
FRAME = """<body style="margin:0"><iframe id=f style="border:0;width:{width}px;height:6000px"
  srcdoc="{page}"></iframe>
<script>f.onload = () => {{ const d = f.contentDocument; document.title = JSON.stringify({{
  width: d.documentElement.scrollWidth, sections: d.querySelectorAll("section").length,
  flat: [...d.querySelectorAll("svg")].filter(
    s => s.getBoundingClientRect().height < 40).length }}) }}</script>"""


def browse(path, folder, *args):
    fixed = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--hide-scrollbars"
    )
    command = [
        BROWSER,
        *fixed.split(),
        f"--user-data-dir={folder / 'profile'}",
        *args,
        f"file://{path}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("width", [20, 30])
def test_long_names_are_broken_into_lines(width):
    """An arm of --vary on an axis, which was cut off at the picture's edge."""
    name = "tiny_dreamerv3,dynamics.hrvq.temperature=[1, 0.5]"
    lines = figures.wrapped(name, width).split("\n")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert all(len(line) <= width for line in lines)
    assert any("0.5" in line for line in lines)  # numbers stay whole


@pytest.mark.parametrize(("names", "rows"), [(2, 1), (6, 2), (20, 7)])
def test_a_legend_of_long_names_stays_inside_the_picture(names, rows):
    figure = figures.Figure(figsize=(13.8, 3))
    lines = [figures.matplotlib.lines.Line2D([], [], label=f"{i}{'n' * 35}") for i in range(names)]
    figures.add_legend(figure, lines)
    (legend,) = figure.legends
    assert 0 <= legend.get_window_extent().width <= figure.bbox.width
    assert figure.get_figheight() == pytest.approx(3 + 0.2 * (rows - 1))


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(known, width, tmp_path):
    """Nothing sticks out sideways, every figure has a height,
    and the screenshot shows colours of all models.
    """
    frame = tmp_path / "frame.html"
    frame.write_text(
        FRAME.format(width=width, page=html.escape((known[0] / "report.html").read_text()))
    )
    seen = json.loads(re.search(r"<title>(.*?)</title>", browse(frame, tmp_path, "--dump-dom"))[1])
    assert (
        seen == {"width": width, "sections": seen["sections"], "flat": 0} and seen["sections"] >= 8
    )
    shot = tmp_path / "shot.png"
    browse(frame, tmp_path, f"--screenshot={shot}", f"--window-size={max(width, 500)},3000")
    image = iio.imread(shot)[:, :width, :3].astype(int)
    for colour in ("d55e00", "0072b2"):
        near = np.abs(image - [int(colour[i : i + 2], 16) for i in (0, 2, 4)]).max(-1) < 12
        assert near.sum() > 200, colour
