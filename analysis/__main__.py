"""Look inside trained agents: one page that opens offline, and JSON beside it.

    python -m analysis LOGDIR [LOGDIR ...] [--out FOLDER] [--episodes N] [--rerun]
                              [--compare | --pictures]

A LOGDIR is a run's folder, or one with runs below it; all of one task. The agents play new
episodes, taking turns, and each agent is evaluated on all of them: probes of named factors beside
the raw observation and the untrained model, information of levels about factors, which level holds
what the agent moves, and pictures of what levels show. See docs/analysis.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hidreamer import app

EPISODES = 40
LEAST = 2 * 5  # episodes that are needed, so that two are for testing
LONGEST = 300  # steps of an episode
SHORTEST = 7  # of --longest: latents.CONTEXT observed steps and two more


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError. Imports nothing large: mistakes are reported at once."""
    parser = app.Parser(
        prog=" ".join(app.command("analysis")),
        description=__doc__.replace("python -m analysis", " ".join(app.command("analysis"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("logdirs", type=Path, nargs="+", metavar="LOGDIR")
    parser.add_argument("--out", type=Path, help="folder of the page [LOGDIR/analysis]")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"new ones [{EPISODES}]")
    parser.add_argument(
        "--longest", type=int, default=LONGEST, help=f"steps of an episode [{LONGEST}]"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compare", action="store_true", help="the tables of all runs, no pictures")
    only.add_argument(
        "--pictures", action="store_true", help="no probes: also for tasks without named factors"
    )
    parser.add_argument("--rerun", action="store_true", help="also analysis.rrd, for rerun.io")
    args = parser.parse_args(argv)
    if args.episodes < LEAST:
        raise app.UsageError(
            f"--episodes is {args.episodes}; at least {LEAST} are needed, so that some can be held"
            " out"
        )
    if args.longest < SHORTEST:
        raise app.UsageError(f"--longest is {args.longest}; it must be at least {SHORTEST}")
    for folder in args.logdirs:
        if problem := app.missing(folder, "a run, or one with runs below it"):
            raise app.UsageError(problem)
    if args.out and args.out.exists() and not args.out.is_dir():
        raise app.UsageError(f"--out is {args.out}, a file: name a folder")
    return args


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 done, 1 the disk failed, 2 for runs or arguments that do not fit."""
    try:
        args = parse(argv)
    except app.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        from analysis import inspection, recording

        if args.rerun:
            recording.needed()
    except app.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        text = f"an analysis needs its extra: {app.install_line('compare')} ({error})"
        print(f"error: {text}", file=sys.stderr)
        return 2
    return inspection.run(args)


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
