"""Does an imported dreamerv3-torch agent compute what upstream computes?

    python -m legacy.check CHECKPOINT --config config.json --batch batch.npz --expected expected.npz

Runs the imported agent on the batch, with the mode wherever it would sample, and prints the
largest absolute difference of every output. Exit status 1 if one is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces

import legacy
import models
import networks
import tools
from hidreamer import app
from hidreamer import distributions as dists
from hidreamer.checkpoint import READ_ERRORS, CheckpointError, load_checkpoint
from hidreamer.dynamics.base import kl_losses

BOUND = 1e-4
NOT_OBSERVED = ("action", "reward", "is_first", "is_last", "is_terminal", "discount", "logprob")


def build(checkpoint: Path, config: Path, batch: dict[str, np.ndarray]) -> models.Agent:
    """The agent of upstream's config with the weights of its checkpoint."""
    theirs = json.loads(config.read_text(encoding="utf-8"))
    obs = {k: x for k, x in batch.items() if k not in NOT_OBSERVED}
    box = lambda x: (
        spaces.Box(0, 255, x.shape[2:], x.dtype)
        if x.dtype == np.uint8
        else spaces.Box(-np.inf, np.inf, x.shape[2:])
    )
    actions = batch["action"].shape[-1]
    act_space = (
        spaces.Discrete(actions)
        if theirs["actor"]["dist"] == "onehot"
        else spaces.Box(-1, 1, (actions,))
    )
    ours = tools.load_config([], legacy.config(theirs, {k: x.shape[2:] for k, x in obs.items()}))
    agent = models.Agent({k: box(x) for k, x in obs.items()}, act_space, actions, ours)
    state = load_checkpoint(checkpoint)
    agent.load_state_dict(legacy.convert(state)["params"])
    return agent


@torch.no_grad()
def outputs(agent: models.Agent, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Everything that upstream's fixtures name."""
    raw = {
        k: torch.from_numpy(x)
        for k, x in batch.items()
        if k not in ("action", "discount", "logprob")
    }
    obs = networks.preprocess(raw | {"prev_action": torch.from_numpy(batch["action"])})
    wm, behavior = agent.world_model, agent.behavior
    _, post, embed = wm.observe(obs, sample=False)
    x, (level,) = post.feat.cat(), post.levels
    losses, _ = wm.dynamics.loss(post)
    kl_config = wm.dynamics.kl_config._replace(dyn=1.0, rep=0.0, free_nats=0.0)
    unclipped, _ = kl_losses(post.levels, kl_config)
    policy, reward = behavior.actor(x), wm.reward(x)
    out = {
        "embed": embed,
        "deter": post.feat.deter,
        "stoch": post.feat.stoch.unflatten(-1, level.post.shape[-2:]),
        "feat": x,
        "prior_logit": level.prior,
        "post_logit": level.post,
        "reward_mode": reward.mode().unsqueeze(-1),
        "reward_logprob": reward.log_prob(obs["reward"]),
        "cont_mean": wm.cont(x).mean().unsqueeze(-1),
        "actor_entropy": policy.entropy(),
        "actor_mode": policy.mode(),
        "value_mode": behavior.critic(x).mode().unsqueeze(-1),
        "slow_value_mode": behavior.slow(x).mode().unsqueeze(-1),
        "kl_value": unclipped["dyn"],
        "kl_loss": losses["dyn"] + losses["rep"],
    }
    if isinstance(policy, dists.OneHotCategorical):
        out["actor_probs"] = torch.cat(policy.probs, -1)
    else:
        out |= {"actor_mean": policy.loc, "actor_std": policy.std}
    for key, dist in wm.decoder(x).items():
        out[f"decoder_{key}_mode"] = dist.mode() + (
            0.5 if key in wm.decoder.kinds["image"] else 0.0
        )
    return out


# what files of other contents raise
WRONG = (RuntimeError, TypeError, AttributeError, IndexError)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m legacy.check", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="upstream's latest.pt")
    for name, what in (
        ("config", "its resolved config"),
        ("batch", "inputs"),
        ("expected", "upstream's outputs"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    args = parser.parse_args(argv)
    try:
        batch, expected = (
            dict(np.load(path, allow_pickle=False)) for path in (args.batch, args.expected)
        )
        ours = outputs(build(args.checkpoint, args.config, batch), batch)
    except (*READ_ERRORS, *WRONG, tools.ConfigError, CheckpointError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        print(f"error: {' '.join(reason.split())[:300]}", file=sys.stderr)
        return 2
    worst = 0.0
    for name, theirs in sorted(expected.items()):
        if name not in ours:
            print(f"{name:24s} not computed here")
            worst = np.inf
            continue
        diff = (
            np.abs(ours[name].numpy() - theirs).max()
            if ours[name].shape == theirs.shape
            else np.inf
        )
        worst = max(worst, diff) if np.isfinite(diff) else np.inf
        print(
            f"{name:24s} {diff:.2e}"
            + ("" if np.isfinite(diff) else f"  {tuple(ours[name].shape)} against {theirs.shape}")
        )
    print(f"largest {worst:.2e}, bound {BOUND:.0e}: {'agrees' if worst <= BOUND else 'DIFFERS'}")
    return int(not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(app.run(main))
