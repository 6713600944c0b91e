"""results/: every file has its row, every commit is in history, no file names a machine."""

import json
import shutil
import subprocess

import pytest

from benchmarks import results_page
from conftest import ROOT


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
    notes = results / "hrvq" / "pong.md"
    notes.write_text(notes.read_text() + "\n/home/somebody/runs/pong\n")
    path = results / "learning" / "cartpole_rssm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "0123456789ab"}))
    found = results_page.faults(tmp_path, claims)
    assert found[:3] == [
        "results/hrvq/pong.md holds a machine's path: /home/somebody/runs/pong",
        "results/new/curve.png has no row: add it to benchmarks/claims.yaml",
        "results/new/numbers.json has no row: add it to benchmarks/claims.yaml",
    ]
    assert found[3].startswith("commit 0123456789ab of results/learning/cartpole_rssm.json")
    assert found[4].startswith("results/README.md is not up to date") and len(found) == 5


def test_numbers_are_looked_up_and_shown_with_their_interval():
    content = {"a": [{"x": 1.0}, {"x": 3.0}], "b": {"c": [5, 6, 7]}}
    assert results_page.look(content, "a.*.x") == [1.0, 3.0]
    assert results_page.look(content, "b.c.0,2") == [5, 7]
    assert results_page.look(content, "b.c.-1") == [7]
    assert results_page.shown([2.0]) == "2.00"
    # the 97.5% point of t with one degree of freedom is 12.706, the standard error 1
    assert results_page.shown([1.0, 3.0]) == "2.00 [−10.7, 14.7] (1.00 / 3.00)"


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("--out /tmp/x.json", True),
        ('"/Users/me/runs"', True),
        ("results/tmp/x", False),
        ("https://x.org/home/y", False),
        ("runs/home/x", False),
    ],
)
def test_what_a_machines_path_is(text, is_path):
    assert bool(results_page.MACHINE.search(text)) == is_path
