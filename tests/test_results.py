"""results/: every file has its row, every commit is in history, no file names a machine."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks import results_page
from conftest import ROOT
from hidreamer import provenance


def history():
    """Whether this is a checkout with all of its history."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == "false"


needs_history = pytest.mark.skipif(not history(), reason="commits are looked for in git's history")


@needs_history
def test_the_page_of_results_is_whole():
    assert results_page.faults(ROOT, results_page.load()) == []


@needs_history
def test_the_page_names_what_is_missing(tmp_path):
    """Each fault is planted in a copy."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    claims = results_page.load()
    assert results_page.faults(tmp_path, claims) == []
    results = tmp_path / "results"
    (results / "new").mkdir()
    (results / "new" / "numbers.json").write_text('{"x": 1}')
    (results / "new" / "curve.png").write_bytes(b"")  # beside nothing that has a row
    (results / "new" / "log.txt").write_text("saved to /home/somebody/runs")
    notes = results / "hrvq" / "pong.md"
    notes.write_text(notes.read_text() + "\n/home/somebody/runs/pong\n")
    path = results / "learning" / "cartpole_rssm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "0123456789ab"}))
    found = results_page.faults(tmp_path, claims)
    assert found[:5] == [
        "results/hrvq/pong.md holds a machine's path: /home/somebody/runs/pong",
        "results/new/curve.png has no row: add it to benchmarks/claims.yaml",
        "results/new/log.txt has no row: add it to benchmarks/claims.yaml",
        "results/new/log.txt holds a machine's path: /home/somebody/runs",
        "results/new/numbers.json has no row: add it to benchmarks/claims.yaml",
    ]
    assert found[5].startswith("commit 0123456789ab of results/learning/cartpole_rssm.json")
    assert found[6].startswith("results/README.md is not up to date") and len(found) == 7


def test_numbers_are_looked_up_and_shown_with_their_interval():
    content = {"a": [{"x": 1.0}, {"x": 3.0}], "b": {"c": [5, 6, 7]}}
    assert results_page.look(content, "a.*.x") == [1.0, 3.0]
    assert results_page.look(content, "b.c.0,2") == [5, 7]
    assert results_page.look(content, "b.c.-1") == [7]
    assert results_page.shown([2.0]) == "2.00"
    assert results_page.shown([0.1 - 1e-9]) == "0.100"
    estimate = {"value": 0.1, "low": -1.0, "high": 1.2, "seeds": ["0", "1"]}
    assert results_page.shown([estimate]) == "+0.100 [−1.00, +1.20]"
    # the 97.5% point of t with one degree of freedom is 12.706, the standard error 1
    assert results_page.shown([1.0, 3.0]) == "2.00 [−10.7, 14.7] (1.00 / 3.00)"


@needs_history
def test_a_comparison_names_the_commits_and_machines_of_its_runs():
    """Not those of its report, which may be made much later and elsewhere."""
    runs = [("5821f51cf1a0, 0966727", "H200"), ("0966727", "EPYC"), ("unknown", "unknown")]
    content = {"runs": [{"commit": commit, "hardware": machine} for commit, machine in runs]}
    content["made"] = {"commit": "ccc3a07", "command": "x", "hardware": "a laptop"}
    commit, _, machines = results_page.of_runs(content)
    assert commit == "5821f51cf1a0, 0966727, ccc3a07 (report)" and machines == "H200; EPYC"
    assert results_page.in_history(commit) and results_page.date(commit) == "2026-11-27"
    assert not results_page.in_history("0966727, 0123456789ab")
    content["made"]["commit"] = "09667271a84c+changes"
    assert results_page.of_runs(content)[0] == "5821f51cf1a0, 0966727"
    content["runs"] = []  # of world models on recorded episodes
    assert results_page.of_runs(content)[::2] == ("09667271a84c+changes", "a laptop")


def test_an_interval_that_holds_the_baseline_shows_nothing(tmp_path):
    """Of two seeds below the baseline, and of one; the t interval of (0.1, 0.3) is 0.2 +- 1.27."""

    def verdict(*errors):
        runs = {str(i): {"open loop 15, moving": x} for i, x in enumerate(errors)}
        for run in runs.values():
            run["open loop 15, moving, copy"] = 0.4
        (row,) = results_page.world_models(tmp_path, "x.json", {"rows": {"gru": runs}})
        return row.shown

    assert verdict(0.1, 0.3) == verdict(0.1) == "open"
    assert verdict(0.1, 0.11) == "yes" and verdict(0.1, 0.5) == "no"


def test_claims_that_lead_nowhere_are_one_line():
    entry = {"file": "results/demo/demo.json", "claim": "x", "seeds": "0", "shown": "no"}
    for fault, says in {
        ("number", "runs.*.then"): "demo.json: there is no 'then' of 'runs.*.then'",
        ("file", "results/none.json"): "names results/none.json, which does not exist",
    }.items():
        with pytest.raises(ValueError, match=re.escape(says)):
            results_page.rows(ROOT, {"files": [entry | dict([fault])], "lineage": []})


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("--out /tmp/x.json", True),
        ('"/Users/me/runs"', True),
        ("/workspace/runs", True),
        (r"C:\Users\me", True),
        ("results/tmp/x", False),
        ("https://x.org/home/y", False),
        ("runs/home/x", False),
    ],
)
def test_what_a_machines_path_is(text, is_path):
    assert bool(results_page.MACHINE.search(text)) == is_path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (str(ROOT / "run_comparison.py"), ["python", "run_comparison.py"]),
        (str(ROOT / "analysis" / "__main__.py"), ["python", "-m", "analysis"]),
        (str(ROOT / "analysis" / "evaluate.py"), ["python", "-m", "analysis.evaluate"]),
        (str(ROOT / "benchmarks" / "beside.py"), ["python", "benchmarks/beside.py"]),
        ("benchmarks/beside.py", ["python", "benchmarks/beside.py"]),
        ("/home/somebody/mine.py", ["python", "mine.py"]),
    ],
)
def test_a_command_names_no_folder_of_the_machine(given, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [given, "--out", "x"])
    assert provenance.script() == words
