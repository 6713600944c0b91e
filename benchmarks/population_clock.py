"""How long whole runs of P members take: the loop of dreamer.py by the clock, environments, acting,
replay and updates together.

    python benchmarks/population_clock.py --configs minatar [--members 1 16] [--seconds 40]
        [--device auto] [--out results/gpu/population_clock.json]

Each population trains until its update was compiled and recorded, then for --seconds. Nothing is
evaluated or saved meanwhile: one evaluation of one member and one checkpoint of all are measured by
themselves, afterwards. ``extrapolated_minutes`` is no measurement: it is what the config's steps
take at that speed, with as many evaluations (of each member, one after the other, as played by the
agent as it is then) and checkpoints (of all) as the config asks for.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch

import models
import tools
from hidreamer import capture, cost, process
from hidreamer.provenance import provenance
from population import Population
from training import Run

READY = capture.WARMUP + 3  # updates until the next one is a replay of the graph
NEVER = {f"{name}_every": 10**9 for name in ("log", "eval", "checkpoint")}


class Enough(Exception):
    """The seconds are over."""


def clock(presets: list[str], values: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
    """Train ``count`` members for ``seconds``. -> what was measured, and what follows from it.

    values: config keys on top of the presets. Raises ConfigError, EnvError.
    """
    config = tools.load_config(presets, values)
    device = models.pick_device(config)
    begun: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def poll() -> None:
        if not begun and runs[0].updates >= READY:
            begun.extend([now(), sum(run.step for run in runs), runs[0].updates])
        elif begun and time.perf_counter() - begun[0] >= seconds:
            raise Enough

    with contextlib.ExitStack() as stack:
        folder, runs = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
        start = now()
        for seed in range(count):
            home = folder / str(seed)
            own = {**values, **NEVER, "seed": seed, "steps": 10**9, "logdir": str(home)}
            run = Run(tools.load_config(presets, own), home, None, device, str)
            stack.callback(run.close)
            runs.append(run)
        members = Population(runs, lambda text: print(text, file=sys.stderr))
        members.poll = poll
        with contextlib.suppress(Enough):
            members.train()
        members.poll = lambda: None
        if members.failed:
            raise RuntimeError("; ".join(members.failed.values()))
        took = now() - begun[0]
        frames = sum(run.step for run in runs) - begun[1]
        out = {
            "seconds": round(took, 2),
            "until_ready_s": round(begun[0] - start, 1),
            "frames_per_s": round(frames / took, 1),  # of all members
            "updates_per_s": round((runs[0].updates - begun[2]) / took, 2),
        }
        start = now()
        members.save()
        out["save_s"] = round(now() - start, 2)
        start = now()
        runs[0].evaluate()
        out["evaluation_s"] = round(now() - start, 2)
    out["peak_mb"] = round(cost.peak_mb(device))
    return out | extrapolated(config, count, out)


def extrapolated(config: tools.Config, count: int, found: dict[str, Any]) -> dict[str, Any]:
    """Minutes of ``config.steps`` frames of each of ``count`` members, at the speed that ``found``
    has.
    """
    training = count * config.steps / found["frames_per_s"]
    evaluations = config.steps // config.eval_every * count * found["evaluation_s"]
    saves = config.steps // config.checkpoint_every * found["save_s"]
    return {
        "extrapolated_to_frames": config.steps,
        "extrapolated_minutes_of_training": round(training / 60, 2),
        "extrapolated_minutes": round(
            (found["until_ready_s"] + training + evaluations + saves) / 60, 2
        ),
    }


def main(argv: list[str]) -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--configs", nargs="+", default=["minatar"])
    parser.add_argument("--members", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    process.keep_freed_memory()
    report = provenance() | {"configs": args.configs, "members": {}}
    for count in args.members:
        try:
            found = clock(args.configs, {"device": args.device}, count, args.seconds)
        except tools.ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        report["members"][str(count)] = found
        measure.write(report, args.out)  # each time: the next one may be ended
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
