"""benchmarks/objectives.py: what an agent learns from, judged by runs that are written by hand."""

import argparse
import json

import numpy as np
import pytest
import scipy.stats

import tools
from conftest import ROOT


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import objectives

    return objectives


def write(folder, frames, returns, evaluation=None, steps=30_000):
    """A run of ``frames``, whose training episodes ended as {frame: return}."""
    folder.mkdir(parents=True)
    config = tools.load_config(["minatar"], {"steps": steps, "seed": int(folder.name)})
    (folder / "config.yaml").write_text(tools.dump_yaml(config.tree()))
    lines = [{"step": at, "train_return": x} for at, x in returns.items()]
    lines.append({"step": frames} | ({} if evaluation is None else {"eval_return": evaluation}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_arms_and_pairs_of_them(judge):
    assert judge.keys("default") == {}
    assert judge.keys("ac_cpc+replay_loss") == {
        "model.losses.ac_cpc": 1.0,
        "critic.replay_loss": 0.3,
    }
    with pytest.raises(argparse.ArgumentTypeError, match="no arm 'acpc'; there are default"):
        judge.keys("ac_cpc+acpc")
    with pytest.raises(argparse.ArgumentTypeError, match="no arm ''"):
        judge.keys("")


def test_all_arms_have_the_same_seed_and_budget(judge, tmp_path, monkeypatch):
    """What a run is started with differs in the arm's own keys and the folder alone."""
    configs = {}
    for arm in judge.ARMS:
        words = []
        monkeypatch.setattr(judge.dreamer, "main", lambda w, words=words: words.extend(w) or 0)
        assert judge.train("freeway", "hrssm", arm, 3, 500, tmp_path / arm) == 0
        args = tools.parse(words)
        configs[arm] = tools.load_config(args.presets, args.overrides).flat()
    words = tools.parse(judge.command("freeway", "gru", "default", 3, tmp_path))
    found = tools.load_config(words.presets, words.overrides).dynamics
    assert (found.type, found.hrvq.memory) == ("hrvq", "gru")
    base = configs["default"]
    assert (base["task"], base["seed"], base["steps"]) == ("minatar_freeway", 3, 500)
    assert base["eval_every"] == 500 and base["eval_episodes"] == 20
    for arm, config in configs.items():
        differs = {key: x for key, x in config.items() if x != base[key] and key != "logdir"}
        assert differs == judge.keys(arm)
        if not config["model.losses.decoder"]:  # so that it can be judged on held-out episodes
            assert config["decoder.probe"]


def test_figures_of_runs_whole_and_not(judge, tmp_path):
    home = tmp_path / "breakout" / "rssm"
    returns = {1500: 1.0, 2500: 3.0, 2900: 6.0, 26_000: 8.0, 29_000: 10.0}
    write(home / "default" / "0", 30_002, returns, 9.0)
    write(home / "default" / "1", 12_000, {1500: 1.0, 11_000: 5.0})  # goes on elsewhere
    write(tmp_path / "freeway" / "rssm" / "default" / "0", 30_000, {20_000: 5.0}, 7.0)
    write(home / "default" / "2", 50_000, returns, 19.0)  # what is evaluated has learned longer
    write(home / "formerly" / "0", 30_000, returns, 9.0)  # an arm that there is no more
    found = judge.report(tmp_path, 30_000)
    assert found["breakout"]["rssm"].keys() == {"default"}
    runs = found["breakout"]["rssm"]["default"]
    assert runs["2"]["evaluation"] is None and runs["2"]["last_5000"] == 9.0
    whole = {key: runs["0"][key] for key in ("frames", "evaluation", "last_5000", "passes_4")}
    assert whole == {"frames": 30_002, "evaluation": 9.0, "last_5000": 9.0, "passes_4": 3000}
    # a run that is not over has no end to compare, though an episode of it ended well
    assert runs["1"]["evaluation"] is None and runs["1"]["last_5000"] is None
    assert runs["1"]["passes_4"] == 11_000
    free = found["freeway"]["rssm"]["default"]["0"]
    # no episode of Freeway ends so late; and 4 points are nothing there
    assert (free["evaluation"], free["last_5000"], free["passes_4"]) == (7.0, None, None)
    lines = judge.table(found).splitlines()
    assert "| breakout | rssm | default | 0 | 30002 | 9.0 | 1.0 | 9.0 | 3000 |" in lines
    # whose first episode ended long after random play
    assert "| freeway | rssm | default | 0 | 30000 | 7.0 | - | - | - |" in lines
    assert len(lines[0].split("|")) == len(lines[1].split("|")) == len(lines[2].split("|"))


def test_differences_are_paired_by_seed(judge, tmp_path):
    home = tmp_path / "asterix" / "rssm"
    for arm, values in {"default": (1.0, 5.0, 3.0), "ac_cpc": (2.0, 7.0, None)}.items():
        for seed, value in enumerate(values):
            write(home / arm / str(seed), 30_000 if value else 8_000, {500: 1.0}, value)
    write(home / "ac_cpc" / "3", 30_000, {500: 1.0}, 99.0)  # nothing beside it
    found = judge.judged(judge.report(tmp_path, 30_000))["rssm"]["ac_cpc"]["asterix"]
    half = scipy.stats.t.ppf(0.975, 1) * np.std([1.0, 2.0], ddof=1) / np.sqrt(2)
    assert found["seeds"] == ["0", "1"]
    expected = [1.5, 1.5 - half, 1.5 + half]
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx(expected)


def test_runs_of_earlier_reports_stand_beside_those_that_are_there(
    judge, tmp_path, monkeypatch, capsys
):
    def reported(logdir, out, *more):
        words = ["--report", "--logdir", str(logdir), "--out", str(out), *more]
        monkeypatch.setattr("sys.argv", ["objectives.py", *words])
        assert judge.main() == 0
        return json.loads(out.read_text())

    arm = tmp_path / "before" / "freeway" / "rssm"
    for name, value in {"default": 1.0, "harmony": 4.0}.items():
        write(arm / name / "0", 30_000, {500: 1.0}, value)
    reported(tmp_path / "before", tmp_path / "before.json")
    arm = tmp_path / "now" / "freeway" / "rssm"
    write(arm / "default" / "0", 9000, {500: 1.0})  # begun anew, and not yet as far
    write(arm / "default" / "1", 30_000, {500: 1.0}, 2.0)
    write(arm / "harmony" / "1", 30_000, {500: 1.0}, 7.0)
    files = ["--from", str(tmp_path / "before.json")]
    body = reported(tmp_path / "now", tmp_path / "both.json", *files)
    found = body["differences"]["rssm"]["harmony"]["freeway"]
    assert found["seeds"] == ["0", "1"] and found["value"] == 4.0
    assert body["runs"]["freeway"]["rssm"]["default"]["0"]["frames"] == 30_000
    assert body["arms"].keys() == {"default", "harmony"}

    words = ["--games", "freeway", "seaquest", "--arms", "default"]
    body = reported(tmp_path / "now", tmp_path / "one.json", *files, *words)
    assert body["runs"]["freeway"]["rssm"].keys() == {"default"} == body["arms"].keys()
    assert not reported(tmp_path / "now", tmp_path / "none.json", "--games", "seaquest")["runs"]

    (tmp_path / "text.json").write_text("[]")
    for name, more, told in (
        ("no.json", [], "no.json is no file that --out of this program wrote"),
        ("text.json", [], "text.json is no file that --out of this program wrote"),
        ("before.json", ["--steps", "50000"], "is of 30000 frames: give --steps 30000"),
    ):
        words = ["--report", "--from", str(tmp_path / name), *more]
        monkeypatch.setattr("sys.argv", ["objectives.py", *words])
        assert judge.main() == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


def test_runs_of_another_config_are_no_pair(judge, tmp_path, monkeypatch, capsys):
    home = tmp_path / "seaquest" / "rssm"
    write(home / "default" / "0", 30_000, {500: 1.0}, 1.0)
    write(home / "harmony" / "0", 30_000, {500: 1.0}, 4.0)
    path = home / "harmony" / "0" / "config.yaml"
    path.write_text(path.read_text().replace("harmony: 0.0", "harmony: 1.0"))
    assert judge.judged(judge.report(tmp_path, 30_000))["rssm"]["harmony"]["seaquest"]["seeds"]
    text = path.read_text()
    path.write_text(text.replace("horizon: 15", "horizon: 9"))
    assert path.read_text() != text
    monkeypatch.setattr("sys.argv", ["objectives.py", "--report", "--logdir", str(tmp_path)])
    assert judge.main() == 2
    err = capsys.readouterr().err
    assert "seaquest/rssm/harmony/0 and default/0 differ" in err and err.count("\n") == 1
    found = judge.report(tmp_path, 30_000)  # as of an earlier report, whose config nobody knows
    found["seaquest"]["rssm"]["default"]["0"]["config"] = None
    with pytest.raises(tools.ConfigError, match="default/0 differ"):
        judge.judged(found)
    found["seaquest"]["rssm"]["harmony"]["0"]["config"] = None
    line = "  seaquest: 1 of 1 pairs are of unknown configs"
    assert judge.verdicts(judge.judged(found))[1:] == [line]
    path.write_text(text)
    for arm in ("default", "harmony"):  # another pair, of known ones
        write(home / arm / "1", 30_000, {500: 1.0}, 2.0)
        found["seaquest"]["rssm"][arm]["1"] = judge.figures(home / arm / "1", "seaquest", 30_000)
    assert judge.verdicts(judge.judged(found))[1:] == [line.replace("of 1", "of 2")]


def test_younger_keys_and_settings_of_another_objective_are_no_other_config(judge, tmp_path):
    """What is published stays comparable with runs of later versions."""
    home = tmp_path / "seaquest" / "rssm"
    for arm in ("default", "barlow", "ac_cpc"):
        write(home / arm / "0", 30_000, {500: 1.0}, 1.0)
    path = home / "default" / "0" / "config.yaml"  # of before
    text = (
        path.read_text().replace("units: 0 ", "units: 512 ").replace("units: 0\n", "units: 512\n")
    )
    younger = [line for line in text.splitlines() if "prior_layers" in line or "units: 512" in line]
    assert len(younger) > 1
    path.write_text("\n".join(x for x in text.splitlines() if "prior_layers" not in x) + "\n")
    found = judge.report(tmp_path, 30_000)
    body = {"steps": 30_000, "configs": judge.packed(found), "runs": found}
    (tmp_path / "file.json").write_text(json.dumps(body))
    again = judge.earlier(tmp_path / "file.json", 30_000)
    assert {*judge.judged(again)["rssm"]} == {"ac_cpc", "barlow"}
    # Runs of one arm under other settings are two arms.
    write(home / "ac_cpc" / "1", 30_000, {500: 1.0}, 1.0)
    write(home / "default" / "1", 30_000, {500: 1.0}, 1.0)
    for name in ("0", "1"):
        path = home / "ac_cpc" / name / "config.yaml"
        text = path.read_text().replace("ac_cpc: 0.0", "ac_cpc: 1.0")
        path.write_text(text.replace("decay: 0.75", f"decay: 0.{name}5"))
    with pytest.raises(
        tools.ConfigError, match=r"rssm/ac_cpc has runs with model\.ac_cpc\.decay 0\.05 and 0\.15"
    ):
        judge.judged(judge.report(tmp_path, 30_000))


def test_a_run_that_is_evaluated_is_kept_before_a_longer_one(judge):
    run = lambda frames, evaluation: {
        "x": {"rssm": {"y": {"0": {"frames": frames, "evaluation": evaluation}}}}
    }
    for own in (run(30_000, None), run(50_000, None)):
        for other in (run(30_005, 6.0), run(60_000, None), run(30_009, 7.0)):
            judge.merged(own, other)
        assert own["x"]["rssm"]["y"]["0"]["evaluation"] == 6.0


def test_pairs_of_different_commits_are_named(judge, tmp_path):
    for arm, commit in (("default", "0dc9d11"), ("harmony", "f01d445")):
        folder = tmp_path / "seaquest" / "rssm" / arm / "0"
        write(folder, 30_000, {500: 1.0}, 1.0)
        (folder / "starts.jsonl").write_text(json.dumps({"step": 0, "commit": commit}) + "\n")
    found = judge.report(tmp_path, 30_000)
    lines = judge.verdicts(judge.judged(found))
    assert lines[1:] == ["  seaquest: pairs of different commits, 0dc9d11, f01d445"]
    found["seaquest"]["rssm"]["default"]["0"]["commits"] = ["f01d445"]
    assert len(judge.verdicts(judge.judged(found))) == 1


def test_cost_without_a_decoder_is_measured_without_one(judge):
    import beside

    for arm in ("barlow", "next_embed"):
        assert beside.KEYS[arm]["model.losses.decoder"] == 0
        assert not beside.KEYS[arm]["decoder.probe"]
    assert beside.KEYS["probe"]["decoder.probe"]


def test_the_default_changes_on_three_of_five_games(judge):
    """Ahead by chance is not won."""
    cell = lambda value, low=-9.0: {"seeds": ["0"], "value": value, "low": low, "high": value + 9}
    games = dict.fromkeys(judge.GAMES, cell(1.0, -0.5))
    (line,) = judge.verdicts({"rssm": {"ac_cpc": games}})
    assert "Ahead in 5 of 5 games, won 0" in line and line.endswith("the default stays")
    single = {"seeds": ["0"], "value": -1.0, "low": None, "high": None}
    games |= dict.fromkeys(("asterix", "seaquest"), cell(2.0, 0.5)) | {"freeway": single}
    (line,) = judge.verdicts({"rssm": {"ac_cpc": games}})
    assert "Ahead in 4 of 5 games, won 2" in line
    assert line.endswith("open, 1 of 5 games have no two pairs")  # which might be lost
    games |= {"breakout": cell(2.0, 0.5), "freeway": cell(-1.0)}
    (line,) = judge.verdicts({"rssm": {"ac_cpc": games}})
    assert "won 3 (interval above 0), lost 0 (below): it can be the default" in line
    games["space_invaders"] = cell(-10.0, -20.0)
    (line,) = judge.verdicts({"rssm": {"ac_cpc": games}})
    assert "won 3 (interval above 0), lost 1 (below): the default stays" in line
    del games["freeway"]
    (line,) = judge.verdicts({"rssm": {"ac_cpc": games}})
    assert line.endswith("open, 1 of 5 games have no two pairs")


def test_rows_are_compared_by_seed(monkeypatch):
    """A gap that all seeds share is seen, however far seeds are apart."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paired

    row = lambda *values: {str(seed): {"ball": x} for seed, x in enumerate(values)}
    rows = {"base": row(0.25, 0.5, 0.75), "more": row(0.5, 0.75, 1.0)}
    lines = paired.table(rows, "ball", ["base"]).splitlines()
    assert lines[2:] == [
        "| base | 0.500 | – |",
        "| more | 0.750 | +0.250 [+0.250, +0.250], 3 of 3 |",
    ]
    fewer = {"less": row(0.5, 0.25)} | rows
    assert "+0 [−3.18, +3.18], 1 of 2" in paired.table(fewer, "ball", ["base"])
