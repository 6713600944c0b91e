"""Scores in files, published ones beside own runs, values of a key against each other, and
returns by seconds.
"""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from test_report import report, write_run

import forked
import run_comparison
import run_config
from comparison import fairness, runs, scores, seconds, stats, summary, words
from comparison.options import arms_of, parse
from comparison.runs import Run, find
from hidreamer import checkpoint

MODELS = ("tiny_dreamerv3", "tiny_hdreamer")
IRIS = {"Pong": [19.3, 18.5, 16.6, 6.2, 12.4], "UpNDown": [3793, 5367.5, 2943.7, 3637.9, 1988.9]}


def runs_of(folder, task="dummy_vector", slow=1.0, seeds=3, **options):
    """Two models that learn alike a frame; a CPU second of the second model is `slow` times one of
    the first.
    """
    for k, model in enumerate(MODELS):
        for seed in range(seeds):
            path = folder / task / model / str(seed)
            write_run(path, np.arange(20) + seed, model, seed, task, **options)
            lines = (path / "metrics.jsonl").read_text().splitlines()
            for i, line in enumerate(lines):
                record = json.loads(line)
                if "perf/frames_per_s" in record:
                    record["perf/cpu_s"] = 2.0 * (slow if k else 1.0)
                lines[i] = json.dumps(record)
            (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer replications: what is tested here is no interval. Each agent is counted once."""
    counted, count = {}, fairness.capacity

    def once(config):
        key = json.dumps(config.flat())
        if key not in counted:
            counted[key] = count(config)
        return dict(counted[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "REPS", 40)
        patch.setattr(fairness, "capacity", once)
        yield


@pytest.fixture(scope="module")
def known(quick, tmp_path_factory):
    """-> folder of runs, file of their scores, the summary of the first."""
    folder = tmp_path_factory.mktemp("runs")
    runs_of(folder / "runs", slow=2.0)
    runs_of(folder / "runs", "dummy_grid", slow=2.0)
    file = folder / "scores.json"
    args = ["--from", str(folder / "runs"), "--logdir", str(folder / "report")]
    assert run_comparison.main([*args, "--export", str(file)]) == 0
    return folder, file, json.loads((folder / "report" / "summary.json").read_text())


# ---------------------------------------------------------------------------------- export and from


def test_every_aggregate_can_be_computed_again_from_the_scores(known):
    folder, file, first = known
    assert run_comparison.main(["--from", str(file), "--logdir", str(folder / "again")]) == 0
    second = json.loads((folder / "again" / "summary.json").read_text())
    for key in ("models", "tasks", "aggregates", "profile", "curves", "comparisons", "seconds"):
        assert first[key] == second[key], key
    assert first["per_task"] == second["per_task"] and first["differences"] == {}
    rows = json.loads(file.read_text())["runs"]
    assert len(rows) == 12 and {"task", "model", "seed", "frames", "returns"} <= set(rows[0])
    assert rows[0]["returns"][:2] == [[50, 0], [100, 1]] and rows[0]["clock"] == "CPU"


def test_a_report_of_a_file_stands_beside_it(known):
    folder, file, _ = known
    assert run_comparison.main(["--from", str(file)]) == 0
    assert (folder / "scores-report" / "report.html").exists()


def test_a_file_and_a_folder_with_the_same_runs_are_refused(known, capsys):
    folder, file, _ = known
    args = ["--from", str(file), str(folder / "runs"), "--logdir", str(folder / "x")]
    assert run_comparison.main(args) == 2
    err = capsys.readouterr().err
    assert "are both dummy_grid/tiny_dreamerv3/0" in err and err.count("\n") == 1


def test_runs_that_were_stopped_are_compared_up_to_where_all_came(tmp_path, capsys):
    """What a run did later does not count, and a run that did not come so far is incomplete."""
    for k, model in enumerate(MODELS):
        for seed in range(2):
            path = tmp_path / "runs" / model / str(seed)
            write_run(path, np.arange(20), model, seed, steps=2000)
            lines = (path / "metrics.jsonl").read_text().splitlines()
            kept = [x for x in lines if json.loads(x)["step"] <= (1500 if k else 1200)]
            (path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    args = ["--from", str(tmp_path / "runs"), "--logdir", str(tmp_path / "report")]

    def final(until):
        assert run_comparison.main([*args, "--until", str(until)]) == 0
        found = json.loads((tmp_path / "report" / "summary.json").read_text())
        table = found["per_task"]["dummy_vector"]
        return {model: table[model]["final"]["value"] for model in MODELS if model in table}

    assert final(1000) == dict.fromkeys(MODELS, 9.0)
    assert final(1400) == {MODELS[1]: 12.5}
    run = runs.read(tmp_path / "runs" / MODELS[1] / "0")
    shorter = replace(run, config=run.config | {"steps": 1500}, complete=True)
    assert runs.cut(shorter, 1500).complete and not runs.cut(shorter, 1800).complete
    assert runs.cut(shorter, 1800).config["steps"] == 1800  # what the report says it is of
    capsys.readouterr()
    assert run_comparison.main(["--steps", "9", "--until", "5"]) == 2
    assert "--from" in capsys.readouterr().err


def test_published_scores_stand_beside_own_runs(tmp_path):
    own = {"env.action_repeat": 4, "eval_episodes": 0}
    for seed in range(2):
        path = tmp_path / "own" / str(seed)
        write_run(path, [-20, 5, 15], MODELS[0], seed, "atari_pong", 400_000, **own)
    (tmp_path / "IRIS.json").write_text(json.dumps({"Pong": IRIS["Pong"]}))
    args = ["--from", str(tmp_path / "own"), str(tmp_path / "IRIS.json")]
    assert run_comparison.main([*args, "--logdir", str(tmp_path / "r")]) == 0
    found = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert found["models"] == [MODELS[0], "IRIS"] and found["seeds"] == {MODELS[0]: 2, "IRIS": 5}
    iris = found["per_task"]["atari_pong"]["IRIS"]
    assert iris["final"]["value"] == pytest.approx(np.mean(IRIS["Pong"]))
    human = (np.mean(IRIS["Pong"]) + 20.7) / (14.6 + 20.7)
    assert iris["normalised"] == pytest.approx(human) and "reached" not in iris
    assert found["seconds"] is None and found["tasks"]["atari_pong"]["normalisation"] == "human"
    page = (tmp_path / "r" / "report.md").read_text()
    assert "Of IRIS only scores are known" in page
    assert "The configs are the same" not in page


def test_published_files_alone(tmp_path):
    table = {"_about": "x", "games": {"Pong": {"Random": -20.7, "Human": 14.6, "A": 3, "B": 4.5}}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    (tmp_path / "IRIS.json").write_text(json.dumps(IRIS))
    found = scores.read(tmp_path / "table.json")
    assert [(run.model, run.task, run.get("score")[0, 1]) for run in found] == [
        ("A", "atari_pong", 3.0),
        ("B", "atari_pong", 4.5),
    ]
    args = ["--from", str(tmp_path / "IRIS.json"), "--logdir", str(tmp_path / "r")]
    assert run_comparison.main(args) == 0
    page = (tmp_path / "r" / "report.md").read_text()
    assert "## Learning curves" not in page and "## Steps to the threshold" not in page
    assert run_comparison.main([*args, "--export", str(tmp_path / "ours.json")]) == 0
    again = scores.read(tmp_path / "ours.json")
    assert all(run.published and not run.known for run in again) and len(again) == 10


def test_published_scores_are_compared_on_the_games_of_own_runs(tmp_path, capsys):
    """Nobody trains all 26 games before looking; a score of other games or lengths is no rival."""
    own = {"env.action_repeat": 4, "eval_episodes": 0}
    for seed in range(2):
        path = tmp_path / "own" / str(seed)
        write_run(path, [-20, 5, 15], MODELS[0], seed, "atari_pong", 400_000, **own)
        path = tmp_path / "short" / str(seed)
        write_run(path, [-20, 5, 15], MODELS[0], seed, "atari_pong", 100_000, **own)
    for name, games in (("IRIS", IRIS), ("other", {"Alien": [1, 2]}), ("REM", {"Pong": [3, 4]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(games))
    args = ["--logdir", str(tmp_path / "r"), "--from"]

    def compared(*names):
        assert run_comparison.main([*args, *(str(tmp_path / name) for name in names)]) == 0
        found = json.loads((tmp_path / "r" / "summary.json").read_text())
        return list(found["tasks"]), set(found["comparisons"])

    assert compared("own", "IRIS.json") == (["atari_pong"], {"IRIS"})
    assert "published scores on 1 other games are left out" in capsys.readouterr().out
    assert compared("REM.json", "IRIS.json") == (["atari_pong"], {"REM"})
    for names, says in {
        ("own", "other.json"): "other has a score on no game of the own runs: leave it out",
        ("IRIS.json", "other.json"): "IRIS has a score on no game that the others have",
        ("short", "IRIS.json"): "0 has 100,000 frames, and the score of IRIS is that of 400,000",
    }.items():
        capsys.readouterr()
        assert run_comparison.main([*args, *(str(tmp_path / name) for name in names)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and says in err, err


def test_a_run_of_which_no_episode_ended_is_exported_and_read_again(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs" / str(seed), [1, 2, 3] * 10, MODELS[0], seed)
        path = tmp_path / "runs" / f"pinpad{seed}"
        write_run(path, [1, 2, 3], MODELS[0], seed, "pinpad_three")
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (path / "metrics.jsonl").write_text("".join(x for x in lines if "_return" not in x))
    file = tmp_path / "scores.json"
    args = ["--from", str(tmp_path / "runs"), "--logdir", str(tmp_path / "a")]
    assert run_comparison.main([*args, "--export", str(file)]) == 0
    assert run_comparison.main(["--from", str(file), "--logdir", str(tmp_path / "b")]) == 0
    for name in "ab":
        page = (tmp_path / name / "report.md").read_text()
        assert "| pinpad_three, random play | – | – |" in page
        assert "2 of 4 runs are left out because no episode of theirs ended." in page
        html = (tmp_path / name / "report.html").read_text()
        assert html.count(">random play</text>") == 1  # of the other task


def test_older_runs_and_other_machines_are_compared_alike(tmp_path):
    """A key younger than a run has its default; threads and processes change nothing learned."""
    for k, model in enumerate(MODELS):
        path = tmp_path / "runs" / model
        write_run(path, [1, 2, 3], model, 0, **({"threads": 2, "env.parallel": True} if k else {}))
        lines = (path / "config.yaml").read_text().splitlines(keepends=True)
        (path / "config.yaml").write_text("".join(x for x in lines if k or "write_back" not in x))
    status, found = report(tmp_path / "runs")
    assert status == 0 and found["differences"] == {}
    assert "error" not in found["capacity"][MODELS[0]]


def test_lines_that_are_no_records_are_left_out(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, [1, 2, 3], MODELS[0], 0)
    (before,) = find([run])
    for line in ("[]", "3", '{"x": 1}', '{"step": "a"}', '{"step": 1e999}', 9999 * "["):
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"step": {before.step}, "train_return": "much", "kl_0": {{"a": 1}}}}\n')
    with open(run / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write('[]\n{"commit": 7}\n')
    (after,) = find([run])
    assert (after.step, after.complete, after.name) == (before.step, before.complete, before.name)
    assert after.series.keys() == before.series.keys()
    for name, values in before.series.items():
        np.testing.assert_array_equal(values, after.series[name], name)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("log_every: ", "log_every: every "))
    assert run_comparison.main(["--from", str(run), "--logdir", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "log_every is 'every " in err, err


def test_games_are_named_as_the_suite_names_them():
    pytest.importorskip("ale_py")
    from comparison.summary import HUMAN

    camel = "Alien BankHeist BattleZone ChopperCommand MsPacman UpNDown KungFuMaster PrivateEye"
    others = ("pong", "atari_hero", "up_n_down", "HERO", "James Bond", "Q*Bert", "Ms. Pac-Man")
    names = [scores.task(name) for name in (*camel.split(), *others)]
    assert all(name.removeprefix("atari_") in HUMAN for name in names)


BAD = {
    "no JSON": ("{", "holds no scores"),
    "a list": ("[1]", "it is a list, not {game: scores}"),
    "empty": ("{}", "there is no score of an agent in it"),
    "references alone": ('{"games": {"Pong": {"Human": 14.6}}}', "there is no score of an agent"),
    "other tasks": ('{"acrobot-swingup": [1]}', "'acrobot-swingup' is none of the 26 games"),
    "another format": ('{"format": "x"}', "has the format 'x', not 'hidreamer-scores-1'"),
    "no runs": ('{"format": "hidreamer-scores-1"}', "'runs'"),
    "no seed": ('{"format": "hidreamer-scores-1", "runs": [{"frames": 1, "task": "a"}]}', "'seed'"),
    "no score": (
        '{"format": "hidreamer-scores-1", "runs": '
        '[{"frames": 1, "task": "a", "seed": 0, "model": "m"}]}',
        "a/m/0 has no returns",
    ),
    "NaN": ('{"Pong": [NaN]}', "has the score nan"),
    "null": ('{"Pong": [null]}', "holds no scores"),
    "text": ('{"Pong": ["good"]}', "good"),
    "three numbers": (
        '{"format": "hidreamer-scores-1", "runs": [{"frames": 1, "task": "a", "seed": 0, "model": '
        '"m", "returns": [[1, 2, 3]]}]}',
        "holds no scores",
    ),
}
RUN = {"task": "dummy_vector", "model": "m", "seed": 0, "frames": 9, "returns": [[9, 1]]}
for key, value, says in (
    ("frames", 0, "a run has 0 frames"),
    ("frames", float("inf"), "cannot convert float infinity"),
    ("model", "", "a run has the model ''"),
    ("task", None, "a run has the task None"),
    ("clock", "sundial", "the clock is 'sundial', not CPU, GPU, wall-clock"),
    ("seconds", [[4, 2.0], [9, 1.0]], "the seconds of a run fall"),
):
    text = json.dumps({"format": scores.FORMAT, "runs": [RUN | {key: value}]})
    BAD[f"{key} {value}"] = text, says
BAD["too deep"] = 100_000 * "[", "holds no scores"
text = {"configs": {"x": {"replay.prefill": "many"}}, "runs": [RUN | {"config": "x"}]}
text = json.dumps({"format": scores.FORMAT} | text)
BAD["a config with text for a number"] = text, "replay.prefill is 'many'; it must be a whole number"
BAD["an empty list"] = json.dumps({"format": scores.FORMAT, "runs": []}), "it has no runs"


@pytest.mark.parametrize("name", BAD)
def test_files_that_hold_no_scores_are_one_line(name, tmp_path, capsys):
    text, says = BAD[name]
    (tmp_path / "x.json").write_text(text)
    assert run_comparison.main(["--from", str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and "x.json" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# ------------------------------------------------------------------------------------------ seconds


def test_returns_by_seconds_by_hand(known):
    """The second model costs twice as much: within the budget it has half of its frames."""
    _, _, found = known
    facts = found["tasks"]["dummy_grid"]
    assert facts["clock"] == "CPU" and facts["budget"] == pytest.approx(40.0)
    rows = {(r["task"], r["model"], r["seed"]): r for r in found["runs"]}
    fast, slow = (rows["dummy_grid", model, 1] for model in MODELS)
    assert fast["seconds"] == pytest.approx(40.0) and slow["seconds"] == pytest.approx(80.0)
    assert fast["final_return"] == slow["final_return"] == 19.5 == fast["final_s"]
    assert slow["final_s"] == 10.0  # of the tenth episode, which ended as the seconds did
    assert fast["curve_s"] == fast["curve"] and slow["area_s"] < fast["area_s"]
    entry = found["seconds"]["comparisons"][MODELS[1]]
    assert entry["value"] < 0 == found["comparisons"][MODELS[1]]["value"]
    assert entry["improvement"]["value"] == 0.0 and entry["claimed"]


def test_seconds_are_in_the_report(known):
    folder, _, _ = known
    page = (folder / "report" / "report.md").read_text()
    assert "## Return a CPU second" in page
    line = "Within equal CPU seconds tiny_hdreamer scores lower than tiny_dreamerv3"
    assert line in page and "with probability 0 [0, 0]" in page
    assert "| dummy_grid, tiny_hdreamer |" in page and "| 80 s |" in page
    html = (folder / "report" / "report.html").read_text()
    assert html.count("CPU seconds</text>") + html.count("% of the seconds</text>") >= 3


def test_a_run_of_which_no_episode_ended_within_the_seconds_has_no_score_by_them(tmp_path):
    runs_of(tmp_path / "runs", slow=100.0, seeds=2)
    _, found = report(tmp_path / "runs")
    entry = found["seconds"]["comparisons"][MODELS[1]]
    assert entry["value"] is entry["improvement"]["value"] is None and not entry["claimed"]
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    line = f"Within equal CPU seconds nothing can be said about {MODELS[1]}: no episode of a run"
    assert line in text and "single runs" not in text and "with probability 0 [" not in text


def test_of_a_longer_run_nothing_later_is_compared():
    series = {"train_return": np.array([[90, 1.0], [190, 2.0]])}
    series["eval_return"] = np.array([[100, 1.0], [200, 2.0]])
    config = {"task": "t", "seed": 0, "steps": 200, "replay.prefill": 0, "env.action_repeat": 1}
    run = Run(None, "m", config, {}, 200, True, series)
    assert summary.record(run, 100)["eval_returns"] == [[100, 1.0]]
    assert summary.record(run, 200)["eval_returns"] == [[100, 1.0], [200, 2.0]]


@pytest.mark.parametrize(("given", "whole"), [({}, True), ({"reached": 60}, False)])
def test_a_run_that_did_not_reach_its_frames_is_incomplete(tmp_path, given, whole):
    row = {"task": "t", "model": "m", "seed": 0, "frames": 100, "returns": [[50, 1.0]]}
    assert scores.restored(row | given, None, tmp_path).complete is whole
    assert scores.restored(row | given | {"complete": True}, None, tmp_path).complete


def made(hardware, device="auto", cpu=True):
    series = {"perf/frames_per_s": np.array([[100, 50.0], [200, 25.0]])}
    if cpu:
        series["perf/cpu_s"] = np.array([[100, 1.0], [200, 3.0]])
    return Run(None, "m", {"device": device}, {"hardware": hardware}, 200, True, series)


@pytest.mark.parametrize(
    ("run", "clock", "used"),
    [
        (made("AMD, 1 threads"), "CPU", [1.0, 4.0]),
        (made("AMD, 1 threads", cpu=False), "wall-clock", [2.0, 6.0]),
        (made("AMD, 1 threads, NVIDIA H100"), "GPU", [2.0, 6.0]),
        (made("AMD, 1 threads, NVIDIA H100", device="cpu"), "CPU", [1.0, 4.0]),
        (made("Intel, 2 threads; AMD, 1 threads"), "CPU", [1.0, 4.0]),  # went on elsewhere
        (made("AMD, 1 threads; AMD, 1 threads, NVIDIA H100"), "wall-clock", [2.0, 6.0]),
    ],
)
def test_the_clock_is_that_of_the_device(run, clock, used):
    found, series = seconds.axis(run)
    assert found == clock and series.tolist() == [[100, used[0]], [200, used[1]]]
    # four members until frame 100, then two: one has its share of their process
    run.series["perf/members"] = np.array([[100, 4.0], [200, 2.0]])
    shared = [used[0] / 4, used[0] / 4 + (used[1] - used[0]) / 2]
    assert seconds.axis(run)[1].tolist() == [[100, shared[0]], [200, shared[1]]]


def test_runs_with_different_clocks_are_not_compared_by_seconds(tmp_path):
    runs_of(tmp_path / "runs", seeds=1)
    path = tmp_path / "runs" / "dummy_vector" / MODELS[0] / "1"
    write_run(path, [1, 2, 3], MODELS[0], 1)  # has logged no CPU seconds
    _, found = report(tmp_path / "runs")
    assert found["seconds"] is None and found["tasks"]["dummy_vector"]["clock"] is None


def started(folder, **facts):
    with open(folder / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def test_runs_of_other_machines_and_code_are_named_and_not_compared_by_seconds(tmp_path):
    runs_of(tmp_path / "runs", seeds=2)
    _, found = report(tmp_path / "runs")
    assert found["seconds"] and not any("trained apart" in x for x in found["warnings"])
    model = tmp_path / "runs" / "dummy_vector" / MODELS[1]
    for seed in "01":
        started(model / seed, commit="def", hardware="Intel, 2 threads")
    _, found = report(tmp_path / "runs")
    assert found["seconds"] is None
    code, machines = (x for x in found["warnings"] if "trained apart" in x)
    assert "tiny_dreamerv3 by code of abc; tiny_hdreamer by code of abc, def" in code
    assert "on a machine; tiny_hdreamer on a machine; Intel, 2 threads" in machines


def test_single_lives_are_no_games(tmp_path):
    """As scores of games they would be normalised by a human's, and come out far too low."""
    for lives, says in (("unused", "human"), ("reset", "run")):
        for model in MODELS:
            folder = tmp_path / lives / model
            write_run(folder, [1.0, 2.0], model, 0, "atari_pong", **{"env.atari.lives": lives})
        _, found = report(tmp_path / lives)
        assert found["tasks"]["atari_pong"]["normalisation"] == says
        assert any("an episode is a life" in x for x in found["warnings"]) == (lives == "reset")


def test_a_run_logs_the_seconds_of_its_processor(tmp_path):
    """Also those of a process that was stopped between two records."""
    from small_runs import latest, run

    def logged(name):
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [line[name] for line in lines if name in line]

    assert run(tmp_path, "--steps", "100", "--log_every", "20") == 0
    used = logged("perf/cpu_s")
    assert len(used) >= 4 and all(0 < x < 60 for x in used)
    state = latest(tmp_path)
    spent = state["rates"]
    assert spent["frames"] == 100 and spent["cpu_s"] > 0 and spent["wall_s"] > 0
    state["rates"] = {"frames": 90, "updates": 0, "cpu_s": 1e4, "wall_s": 3e4}
    checkpoint.save_checkpoint(tmp_path / "checkpoints" / "latest.pt", state)
    assert run(tmp_path, "--steps", "120", "--log_every", "20") == 0
    assert 1e4 < logged("perf/cpu_s")[-1] < 1.1e4
    # by this, and the frames between two records, wall-clock time is known (`seconds.axis`)
    assert logged("perf/frames_per_s")[-1] == pytest.approx(30 / 3e4, rel=0.1)


# --------------------------------------------------------------------------------------------- vary


def options(*words):
    return parse(list(words))[0]


def test_values_of_a_key_are_arms():
    found = arms_of(options("--vary", "actor.entropy", "3e-4", "3e-3"))
    assert list(found) == ["actor.entropy=3e-4", "actor.entropy=3e-3"]
    assert {arm.preset for arm in found.values()} == {"tiny_dreamerv3"}
    found = arms_of(options("--models", *MODELS, "--vary", "imag.starts", "4", "8"))
    assert list(found)[1:3] == ["tiny_dreamerv3,imag.starts=8", "tiny_hdreamer,imag.starts=4"]
    assert list(arms_of(options("--models", *MODELS))) == list(MODELS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["actor.entropi", "1", "2"],
            "there is no key 'actor.entropi'; did you mean actor.entropy",
        ),
        (["actor.entropy", "1"], "needs two values"),
        (["actor.entropy"], "needs two values"),
        (["seed", "1", "2"], "--seeds 3"),
        (["task", "a", "b"], "--task A B"),
        (["steps", "10", "20"], "equally many frames"),
        (["video", "true", "false"], "it changes nothing that is learned"),
        (["actor.entropy", "1", "1.0"], "names one value twice"),
        (["env.gym.keys", "a/b", "a_b"], "two whose folders have one name"),
        (["actor.entropy", "1", "1"], "names one value twice"),
        (["actor.entropy", "1", "high"], "actor.entropy is 'high'; it must be a number"),
        (["actor.entropy", "1", "-1"], "it must be at least 0"),
        (["dynamics.type", "rssm", "lstm"], "it can be rssm"),
        (["actor.entropy", "1", "2", "--actor.entropy", "3"], "contradict each other"),
        (["actor.entropy", "1", "2", "--from", "x"], "leave one of them out"),
    ],
)
def test_bad_varying_is_one_line(words, says, tmp_path, capsys):
    args = [] if "--from" in words else ["--configs", "debug", "--task", "dummy_vector"]
    assert run_comparison.main([*args, "--logdir", str(tmp_path), "--vary", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--export", ".", "--from", "x"], "is a folder"),
        (["--export", f"{__file__}/x.json", "--from", "x"], "cannot be written to"),
        (["--export", "x.json", "--paired-offline", "y"], "has none"),
    ],
)
def test_bad_exports_are_one_line(words, says, capsys):
    assert run_comparison.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err, err


def test_a_varied_key_is_compared_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forked.popen)
    args = ["--configs", "debug", "--task", "dummy_vector", "--seeds", "1", "--steps", "60"]
    args += ["--log_every", "20", "--logdir", str(tmp_path / "v"), "--eval_episodes", "0"]
    args += ["--jobs", "2", "--export", str(tmp_path / "s.json")]
    vary = ["--vary", "dynamics.hrssm.stoch", "[3,1]", "[2,2]", "--models", "tiny_hdreamer"]
    assert run_comparison.main([*args, *vary]) == 0
    found = json.loads((tmp_path / "v" / "summary.json").read_text())
    assert found["models"] == ["dynamics.hrssm.stoch=[3,1]", "dynamics.hrssm.stoch=[2,2]"]
    config = run_config.saved_config(tmp_path / "v" / "dummy_vector" / found["models"][0] / "0")
    assert config["dynamics.hrssm.stoch"] == [3, 1]
    assert run_comparison.main(["--from", str(tmp_path / "s.json")]) == 0  # names it again
    again = json.loads((tmp_path / "s-report" / "summary.json").read_text())
    assert again["models"] == found["models"]
    assert found["runs"][0]["folder"] == f"dummy_vector/{found['models'][0]}/0"
    page = (tmp_path / "s-report" / "report.md").read_text()
    assert "What is compared are values of dynamics.hrssm.stoch" in page
    given = options("--vary", "replay.ratio", "1", "2", "--task", "dummy_vector")
    plan = run_comparison.make_plan(given, ["debug"], {})
    assert plan.differences == {}  # although outside the latent state
    words = run_comparison.command(plan, "dummy_vector", "replay.ratio=2", tmp_path, "--seed", "0")
    assert words[words.index("--replay.ratio") + 1] == "2"


# ----------------------------------------------------------------------------------- the first line


def test_unmatched_capacity_is_the_first_line(tmp_path):
    for k, (model, units) in enumerate(zip(MODELS, (16, 64), strict=True)):
        path = tmp_path / "runs" / model
        write_run(path, [1, 2, 3], model, k, "dummy_vector", **{"dynamics.hidden": units})
    report(tmp_path / "runs")
    lines = (tmp_path / "runs" / "report" / "report.md").read_text().splitlines()
    assert lines[2].startswith("Capacity is not matched: tiny_hdreamer against tiny_dreamerv3: ")


def test_capacity_is_compared_on_every_kind_of_observation(tmp_path, capsys):
    """Alike on the first task, unlike on a later one: the first line says so, and names it once."""
    for task, other in (("dummy_grid", 16), ("dummy_vector", 16), ("dummy_image", 64)):
        for k, model in enumerate(MODELS):
            path = tmp_path / "runs" / task / model
            sizes = {"dynamics.hidden": other if k else 16, "dynamics.deter": 16}
            sizes |= {"dynamics.rssm.stoch": 4, "dynamics.hrssm.stoch": [2, 2]}
            sizes |= {"dynamics.rssm.classes": 4, "dynamics.hrssm.classes": [4, 4]}
            write_run(path, [1, 2, 3], model, 0, task, **sizes)
    _, found = report(tmp_path / "runs")
    unmatched = [x for x in found["warnings"] if x.startswith("Capacity is not matched")]
    assert len(unmatched) == 1, unmatched
    where = "Capacity is not matched on dummy_image: tiny_hdreamer against tiny_dreamerv3: "
    assert unmatched[0].startswith(where)
    lines = (tmp_path / "runs" / "report" / "report.md").read_text().splitlines()
    assert lines[2].startswith(where)


def test_words_of_improvement():
    entry = {"improvement": {"value": 0.8, "low": 0.6, "high": 1.0}}
    (line,) = words.improvements({"models": ["a", "b"], "comparisons": {"b": entry}})
    assert line.startswith("A run of b scores more than one of a with probability 0.800 [0.600, 1")
    assert "leaves out one half" in line and "claims nothing" in line
    entry = {"improvement": {"value": 0.8, "low": None, "high": None}}
    (line,) = words.improvements({"models": ["a", "b"], "comparisons": {"b": entry}})
    assert line.endswith("single runs have no interval.")
