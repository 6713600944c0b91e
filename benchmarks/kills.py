"""SIGKILL at random moments: does a run that is continued log what one that was never killed logs?

    python benchmarks/kills.py --kills 200 --out results/kills.json
    python benchmarks/kills.py --members 3 --kills 30 --out results/kills_population.json

Short runs of every latent state on two tasks; with --members, populations of as many seeds in one
process (docs/population.md), each of which is compared. Each is made once without a kill, then
again with kills at uniformly random moments of that time (set-up, updates, checkpoints, evaluations
alike), continued by the same command. Compared bit for bit: every record of metrics.jsonl but
``perf/``, the files of all episodes, weights and counters at the end.
Exit status 1 if anything differs. A process is forked for each start, so that torch is imported
once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

import dreamer
from hidreamer.checkpoint import CheckpointError, load_checkpoint
from hidreamer.dynamics import TYPES
from hidreamer.provenance import provenance

TASKS = ("dummy_vector", "gym_CartPole-v1")
WORDS = (
    "--configs debug --env.action_repeat 1 --env.count 2 --steps 160 --log_every 10 "
    "--eval_every 50 --video false"
)
WORDS += " --eval_episodes 2 --checkpoint_every 15 --replay.ratio 8 --device cpu"


def begin(argv: list[str], log: Path) -> int:
    """Fork a process that trains as the command line says. -> its id."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = dreamer.main(argv)
        sys.stdout.flush()
    finally:
        os._exit(status)  # what belongs to the parent is not the child's to clean up


def wait(pid: int, log: Path) -> None:
    """Raises RuntimeError, with the process's last output, where it did not end well."""
    _, status = os.waitpid(pid, 0)
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
        raise RuntimeError(
            f"a run ended with status {os.waitstatus_to_exitcode(status)}: {' / '.join(last)}"
        )


def kill_once(argv: list[str], log: Path, seconds: float) -> bool:
    """Start the run and kill it after ``seconds``. -> whether it was still running."""
    pid = begin(argv, log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(
                    f"a continued run ended with {status}: {log.read_text(encoding='utf-8')[-500:]}"
                )
            return False
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but what depends on the clock."""
    state = load_checkpoint(folder / "checkpoints" / "latest.pt")
    records = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        records.append(
            {key: x for key, x in json.loads(line).items() if not key.startswith("perf/")}
        )
    episodes = {path.name: members(path) for path in (folder / "train_eps").glob("*.npz")}
    return {
        "records": records,
        "episodes": episodes,
        "counters": state["counters"],
        "agent": state["agent"]["params"],
    }


def members(path: Path) -> dict[str, bytes]:
    """Of an archive; its comment names the run, which is another one in each folder."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    found = [name for name in ("records", "episodes", "counters") if ours[name] != theirs[name]]
    same = all(torch.equal(x, theirs["agent"][name]) for name, x in ours["agent"].items())
    return found if same else [*found, "agent"]


def checkpoint_step(folder: Path) -> int | None:
    """Frames in the last checkpoint of the run in this folder; None where there is none yet."""
    try:
        return load_checkpoint(folder / "checkpoints" / "latest.pt")["step"]
    except CheckpointError:
        return None


def one_run(
    task: str, kind: str, seeds: list[str], folder: Path, rng: np.random.Generator, most: int
) -> dict[str, Any]:
    """A run that is never killed, and the same with at most ``most`` kills. Several seeds are
    members of a population.
    """
    words = [*WORDS.split(), "--task", task, "--dynamics.type", kind]
    words += ["--seeds" if len(seeds) > 1 else "--seed", *seeds]
    runs = {seed: seed if len(seeds) > 1 else "" for seed in seeds}  # their folders
    log, began = folder / "log", time.monotonic()
    wait(begin([*words, "--logdir", str(folder / "whole")], log), log)
    took = time.monotonic() - began
    argv, kills = [*words, "--logdir", str(folder / "killed")], []
    for _ in range(most):
        seconds = float(rng.uniform(0.0, took))
        if not kill_once(argv, log, seconds):
            break
        steps = [checkpoint_step(folder / "killed" / run) for run in runs.values()]
        kills.append({"seconds": round(seconds, 3), "checkpoint": steps if steps[1:] else steps[0]})
    wait(begin(argv, log), log)
    found = {seed: outcome(folder / "whole" / run) for seed, run in runs.items()}
    differs = []
    for seed, run in runs.items():
        names = differences(outcome(folder / "killed" / run), found[seed])
        differs += [f"{seed}: {name}" if seeds[1:] else name for name in names]
    report = {
        "task": task,
        "dynamics": kind,
        "seed": " ".join(seeds) if seeds[1:] else int(seeds[0]),
        "seconds": round(took, 2),
        "kills": kills,
        "records": sum(len(x["records"]) for x in found.values()),
        "differs": differs,
    }
    return report | {"outcomes": list(found.values())}


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="kills of one run at most")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments; the runs count theirs from here"
    )
    parser.add_argument("--members", type=int, default=1, help="seeds in one process")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--dynamics", nargs="+", default=list(TYPES))
    parser.add_argument("--out", type=Path, help="write the report to this file")
    args = parser.parse_args()
    if min(args.kills, args.each, args.members) < 1:
        parser.error("--kills, --each and --members must be at least 1")
    rng, runs, done = np.random.default_rng(args.seed), [], 0
    report: dict[str, Any] = dict(provenance())  # before anybody changes a file
    before: dict[tuple[str, str], dict[str, Any]] = {}
    # whether runs that differ in their seed alone differ: the comparison is not blind
    control: list[bool] = []
    for i, (kind, task) in enumerate(itertools.cycle(itertools.product(args.dynamics, args.tasks))):
        if done >= args.kills:
            break
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        try:
            first = args.seed + args.members * i
            seeds = [str(first + k) for k in range(args.members)]
            run = one_run(task, kind, seeds, folder, rng, min(args.each, args.kills - done))
        finally:
            shutil.rmtree(folder)
        for found in run.pop("outcomes"):
            if (kind, task) in before:
                control.append("records" in differences(found, before[kind, task]))
            before[kind, task] = found
        runs.append(run)
        done += len(run["kills"])
        differing = [run for run in runs if run["differs"]]
        report |= {"words": WORDS, "members": args.members, "moments": args.seed, "kills": done}
        report["differing"] = len(differing)
        report |= {"other_seeds_differ": f"{sum(control)} of {len(control)}", "runs": runs}
        measure.save(report, args.out)  # each time: what was seen is kept if this process is ended
        print(
            f"{done} kills; {task} {kind}:",
            "differs in " + ", ".join(run["differs"]) if run["differs"] else "equal",
        )
    print(
        f"{done} kills in {len(runs)} runs; {len(differing)} differ "
        "from the same run without a kill"
    )
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
