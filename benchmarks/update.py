"""What one update, one policy step and one environment step cost.

    python benchmarks/update.py --configs tiny_dreamerv3 [--device cpu|cuda] [--repeats N] [--dry] [--key value]

The last line is one JSON object: sizes (all that --dry asks for) and medians over the repeats.
"""

from __future__ import annotations

import json
import sys
import time

import measure
import torch

import dreamer
import models
import tools
from envs import EnvError, make_env


def sizes(agent: models.Agent) -> dict:
    """Latent sizes and trainable parameters. Bits: what the state of one step can hold at most."""
    wm, dyn = agent.world_model, agent.world_model.dynamics
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)
    parts = {"world_model": wm, "actor": agent.behavior.actor, "critic": agent.behavior.critic}
    parts |= {"encoder": wm.encoder, "decoder": wm.decoder, "dynamics": dyn}
    out = {"stoch": dyn.stoch_dim, "deter": dyn.deter_dim, "feature": dyn.feat_dim, "bits": dyn.bits}
    return out | {"params": {name: count(module) for name, module in parts.items()}}


def frames_per_second(env, seconds: float = 2.0) -> float:
    """Environment frames a second of one process, random actions, resets included."""
    rng = __import__("numpy").random.default_rng(0)
    obs, frames = env.reset(), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if obs["is_last"]:
            obs = env.reset()
        obs = env.step(dreamer.random_action(env.act_space, 1, rng)[0])
        frames += env.repeat
    return frames / seconds


def main(argv: list[str]) -> int:
    dry = "--dry" in argv
    try:
        presets, overrides, _ = tools.parse([word for word in argv if word != "--dry"])
        repeats = int(overrides.pop("repeats", 5))
        config = tools.load_config(presets, overrides)
        device = dreamer.pick_device(config)
        env = make_env(config.task, config.env.tree(), 0)
        agent = models.Agent(env.obs_space, env.act_space, env.act_dim, config).to(device)
    except (tools.ConfigError, EnvError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = {"configs": presets, "task": config.task, "device": str(device), "torch": torch.__version__} | sizes(agent)
    if not dry:
        cuda = device.type == "cuda"
        agent.make_optimizers()
        block = config.replay
        rows = measure.random_rows(env.obs_space, env.act_space, block.batch, block.length)
        batch = {key: torch.from_numpy(x).to(device) for key, x in rows.items()}
        eager = lambda: agent.update(batch)
        eager(), eager()  # the first one allocates the optimisers' states
        out |= measure.operators(eager) | {"flops": measure.flops(eager)}
        step = agent.make_update(config.compile)
        for _ in range(5 if step is not agent.update else 1):
            step(batch)
        obs = {key: x[:1, 0] for key, x in batch.items() if key in env.obs_space or key == "is_first"}
        state = agent.initial(1)
        fns = {"update": lambda: step(batch), "policy": lambda: agent.act(state, obs)}
        times = measure.interleaved(fns, repeats, cuda)
        out |= {
            "cpu_s": measure.median([t[0] for t in times["update"]]),
            "wall_s": measure.median([t[1] for t in times["update"]]),
        }
        out |= {"policy_ms": 1000 * measure.median([t[1] for t in times["policy"]]), "peak_mb": measure.peak_mb(cuda)}
        out |= {
            "env_frames_per_s": round(frames_per_second(env)),
            "threads": torch.get_num_threads(),
            "repeats": repeats,
        }
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
