"""A few kills by default; ``benchmarks/kills.py`` does 200 of them and its results are
in results/kills.json.
"""

import json
import sys

import pytest
import torch

import forked
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import kills

KINDS = [
    ("gym_CartPole-v1", "hrvq"),
    pytest.param("dummy_vector", "rssm", marks=pytest.mark.slow),
    pytest.param("dummy_vector", "hrssm", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("task", "dynamics"), KINDS)
def test_a_run_that_is_killed_logs_what_one_that_is_not_logs(task, dynamics, tmp_path):
    out = tmp_path / "kills.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kills.py"),
        "--tasks",
        task,
        "--dynamics",
        dynamics,
    ]
    command += ["--kills", "2", "--each", "1", "--out", str(out)]
    result = forked.run(command, timeout=500)
    report = json.loads(out.read_text())
    assert result.returncode == 0 and report["differing"] == 0, result.stdout + result.stderr
    assert report["kills"] == 2 and all(run["records"] > 20 for run in report["runs"])
    assert report["other_seeds_differ"] == f"{len(report['runs']) - 1} of {len(report['runs']) - 1}"


def test_every_difference_is_seen():
    whole = {
        "records": [{"step": 1}],
        "episodes": {"a": b"1"},
        "counters": {"step": 1},
        "agent": {"w": torch.ones(2)},
    }
    assert kills.differences(whole, whole) == []
    for name, other in {
        "records": [],
        "episodes": {},
        "counters": {"step": 2},
        "agent": {"w": torch.zeros(2)},
    }.items():
        assert kills.differences(whole, whole | {name: other}) == [name]
