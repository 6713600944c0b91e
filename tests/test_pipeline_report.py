"""``all``, the report, and that every key of the pipeline is read."""

import re

import numpy as np
import pytest
import torch
from small_pipeline import CONFIGS, copied, read, run, same
from test_pipeline import recording

import tools
from conftest import ROOT
from pipeline import __main__ as command
from pipeline import pictures, report
from pipeline.encoder import Encoder
from pipeline.policy import Policy
from pipeline.stage import Runner
from pipeline.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def reported(acting, tmp_path_factory):
    folder = copied(acting, tmp_path_factory.mktemp("reported"), *command.STAGES)
    assert run("all", folder) == 0
    return folder


def test_the_report_has_every_part_and_opens_offline(reported):
    text = (reported / "report.html").read_text()
    for title in ("The chain", "Claimed and measured", "Frames and their codes", "Dreams"):
        assert f"<h2>{title}</h2>" in text
    for name in command.STAGES:
        assert f"Gate: {name}" in text
    assert text.count("<svg") == 2 + 2 + 2 + 1  # two games; decodes, dreams, codes; shared codes
    outside = re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text)
    assert outside == [], outside
    assert "<script" not in text


def test_claims_name_rows_that_there_are(reported):
    """A renamed metric would leave a dash where a measurement stands."""
    gates = {name: read(reported / name) for name in command.STAGES}
    for claim in report.CLAIMS:
        assert claim.stage in gates
        assert report.measured(gates, claim) != "–", claim.what
        assert bool(claim.metrics) != bool(claim.elsewhere), claim.what


# Rows that stand beside another value and that no value of makes a warning: a note says why.
RECORD = ("persistence", "bits", "shared codes", "bits about the game", "diversity", "norm")
RECORD += ("best r (lineage)", "standard error", "codes in use", "perplexity")


def test_every_metric_with_a_baseline_can_warn(reported):
    found = set()
    for name in command.STAGES:
        for table in read(reported / name)["tables"]:
            for row in table["rows"]:
                known = row["value"] is not None and row["baselines"]
                if known and not row["better"] and not row["metric"].endswith(RECORD):
                    found.add(row["metric"])
    assert not found


def test_what_the_project_measured_is_not_said_to_be_of_this_run():
    for claim in (claim for claim in report.CLAIMS if claim.elsewhere):
        text = report.measured({}, claim)
        assert text.startswith(f"not by this run; measured by the project ({claim.source})")
        file, _, commit = claim.source.partition(", commit ")
        assert commit in (ROOT / file).read_text()
    assert not any("standard error" in claim.why + claim.elsewhere for claim in report.CLAIMS)


def test_eight_levels_have_a_picture():
    """The report ended in an IndexError, after every stage was done: there are seven colours."""
    part = recording([4, 3, 5])
    tokens = np.arange(8 * len(part)).reshape(-1, 8) % 5
    assert "<svg" in pictures.codes_over_time(part, tokens)


def test_measured_by_hand():
    row = {"metric": "pong: L0 accuracy", "value": 0.5, "baselines": {"copy-last": 0.25, "x": None}}
    other = {"metric": "L0 accuracy, changed", "value": 1.0, "baselines": {}}
    gates = {"s": {"tables": [{"title": "Teacher-forced", "rows": [row, other]}]}}
    claim = report.Claim("", "", "s", ("*: L0 accuracy",), "")
    assert report.measured(gates, claim) == "pong: L0 accuracy 0.5 (copy-last 0.25)"
    assert report.measured(gates, claim._replace(stage="t")) == "–"


def test_the_report_says_in_words_what_did_not_work():
    row = lambda metric, value, beaten, **by: {
        "metric": metric,
        "value": value,
        "beaten_by": beaten,
        "baselines": by,
    }
    both = {"copy-last": 0.5, "counted pairs": 0.95}
    found = [row("pong: L0 accuracy", 0.9, ["counted pairs"], **both)]
    found.append(row("b: L0 accuracy", 0.1, ["copy-last", "counted pairs"], **both))
    found.append(row("pong: L0 accuracy, changed", 0.9, [], **both))
    played = row("pong: mean return", -20.4, ["x"], **{"random play": -17.8, "online": -21.0})
    gates = {
        "world_model": {"tables": [{"title": "Teacher-forced", "rows": found}]},
        "policy": {"tables": [{"title": "In the real game", "rows": [played]}]},
    }
    first, pairs, second = report.in_words(gates).text
    assert "copying the last code: L0 in 1 of 2 games" in first
    assert "counted pairs of codes: L0 in 0 of 2 games" in pairs
    assert "did not learn: -20.4" in second and "-17.8" in second and "-21" in second
    by_chance, better = (report.learned(played | {"value": -10.0}, x) for x in (False, True))
    assert "is not shown to return more" in by_chance and "did not learn" not in by_chance
    assert "The policy returns more than random play" in better
    played["value"], above = -10.0, row("pong: above random play by", 2.0, [], none=0.0)
    gates["policy"]["tables"][0]["rows"].append(above)
    assert "The policy returns more than random play" in report.in_words(gates).text[2]


def test_all_finishes_what_is_left_and_changes_nothing_that_is_done(acting, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda root, *_: (root / "report.html").touch())
    folder = copied(acting, tmp_path / "run", "collect", "encoder", "tokenizer", "world_model")
    before = (folder / "encoder" / "manifest.json").read_bytes()
    assert run("all", folder, "--policy.online", "false") == 0
    assert (folder / "encoder" / "manifest.json").read_bytes() == before
    assert (folder / "policy" / "manifest.json").exists() and (folder / "report.html").exists()


def test_strict_stops_all_at_the_first_gate_with_a_warning(acting, tmp_path, capsys):
    folder = copied(acting, tmp_path / "run", "encoder", "collect")
    first = next(n for n in ("collect", "encoder") if not read(folder / n)["passed"])
    assert run("all", folder, "--strict") == 1
    out = capsys.readouterr().out
    assert f"Gate of {first}: with warnings" in out
    assert not (folder / "tokenizer").exists() and not (folder / "report.html").exists()


def test_a_stage_that_stops_on_a_signal_says_so_and_continues(acting, tmp_path, monkeypatch):
    folder = copied(acting, tmp_path / "run", "collect")
    steps = []
    original = Runner.run

    def poll_twice(self, poll, screen):
        def stop():
            steps.append(1)
            if len(steps) == 3:
                raise command.Stop(15)

        return original(self, stop, screen)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", poll_twice)
        assert run("encoder", folder) == 128 + 15
    assert run("encoder", folder) == 0
    assert same(folder / "encoder", acting / "encoder")


def test_every_key_of_the_pipeline_is_read(acting, reported, tmp_path):
    """By what made ``acting`` and ``reported``, and by one step of every variant."""
    config = lambda **keys: tools.load_config(["pipeline_debug"], keys)
    variants = {
        Encoder: config(**{"pipeline.encoder.objective": "both"}),
        Tokenizer: config(**{"pipeline.tokenizer.joint": "true"}),
        Policy: config(**{"pipeline.policy.algorithm": "ppo"}),
    }
    for kind, settings in variants.items():
        kind(settings, acting, torch.device("cpu"), print).advance()
    assert run("encoder", tmp_path, "--kind", "dinov2") == 2
    keys = {key for key in config().flat() if key.startswith("pipeline.")}
    found = set().union(*(one.reads for one in (*CONFIGS, *variants.values())))
    known = {"pipeline.collect.random", "pipeline.encoder.weights"}  # of an agent, of a DINOv2
    assert keys - found <= known
