"""What a report may not say: of configs that nobody knows, of seconds that nobody measured, of
rounding, of two runs; and what is asked for by name is done though it is the default.
"""

import json

import numpy as np
import pytest
from test_report import write_run

import run_comparison
from comparison import scores, seconds, stats, words
from comparison.options import arms_of, parse
from comparison.runs import read

FRAMES = 1000


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer replications: what is tested here is no bracket of a bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "REPS", 40)
        yield


def row(model, seed, returns, **more):
    """An entry of a file of scores, whose episodes ended at even intervals."""
    ends = [[(i + 1) * FRAMES // len(returns), x] for i, x in enumerate(returns)]
    known = {"task": "popgym_X", "model": model, "seed": seed, "frames": FRAMES}
    return known | {"returns": ends} | more


def judged(folder, rows, *args, configs=None, name="scores.json"):
    """-> exit status, summary.json, report.md of a file with these rows."""
    body = {"format": scores.FORMAT, "runs": rows, "configs": configs or {}}
    (folder / name).write_text(json.dumps(body))
    out = folder / "report"
    words = ["--from", str(folder / name), "--logdir", str(out), *map(str, args)]
    status = run_comparison.main(words)
    text = lambda file: (out / file).read_text() if (out / file).exists() else "{}"
    return status, json.loads(text("summary.json")), text("report.md")


def two(model="B", **more):
    """Four runs of A, and of another model that returns twice as much."""
    return [
        row(m, s, [k + 0.1 * s] * 5, **more) for k, m in ((1, "A"), (2, model)) for s in range(4)
    ]


SAME = "The configs are the same in everything but the latent state."


@pytest.mark.parametrize("how", ["none", "a part", "a part that differs"])
def test_nothing_is_said_of_configs_that_are_not_known(how, tmp_path, capsys):
    rows, configs = two(), {}
    if how != "none":
        for x in rows:
            x["config"] = x["model"]
        ratio = 512 if "differs" in how else 32
        configs = {"A": {"replay.ratio": 32}, "B": {"replay.ratio": ratio}}
    status, found, page = judged(tmp_path, rows, configs=configs)
    if "differs" in how:
        err = capsys.readouterr().err
        assert status == 2 and "replay.ratio: 32" in err and "512" in err
        return
    assert status == 0 and SAME not in page and not any(x["known"] for x in found["runs"])
    assert "Of A, B only scores are known, or a part of the config" in page


@pytest.mark.parametrize("key", ["env.action_repeat", "replay.prefill"])
def test_what_a_part_of_a_config_states_is_compared(key, tmp_path, capsys):
    """Also what stands for a config that is not known."""
    rows = [x | {"config": x["model"]} for x in two()]
    status, *_ = judged(tmp_path, rows, configs={"A": {key: 1}, "B": {key: 4}})
    assert status == 2 and f"{key}: 1" in capsys.readouterr().err
    shorter = [x | {"frames": 500} if x["model"] == "B" else x for x in two()]
    assert judged(tmp_path, shorter)[0] == 0  # compared up to where all came


def test_the_same_is_said_where_all_are_known(tmp_path):
    for model in ("tiny_dreamerv3", "tiny_hdreamer"):
        write_run(tmp_path / "runs" / model, [1.0, 2.0], model, 0)
    assert run_comparison.main(["--from", str(tmp_path / "runs")]) == 0
    assert SAME in (tmp_path / "runs" / "report.md").read_text()


# ------------------------------------------------------------------------------------------ seconds

TIMES = {"clock": "CPU", "hardware": "a machine, 1 threads"}


def timed(cost, ends, **more):
    """As ``two``, both learning alike a frame; a frame of B costs ``cost`` times as many seconds,
    which are known at ``ends``.
    """
    rows = []
    for model, factor in (("A", 1.0), ("B", cost)):
        for seed in range(4):
            used = [[end, 0.1 * factor * end] for end in ends]
            returns = (np.arange(100) / 10 + seed).tolist()
            rows.append(row(model, seed, returns, seconds=used, **TIMES | more))
    return rows


def test_seconds_are_known_between_records_and_not_beyond_them(tmp_path):
    """An episode after the last one had ended, by the clock, at its very time."""
    rows = timed(1.05, [500, 1000])
    _, found, _ = judged(tmp_path, rows)
    assert found["tasks"]["popgym_X"]["budget"] == pytest.approx(100.0)
    whole = found["seconds"]["comparisons"]["B"]["value"]
    _, found, _ = judged(tmp_path, rows, "--until", 950)
    assert found["tasks"]["popgym_X"]["budget"] == pytest.approx(95.0)  # not 50
    assert found["seconds"]["comparisons"]["B"]["value"] == pytest.approx(whole, abs=0.01)
    short = [x | {"seconds": [[100, 10.0]]} if x["model"] == "B" else x for x in rows]
    assert judged(tmp_path, short)[1]["seconds"] is None
    nearly = [x | {"seconds": [[980, 98.0]]} for x in rows]
    _, found, _ = judged(tmp_path, nearly)
    assert {x["final_s"] for x in found["runs"]} == {9.25 + seed for seed in range(4)}  # to 980


def test_a_run_that_is_cut_has_the_seconds_of_its_end(tmp_path):
    write_run(tmp_path / "x", [1.0, 2.0, 3.0, 4.0], "tiny_dreamerv3", 0)
    run = read(tmp_path / "x")
    clock, used = seconds.axis(run)
    short = seconds.cut(run, 600)
    found = seconds.axis(short)
    assert found[0] == clock and found[1][-1].tolist() == [600, np.interp(600, *used.T)]
    assert seconds.cut(run, 1000) is run


@pytest.mark.parametrize("hardware", ["", "unknown", None])
def test_machines_that_are_not_known_are_not_one(hardware, tmp_path):
    given = timed(1.5, [500, 1000], **({} if hardware is None else {"hardware": hardware}))
    if hardware is None:
        given = [{k: x for k, x in row.items() if k != "hardware"} for row in given]
    assert judged(tmp_path, timed(1.5, [500, 1000]))[1]["seconds"]
    assert judged(tmp_path, given)[1]["seconds"] is None


def test_settings_that_take_seconds_are_named_and_no_seconds_compared(tmp_path):
    rows = [x | {"config": x["model"]} for x in timed(1.5, [500, 1000])]
    configs = {"A": {"env.parallel": True, "eval_every": 100}, "B": {"env.parallel": False}}
    _, found, page = judged(tmp_path, rows, configs=configs)
    assert found["seconds"] is None and "differ in env.parallel: no seconds are compared" in page
    same = {"A": configs["A"], "B": configs["A"]}
    half = [row("A", 9, [1.0], config="C", complete=False, **TIMES)]
    _, found, page = judged(tmp_path, rows + half, configs=same | {"C": configs["B"]})
    assert found["seconds"] and "no seconds are compared" not in page


def test_a_run_without_a_score_is_not_trimmed_away_as_the_best():
    values = np.array([0.1, 0.2, 0.3, 0.4, np.nan]).reshape(-1, 1, 1)
    assert np.isnan(stats.iqm(values)).all()
    assert stats.iqm(values[:4])[0] == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------- words


def test_rounding_is_no_difference(tmp_path):
    """The mean of 40 times 0.1 is not that of 30."""
    rows = [row(m, s, [0.1] * n) for n, m in ((40, "A"), (30, "B")) for s in range(5)]
    _, found, page = judged(tmp_path, rows)
    assert found["comparisons"]["B"]["value"] == 0.0 and "higher" not in page


def test_a_baseline_near_random_play_gives_no_percentages(tmp_path):
    rows = [row(m, s, [k + 1e-4 * s] * 5) for k, m in ((1e-3, "A"), (9.0, "B")) for s in range(5)]
    _, found, page = judged(tmp_path, rows)
    (claim,) = (line for line in page.splitlines() if "B scores higher than A" in line)
    assert found["comparisons"]["B"]["claimed"] and "%" not in claim
    assert words.relative_to({"baseline": 2.0}, 1.0) == "50% of the baseline's score"


def test_a_report_of_three_models_is_joint(tmp_path):
    rows = two() + [row("C", seed, [3 + 0.1 * seed] * 5) for seed in range(4)]
    _, found, _ = judged(tmp_path, rows)
    assert [found["comparisons"][x]["alpha"] for x in "BC"] == pytest.approx([0.025] * 2)


def test_the_threshold_is_half_way_to_the_mean_and_who_reached_it_when(tmp_path):
    rows = [row("A", seed, list(range(10))) for seed in range(2)]
    rows += [row("B", seed, [1.0] * 10) for seed in range(2)]
    _, found, _ = judged(tmp_path, rows)
    assert found["tasks"]["popgym_X"]["threshold"] == 2.5  # half of the mean of 9, 9, 1 and 1
    a, b = (found["per_task"]["popgym_X"][x] for x in "AB")
    assert (a["reached"], a["steps_to"]["value"], b["reached"]) == (2, 400.0, 0)


def test_two_runs_claim_nothing(tmp_path):
    """2 against 5 separate completely by chance in one of 21 shuffles."""
    rows = [row("A", s, [1 + 0.01 * s] * 5) for s in range(2)]
    rows += [row("B", s, [2 + 0.01 * s] * 5) for s in range(5)]
    _, found, page = judged(tmp_path, rows)
    entry = found["comparisons"]["B"]
    assert entry["p"] <= entry["alpha"] and entry["low"] > 0 and not entry["claimed"]
    assert "2 runs of a model on a task are too few for a claim" in page
    assert "B: of 5 runs against 2 nothing can be claimed" in page and "cannot be seen" not in page
    rows.append(row("A", 2, [1.02] * 5))
    _, found, page = judged(tmp_path, rows)
    assert found["comparisons"]["B"]["claimed"] and "docs/statistics.md" in page


# ------------------------------------------------------------------------------------------ options


def test_what_is_named_is_done_though_it_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    body = {"format": scores.FORMAT, "runs": two("mine")}
    (tmp_path / "scores.json").write_text(json.dumps(body))
    assert run_comparison.main(["--from", "scores.json", "--logdir", "runs/comparison"]) == 0
    assert (tmp_path / "runs/comparison/report.html").exists()
    assert not (tmp_path / "scores-report").exists()
    four = ("tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer", "tiny_hidreamer_gru")
    capsys.readouterr()
    assert run_comparison.main(["--from", "scores.json", "--models", *four]) == 2
    assert "there is no run of 'tiny_dreamerv3'" in capsys.readouterr().err
    options, *_ = parse(["--vary", "actor.entropy", "1e-3", "3e-3", "--models", *four])
    assert len(arms_of(options)) == 8
    assert run_comparison.main(["--from", "scores.json", "--models", "A", "A"]) == 2
    assert "names a model twice" in capsys.readouterr().err
    before = (tmp_path / "scores.json").read_bytes()
    more = ["--until", "500", "--export", "./scores.json"]
    assert run_comparison.main(["--from", "scores.json", *more]) == 2
    assert "name another file" in capsys.readouterr().err
    assert (tmp_path / "scores.json").read_bytes() == before


def test_returns_of_lives_do_not_stand_beside_scores_of_games(tmp_path, capsys):
    lived = {"env.atari.lives": "reset"}
    write_run(tmp_path / "own", [1.0, 2.0], "tiny_dreamerv3", 0, "atari_pong", **lived)
    (tmp_path / "IRIS.json").write_text(json.dumps({"Pong": [14.6]}))
    words = ["--from", str(tmp_path / "own"), str(tmp_path / "IRIS.json")]
    assert run_comparison.main(words) == 2
    err = capsys.readouterr().err
    assert "are of single lives" in err and err.count("\n") == 1


def test_a_log_alone_is_complete_where_it_reaches_the_end(tmp_path):
    """The default logs every 10,000 frames: half of a run of 20,000 is no whole one."""
    write_run(tmp_path / "x", [1.0, 2.0], "tiny_dreamerv3", 0, log_every=500)
    assert read(tmp_path / "x").complete
    lines = (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 1000]
    (tmp_path / "x" / "metrics.jsonl").write_text("\n".join([*kept, '{"step": 510}']) + "\n")
    assert not read(tmp_path / "x").complete


@pytest.mark.parametrize("key", ["commit", "hardware", "arm", "varied"])
@pytest.mark.parametrize("value", [None, 3.5, [1]])
def test_facts_of_a_start_are_optional_and_of_their_type(key, value, tmp_path, capsys):
    status, *_ = judged(tmp_path, [x | {key: value} if x["model"] == "A" else x for x in two()])
    err = capsys.readouterr().err
    assert status == (0 if value is None else 2)
    assert err == "" if value is None else f"{key} is {value!r}" in err and err.count("\n") == 1


def test_a_part_of_a_config_is_enough(tmp_path):
    rows = [x | {"config": "a"} for x in two()]
    assert judged(tmp_path, rows, configs={"a": {"expl.behavior": "random"}})[0] == 0
