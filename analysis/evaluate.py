"""Play episodes of the real task with a trained agent, and write down every return.

    python -m analysis.evaluate LOGDIR [--episodes N] [--seed S] [--sampled] [--out scores.json]

LOGDIR is all that ``hidreamer.load`` takes: a run, an export, or hf:ORG/NAME. Without options these
are the episodes of the run's own last evaluation, with the same numbers: as many of them, with the
run's seed, and with the likeliest actions if ``eval_greedy`` is true. --sampled samples actions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hidreamer import app

SEEDS = 2**32 - 1  # the largest that every environment takes
Measure = Callable[[Any, argparse.Namespace], tuple[dict[str, Any], str]]  # -> numbers, text


def evaluate(
    agent: Any,
    *,
    episodes: int | None = None,
    seed: int | None = None,
    sampled: bool = False,
) -> dict[str, Any]:
    """-> "returns" and "lengths" (agent steps) of each episode, the means as ``eval_*``, and what
    they are of. agent: a ``LoadedAgent``. See the module for the other arguments. Raises EnvError.
    """
    from hidreamer import evaluation
    from hidreamer.provenance import provenance
    from run_setup import evaluation_generator, make_envs
    from tools import Config

    tree = agent.config.tree()
    tree["seed"] = agent.config.seed if seed is None else seed
    tree["eval_episodes"] = episodes or max(1, agent.config.eval_episodes)
    tree["eval_greedy"] = agent.config.eval_greedy and not sampled
    config, step = Config(tree | {"video": False}), agent.facts["step"]
    count = min(config.env.count, config.eval_episodes)
    generator = evaluation_generator(config, step, agent.device)
    with contextlib.closing(make_envs(config, count, step, evaluating=True)) as envs:
        scores, played = evaluation.evaluate(
            agent.model, envs, config, False, lambda: None, generator
        )
    facts = {key: agent.facts[key] for key in ("task", "step", "commit")}
    facts |= {"dynamics": config.dynamics.type, "trained_with_seed": agent.facts["seed"]}
    facts |= {"seed": config.seed, "actions": "likeliest" if config.eval_greedy else "sampled"}
    facts |= {"episodes": played.episodes, "returns": [x["return"] for x in played.episodes]}
    facts["lengths"] = [int(x["length"]) for x in played.episodes]
    return facts | scores | {"made_by": provenance()}


def parser() -> app.Parser:
    name = " ".join(app.command("analysis.evaluate"))
    found = app.Parser(name, description=__doc__.splitlines()[0])
    add_options(found, "of environments and actions [the run's]")
    found.add_argument("--episodes", type=at_least(1), help="number [the run's eval_episodes]")
    found.add_argument(
        "--sampled",
        action="store_true",
        help="sample actions instead of taking the likeliest",
    )
    return found


def add_options(found: app.Parser, seed: str) -> None:
    """Those of ``command``. seed: what --seed is of."""
    found.add_argument("logdir", help="a run's folder, an export, or hf:ORG/NAME")
    found.add_argument("--seed", type=at_least(0, SEEDS), help=seed)
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--out", type=Path, help="a JSON file for all numbers [one line here]")


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is more than {most}")
        return value

    return integer


def parse(found: app.Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError. Imports nothing large: mistakes are reported at once."""
    args = found.parse_args(argv)
    if args.out and args.out.is_dir():
        raise app.UsageError(f"--out is {args.out}, a folder: name a file")
    if problem := app.missing_agent(args.logdir):
        raise app.UsageError(problem)
    return args


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 done, 1 an environment failed or the disk did, 2 bad arguments."""

    def measured(agent: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
        from hidreamer import evaluation

        found = evaluate(agent, episodes=args.episodes, seed=args.seed, sampled=args.sampled)
        return found, evaluation.line(found)

    return command(parser(), argv, measured)


def command(found: app.Parser, argv: Sequence[str], measure: Measure) -> int:
    """Load an agent, ``measure`` it, show the text and write the numbers. -> exit status."""
    try:
        args = parse(found, argv)
    except app.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from envs import EnvError
    from hidreamer.checkpoint import FolderError, replace_text, writable_folder
    from library.agent import load
    from tools import ConfigError

    try:
        agent = load(args.logdir, device=args.device)
    except (ConfigError, FolderError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if args.out:  # before episodes are played for nothing
            writable_folder(args.out.parent)
    except OSError as error:
        print(f"error: --out cannot be written ({error}): name another file", file=sys.stderr)
        return 1
    try:
        facts, shown = measure(agent, args)
        print(shown)
        if args.out:
            try:
                replace_text(args.out, json.dumps(facts, indent=1) + "\n")
            except OSError as error:  # what was played for is not lost
                print(json.dumps(facts))
                text = f"--out cannot be written ({error}): its content is above"
                print(f"error: {text}", file=sys.stderr)
                return 1
            print(args.out)
        else:
            print(json.dumps(facts))
    except app.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
