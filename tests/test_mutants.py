"""The list of mutants cannot rot, and each of them is noticed:
pytest -m slow tests/test_mutants.py.
"""

import ast
import json
import subprocess
import sys

import pytest

from conftest import ROOT

LEAST = 200  # mutants; the list may grow


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mutants

    return mutants


def test_every_mutant_fits_the_code(mutants):
    """What it replaces occurs exactly once and outside of comments,
    and what comes of it is Python.
    """
    found = mutants.load(mutants.LIST)
    assert len(found) >= LEAST and len({mutant.name for mutant in found}) == len(found)
    for mutant in found:
        text = (ROOT / mutant.file).read_text()
        ast.parse(mutants.mutated(mutant, text))
        assert (
            mutant.old != mutant.new
            and "#" not in text[: text.index(mutant.old)].rsplit("\n", 1)[-1]
        ), mutant.name


def test_an_entry_that_no_longer_fits_is_named(mutants):
    with pytest.raises(ValueError, match=r"'gone': models\.py has 'nowhere to be found' 0 times"):
        mutants.mutated(mutants.Mutant("gone", "models.py", "nowhere to be found", ""), "x = 1")


def test_every_fast_file_exists(mutants):
    assert all((ROOT / name).exists() for name in mutants.in_order(mutants.FAST))
    files = {mutant.file for mutant in mutants.load(mutants.LIST)}
    assert files >= set(mutants.LIKELY) and all(
        set(x) <= set(mutants.FAST) for x in mutants.LIKELY.values()
    )


def run(*words):
    """-> exit status, lines. In a process of its own: the project must not have been imported."""
    words = [sys.executable, str(ROOT / "benchmarks" / "mutants.py"), *map(str, words)]
    result = subprocess.run(words, capture_output=True, text=True)
    return result.returncode, result.stdout.splitlines(), result.stderr


def test_a_fault_is_noticed_and_what_is_none_survives(tmp_path):
    before = (ROOT / "hidreamer" / "mask.py").read_bytes()
    faults = {
        "fault": ["(ago < window)", "(ago <= window)"],
        "harmless": ["n = levels + 1", "n = 1 + levels"],
    }
    (tmp_path / "list.yaml").write_text(json.dumps({"hidreamer/mask.py": faults}))
    status, lines, _ = run(
        "--list", tmp_path / "list.yaml", "--tests", "mask", "--out", tmp_path / "out.json"
    )
    assert status == 1 and [line.split()[:2] for line in lines[:2]] == [
        ["killed", "fault"],
        ["SURVIVED", "harmless"],
    ]
    summary = json.loads(lines[-1])
    assert summary["survived"] == ["harmless"] and (summary["tried"], summary["killed"]) == (2, 1)
    assert json.loads((tmp_path / "out.json").read_text())["noticed_by"]["fault"].endswith(
        "test_window"
    )
    assert before == (ROOT / "hidreamer" / "mask.py").read_bytes()


@pytest.mark.parametrize(
    "text", ["a.py: {x: [only one]}", "models.py: {x: [nowhere to be found, y]}", "a: ["]
)
def test_a_bad_list_is_one_line(text, tmp_path):
    (tmp_path / "list.yaml").write_text(text)
    status, lines, error = run("--list", tmp_path / "list.yaml")
    assert (status, lines) == (2, []) and error.startswith("error: ") and error.count("\n") == 1


def test_an_unknown_name_is_one_line():
    status, lines, error = run("no such mutant")
    assert (status, lines) == (2, []) and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_no_mutant_survives():
    status, lines, error = run()
    assert status == 0, error
    summary = json.loads(lines[-1])
    assert summary["survived"] == [] and summary["tried"] >= LEAST
