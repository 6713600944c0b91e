"""Runs of seconds, in this process, and what they leave."""

import json

import dreamer
from hidreamer import checkpoint

TINY = [
    "--configs",
    "debug",
    "--task",
    "dummy_vector",
    "--video",
    "false",
    "--eval_episodes",
    "1",
    "--env.action_repeat",
    "1",
]


def run(logdir, *args):
    return dreamer.main([*TINY, *map(str, args), "--logdir", str(logdir)])


def short(logdir, kind, task):
    """A finished run of 60 agent steps with the latent state ``kind``, on dummy_TASK."""
    words = ["--configs", "debug", "--task", f"dummy_{task}", "--dynamics.type", kind]
    words += ["--steps", "120", "--video", "false", "--eval_every", "1000", "--eval_episodes", "3"]
    return dreamer.main([*words, "--logdir", str(logdir)])


def records(logdir):
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines
    ]


def steps_of(name, logdir):
    return [record["step"] for record in records(logdir) if name in record]


def latest(logdir):
    return checkpoint.load_checkpoint(logdir / "checkpoints" / "latest.pt")


def one_line(capsys, *hints):
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(hint in err for hint in hints), err
    return err
