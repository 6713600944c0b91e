"""The same matrix through every backend: processes, a Ray cluster of this machine,
submitit's local executor.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

import run_comparison
from comparison import backends
from comparison.matrix import Job, Matrix

CLUSTERS = ["ray", "slurm"]


def needs(name):
    if name != "local":
        pytest.importorskip({"ray": "ray", "slurm": "submitit"}[name])


@pytest.fixture
def make(tmp_path):
    """make("ray") -> that backend."""
    made = {
        "local": lambda: backends.Local(2, "cpu", 1),
        "ray": lambda: backends.Ray(2, "cpu", 1, {"num_cpus": 0.5}),
        "slurm": lambda: backends.Slurm(2, "cpu", {"timeout_min": 5}, tmp_path / "slurm"),
    }
    return lambda name: (needs(name), made[name]())[1]


@pytest.fixture(scope="module", autouse=True)
def one_cluster():
    """Ray is started once for all tests."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def job(folder, script, steps=1):
    """A shell script that is done when it has left a file "done"."""
    return Job(
        folder.name,
        ["sh", "-c", f"cd {folder} && {script}"],
        folder,
        steps,
        (folder / "done").exists,
        {},
    )


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["local", *CLUSTERS])
def test_ends_and_signals_are_passed_on(name, make, tmp_path):
    """One job works, one fails twice, one is at work when a signal comes and may tidy up;
    the last never starts.
    """
    backend, console = make(name), Console(file=io.StringIO())
    works = job(tmp_path / "works", "touch done")
    fails = job(tmp_path / "fails", "echo what went wrong; exit 3")
    assert Matrix([works, fails], backend, console).run() == 0
    assert (works.state, works.attempts, fails.state, fails.attempts) == ("done", 1, "failed", 2)
    assert fails.reason == "exit status 3" and "what went wrong" in fails.last_lines()

    # Not SIGINT: a shell cannot trap it where it was ignored from the start, as below a background
    # job.
    tidy = 'trap "touch tidied; exit 143" TERM; touch started; while :; do sleep 0.1; done'
    first, second = (job(tmp_path / str(i), tidy) for i in range(2))
    backend.slots = 1

    def interrupt():
        wait_for(first.folder / "started")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert Matrix([first, second], backend, console).run() == signal.SIGTERM
    assert (first.state, first.attempts, second.state, second.attempts) == (
        "stopped",
        1,
        "stopped",
        0,
    )
    wait_for(first.folder / "tidied")  # submitit's local executor does not wait for what it cancels
    assert (first.folder / "tidied").exists()


def test_a_signal_that_comes_while_a_command_starts_is_not_lost(tmp_path, monkeypatch):
    """On a cluster another thread passes it on;
    a busy machine may leave it between the two lines of a start.
    """
    process = backends.Process(["sleep", "20"], tmp_path, tmp_path / "log", {}, {})

    class Started(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            process.stop(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Started)
    assert process.run() == -signal.SIGTERM and not process.signals


def test_no_job_outlives_a_matrix_that_breaks_off(make, tmp_path):
    tidy = 'trap "touch tidied; exit 143" TERM; touch started; while :; do sleep 0.1; done'
    first, second = job(tmp_path / "first", tidy), job(tmp_path / "file" / "second", "true")
    (tmp_path / "file").write_text("no folder can be below")
    backend = make("local")
    start, backend.slots = backend.start, 2

    def once_the_first_runs(job):
        if job is second:
            wait_for(first.folder / "started")
        return start(job)

    backend.start = once_the_first_runs
    with pytest.raises(NotADirectoryError):
        Matrix([first, second], backend, Console(file=io.StringIO())).run()
    assert (first.folder / "tidied").exists() and first.handle.poll() == 143


def test_a_run_that_ends_well_but_early_has_failed(make, tmp_path):
    liar = job(tmp_path / "liar", "true")
    assert Matrix([liar], make("local"), Console(file=io.StringIO())).run() == 0
    assert liar.state == "failed" and "not that of a finished run" in liar.reason


def test_what_another_runner_runs_holds_up_nothing_else(make, tmp_path):
    """Two runners on one folder share the work, also where each starts one run at a time."""
    backend, console = make("local"), Console(file=io.StringIO())
    backend.slots = 1
    works = job(tmp_path / "works", "touch done")
    theirs = job(tmp_path / "theirs", "touch done")
    waits = f"for i in $(seq 200); do [ -e {works.folder}/done ] && exit 0; sleep 0.1; done; exit 1"
    other = backends.Process(["sh", "-c", waits], theirs.folder, theirs.log, {}, {})
    assert other.start()
    assert Matrix([theirs, works], backend, console).run() == 0
    assert theirs.state == works.state == "done" and other.poll() == 0


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_matrix_on_a_cluster(name, tmp_path, capsys):
    needs(name)
    args = [
        "--configs",
        "debug",
        "--task",
        "dummy_vector",
        "--steps",
        "80",
        "--models",
        "tiny_dreamerv3",
    ]
    args += ["--seeds", "2", "--jobs", "2", "--logdir", str(tmp_path)]
    assert run_comparison.main([*args, "--backend", name]) == 0
    report = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["seed"], r["status"], r["steps"]) for r in report["runs"]] == [
        (i, "complete", 80) for i in (0, 1)
    ]


def test_gpus_are_shared_evenly(tmp_path, monkeypatch):
    """Without a GPU here: what matters is which one each process is given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    backend = backends.Local(0, "auto", 2)
    assert backend.slots == 4
    jobs = [job(tmp_path / str(i), "echo $CUDA_VISIBLE_DEVICES > gpu; sleep 5") for i in range(4)]
    processes = [backend.start(x) for x in jobs]
    notes = [json.loads((x.folder / "starts.jsonl").read_text())["environment"] for x in jobs]
    assert sorted(note["CUDA_VISIBLE_DEVICES"] for note in notes) == ["2", "2", "5", "5"]
    for process in processes:
        process.popen.kill(), process.popen.wait()
    assert backends.Local(1, "auto", 2).slots == 1 and backends.Local(3, "cpu", 2).slots == 3
