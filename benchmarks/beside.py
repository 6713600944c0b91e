"""Updates of several presets in turn in one process, as ratios to the first; beside
dreamerv3-torch if it is at hand.

    python benchmarks/beside.py tiny_dreamerv3 tiny_hdreamer tiny_hidreamer
        [--upstream FOLDER] [--arms ac_cpc barlow] [--device auto] [--precision tf32]
        [--repeats 7] [--out F]

FOLDER is a checkout of github.com/NM512/dreamerv3-torch; it is measured at the first preset's
sizes. --arms: the first preset with other objectives as well (``objectives.ARMS``). Images of
64x64, 6 actions, random data. Kernels and FLOPs are counted of the eager update; timed is the one
that training uses, on CUDA compiled and captured. imagine: one step of imagination from every
replayed state (16 x 64), policy and all. The replay's part: seconds to draw a batch from 100,000
steps, and the memory they take.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import measure
import numpy as np
import torch
from gymnasium import spaces
from objectives import ARMS
from ruamel.yaml import YAML

import models
import tools
from hidreamer import cost, precision, process
from hidreamer.capture import Captured
from hidreamer.provenance import provenance
from hidreamer.replay import Replay, row_spec
from hidreamer.spaces import random_rows

OBS = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
ACTIONS = 6


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
    agent = models.Agent(OBS, spaces.Discrete(ACTIONS), ACTIONS, config).to(device)
    agent.make_optimizers()
    batch = agent.tensors(
        random_rows(OBS, spaces.Discrete(ACTIONS), config.replay.batch, config.replay.length)
    )
    counted = counts(lambda: agent.update(batch))
    update = agent.make_update(config.compile)
    update(batch)  # compiles the parts: the dream has them as training does
    with torch.no_grad(), agent.autocast():
        carry, post, _ = agent.world_model.observe(models.networks.preprocess(batch))
        start = agent.world_model.dynamics.starts(carry, post, 0)

    @torch.no_grad()
    def dream(inputs: models.Batch) -> torch.Tensor:
        with agent.autocast():
            return agent.behavior.imagine(agent.world_model, start, inputs["is_terminal"]).x

    dream = Captured(dream) if device.type == "cuda" else dream
    ends = {"is_terminal": torch.zeros(batch["reward"].numel(), device=device)}
    return Measured(counted, lambda: update(batch), lambda: dream(ends), config.imag.horizon)


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Their modules have the names of ours: hide ours while theirs are imported."""
    hidden = {
        name: sys.modules.pop(name)
        for name in ("tools", "networks", "models")
        if name in sys.modules
    }
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in ("tools", "networks", "models"):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def upstream(folder: Path, config: tools.Config, device: torch.device) -> Measured:
    """The same, without the dream, for dreamerv3-torch: its atari100k preset at the sizes of
    ``config``.
    """
    with importing(folder):
        import models as theirs
    dyn, units, depth = config.dynamics, config.encoder.units, config.encoder.depth
    presets = YAML(typ="safe").load((folder / "configs.yaml").read_text())
    options = presets["defaults"]
    sizes = {
        "dyn_hidden": dyn.hidden,
        "dyn_deter": dyn.deter,
        "units": units,
        "num_actions": ACTIONS,
    }
    sizes |= {
        "dyn_stoch": dyn.rssm.stoch,
        "dyn_discrete": dyn.rssm.classes,
        "device": device.type,
        "compile": False,
    }
    nested = {"encoder": {"cnn_depth": depth}, "decoder": {"cnn_depth": depth}}
    for change in (presets["atari100k"], sizes, nested):
        for key, value in change.items():
            options[key] = options[key] | value if isinstance(value, dict) else value
    options = types.SimpleNamespace(**options)
    world = theirs.WorldModel(types.SimpleNamespace(spaces=OBS), None, 0, options).to(device)
    behavior = theirs.ImagBehavior(options, world).to(device)
    # their update turns gradients on where it needs them
    for module in (world, behavior):
        module.requires_grad_(False)
    rows = random_rows(OBS, spaces.Discrete(ACTIONS), config.replay.batch, config.replay.length)
    batch = {"action": rows.pop("prev_action"), **rows}

    def reward(feat, state, action) -> torch.Tensor:
        return world.heads["reward"](world.dynamics.get_feat(state)).mode()

    def update() -> None:
        post, _, _ = world._train(batch)
        behavior._train(post, reward)

    return Measured(counts(update), update)


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
        "replay_mb": round(ring.nbytes / 2**20),
        "replay_resident_mb": round(resident_mb() - before),
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=[])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", default="tf32", help="ours; upstream computes in float32")
    args = parser.parse_args()
    try:
        keys = {"device": args.device, "precision": args.precision}
        configs = {preset: tools.load_config([preset], keys) for preset in args.presets}
        first = args.presets[0]
        for arm in args.arms:
            configs[f"{first}, {arm}"] = tools.load_config([first], keys | ARMS[arm])
        device = models.pick_device(configs[args.presets[0]])
    except tools.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
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
        all_of["dreamerv3-torch"] = upstream(args.upstream, configs[first], device)
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
