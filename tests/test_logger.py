"""What a run writes: standard JSON, TensorBoard, W&B, videos, lines;
and that only the first of them may end it.
"""

import contextlib
import contextvars
import functools
import importlib.machinery
import json
import os
import sqlite3
import subprocess
import sys
import types
import warnings

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import dreamer
from comparison import matrix, runs
from conftest import ROOT
from hidreamer import logger
from hidreamer.logger import Logger, Screen, stack
from hidreamer.metrics import Means
from tools import load_config


def lines(logdir):
    """The records of metrics.jsonl, read by a parser that knows no NaN."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (logdir / "metrics.jsonl").read_text().splitlines()
    ]


def board(logdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir))
    events.Reload()
    return events


def raises(error):
    def act(*args, **kwargs):
        raise error

    return act


# ---------------------------------------------------------------- metrics.jsonl


def test_what_is_no_number_becomes_null(tmp_path):
    log = Logger(tmp_path, 0, 0)
    log.scalars(1, {"a": float("nan"), "b": float("-inf"), "c": np.float32(0.5), "d": 2})
    log.scalars(2, {"a": 1.0})
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "a": None, "b": None, "c": 0.5, "d": 2},
        {"step": 2, "a": 1.0},
    ]


def test_readers_skip_null_and_the_nan_of_older_logs(tmp_path):
    config = load_config(["debug"], {"task": "dummy_vector", "steps": "30", "log_every": "10"})
    (tmp_path / "config.yaml").write_text(json.dumps(config.tree()))
    log = (
        '{"step": 10, "x": 1.0, "y": null, "train_return": 5.0}\n'
        '{"step": 20, "x": null, "train_return": null}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(
        log + '{"step": 30, "x": NaN, "perf/frames_per_s": null}\n'
    )
    run = runs.read(tmp_path)
    assert (
        run.step == 30 and run.get("x").tolist() == [[10.0, 1.0]] and run.get("y").shape == (0, 2)
    )
    seen = types.SimpleNamespace(folder=tmp_path, unit="frames", seen={}, watched=None)
    matrix.Job.look(seen)
    assert seen.seen == {"step": 30, "return": 5.0}


def test_a_full_disk_under_metrics_is_an_error_and_all_is_closed(tmp_path):
    log = Logger(tmp_path, 0, 0)
    log.file.close()
    log.file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    log.scalars(1, {"x": 1.0})
    with pytest.raises(OSError, match="No space"):
        log.flush()
    with pytest.raises(OSError, match="No space"):
        log.close()
    assert log.board.writer.closed


# ---------------------------------------------------------------- TensorBoard


def test_continuing_hides_only_what_is_logged_again(tmp_path):
    first = Logger(tmp_path, 0, 0)
    for step in (10, 20, 30):
        first.scalars(step, {"x": float(step)})
    size = first.flush()
    first.scalars(40, {"x": 40.0})  # after the checkpoint at step 30
    first.close()
    second = Logger(tmp_path, 30, size)
    second.scalars(50, {"x": 50.0})
    second.close()
    assert [event.step for event in board(tmp_path).Scalars("x")] == [10, 20, 30, 50]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 50]


def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path, monkeypatch, capfd):
    def elsewhere(path, *args, **more):
        return open("/dev/full" if "tfevents" in str(path) else path, *args, **more)

    monkeypatch.setattr(logger, "open", elsewhere, raising=False)
    log = Logger(tmp_path, 0, 0)
    with pytest.warns(
        RuntimeWarning, match=r"TensorBoard failed .*metrics\.jsonl.*No space"
    ) as seen:
        for step in range(2000):
            log.scalars(step, {"x": 1.0})
            log.flush()
        log.close()
    assert len(seen) == 1 and len(lines(tmp_path)) == 2000
    assert capfd.readouterr().err == ""


def test_tensorboard_that_cannot_begin_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "EventFile", raises(ImportError("protobuf is too old")))
    with pytest.warns(RuntimeWarning, match="TensorBoard failed .*protobuf is too old") as seen:
        log = Logger(tmp_path, 0, 0)
        log.scalars(1, {"x": 1.0})
        log.video(1, "agent", [np.zeros((16, 16, 3), np.uint8)])
        log.close()
    assert (
        len(seen) == 1 and len(lines(tmp_path)) == 1 and list((tmp_path / "videos").glob("*.mp4"))
    )


def test_tensorflow_stays_out(tmp_path):
    """Where it is installed, its import prints pages about processors and GPUs."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        "import sys; print('rebuild TensorFlow', file=sys.stderr)"
    )
    code = (
        "import pathlib; from hidreamer.logger import Logger; log = Logger(pathlib.Path(), 0, 0); "
    )
    code += "log.scalars(1, {'x': 1.0}); log.close()"
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""


# ---------------------------------------------------------------- Weights & Biases


class Wandb(types.ModuleType):
    """As much of the module as the logger uses."""

    Video = staticmethod(str)

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs, self.logged, self.fails = [], [], fails

    def init(self, **settings):
        if "init" in self.fails:
            raise RuntimeError("no\nnetwork")
        self.runs.append(settings)
        log = raises(BrokenPipeError("its service is gone")) if "log" in self.fails else self._log
        return types.SimpleNamespace(log=log, finish=lambda: None)

    def _log(self, values, step):
        self.logged.append((step, values))


CONFIG = {"task": "gym_CartPole-v1", "dynamics": {"type": "hrvq"}, "seed": 3}


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    first = Logger(tmp_path, 0, 0, CONFIG)
    first.scalars(1, {"x": 1.0})
    first.close()
    Logger(tmp_path, 1, 0, CONFIG, first.wandb_id).close()
    other = Logger(tmp_path, 1, 0, CONFIG)
    other.close()
    a, b, c = module.runs
    assert a["id"] == b["id"] == first.wandb_id != c["id"] and a["resume"] == "allow"
    assert a["name"] == "gym_CartPole-v1-hrvq-3" and a["config"] == CONFIG
    assert module.logged == [(1, {"x": 1.0})]


class Contextual(Wandb):
    """As Trackio: a run that begins ends the one before, of the same context."""

    current = contextvars.ContextVar("current", default=None)

    def init(self, **settings):
        if before := self.current.get():
            before.finish()
        run = super().init(**settings)
        self.current.set(run)
        return run


class Single(Wandb):
    """As Weights & Biases: a second run is the first one, unless it is to be another."""

    active = None

    def init(self, reinit="default", **settings):
        if self.active is None or reinit != "create_new":
            self.active = self.active or super().init(**settings)
            return self.active
        return super().init(**settings)


@pytest.mark.parametrize(("service", "kind"), [("trackio", Contextual), ("wandb", Single)])
def test_seeds_in_one_process_have_a_run_of_the_service_each(tmp_path, monkeypatch, service, kind):
    module, ended = kind(), []
    monkeypatch.setitem(sys.modules, service, module)
    logs = []
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        config = CONFIG | {"seed": seed}
        logs.append(Logger(tmp_path / str(seed), 0, 0, config, service=service))
        logs[-1].run.finish = functools.partial(ended.append, seed)
    assert [run["config"]["seed"] for run in module.runs] == [3, 4]
    assert logs[0].run is not logs[1].run and not ended
    for log in logs:
        log.close()
    assert ended == [3, 4]


def test_a_run_keeps_its_wandb_id_through_other_loggers(tmp_path, monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    words = [
        "--configs",
        "debug",
        "--task",
        "dummy_vector",
        "--eval_episodes",
        "0",
        "--logdir",
        str(tmp_path),
    ]
    for steps, kind in (("40", "wandb"), ("60", "tensorboard"), ("80", "wandb")):
        assert dreamer.main([*words, "--steps", steps, "--logger", kind]) == 0
    assert len(module.runs) == 2 and len({settings["id"] for settings in module.runs}) == 1


def test_trackio_has_the_same_numbers(tmp_path):
    """In a process of its own, as it has threads: what its files say of two halves of a run."""
    pytest.importorskip("trackio")
    script = f"""
import sys
import numpy as np
from pathlib import Path
from hidreamer.logger import Logger
config = {CONFIG!r}
first = Logger(Path("run"), 0, 0, config, service="trackio")
first.scalars(1, {{"eval_return": 1.5, "kl_0": float("nan")}})
size = first.flush()
first.close()
second = Logger(Path("run"), 1, size, config, first.wandb_id, service="trackio")
second.scalars(2, {{"eval_return": 2.5}})
second.video(2, "agent", [np.zeros((16, 16, 3), np.uint8)] * 3)
second.close()
"""
    (tmp_path / "run").mkdir()
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "hidreamer.db")) as file:
        rows = file.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert rows[0][0].startswith("gym_CartPole-v1-hrvq-3-")
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert logged[:2] == [(1, {"eval_return": 1.5}), (2, {"eval_return": 2.5})]
    assert logged[2][1]["agent"]["_type"] == "trackio.video"


@pytest.mark.parametrize("fails", ["init", "log"])
def test_wandb_that_fails_is_one_warning(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb({fails}))
    with pytest.warns(
        RuntimeWarning, match="Weights & Biases failed .*--logger tensorboard"
    ) as seen:
        log = Logger(tmp_path, 0, 0, CONFIG)
        for step in range(3):
            log.scalars(step, {"x": 1.0})
        log.video(1, "agent", [np.zeros((16, 16, 3), np.uint8)])
        log.close()
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert len(lines(tmp_path)) == 3 and len(board(tmp_path).Scalars("x")) == 3


# ---------------------------------------------------------------- videos


def test_pictures_of_any_size_become_one_video(tmp_path):
    sizes = [(5, 7), (8, 7, 1), (6, 9, 3), (3, 3, 4)]
    movie = stack(np.full(size, 10 * (i + 1), np.uint8) for i, size in enumerate(sizes))
    assert movie.shape == (4, 8, 9, 3) and movie.dtype == np.uint8
    for i, (frame, size) in enumerate(zip(movie, sizes, strict=True)):
        assert (frame[: size[0], : size[1]] == 10 * (i + 1)).all()
        assert frame.sum() == 3 * 10 * (i + 1) * size[0] * size[1]  # and black around it
    assert stack([]).shape == (0, 0, 0, 3)
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        stack([np.zeros((2, 2, 2))])
    log = Logger(tmp_path, 0, 0)
    log.video(3, "agent", movie)
    log.video(3, "nothing", [])
    log.close()
    (path,) = (tmp_path / "videos").iterdir()
    assert iio.imread(path, plugin="pyav").shape == (4, 8, 10, 3)
    assert board(tmp_path).Tags()["images"] == ["agent"]


def test_a_codec_that_fails_is_one_warning(tmp_path, monkeypatch):
    log = Logger(tmp_path, 0, 0)
    monkeypatch.setattr(logger.iio, "imwrite", raises(OSError("no encoder libx264")))
    with pytest.warns(RuntimeWarning, match="video failed .*--video false.*libx264") as seen:
        for step in range(3):
            log.video(step, "agent", [np.zeros((16, 16, 3), np.uint8)])
    log.scalars(3, {"x": 1.0})
    log.close()
    assert (
        len(seen) == 1 and len(lines(tmp_path)) == 1 and not list((tmp_path / "videos").iterdir())
    )


def test_a_folder_for_videos_that_is_none_is_one_warning(tmp_path):
    (tmp_path / "videos").write_text("")
    log = Logger(tmp_path, 0, 0)
    with pytest.warns(RuntimeWarning, match="video failed"):
        log.video(1, "agent", [np.zeros((16, 16, 3), np.uint8)])
    log.close()


def test_what_works_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log = Logger(tmp_path, 0, 0)
        log.scalars(1, {"x": 1.0})
        log.video(1, "agent", [np.zeros((15, 16, 3), np.uint8)])
        log.close()


# ---------------------------------------------------------------- the screen


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_a_minute_and_the_last(clock, capsys):
    screen = Screen(1000)
    with screen:
        for step in range(0, 130, 10):  # one every ten seconds
            screen.update(step, step // 10, {"model": 1.0}, None)
            clock[0] += 10.0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["[70/1000]", "[120/1000]"]
    assert out[-1] == "[120/1000] 1 frames/s 0.08 updates/s loss: model 1.00 nats return -"
    screen.update(1000, 100, {}, 2.0)
    assert capsys.readouterr().out == ""


def test_the_last_line_is_shown_once(clock, capsys):
    with Screen(10) as screen:
        clock[0] += 61.0
        screen.update(10, 1, {}, 2.0)
    assert capsys.readouterr().out.count("[10/10]") == 1


def test_on_a_terminal_the_bar_ends_at_the_last_update(clock, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Screen(100) as screen:
        screen.update(50, 5, {}, None)  # half a second has not passed
        screen.update(100, 10, {}, None)
    assert screen.bar.tasks[0].completed == 100


def test_records_are_means_over_the_updates_since_the_last_one():
    means = Means(torch.device("cpu"))
    for x in ([1.0, 2.0], [3.0, 6.0]):
        means.add(torch.tensor(x))
    assert means.read(("a", "b")) == {"a": 2.0, "b": 4.0}
    means.reset()
    assert means.read(("a", "b")) == {}
