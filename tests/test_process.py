"""What a run does to its process: memory, threads, imports."""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_runs import run
from test_agent import EVERYTHING, VECTOR, make

from conftest import ROOT
from hidreamer import process

sys.path.insert(0, str(ROOT / "benchmarks"))
import before
import process as benchmark


def python(code, **env):
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


FAULTS = """
import resource
from hidreamer.process import keep_freed_memory
keep_freed_memory()
import torch
torch.set_num_threads(1)
for _ in range(15):
    torch.ones(20_000_000)  # 80 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    assert int(python(FAULTS)) < 1000
    assert int(python(FAULTS, HIDREAMER_MALLOC="system")) > 50_000  # 10 times 80 MB, paged in anew


UPDATES = """
import sys
from hidreamer.process import keep_freed_memory
keep_freed_memory()
sys.path.insert(0, "benchmarks")
import torch, equality, measure
from hidreamer import cost
torch.set_num_threads(1)
cpu = torch.device("cpu")
before = cost.peak_mb(cpu)
agent, (batch,) = equality.make_agent(["debug"], cpu, **{"replay.batch": 32, "replay.length": 32})
for _ in range(3):
    agent.update(batch)
faults = [measure.page_faults(lambda: agent.update(batch)) for _ in range(3)]
print(min(faults), cost.peak_mb(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_an_update_takes_no_new_pages():
    """Once the heap has grown. What an update needs is bounded where freed memory goes back at
    once; a kept heap has gaps besides, other ones each time, up to two steps of its growth.
    """
    given_back, needed = map(float, python(UPDATES, HIDREAMER_MALLOC="system").split())
    assert given_back > 50_000 and needed < 600.0  # so the bound on faults can be missed
    faults, peak = map(float, python(UPDATES).split())
    assert faults < 5000 and peak < needed + 2 * process.GROWTH / 2**20


def test_games_load_no_plotting_libraries_and_others_still_can():
    pytest.importorskip("matplotlib")
    code = "import envs.minatar, sys; print('pandas' in sys.modules, 'matplotlib' in sys.modules)"
    code += "; import matplotlib.pyplot, logging; print(logging.getLogger().handlers)"
    assert python(code).splitlines() == ["False False", "[]"]
    # Where it is loaded already, it stays what it is.
    code = "import matplotlib as m, envs.minatar, sys; print(sys.modules['matplotlib'] is m)"
    assert python(code) == "True"


WORDS = """
import runpy, sys
sys.argv = ["dreamer.py", *{words}]
try:
    runpy.run_path("dreamer.py", run_name="__main__")
except SystemExit as error:
    print(error.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--configs", "minatra"], 2),
        (["--capacity", "minatra"], 2),
        (["--no.key", "1"], 2),
        (["word"], 2),
    ],
)
def test_help_and_wrong_arguments_need_no_torch(words, status):
    code = "import sys, io; sys.stderr = io.StringIO()" + WORDS.format(words=words)
    assert python(code).splitlines()[-1] == f"{status} False"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_small_networks_have_one_thread(threads, monkeypatch):
    monkeypatch.setattr(process, "AVAILABLE", 2)
    torch.set_num_threads(1)  # as an earlier run of this process may have left it
    images, small = make(EVERYTHING)[0], make(VECTOR)[0]
    assert process.pick_threads(small, 0) == 1
    assert process.pick_threads(images, 0) == 2
    assert process.pick_threads(small, 3) == 3
    monkeypatch.setattr(process, "SMALL", 10)
    assert process.pick_threads(small, 0) == 2


def test_a_run_uses_the_threads_asked_for_and_notes_its_precision(threads, tmp_path):
    torch.set_num_threads(2)
    assert run(tmp_path, "--steps", 30) == 0 and torch.get_num_threads() == 1
    words = ["--steps", 60, "--threads", 2, "--precision", "bfloat16"]
    assert run(tmp_path, *words) == 0 and torch.get_num_threads() == 2
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["precision"] for start in starts] == ["float32", "bfloat16"]


def test_threads_sleep_while_they_wait():
    assert python("import dreamer, os; print(os.environ['OMP_WAIT_POLICY'])") == "PASSIVE"
    code = "import os; os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'; import dreamer"
    assert python(code + "; print(os.environ['OMP_WAIT_POLICY'])") == "ACTIVE"


def test_the_benchmark_measures_beside_busy_processes(tmp_path, monkeypatch, capfd):
    assert len(benchmark.rows(1)) == 2 and len(benchmark.rows(2)) == 5
    row = benchmark.Row("system", 1, 1)
    monkeypatch.setattr(benchmark, "rows", lambda cores: [row])
    words = ["--configs", "debug", "--task", "dummy_vector"]
    few = ["--updates", "1", "--rounds", "1", "--out", str(tmp_path / "new" / "found.json")]
    assert benchmark.main([*words, *few]) == 0
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert json.loads(capfd.readouterr().out) == found
    measured = found["rows"]["system, 1 threads, beside 1 busy"]
    assert set(measured) == set(benchmark.KEYS) and measured["cpu_s"] > 0.0
    assert not any("BUSY" in line or "getppid" in line for line in running())


def running():
    """The command lines of this process's children."""
    listed = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    return listed.stdout.splitlines()


def test_the_benchmark_stops_what_takes_too_long_and_says_so(capfd):
    row = benchmark.Row("kept", 1, 0)
    run = {key: 2.0 for key in benchmark.KEYS}
    assert benchmark.one(["--configs", "debug"], row, 0.05) is None
    assert benchmark.summary([None, run], 9) == run | {"stopped": "1 of 2, after 9 s"}
    assert benchmark.summary([None], 9) == {"stopped": "1 of 1, after 9 s"}
    assert benchmark.main(["--configs", "nonsense"]) == 2
    assert benchmark.main(["--updates", "many"]) == 2
    assert capfd.readouterr().err.count("error:") == 2


@pytest.mark.slow
def test_an_update_against_an_older_commit(tmp_path, capfd):
    words = ["--configs", "debug", "--task", "dummy_vector", "--repeats", "1"]
    out = tmp_path / "found.json"
    assert before.main(["HEAD", "--rounds", "1", "--out", str(out), "--", *words]) == 0
    found = json.loads(out.read_text())
    assert found["now"]["kernels"] > 0 and 0.2 < found["cpu_ratio"] < 5.0
    assert found["words"] == words and found["before_commit"] == "HEAD"


def test_an_older_commit_that_there_is_not_is_one_line(capfd):
    assert before.main(["nonsense", "--", "--configs", "debug"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: git archive --format=tar fails"
