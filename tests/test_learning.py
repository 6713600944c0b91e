"""Does it learn? Whole runs of a quarter of an hour and more: pytest -m slow. Last results: results/learning/."""

import subprocess
import sys

import pytest

from conftest import ROOT
from hidreamer.dynamics import TYPES


def learning(*words):
    """Exit status of benchmarks/learning.py: 0 if every bar is met, or, for a broken twin, missed."""
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "learning.py"), *words]).returncode


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
@pytest.mark.parametrize("dynamics", TYPES)
def test_it_learns(task, dynamics):
    assert learning(task, "--dynamics", dynamics) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole", "minatar"])
def test_the_broken_twin_does_not(task):
    assert learning(task, "--seeds", "0", "--steps", "20000", "--twin") == 0
