"""run_comparison.py: a matrix of real runs ends complete whatever befalls them,
and bad input is one line.
"""

import json
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest

import dreamer
import forked
import run_comparison
import run_config
import tools
from comparison import runs
from comparison.backends import Process
from comparison.options import OPTIONS
from conftest import ROOT
from hidreamer import checkpoint
from hidreamer.provenance import provenance

MODELS = ["tiny_dreamerv3", "tiny_hdreamer", "tiny_hidreamer"]
QUICK = [
    "--configs",
    "debug",
    "--task",
    "dummy_vector",
    "--steps",
    "160",
    "--log_every",
    "20",
    "--eval_every",
    "1000",
]
QUICK += ["--checkpoint_every", "40", "--jobs", "2"]

PLAN = {
    "tiny_hdreamer/0": {"signal": signal.SIGKILL, "once": True},
    "tiny_hidreamer/0": {"signal": 0, "once": False},
}


# dreamer.py, whose runs die as FAULTS says, after a checkpoint.
FAULTY = """
import json, os, sys
sys.path.insert(0, os.environ["ROOT"])
import dreamer, training
plan, save = json.loads(os.environ["FAULTS"]), training.Run.save

def save_and_die(run):
    save(run)
    marker = run.logdir.with_suffix(".fault")
    fault = plan.get("/".join(run.logdir.parts[-2:]))
    if fault and run.step and not (fault["once"] and marker.exists()):
        marker.touch()
        print("the planted fault", flush=True)
        os.kill(os.getpid(), fault["signal"]) if fault["signal"] else os._exit(7)

training.Run.save = save_and_die
sys.exit(dreamer.main(sys.argv[1:]))
"""


def plant(monkeypatch, plan):
    """Have runs die as the plan says, be they copies of this process or others."""
    script = str(ROOT / "dreamer.py")

    def popen(command, **keys):
        if script in command:  # git is started as well
            at = command.index(script)
            command = [*command[:at], "-c", FAULTY, *command[at + 1 :]]
        return forked.popen(command, **keys)

    monkeypatch.setenv("ROOT", str(ROOT))
    monkeypatch.setenv("FAULTS", json.dumps(plan))
    monkeypatch.setattr(subprocess, "Popen", popen)


def compare(*args):
    return run_comparison.main([*QUICK, *map(str, args)])


def starts(folder):
    """{"model/seed": how often it was started}."""
    paths = folder.glob("dummy_vector/*/*/starts.jsonl")
    return {"/".join(p.parts[-3:-1]): p.read_text().count("environment") for p in paths}


def steps_logged(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_matrix_ends_complete(tmp_path, monkeypatch, capsys):
    """One run is finished already, one gets killed,
    one crashes until its fault is mended: no other notices.
    """
    monkeypatch.setattr(subprocess, "Popen", forked.popen)
    folder = tmp_path / "matrix"
    assert compare("--models", MODELS[0], "--seeds", 1, "--logdir", folder) == 0
    assert starts(folder) == {"tiny_dreamerv3/0": 1}

    plant(monkeypatch, PLAN)
    matrix = ["--models", *MODELS, "--seeds", 1, "--logdir", folder]
    assert compare(*matrix) == 1
    expected = {"tiny_dreamerv3/0": 1, "tiny_hdreamer/0": 2, "tiny_hidreamer/0": 2}
    assert starts(folder) == expected
    report = json.loads((folder / "summary.json").read_text())
    status = {f"{row['model']}/{row['seed']}": row["status"] for row in report["runs"]}
    assert status == dict.fromkeys(expected, "complete") | {"tiny_hidreamer/0": "incomplete"}
    assert [failed["name"] for failed in report["failed"]] == ["dummy_vector/tiny_hidreamer/0"]
    assert report["failed"][0]["reason"] == "exit status 7"
    assert report["failed"][0]["log"].endswith("the planted fault")
    out, err = capsys.readouterr()
    assert "dummy_vector/tiny_hidreamer/0: exit status 7" in err and "the planted fault" in err
    assert "dummy_vector/tiny_hdreamer/0: waiting (killed by SIGKILL)" in out
    assert "dummy_vector/tiny_hidreamer/0: failed (exit status 7)" in out
    for name in ("report.md", "report.html"):
        assert "the planted fault" in (folder / name).read_text()

    plant(monkeypatch, {})
    assert compare(*matrix) == 0
    assert starts(folder) == expected | {"tiny_hidreamer/0": 3}
    report = json.loads((folder / "summary.json").read_text())
    assert not report["failed"] and {row["status"] for row in report["runs"]} == {"complete"}
    assert {row["commit"] for row in report["runs"]} == {provenance()["commit"]}
    killed = folder / "dummy_vector" / "tiny_hdreamer" / "0"
    assert "continuing" in killed.with_suffix(".log").read_text()
    assert steps_logged(killed) == sorted(steps_logged(killed)) and steps_logged(killed)[-1] == 160
    for row in report["runs"]:
        assert (
            row["steps"] == 160
            and row["peak_mb"] > 50
            and row["wall_s"] > 0
            and row["updates_per_s"] > 0
        )
        assert (
            np.isfinite(row["final_return"])
            and row["commit"] != "unknown"
            and row["eval_returns"][-1][0] == 160
        )
    assert report["capacity"]["tiny_hdreamer"]["bits"] == 60.0


@pytest.mark.slow  # half a minute; tests/test_population_runs.py has the parts
def test_seeds_side_by_side_are_runs_like_any_other(tmp_path, capsys):
    words = ["--models", *MODELS[:2], "--seeds", 2, "--steps", 40, "--logdir", tmp_path]
    assert compare(*words, "--side-by-side") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {(run["model"], run["seed"]) for run in summary["runs"]}
    assert found == {(model, seed) for model in MODELS[:2] for seed in (0, 1)}
    for model in MODELS[:2]:
        log = (tmp_path / "dummy_vector" / f"{model}.log").read_text()
        assert log.count("$ ") == 1 and "--seeds 0 1" in log
    assert compare("--from", tmp_path) == 0


def test_periods_that_do_not_fit_the_steps_cost_no_second_training(tmp_path, monkeypatch, capsys):
    """The last evaluation falls on the last step, and no checkpoint does."""
    monkeypatch.setattr(subprocess, "Popen", forked.popen)
    folder = tmp_path / "matrix"
    matrix = ["--models", MODELS[0], "--seeds", 1, "--logdir", folder]
    matrix += ["--eval_every", 80, "--checkpoint_every", 1000]
    for _ in range(2):
        assert compare(*matrix) == 0
        assert starts(folder) == {"tiny_dreamerv3/0": 1}
    # Only what was asked for is finished.
    capsys.readouterr()
    assert compare(*matrix, "--replay.ratio", 64) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "replay.ratio" in err and "--resume" not in err, err
    assert starts(folder) == {"tiny_dreamerv3/0": 1}
    run = folder / "dummy_vector" / "tiny_dreamerv3" / "0"
    same = tools.load_config(["debug", MODELS[0]], run_config.saved_config(run))
    other = tools.load_config(
        ["debug", MODELS[0]], run_config.saved_config(run) | {"eval_episodes": 7}
    )
    assert runs.finished(run, 160, same) and not runs.finished(run, 160, other)


def test_ctrl_c_leaves_everything_resumable(tmp_path, capsys):
    """In a process of its own, as a terminal would do it."""
    folder = tmp_path / "matrix"
    args = [*QUICK, "--models", *MODELS[:2], "--seeds", "1", "--jobs", "1", "--steps", "100000"]
    args += ["--logdir", str(folder)]
    command = [sys.executable, str(ROOT / "run_comparison.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = folder / "dummy_vector" / "tiny_dreamerv3" / "0"
    deadline = time.monotonic() + 60
    while (
        not (first / "checkpoints" / "running-000000000080.npz").exists()
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in out, out
    assert "tiny_hdreamer/0: stopped" in out and "the same command continues" in out
    assert "stopped by SIGINT" in first.with_suffix(".log").read_text()
    state = checkpoint.load_checkpoint(first / "checkpoints" / "latest.pt")
    assert state["step"] >= 40 and starts(folder) == {"tiny_dreamerv3/0": 1}
    # What there is can be reported on, and says what it is.
    assert run_comparison.main(["--from", str(folder), "--logdir", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "incomplete" in text and "0 of 1 run complete" in text


def test_memory_is_the_runs_own():
    """Linux's getrusage reports at least what the parent held:
    a heavy runner would make all its runs look heavy.
    """
    ballast = np.ones(2**27)  # 1 GiB
    code = "import torch; from hidreamer.cost import peak_mb; print(peak_mb(torch.device('cpu')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 50.0 < float(result.stdout) < ballast.nbytes / 2**20, result.stderr


def test_two_runners_never_share_a_folder(tmp_path):
    """The lock belongs to the run, so that it outlives a runner that was killed."""
    make = lambda: Process(["sleep", "30"], tmp_path / "run", tmp_path / "run.log", {}, {})
    first, second = make(), make()
    assert first.start() and not second.start()
    first.stop(signal.SIGKILL)
    first.popen.wait()
    assert second.start()
    second.stop(signal.SIGKILL)
    second.popen.wait()
    assert len((tmp_path / "run" / "starts.jsonl").read_text().splitlines()) == 2


def test_a_job_finds_modules_where_the_runner_does(tmp_path, monkeypatch):
    """PYTHONPATH may be relative, and jobs have another folder."""
    (tmp_path / "own_environment.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ".")
    command = [sys.executable, "-c", "import own_environment, tools"]
    assert Process(command, tmp_path / "run", tmp_path / "run.log", {}, {}).run() == 0


# ---------------------------------------------------------------- bad input


BAD = {
    "no such model": (["--models", "tiny_dreamer"], "or tiny_dreamerv3"),
    "no such option": (["--sedes", "3"], "did you mean seeds"),
    "no such backend": (["--backend", "pbs"], "local, ray, slurm"),
    "no such task": (["--task", "dummy_nothing"], "dummy"),
    "one run's option": (["--seed", "3"], "--seed-list"),
    "no number": (["--seeds", "many"], "whole number"),
    "no seeds": (["--seeds", "0"], "at least 1"),
    "too many seeds": (["--seeds", "1" + 12 * "0"], "at most 1000"),
    "a seed twice": (["--seed-list", "7", "11", "7"], "twice"),
    "a model twice": (["--models", "tiny_hdreamer", "tiny_hdreamer"], "twice"),
    "resources without a cluster": (["--resources", "num_cpus=2"], "--backend ray or slurm"),
    "resources without a value": (["--backend", "slurm", "--resources", "num_cpus"], "KEY=VALUE"),
    "no runs": (["--from", "/nonexistent"], "there is no run"),
    "a home that is not known": (["--from", "~nobody-here/run"], "no home is known"),
    "another size": (["--dynamics.hrvq.levels", "0"], "at least 1"),
    "a task of runs that exist": (["--from", "x", "--task", "y"], "--task would change nothing"),
    "a key of runs that exist": (["--from", "x", "--steps", "9"], "--until the frames"),
    "a preset of runs that exist": (["--from", "x", "--configs", "debug"], "--configs would"),
    "both": (["--from", "x", "--paired-offline", "y"], "leave one of them out"),
    "seeds side by side, offline": (["--side-by-side", "--paired-offline", "y"], "--side-by-side"),
    "seeds side by side, again": (["--side-by-side", "--from", "y"], "--side-by-side"),
    "resume": (["--resume", "x"], "dreamer.py"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    args, says = BAD[name]
    trained = [] if "--from" in args else ["--configs", "debug", "--task", "dummy_vector"]
    status = run_comparison.main([*trained, "--logdir", str(tmp_path), *args])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and says in err, err
    assert not list(tmp_path.iterdir())


class Unbuildable(gymnasium.Env):
    def __init__(self):
        raise AssertionError("three\nwalls")


def test_an_environment_that_cannot_be_built_is_one_line(tmp_path, capsys, monkeypatch):
    """Whatever its constructor raises; in a run it would be a crash."""
    spec = gymnasium.envs.registration.EnvSpec("Unbuildable-v0", entry_point=Unbuildable)
    monkeypatch.setitem(gymnasium.registry, "Unbuildable-v0", spec)
    args = ["--configs", "debug", "--task", "gym_Unbuildable-v0", "--logdir", str(tmp_path)]
    says = "error: gym_Unbuildable-v0 cannot be built: AssertionError three walls (test_comparison"
    for status in (
        run_comparison.main(args),
        dreamer.main(["--configs", "debug", *args[2:4], "--capacity", "tiny_hdreamer"]),
    ):
        assert status == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.count(says) == 2, err


def test_an_unfair_comparison_is_refused(tmp_path, capsys):
    """crafter's preset has larger heads than tiny_dreamerv3."""
    args = [
        "--models",
        "tiny_dreamerv3",
        "crafter",
        "--task",
        "dummy_vector",
        "--logdir",
        str(tmp_path),
    ]
    assert run_comparison.main(args) == 2
    err = capsys.readouterr().err
    assert (
        "actor.net.layers: 2 (tiny_dreamerv3), 5 (crafter)" in err and "--allow-differences" in err
    )
    assert "dynamics." not in err and not list(tmp_path.iterdir())


def test_help_names_every_option(capsys):
    assert run_comparison.main(["--help"]) == 0
    out = capsys.readouterr().out
    for key in OPTIONS:
        assert f"--{key.replace('_', '-')}" in out
