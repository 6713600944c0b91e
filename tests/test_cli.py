"""dreamer.py as people call it: every kind of task, every wrong argument,
what ends up in the folder.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import dreamer
import simple_test
import tools
from conftest import ROOT
from hidreamer import checkpoint
from hidreamer.dynamics import TYPES

QUICK = [
    "--steps",
    "60",
    "--log_every",
    "30",
    "--eval_every",
    "60",
    "--checkpoint_every",
    "60",
    "--eval_episodes",
    "1",
]


def run(logdir, *args):
    return dreamer.main(["--configs", "debug", *map(str, args), "--logdir", str(logdir)])


def records(logdir):
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


TASKS = {
    "atari_pong": ["--env.action_repeat", 4, "--steps", 240, "--env.time_limit", 80],
    "dmc_cartpole_balance": [
        "--env.dmc.image",
        "false",
        "--env.dmc.proprio",
        "true",
        "--env.time_limit",
        40,
    ],
    "crafter_reward": ["--env.time_limit", 30],
    "vizdoom_basic": ["--env.action_repeat", 4, "--steps", 240, "--env.time_limit", 80],
    "minatar_freeway": ["--env.time_limit", 30],
    "gym_Pendulum-v1": ["--env.time_limit", 30, "--actor.gradient", "dynamics"],
    "minigrid_MemoryS7": ["--env.time_limit", 30],
    "pinpad_three": ["--env.time_limit", 30],
    "popgym_AutoencodeEasy": ["--env.time_limit", 30, "--video", "false"],
    "dummy_multi": [],
    "dummy_continuous": ["--expl.behavior", "plan2explore", "--expl.units", 8],
    "dummy_grid": ["--expl.behavior", "random", "--expl.until", 40],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_suite_trains_evaluates_and_saves(task, tmp_path, capsys):
    suite = task.split("_")[0]
    module = {suite: suite for suite in ("crafter", "minigrid", "popgym", "vizdoom")}
    pytest.importorskip((module | {"dmc": "dm_control"}).get(suite, "numpy"))
    assert run(tmp_path, "--task", task, *QUICK, "--env.action_repeat", 1, *TASKS[task]) == 0
    out = capsys.readouterr().out
    assert "checkpoint:" in out and "continue:   python dreamer.py" in out
    found = records(tmp_path)
    keys = {key for record in found for key in record}
    assert {
        "step",
        "model_loss",
        "kl_0",
        "actor_loss",
        "eval_return",
        "train_return",
        "train_length",
    } <= keys
    assert all(np.isfinite(value) for record in found for value in record.values())
    assert [record["step"] for record in found] == sorted(record["step"] for record in found)
    assert list((tmp_path / "videos").glob("*-agent.mp4")) or "--video" in TASKS[task]
    assert checkpoint.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")["step"] >= 60


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_dynamics_trains_on_vectors_and_images(kind, tmp_path):
    for task in ("dummy_vector", "dummy_image"):
        assert (
            run(
                tmp_path / task,
                "--task",
                task,
                *QUICK,
                "--env.size",
                16,
                16,
                "--dynamics.type",
                kind,
            )
            == 0
        )


def test_the_folder_holds_what_the_contract_says(tmp_path):
    assert run(tmp_path, "--task", "dummy_image", *QUICK, "--env.size", 16, 16) == 0
    config = YAML(typ="safe").load((tmp_path / "config.yaml").read_text())
    assert config["task"] == "dummy_image" and config["env"]["size"] == [16, 16]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert isinstance(torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True), dict)
    assert list((tmp_path / "videos").glob("*-open_loop.mp4"))
    episodes = list((tmp_path / "train_eps").glob("*.npz"))
    assert episodes
    with np.load(episodes[0]) as episode:
        flags = {"is_first", "is_terminal"}
        assert {"image", "action", "reward", "discount", "logprob", *flags} == set(episode)
        assert int(episodes[0].stem.split("-")[-1]) == len(episode["reward"])


def test_tensorboard_has_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path, "--task", "dummy_image", *QUICK, "--env.size", 16, 16) == 0
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    ours = {key for record in records(tmp_path) for key in record} - {"step"}
    assert set(board.Tags()["scalars"]) == ours
    assert set(board.Tags()["images"]) == {"agent", "open_loop"}
    (loss,) = [
        record for record in records(tmp_path) if record["step"] >= 60 and "model_loss" in record
    ][-1:]
    assert board.Scalars("model_loss")[-1].value == pytest.approx(loss["model_loss"], rel=1e-5)


def test_videos_are_videos(tmp_path):
    import imageio.v3 as iio

    assert run(tmp_path, "--task", "dummy_image", *QUICK, "--env.size", 16, 16) == 0
    (path,) = (tmp_path / "videos").glob("*-open_loop.mp4")
    frames = iio.imread(path, plugin="pyav")
    assert len(frames) == 8 and frames.shape[1:] == (
        3 * 16 * 8,
        2 * 16 * 8,
        3,
    )  # 2 sequences of 8 steps, enlarged 8x
    truth, model = frames[0][: 16 * 8].astype(int), frames[0][16 * 8 : 2 * 16 * 8].astype(int)
    assert truth.std() > 5 and abs(truth - model).mean() > 1  # hardly trained: they differ


def test_levels_are_shown_when_asked_for(tmp_path):
    import imageio.v3 as iio

    task = ["--task", "dummy_image", *QUICK, "--env.size", 16, 16, "--decode-levels"]
    assert run(tmp_path / "flat", *task) == 0
    assert (
        run(tmp_path / "two", *task, "--dynamics.type", "hrssm", "--dynamics.hrssm.stoch", 2, 3)
        == 0
    )
    for kind, rows in (
        ("flat", (3, 2)),
        ("two", (4, 3)),
    ):  # truth, model, error, top; truth, model, top
        for name, count in zip(("open_loop", "levels"), rows, strict=True):
            (path,) = (tmp_path / kind / "videos").glob(f"*-{name}.mp4")
            assert iio.imread(path, plugin="pyav").shape[1] == count * 16 * 8


def test_capacity_prints_presets_side_by_side(capsys):
    assert (
        dreamer.main(
            [
                "--configs",
                "debug",
                "tiny_hdreamer",
                "--capacity",
                "tiny_dreamerv3",
                "--task",
                "dummy_image",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    words = (
        "bits",
        "feature",
        "FLOPs per update",
        "kernels",
        "parameters world_model",
        "tiny_hdreamer",
        "4 + 8",
    )
    assert all(word in out for word in words)
    assert dreamer.main(["--configs", "tiny_hdreamer", "--capacity", "tiny_dreamer"]) == 2


def test_a_crashed_environment_is_counted_and_survived(tmp_path):
    args = ["--task", "dummy_crash", *QUICK, "--steps", 400, "--eval_episodes", 0, "--env.count", 2]
    with pytest.warns(RuntimeWarning, match="crashed and is replaced"):
        assert run(tmp_path, *args) == 0
    assert max(record.get("env_restarts", 0) for record in records(tmp_path)) > 0
    # the episodes that a crash cut short after 10 steps are no returns
    assert {x["train_length"] for x in records(tmp_path) if "train_length" in x} == {20.0}


WRONG = {
    "unknown key": (["--acotr.lr", "1"], "actor.lr"),
    "unknown preset": (["--configs", "atarii100k"], "atari100k"),
    "unknown suite": (["--task", "atri_pong"], "atari"),
    "unknown game": (["--task", "atari_pongg"], "pong"),
    "unknown scenario": (["--task", "vizdoom_basik"], "basic"),
    "unknown id": (["--task", "gym_CartPol-v1"], "CartPole"),
    "wrong type": (["--steps", "soon"], "whole number"),
    "two words": (["--task", "my", "game"], "task takes one text, not 2: quote it, 'my game'"),
    "wrong choice": (["--dynamics.type", "rsm"], "rssm"),
    "no value": (["--steps"], "needs a value"),
    "stray word": (["train"], "unexpected"),
    "sizes": (["--env.size", "60", "60"], "both encoder.minres and decoder.minres"),
    "no square": (
        ["--env.size", "64", "32"],
        "env.size, or both encoder.minres and decoder.minres",
    ),
    "one size": (["--env.size", "64"], "env.size is height and width"),
    "three sizes": (["--env.size", "64", "64", "3"], "env.size is height and width"),
    "no size": (["--env.size", "0", "64"], "env.size"),
    "no number": (["--env.size", "64x64"], "env.size"),
    "no expression": (
        ["--encoder.keys", "image|("],
        "encoder.keys is 'image|(', which is no regular expression",
    ),
    "nor here": (["--decoder.keys", "*"], "decoder.keys is '*', which is no regular expression"),
    "empty expression": (["--encoder.keys", ""], "no observation matches encoder.keys ''"),
    "nor there": (
        ["--decoder.keys", "pixels"],
        "no observation matches decoder.keys 'pixels'; the task has image",
    ),
    "bad policy": (["--env.invalid", "skip"], "stop, truncate"),
    "no device": (["--device", "cuda"], "CUDA"),
    "no preset": (["--configs", "--steps", "9"], "--configs needs the name of a preset"),
    "capacity of what": (["--capacity", "--steps", "9"], "--capacity needs the name of a preset"),
    "capacity of a run": (["--capacity", "debug", "--resume", "x"], "takes no --resume"),
    "no checkpoint": (["--resume", "/nowhere/latest.pt"], "/nowhere/latest.pt"),
    "an unset variable": (["--resume", ""], "--resume needs one path"),
    "and with =": (["--resume="], "--resume needs one path"),
    "no home": (["--resume", "~nobody-here/run"], "no home is known for ~nobody-here"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line_and_status_2(name, tmp_path, capsys, monkeypatch):
    if name == "no device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if name == "unknown scenario":
        pytest.importorskip("vizdoom")
    args, hint = WRONG[name]
    monkeypatch.chdir(tmp_path)
    assert (
        dreamer.main([*args, "--logdir", str(tmp_path / "run")] if name != "stray word" else args)
        == 2
    )
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and hint in err
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    monkeypatch.delitem(sys.modules, "envs.crafter", raising=False)
    assert run(tmp_path / "run", "--task", "crafter_reward") == 2
    assert "pip install -e '.[crafter]'" in capsys.readouterr().err


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_missing_service_is_named(service, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dreamer.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path / "run", "--task", "dummy_vector", "--logger", service) == 2
    assert f"pip install -e '.[{service}]'" in capsys.readouterr().err


def test_help_shows_every_key_with_its_sentence(capsys):
    assert dreamer.main(["--help"]) == 0
    out = capsys.readouterr().out
    says = tools.sentences()
    for key in tools.load_config([], {}).flat():
        assert f"--{key} " in out and says[f"defaults.{key}"] in out
    assert all(name in out for name in ("atari100k", "tiny_dreamerv3", "--resume PATH"))


WITHOUT_TORCH = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
try:
    (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
except SystemExit as ended:
    print(ended.code, *({"torch", "matplotlib", "pandas"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["dreamer.py", "--help"], 0),
        (["dreamer.py", "--configs", "nothing"], 2),
        (["run_comparison.py", "--help"], 0),
        (["run_comparison.py", "--sed", "3"], 2),
        (["pipeline", "--help"], 0),
        (["pipeline", "colect"], 2),
        (["analysis", "--help"], 0),
        (["play", "nowhere"], 2),
    ],
)
def test_help_and_wrong_arguments_load_nothing_that_takes_seconds(words, status):
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == str(status), ended.stdout + ended.stderr


@pytest.mark.parametrize("script", ["dreamer.py", "run_comparison.py"])
def test_a_reader_that_leaves_is_no_error(script):
    """As with --help | head."""
    command = [sys.executable, str(ROOT / script), "--help"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize("script", ["dreamer.py", "run_comparison.py"])
def test_closed_output_is_no_error(script):
    """As with a service manager that gives none."""
    command = f"exec {sys.executable} {ROOT / script} --help >&-"
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_last_line_continues_a_run_that_went_beyond_its_steps(tmp_path, capsys):
    assert run(tmp_path / "run", "--task", "dummy_vector", "--steps", 90) == 0
    assert run(tmp_path / "run", "--task", "dummy_vector", "--steps", 60) == 0
    again = capsys.readouterr().out.splitlines()[-1]
    assert again.startswith("continue:") and int(again.split()[-1]) > 90


def test_the_smoke_test_says_what_it_is_and_takes_no_arguments(capsys):
    assert simple_test.main(["--help"]) == 0 and "every latent state" in capsys.readouterr().out
    assert simple_test.main(["--seed"]) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", "error: simple_test.py takes no arguments, not '--seed'\n")


def test_no_arguments_show_the_help_and_fail(capsys):
    assert dreamer.main([]) == 2
    assert "Presets" in capsys.readouterr().out


def test_as_a_program(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "dreamer.py"),
        "--configs",
        "debug",
        "--task",
        "dummy_vector",
        *QUICK,
    ]
    result = subprocess.run(
        [*command, "--logdir", str(tmp_path)], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert result.returncode == 0 and result.stderr == ""


def test_every_config_key_is_read(tmp_path, monkeypatch):
    """Runs that between them use everything; a key that none of them reads is dead."""
    made = []
    original = tools.load_config
    monkeypatch.setattr(
        tools, "load_config", lambda *args: made.append(original(*args)) or made[-1]
    )
    runs = [
        ["--task", "dummy_image", "--env.size", 16, 16, "--dynamics.type", kind] for kind in TYPES
    ]
    runs.append(
        ["--task", "dummy_continuous", "--expl.behavior", "plan2explore", "--expl.units", 8]
    )
    for name in ("ac_cpc", "barlow", "next_embed", "harmony"):
        runs[0] += [f"--model.losses.{name}", "0.1"]
    for i, args in enumerate(runs):
        assert run(tmp_path / str(i), *args, *QUICK) == 0
    keys, read = set(original([], {}).flat()), set().union(*(config.reads for config in made))
    # The suites take their own blocks; each of these is an argument of the suite's class, which
    # Python checks.
    blocks = tuple(f"env.{suite}." for suite in ("atari", "dmc", "gym", "minatar", "minigrid"))
    suites = {key for key in keys if key.startswith(blocks)}
    assert (
        sorted(
            keys
            - read
            - suites
            - {key for key in keys if key.startswith("pipeline.")}  # tests/test_pipeline.py
            - {"env.size", "env.action_repeat", "env.time_limit", "env.invalid"}
        )
        == []
    )


def test_starting_from_another_run(tmp_path, capsys):
    first = ["--task", "dummy_vector", *QUICK]
    assert run(tmp_path / "a", *first) == 0
    assert run(tmp_path / "b", *first, "--actor.lr", "1e-3", "--resume", tmp_path / "a") == 0
    assert "started from" in capsys.readouterr().out
    a, b = (checkpoint.load_checkpoint(tmp_path / d / "checkpoints" / "latest.pt") for d in "ab")
    assert b["step"] < 2 * a["step"]  # its count starts at 0
    files = [len(list((tmp_path / d / "train_eps").glob("*.npz"))) for d in "ab"]
    assert files[1] > files[0]  # a's episodes and its own
    # The same command again goes on with b, and does not begin from a once more.
    again = [*first, "--actor.lr", "1e-3", "--resume", tmp_path / "a"]
    again[again.index("--steps") + 1] = "90"
    assert run(tmp_path / "b", *again) == 0
    assert "continuing" in capsys.readouterr().out


def test_resuming_a_run_by_its_folder(tmp_path, capsys, monkeypatch):
    args = ["--task", "dummy_vector", *QUICK]
    assert run(tmp_path / "a", *args) == 0
    args[args.index("--steps") + 1] = "90"
    assert dreamer.main(["--configs", "debug", *args, "--resume", str(tmp_path / "a")]) == 0
    step = lambda folder: checkpoint.load_checkpoint(folder / "checkpoints" / "latest.pt")["step"]
    assert step(tmp_path / "a") >= 90
    assert "continuing" in capsys.readouterr().out
    # The folder alone says what run it is, wherever it was moved.
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    assert dreamer.main(["--resume", str(moved)]) == 0
    assert dreamer.main(["--resume", str(moved), "--steps", "120"]) == 0
    assert step(moved) >= 120 and not (tmp_path / "a").exists()
    # By a path from inside; and without presets a run from its weights has its config.
    monkeypatch.chdir(moved / "checkpoints")
    for path in ("latest.pt", ".", "../checkpoints/latest.pt"):
        config, logdir, source = dreamer.prepare(dreamer.tools.parse(["--resume", path]))
        assert logdir.resolve() == moved and source is None
    other = ["--resume", str(moved), "--logdir", str(tmp_path / "other"), "--actor.lr", "1e-3"]
    new, logdir, source = dreamer.prepare(dreamer.tools.parse(other))
    assert new.flat() == config.flat() | {"actor.lr": 1e-3, "logdir": str(tmp_path / "other")}
    assert logdir == tmp_path / "other" and source == moved / "checkpoints" / "latest.pt"
    (moved / "config.yaml").unlink()
    capsys.readouterr()
    assert dreamer.main(["--resume", str(moved)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--configs" in err and "config.yaml: name the" in err


def test_weights_that_do_not_fit_are_refused_with_both_shapes(tmp_path, capsys):
    assert run(tmp_path / "a", "--task", "dummy_vector", *QUICK) == 0
    assert (
        run(
            tmp_path / "b",
            "--task",
            "dummy_vector",
            *QUICK,
            "--critic.net.units",
            17,
            "--resume",
            tmp_path / "a",
        )
        == 2
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "behavior.critic" in err and "(17," in err and "(16," in err


def test_layers_that_have_no_place_are_refused(tmp_path, capsys):
    """The rest would pass for the whole, reading what it was never trained on."""
    first = ["--task", "dummy_vector", *QUICK]
    assert run(tmp_path / "a", *first, "--encoder.layers", "3") == 0
    capsys.readouterr()
    assert run(tmp_path / "b", *first, "--encoder.layers", "1", "--resume", tmp_path / "a") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is nothing here" in err and "encoder" in err


def test_a_run_from_before_a_key_goes_on_with_its_default(tmp_path, capsys):
    """Any other value would make it another run from there on, which its config.yaml denies."""
    first = ["--task", "dummy_vector", *QUICK]
    assert run(tmp_path / "a", *first) == 0
    latest = tmp_path / "a" / "checkpoints" / "latest.pt"
    state = checkpoint.load_checkpoint(latest)
    del state["config"]["replay"]["online"], state["config"]["dynamics"]["hrvq"]["norm"]
    checkpoint.save_checkpoint(latest, state)
    longer = [*first]
    longer[longer.index("--steps") + 1] = "90"
    capsys.readouterr()
    assert run(tmp_path / "a", *longer, "--replay.online", "true") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "replay.online False -> True" in err
    # A setting of another latent state makes no other run.
    assert run(tmp_path / "a", *longer, "--dynamics.hrvq.norm", "rms") == 0


def test_weights_alone_begin_a_run_with_the_keys_that_are_given(tmp_path, capsys):
    first = ["--task", "dummy_vector", *QUICK]
    assert run(tmp_path / "a", *first) == 0
    folder = tmp_path / "x" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "checkpoints" / "latest.pt", folder)
    words = ["--resume", str(folder / "latest.pt"), "--logdir", str(tmp_path / "new")]
    config, _, source = dreamer.prepare(tools.parse([*words, "--task", "dummy_vector"]))
    assert config.flat() == tools.load_config([], config_of(words)).flat() and source


def config_of(words):
    return {"task": "dummy_vector", "logdir": words[-1]}
