"""The list of mutants cannot rot, and each of them is noticed: pytest -m slow tests/test_mutants.py."""

import ast
import json

import pytest

from conftest import ROOT

LEAST = 200  # mutants; the list may grow


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mutants

    return mutants


def test_every_mutant_fits_the_code(mutants):
    """What it replaces occurs exactly once, and what comes of it is Python that says something else."""
    found = mutants.load()
    assert len(found) >= LEAST and len({mutant.name for mutant in found}) == len(found)
    for mutant in found:
        text = (ROOT / mutant.file).read_text()
        changed = mutants.mutated(mutant, text)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutant.name


def test_an_entry_that_no_longer_fits_is_named(mutants):
    with pytest.raises(ValueError, match=r"'gone': models\.py has 'nowhere to be found' 0 times"):
        mutants.mutated(mutants.Mutant("gone", "models.py", "nowhere to be found", ""), "x = 1")


def test_every_fast_file_exists(mutants):
    assert all((ROOT / name).exists() for name in mutants.in_order())
    files = {mutant.file for mutant in mutants.load()}
    assert files >= set(mutants.LIKELY) and all(set(x) <= set(mutants.FAST) for x in mutants.LIKELY.values())


def test_a_fault_is_noticed_and_what_is_none_survives(mutants, tmp_path):
    mutants.copy_tree(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("hidreamer/*.py")}
    fault = next(mutant for mutant in mutants.load() if mutant.name == "return norm ten times as fast")
    survives, by = mutants.trial(fault, tmp_path, ["tests/test_numerics.py"])
    assert not survives and by.endswith("test_normaliser_moves_by_a_hundredth")
    harmless = mutants.Mutant("harmless", "hidreamer/mask.py", "n = levels + 1", "n = 1 + levels")
    assert mutants.trial(harmless, tmp_path, ["tests/test_mask.py"]) == (True, "")
    assert before == {path: path.read_bytes() for path in tmp_path.glob("hidreamer/*.py")}


def test_an_unknown_name_is_one_line(mutants, capsys):
    assert mutants.main(["no such mutant"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_no_mutant_survives(mutants, capsys):
    status = mutants.main([])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and told["survived"] == [] and told["tried"] >= LEAST
