"""Does it learn? Whole runs of a quarter of an hour and more: pytest -m slow. Last results: results/learning/."""

import subprocess
import sys

import pytest

from conftest import ROOT
from hidreamer.dynamics import TYPES


def status(*words):
    """Exit status of benchmarks/learning.py: 0 if every bar is met, or, for a broken twin, missed."""
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "learning.py"), *words]).returncode


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
@pytest.mark.parametrize("dynamics", TYPES)
def test_it_learns(task, dynamics):
    # Tokens as their results were measured: docs/decisions/012.
    tokens = {
        "cartpole": ["--imag.starts", "8", "--actor.entropy", "1e-3"],
        "minatar": ["--actor.entropy", "3e-3"],
    }
    more = ["--", *tokens[task]] if dynamics == "hrvq" else []
    assert status(task, "--dynamics", dynamics, *more) == 0


def test_a_longer_run_is_not_judged_as_a_short_one(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    assert not learning.longer(tmp_path, 100)
    (tmp_path / "config.yaml").write_text("steps: 200\n")
    assert not learning.longer(tmp_path, 200) and learning.longer(tmp_path, 100)
    assert "give --steps 200" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
def test_the_broken_twin_does_not(task):
    assert status(task, "--seeds", "0", "--steps", "20000", "--twin") == 0
