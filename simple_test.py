"""One minute, no downloads: does every latent state build, learn, save and imagine on this machine?

python simple_test.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces

import models
import tools
from hidreamer import app, checkpoint
from hidreamer.dynamics import TYPES

OBS = {
    "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
}
ACTIONS = 4


def batch(config: tools.Config) -> dict[str, torch.Tensor]:
    """Random experience, (B, T, ...)."""
    shape = config.replay.batch, config.replay.length
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    return {
        "image": torch.randint(0, 256, (*shape, 16, 16, 3), dtype=torch.uint8),
        "vector": torch.randn(*shape, 5),
        "prev_action": (
            torch.nn.functional.one_hot(torch.randint(0, ACTIONS, shape), ACTIONS).float()
        ),
        "reward": torch.randn(shape),
        "is_first": first,
        "is_terminal": torch.zeros(shape, dtype=torch.bool),
    }


def check(kind: str, folder: Path) -> str:
    """Shapes, updates, a checkpoint and an imagined rollout of one latent state. -> a line."""
    config = tools.load_config(["debug"], {"dynamics.type": kind})
    agents = [models.Agent(OBS, spaces.Discrete(ACTIONS), ACTIONS, config) for _ in range(2)]
    for agent in agents:
        agent.make_optimizers()
    agent, other = agents
    data = batch(config)
    for _ in range(2):
        metrics = agent.update(data)
        assert metrics.isfinite().all(), "an update gave numbers that are not finite"

    checkpoint.save_checkpoint(folder / "latest.pt", agent.save_state())
    other.load_state(checkpoint.load_checkpoint(folder / "latest.pt"))
    results = [torch.manual_seed(1) and a.update(data) for a in agents]
    assert torch.equal(*results), "a restored agent continues differently"

    obs = {key: data[key][:, 0] for key in (*OBS, "is_first")}
    state = agent.act(agent.initial(len(obs["image"])), obs)
    horizon = 5
    policy = lambda feat: agent.behavior.actor(feat.cat()).sample()
    _, feat, action = agent.world_model.dynamics.imagine(state.carry, policy, horizon)
    assert feat.cat().shape == (len(obs["image"]), horizon + 1, agent.world_model.feat_dim)
    assert action.shape[-1] == ACTIONS and torch.isfinite(feat.cat()).all()
    count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    return f"feature {agent.world_model.feat_dim}, {count:,} parameters, {horizon} steps imagined"


def main(argv: list[str]) -> int:
    """-> exit status: 0 all work or, with --help, what this is; 1 one fails, 2 bad arguments."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    if argv:
        print(f"error: simple_test.py takes no arguments, not {argv[0]!r}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            start = time.monotonic()
            torch.manual_seed(0)
            try:
                seen = check(kind, Path(folder) / kind)
            except Exception as error:  # whatever it is, name the latent state that fails and how
                print(f"❌ {kind:<6} {type(error).__name__}: {error}")
                return 1
            print(f"✅ {kind:<6} {seen} ({time.monotonic() - start:.1f} s)")
    print("🎉 All tests passed! hDreamer implementation is working correctly.")
    print("Ready for training experiments!")
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
