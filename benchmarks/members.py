"""One update of P members at once beside one update of a single run, called in turn in one process.

    python benchmarks/members.py --configs minatar [--members 2 4 8] [--device auto] [--repeats 5]
        [--out results/population.json]

ratio: what a member costs in a population, relative to alone; below 1 the population is faster.
Random data.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import measure
import torch

import models
import tools
from envs import make_env
from hidreamer import cost, process
from hidreamer.provenance import provenance
from hidreamer.spaces import random_rows
from hidreamer.stacked import Stack


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--configs", nargs="+", default=["minatar"])
    parser.add_argument("--members", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    process.keep_freed_memory()
    try:
        config = tools.load_config(args.configs, {"device": args.device})
        device = models.pick_device(config)
    except tools.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    env = make_env(config.task, config.env.tree(), 0)
    block = config.replay
    rows = random_rows(env.obs_space, env.act_space, block.batch, block.length)
    batch = {key: torch.from_numpy(x).to(device) for key, x in rows.items()}

    def agent(seed: int) -> models.Agent:
        torch.manual_seed(seed)
        made = models.make_agent(env, config, device)
        made.make_optimizers()
        return made

    torch.set_num_threads(process.pick_threads(agent(0), config.threads))
    alone = agent(0).make_update(config.compile)
    fns = {"1": functools.partial(alone, batch)}
    for count in args.members:
        own = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
        stack = Stack(agent(0), [agent(seed) for seed in range(count)], own)
        batches = {key: torch.stack([x] * count) for key, x in batch.items()}
        fns[str(count)] = functools.partial(stack.make_update(), batches)
    cuda = device.type == "cuda"
    for fn in fns.values():
        for _ in range(5 if cuda else 1):  # warming up, recording
            fn()
    times = measure.interleaved(fns, args.repeats, cuda)
    report = provenance() | {"configs": args.configs, "device": device.type, "updates": {}}
    for count, found in times.items():
        line = report["updates"][count] = {}
        for i, unit in enumerate(("cpu", "wall")):
            line[f"{unit}_s"] = measure.median([t[i] for t in found])
            # of one round each: what slows the machine slows both
            pairs = zip(found, times["1"], strict=True)
            line[f"{unit}_ratio"] = measure.median([a[i] / b[i] / int(count) for a, b in pairs])
    report["peak_mb"] = cost.peak_mb(device)
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
