"""Stages of seconds on real Atari, in this process."""

import json
import shutil
from unittest import mock

import tools
from pipeline import __main__ as command

DEBUG = ["--configs", "pipeline_debug", "--device", "cpu"]
CONFIGS = []  # that ``run`` loaded, which know the keys that were read of them


class Killed(BaseException):
    """Ends a stage where it stands, as SIGKILL does: nothing is saved."""


def run(stage, logdir, *args):
    original = tools.load_config

    def load(*given):
        CONFIGS.append(original(*given))
        return CONFIGS[-1]

    with mock.patch.object(tools, "load_config", load):
        return command.main([stage, *DEBUG, "--logdir", str(logdir), *map(str, args)])


def run_killed(monkeypatch, stage, logdir, polls, *args):
    """Run a stage that dies at its ``polls``-th step."""
    left = polls

    def check(self):
        nonlocal left
        left -= 1
        if left < 0 and self.deferred:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(command.Signals, "check", check)
        try:
            run(stage, logdir, *args)
        except Killed:
            return
    raise AssertionError(f"{stage} ended before its step {polls}")


def copied(source, target, *stages):
    """A LOGDIR with the finished ``stages`` of another."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
    return target


def read(folder, name="gate.json"):
    return json.loads((folder / name).read_text())


def rows(folder, title):
    """{metric: row} of a table of a gate."""
    (table,) = [table for table in read(folder)["tables"] if table["title"] == title]
    return {row["metric"]: row for row in table["rows"]}


def made(folder):
    """{output: hash} of a finished stage, without its gate, which has timings."""
    outputs = read(folder, "manifest.json")["outputs"]
    return {name: x for name, x in outputs.items() if not name.startswith("gate.")}


def same(a, b):
    """Whether two stages made and logged the same, to the last bit."""
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (a, b)]
    return logs[0] == logs[1] and made(a) == made(b)
