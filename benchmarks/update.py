"""What one update, one policy step and one environment step cost.

    python benchmarks/update.py --configs tiny_dreamerv3 [--device cpu|cuda] [--repeats N]
        [--dry] [--key value]

The last line is one JSON object: sizes (all that --dry asks for) and medians over the repeats.
"""

from __future__ import annotations

import functools
import json
import sys
import time

import measure
import numpy as np
import torch

import models
import tools
from envs import EnvError, make_env
from hidreamer import cost, process
from hidreamer.provenance import provenance
from hidreamer.spaces import random_action, random_rows


def frames_per_second(env, seconds: float = 2.0) -> float:
    """Environment frames a second of one process, random actions, resets included."""
    rng, obs, frames = np.random.default_rng(0), env.reset(), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if obs["is_last"]:
            obs = env.reset()
        obs = env.step(random_action(env.act_space, 1, rng)[0])
        frames += env.repeat
    return frames / seconds


def timings(agent: models.Agent, env, repeats: int) -> dict:
    """Counts of one eager update; medians of the update that training uses and of a policy step
    for one environment.
    """
    device = next(agent.parameters()).device
    torch.set_num_threads(process.pick_threads(agent, agent.config.threads))
    block = agent.config.replay
    agent.make_optimizers()
    rows = random_rows(env.obs_space, env.act_space, block.batch, block.length)
    batch = {key: torch.from_numpy(x).to(device) for key, x in rows.items()}
    eager = functools.partial(agent.update, batch)
    for _ in range(2):  # the first one allocates the optimisers' states
        eager()
    out = cost.operators(eager) | {"flops": cost.flops(eager)}
    step = agent.make_update(agent.config.compile)
    for _ in range(5 if step != agent.update else 1):
        step(batch)
    obs = {key: x[:1, 0] for key, x in batch.items() if key in env.obs_space}
    obs["is_first"] = torch.zeros_like(batch["is_first"][:1, 0])
    state = agent.initial(1)
    for _ in range(agent.config.dynamics.hrvq.window):  # a full memory, as it mostly is
        state = agent.act(state, obs)
    fns = {"update": lambda: step(batch), "policy": lambda: agent.act(state, obs)}
    times = measure.interleaved(fns, repeats, device.type == "cuda")
    for i, name in enumerate(("cpu", "wall")):
        out[f"{name}_s"] = measure.median([t[i] for t in times["update"]])
    out["page_faults"] = measure.page_faults(lambda: step(batch))
    out |= {"policy_ms": 1000 * measure.median([t[1] for t in times["policy"]]), "repeats": repeats}
    return out | {"peak_mb": round(cost.peak_mb(device), 1)}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    process.keep_freed_memory()  # as a run does
    try:
        args = tools.parse([word for word in argv if word != "--dry"])
        repeats = int(args.overrides.pop("repeats", 5))
        config = tools.load_config(args.presets, args.overrides)
        device = models.pick_device(config)
        env = make_env(config.task, config.env.tree(), 0)
        agent = models.make_agent(env, config, device)
    except (tools.ConfigError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = provenance() | {"configs": args.presets, "task": config.task, "device": device.type}
    out |= cost.sizes(agent)
    if "--dry" not in argv:
        out |= timings(agent, env, repeats) | {"env_frames_per_s": round(frames_per_second(env))}
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
