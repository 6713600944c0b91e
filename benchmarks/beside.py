"""Updates of several presets in turn in one process, as ratios to the first; beside
dreamerv3-torch and r2dreamer if they are at hand.

    python benchmarks/beside.py tiny_dreamerv3 tiny_hdreamer tiny_hidreamer
        [--upstream FOLDER] [--r2dreamer FOLDER] [--arms ac_cpc replay_loss] [--device auto]
        [--precision tf32] [--repeats 7] [--out F]

The FOLDERs are checkouts of github.com/NM512/dreamerv3-torch and github.com/NM512/r2dreamer; they
are measured at the first preset's sizes. --arms: the first preset with other objectives as well
(``arms.ARMS``), or KEYS; write_back includes its part of the replay. Images of 64x64, 6
actions, random data. Kernels and FLOPs are counted of the eager update; timed is the one that
training uses, on CUDA compiled and captured. imagine: one step of imagination from every replayed
state (16 x 64), policy and all. The replay's part: seconds to draw a batch from 100,000 steps, and
the memory they take. dreamerv3-torch moves its batch to the device itself; the others have it
there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import measure
import numpy as np
import torch
import upstreams
from arms import ARMS
from gymnasium import spaces
from upstreams import ACTIONS

import models
import tools
from hidreamer import carries, cost, precision, process
from hidreamer.capture import Captured
from hidreamer.provenance import provenance
from hidreamer.replay import Replay, row_spec
from hidreamer.spaces import random_rows

KEYS: dict[str, dict[str, float | str]] = {
    **ARMS,
    "ac_cpc_crop": {**ARMS["ac_cpc"], "model.ac_cpc.augment": "crop"},
    "barlow": {**ARMS["barlow"], "decoder.probe": False},
    "next_embed": {**ARMS["next_embed"], "decoder.probe": False},
    "no_decoder": {"model.losses.decoder": 0},  # what the objectives without one come on top of
    "bfloat16": {"precision": "bfloat16"},
    "replay_grad": {"critic.replay_loss": 0.3, "critic.replay_grad": True},
    "probe": ARMS["barlow"],
    "write_back": {"replay.write_back": True},
}
OBS = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}


class Measured(NamedTuple):
    """What one preset, or upstream, does in turn with the others: functions of nothing."""

    counts: dict[str, int]  # of the eager update
    update: Callable[[], object]  # as training does it
    dream: Callable[[], object] | None = None  # a whole one
    horizon: int = 1  # its steps


def counts(update: Callable[[], object]) -> dict[str, int]:
    for _ in range(2):  # the first one allocates the optimisers' states
        update()
    return cost.operators(update) | {"flops": cost.flops(update)}


def ours(config: tools.Config, device: torch.device) -> Measured:
    precision.set_precision(config, device)
    env = SimpleNamespace(obs_space=OBS, act_space=spaces.Discrete(ACTIONS), act_dim=ACTIONS)
    agent = models.make_agent(env, config, device)
    agent.make_optimizers()
    batch = agent.tensors(
        random_rows(OBS, spaces.Discrete(ACTIONS), config.replay.batch, config.replay.length)
    )
    counted = counts(lambda: agent.update(batch))
    update = agent.make_update(config.compile)
    learn = functools.partial(update, batch)
    if config.replay.write_back:
        learn = writing_back(agent, config, update)
    learn()  # compiles the parts: the dream has them as training does
    with torch.no_grad(), agent.autocast():
        carry, post, _ = agent.world_model.observe(models.networks.preprocess(batch))
        start = agent.world_model.dynamics.starts(carry, post, 0)

    @torch.no_grad()
    def dream(inputs: models.Batch) -> torch.Tensor:
        with agent.autocast():
            return agent.behavior.imagine(agent.world_model, start, inputs["is_terminal"]).x

    dream = Captured(dream) if device.type == "cuda" else dream
    ends = {"is_terminal": torch.zeros(batch["reward"].numel(), device=device)}
    return Measured(counted, learn, lambda: dream(ends), config.imag.horizon)


def writing_back(agent: models.Agent, config: tools.Config, update: Callable) -> Callable:
    """An update with the samples from replay before it and what it finds written back."""
    block, steps, rng = config.replay, 2000, np.random.default_rng(0)
    extra, sizes = carries.carry_spec(agent.world_model.dynamics), {"batch": block.batch}
    sizes |= {"length": block.length, "capacity": steps, "streams": 1}
    ring = Replay(row_spec(OBS, ACTIONS), **sizes, rng=rng, extra=extra)
    rows = random_rows(OBS, spaces.Discrete(ACTIONS), 1, steps)
    rows["is_last"] = rows["is_terminal"]
    ring.streams[0].extend({key: x[0] for key, x in rows.items()})
    write_back = carries.WriteBack()

    def learn() -> torch.Tensor:
        sampled = agent.tensors(write_back.sample(ring, None))
        del sampled["is_last"]
        metrics = update(sampled)
        write_back.found = agent.carries
        return metrics

    return learn


def replay_figures(
    config: tools.Config, steps: int = 100_000, repeats: int = 50
) -> dict[str, float]:
    """Seconds to draw one batch from a full ring of random Atari steps, and the ring's resident
    memory.
    """
    block, rng = config.replay, np.random.default_rng(0)
    before = resident_mb()
    spec = row_spec(OBS, ACTIONS)
    ring = Replay(spec, capacity=steps, batch=block.batch, length=block.length, streams=1, rng=rng)
    rows = random_rows(OBS, spaces.Discrete(ACTIONS), 1, 1000)
    rows["is_last"] = rows["is_terminal"]
    for i in range(steps):
        ring.add({key: x[:, i % 1000] for key, x in rows.items()})
    times = measure.interleaved({"sample": ring.sample}, repeats, False)["sample"]
    return {
        "replay_sample_cpu_s": measure.median([cpu for cpu, _ in times]),
        "replay_steps": len(ring),
        "replay_mb": round(measure.replay_bytes(ring) / 2**20),
        "replay_resident_mb": round(resident_mb() - before),
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--r2dreamer", type=Path)
    parser.add_argument("--arms", nargs="*", choices=KEYS, default=[])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", default="tf32", help="ours; dreamerv3-torch has float32, r2dreamer float16"
    )
    args = parser.parse_args()
    try:
        keys = {"device": args.device, "precision": args.precision}
        configs = {preset: tools.load_config([preset], keys) for preset in args.presets}
        first = args.presets[0]
        for arm in args.arms:
            configs[f"{first}, {arm}"] = tools.load_config([first], keys | KEYS[arm])
        device = models.pick_device(configs[args.presets[0]])
    except tools.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder, file in ((args.upstream, "models.py"), (args.r2dreamer, "rssm.py")):
        if folder and not (folder / file).is_file():
            print(f"error: {folder} is no such checkout: it has no {file}", file=sys.stderr)
            return 2
    process.keep_freed_memory()  # as a run does; for all of them
    cuda = device.type == "cuda"
    report = (
        provenance()
        | {"device": device.type, "precision": args.precision}
        | replay_figures(configs[first])
    )
    all_of = {preset: ours(config, device) for preset, config in configs.items()}
    if args.upstream:
        update = upstreams.dreamerv3_torch(args.upstream, OBS, configs[first], device)
        all_of["dreamerv3-torch"] = Measured(counts(update), update)
    if args.r2dreamer:
        update = upstreams.r2dreamer(args.r2dreamer, OBS, configs[first], device)
        all_of["r2dreamer"] = Measured({}, update)  # counting would see through its compiler
    fns = {name: one.update for name, one in all_of.items()}
    fns |= {f"{name}, dream": one.dream for name, one in all_of.items() if one.dream}
    for fn in fns.values():
        for _ in range(5 if cuda else 1):  # compilation, warming up, recording
            fn()
    times = measure.interleaved(fns, args.repeats, cuda)
    report["updates"] = {}
    for name, one in all_of.items():
        found = report["updates"][name] = dict(one.counts)
        for i, unit in enumerate(("cpu", "wall")):
            found[f"{unit}_s"] = measure.median([t[i] for t in times[name]])
        for i, unit in enumerate(("cpu", "wall")):
            # Of one round each: what slows the machine slows both.
            ratios = [a[i] / b[i] for a, b in zip(times[name], times[first], strict=True)]
            found[f"{unit}_ratio"] = measure.median(ratios)
        found["page_faults"] = measure.page_faults(one.update)
    for name, one in all_of.items():
        if one.dream:
            ms = [1000 * wall / one.horizon for _, wall in times[f"{name}, dream"]]
            report["updates"][name]["imagine_wall_ms"] = measure.median(ms)
    report["replay_share"] = round(
        report["replay_sample_cpu_s"] / report["updates"][first]["cpu_s"], 4
    )
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
