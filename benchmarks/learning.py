"""Does the agent learn? Whole runs through dreamer.py, beside thresholds, random play, and a
negative control.

    python benchmarks/learning.py minatar --dynamics rssm --seeds 0 1 2
        [--out results/FILE.json] [-- --key value ...]
    python benchmarks/learning.py cartpole --negative-control

--negative-control: rewards and ends are shuffled in replay, and the test must fail. Runs go to
runs/learning/ and continue where they stopped. Exit status 1 if a threshold is missed (for the
control: if one is met).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import BALL, Table, cells
from measure import ROOT, argument_parser, save

import dreamer
import hidreamer.episodes
import run_config
import tools
from comparison.runs import records
from envs import make_env
from hidreamer import checkpoint
from hidreamer.episodes import load_episode
from hidreamer.provenance import STARTS, provenance
from hidreamer.replay import Addresses, Replay, Rows
from hidreamer.spaces import random_action

# name: presets, steps, and thresholds (of what figure, its least value).
TASKS = {
    "minatar": {
        "configs": ["minatar"],
        "steps": 50_000,
        "thresholds": {
            "return_at_20000": 2.0,
            "return_at_50000": 5.0,
            "ball_after_3": 0.85,
            "ball_after_3_beyond_counted": 0.0,
        },
    },
    "cartpole": {"configs": ["gym"], "steps": 20_000, "thresholds": {"last_10_episodes": 400.0}},
}


class Shuffled(Replay):
    """The negative control: rewards and ends of every batch come in a random order, unrelated to
    states and actions.

    Rewards alone would not do: CartPole pays 1 for every step, and what there is to learn is in
    the ends.
    """

    def read(self, addresses: Addresses, out: Rows | None = None) -> Rows:
        batch = super().read(addresses, out)
        order = self.rng.permutation(batch["reward"].size)
        for key in ("reward", "is_terminal"):
            batch[key][...] = batch[key].ravel()[order].reshape(batch[key].shape)
        return batch


def latent(more: list[str]) -> dict[str, str]:
    """{key: value} of the settings of the latent state among a run's arguments, without
    "dynamics.".
    """
    given = tools.parse(more).overrides
    own = {key: str(x) for key, x in given.items() if key.startswith("dynamics.")}
    return {key.removeprefix("dynamics."): x for key, x in own.items()}


def thresholds(task: str, dynamics: str, more: list[str]) -> dict[str, float]:
    """Those that were set before anything was measured: other ones for tokens, and for the
    posterior of ssrhaso/hidreamer (nearest codes).
    """
    found = dict(TASKS[task]["thresholds"])
    if task == "minatar" and dynamics == "hrvq":
        found["ball_after_3"] = 0.75
        if latent(more).get("hrvq.posterior") == "nearest":
            found = {"return_at_20000": 1.0}
    return found


def train(task: str, words: list[str], folder: Path, control: bool) -> None:
    """One run, in this process; finished runs are kept."""
    hidreamer.episodes.Replay = Shuffled if control else Replay  # what a run makes its replay of
    common = ["--configs", *TASKS[task]["configs"], "--logdir", str(folder)]
    status = dreamer.main([*common, "--eval_episodes", "0", *words])
    if status:
        sys.exit(status)


def saved_latent(folder: Path) -> dict[str, Any]:
    """{key: value} of all settings of the latent state of a run, without "dynamics."."""
    saved = run_config.saved_config(folder).items()
    return {key.removeprefix("dynamics."): x for key, x in saved if key.startswith("dynamics.")}


def longer(folder: Path, steps: int) -> bool:
    """Whether a longer run is there already, with a line about it: its last weights would be
    judged as those of ``steps``.
    """
    if not (folder / "config.yaml").exists():
        return False
    there = run_config.saved_config(folder)["steps"]
    if there <= steps:
        return False
    print(
        f"error: {folder} holds a run of {there} frames: give --steps {there}, or move it",
        file=sys.stderr,
    )
    return True


def episodes(folder: Path) -> np.ndarray:
    """(episodes, 2): the step at which each training episode ended, and its return."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ended = [line for line in lines if line.get("train_return") is not None]
    return np.array([(line["step"], line["train_return"]) for line in ended])


def measure(task: str, folder: Path, steps: int) -> dict[str, float]:
    """Every figure that has a threshold and can be had from a run of this length."""
    ended = episodes(folder)
    if task == "cartpole":
        return {"last_10_episodes": float(ended[-10:, 1].mean())}
    found = {}
    for at in (20_000, 50_000):
        if at <= steps:
            found[f"return_at_{at}"] = float(returns_in(ended, at - 2000, at).mean())
    return found | ball(folder)


def returns_in(ended: np.ndarray, low: int, high: int) -> np.ndarray:
    """Of ``episodes``, those that ended after frame ``low`` and until ``high``."""
    return ended[(ended[:, 0] > low) & (ended[:, 0] <= high), 1]


@torch.no_grad()
def ball(folder: Path, context: int = 8, horizon: int = 3, count: int = 128) -> dict[str, float]:
    """Breakout's open loop on new episodes of the trained policy: is the ball's cell right after 3
    imagined steps?

    ``copy`` is what the ball's last seen cell would score, ``counted`` what a table of the run's
    own episodes does without a model (``counted.Table``), ``beyond_counted`` what is above that.
    """
    state = checkpoint.load_checkpoint(folder / "checkpoints" / "latest.pt")
    config = tools.load_config([], tools.flatten(state["config"]))
    env = make_env(config.task, config.env.tree(), 987_654_321)
    agent = dreamer.models.Agent(env.obs_space, env.act_space, env.act_dim, config)
    agent.load_state_dict(state["agent"]["params"])
    torch.manual_seed(0)
    rows, obs, acting = [], env.reset(), agent.initial(1)
    zero = np.zeros(env.act_dim, np.float32)
    length = context + horizon
    while len(rows) < count * length:
        rows.append({**obs, "prev_action": zero if obs["is_first"] else acting.action[0].numpy()})
        inputs = {key: torch.as_tensor(obs[key])[None] for key in ("grid", "is_first")}
        acting = agent.act(acting, inputs)
        obs = env.reset() if obs["is_last"] else env.step(acting.action[0].numpy())
    keys = ("grid", "prev_action", "reward", "is_first", "is_terminal")
    batch = {}
    for key in keys:
        x = torch.from_numpy(np.stack([row[key] for row in rows]))
        batch[key] = x.unflatten(0, (count, length))
    batch["is_first"][:, 0] = True  # as in a replayed chunk
    with agent.autocast():
        truth, model = agent.world_model.open_loop(batch, context)
    whole = ~batch["is_first"][:, context:].any(1)  # a new episode cannot be predicted
    out = {}
    recorded = [load_episode(path)["grid"] for path in sorted((folder / "train_eps").glob("*.npz"))]
    seen = cells(truth["grid"][:, context - 2 : context], BALL)  # (N, 2)
    guesses = {
        "": cells(model["grid"][:, -1], BALL),
        "_copy": seen[:, 1],
        "_counted": torch.as_tensor(Table(recorded, BALL, [horizon])(*seen.numpy().T, horizon)),
    }
    for name, guess in guesses.items():
        hits = guess == cells(truth["grid"][:, -1], BALL)
        out[f"ball_after_3{name}"] = float(hits[whole].float().mean())
    beyond = out["ball_after_3"] - out["ball_after_3_counted"]
    return out | {"ball_after_3_beyond_counted": beyond}


def random_return(task: str, count: int = 300) -> float:
    config = tools.load_config(TASKS[task]["configs"], {})
    env, rng, returns = make_env(config.task, config.env.tree(), 1), np.random.default_rng(1), []
    while len(returns) < count:
        obs, score = env.reset(), 0.0
        while not obs["is_last"]:
            obs = env.step(random_action(env.act_space, 1, rng)[0])
            score += float(obs["reward"])
        returns.append(score)
    return float(np.mean(returns))


def curve(folder: Path, steps: int, width: int) -> list[list[float]]:
    """[step, mean return of the episodes that ended in the ``width`` steps before] ..."""
    ended = episodes(folder)
    points = []
    for at in range(width, steps + 1, width):
        scores = returns_in(ended, at - width, at)
        if len(scores):
            points.append([at, round(float(scores.mean()), 3)])
    return points


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="a shorter run; later thresholds are left out")
    parser.add_argument("--dynamics", default="rssm", help="the latent state")
    parser.add_argument(
        "--negative-control", action="store_true", help="train what must not learn instead"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    # more: arguments of dreamer.py
    args, more = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    steps = args.steps or TASKS[args.task]["steps"]
    least, runs, passed = thresholds(args.task, args.dynamics, more), {}, True
    for seed in args.seeds:
        parts = [args.task, args.dynamics, *(["negative_control"] if args.negative_control else [])]
        name = "-".join([*parts, *(word.strip("-") for word in more)])
        folder = ROOT / "runs" / "learning" / name / str(seed)
        words = ["--dynamics.type", args.dynamics, "--seed", str(seed)]
        words += ["--steps", str(steps), *more]
        if longer(folder, steps):
            return 2
        train(args.task, words, folder, args.negative_control)
        found = measure(args.task, folder, steps)
        met = {name: found[name] >= value for name, value in least.items() if name in found}
        if args.negative_control:
            # The control must miss every threshold of returns: what the world looks like it may
            # still learn.
            passed &= not any(ok for name, ok in met.items() if "ball" not in name)
        else:
            passed &= all(met.values())
        starts = [start for start in records(folder / STARTS) if "commit" in start]
        commits = list(dict.fromkeys(start["commit"] for start in starts))
        runs[seed] = {
            "figures": found,
            "met": met,
            "curve": curve(folder, steps, 1000),
            "commits": commits,
        }
        print(
            f"seed {seed}:",
            ", ".join(f"{name} {value:.2f}" for name, value in found.items()),
            flush=True,
        )
    report = provenance() | {
        "task": args.task,
        "dynamics": args.dynamics,
        "more": more,
        "latent": saved_latent(folder),
        "steps": steps,
        "negative_control": args.negative_control,
        "thresholds": least,
    }
    report |= {"random_return": random_return(args.task), "runs": runs}
    save(report, args.out)
    print(
        "as it should be" if passed else "NOT as it should be",
        f"(random play: {report['random_return']:.2f})",
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
