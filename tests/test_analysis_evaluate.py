"""python -m analysis.evaluate: the numbers of the run's own evaluation; one line for bad input."""

import json
import subprocess
import sys

import pytest
from small_runs import one_line, records

import dreamer
import forked
import hidreamer
from analysis import evaluate
from conftest import ROOT


def own(folder):
    """The run's last evaluation."""
    (*_, last) = [line for line in records(folder) if "eval_return" in line]
    return {key: value for key, value in last.items() if key.startswith("eval_")}


def scores(tmp_path, *words):
    out = tmp_path / "deep" / "scores.json"
    assert evaluate.main([*map(str, words), "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", [("rssm", "image"), ("hrvq", "vector"), ("rssm", "continuous")])
def test_it_is_the_runs_own_evaluation(case, trained, tmp_path):
    found = scores(tmp_path, trained(*case))
    expected = own(trained(*case))
    assert {key: found[key] for key in expected} == expected
    assert found["eval_episodes"] == len(found["returns"]) == len(found["lengths"]) == 3
    assert sum(found["returns"]) / 3 == pytest.approx(found["eval_return"])
    assert (found["seed"], found["actions"], found["step"]) == (0, "likeliest", 120)


def test_of_several_environments_and_sampled_actions(tmp_path):
    """In the middle of training, continued, with another number of environments."""
    run = ["--configs", "debug", "--task", "dummy_grid", "--logdir", str(tmp_path / "run")]
    run += ["--env.count", "2", "--eval_greedy", "false", "--eval_episodes", "5", "--seed", "3"]
    run += ["--video", "false", "--eval_every", "60"]
    for steps in ("70", "130"):
        assert dreamer.main([*run, "--steps", steps]) == 0
    found, expected = scores(tmp_path, tmp_path / "run"), own(tmp_path / "run")
    assert {key: found[key] for key in expected} == expected
    assert (found["seed"], found["actions"]) == (3, "sampled")


def test_other_episodes(trained, tmp_path):
    folder = trained("hrvq", "vector")
    first = scores(tmp_path, folder, "--episodes", 6, "--seed", 11)
    again = scores(tmp_path, folder, "--episodes", 6, "--seed", 11)
    assert first["returns"] == again["returns"] and len(first["returns"]) == 6
    other = scores(tmp_path, folder, "--episodes", 6, "--seed", 12)
    sampled = scores(tmp_path, folder, "--episodes", 6, "--seed", 11, "--sampled")
    assert first["returns"] not in (other["returns"], sampled["returns"])
    assert sampled["actions"] == "sampled"


def test_an_export_scores_the_same(trained, tmp_path):
    folder = trained("hrvq", "vector")
    out = hidreamer.export(folder, tmp_path / "agent")
    assert scores(tmp_path, out)["returns"] == scores(tmp_path, folder)["returns"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "logdir"),
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--episodes", "0"], "0 is less than 1"),
        ([".", "--episodes", "many"], "many"),
        ([".", "--sead", "3"], "--sead"),
        ([str(ROOT / "docs")], "holds no agent"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    assert evaluate.main(words) == 2
    one_line(capsys, says)


def test_a_file_that_cannot_be_written_is_one_line(trained, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = [str(trained("rssm", "image")), "--out", str(tmp_path / "file" / "x.json")]
    assert evaluate.main(words) == 1
    one_line(capsys, "file")


def test_the_commands(trained, tmp_path):
    """As a module and as ``hidreamer evaluate``, from another folder."""
    for words in (["analysis.evaluate"], ["hidreamer", "evaluate"]):
        words = [sys.executable, "-m", *words, trained("rssm", "image"), "--episodes", "1"]
        words = list(map(str, words))
        done = forked.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and done.stdout.startswith("eval return "), done.stderr
        assert len(json.loads(done.stdout.splitlines()[-1])["returns"]) == 1


@pytest.mark.parametrize(
    "module", ["analysis", "analysis.evaluate", "analysis.overestimation", "play", "pipeline"]
)
def test_a_command_says_at_once_what_is_wrong(module, tmp_path):
    """In a folder with modules of our names; without torch, which takes seconds to import."""
    for name in ("tools", "models", "library"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('of another project')")
    env = {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    words = [sys.executable, "-m", module, "nowhere", "--episodes", "many"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    if module != "pipeline":
        assert not any(line.endswith("| torch") for line in done.stderr.splitlines())


def test_what_cannot_be_written_is_said_before_and_printed_after(
    trained, tmp_path, capsys, monkeypatch
):
    out, words = tmp_path / "scores.json", [str(trained("rssm", "vector")), "--episodes", "1"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hidreamer.checkpoint.replace_file", full)
        assert evaluate.main([*words, "--out", str(out)]) == 1
        printed, err = capsys.readouterr()
        assert len(json.loads(printed.splitlines()[-1])["returns"]) == 1
        assert "--out" in err and err.count("\n") == 1
    monkeypatch.setattr("hidreamer.checkpoint.tempfile.TemporaryFile", full)
    monkeypatch.setattr(evaluate, "evaluate", None)  # nothing is played
    assert evaluate.main([*words, "--out", str(out)]) == 1
    one_line(capsys, "--out", "name another")
