"""Look inside a trained agent and play in its dream, on a page of this machine.

    python -m play LOGDIR [--port 8765] [--seed S]
    python -m play LOGDIR --record OUT.mp4 [--steps N] [--dream]

LOGDIR is all that ``hidreamer.load`` takes: a run, an export, or hf:ORG/NAME.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hidreamer import app


def parser() -> app.Parser:
    found = app.Parser(" ".join(app.command("play")), description=__doc__.splitlines()[0])
    found.add_argument("logdir", help="a run's folder, an export, or hf:ORG/NAME")
    found.add_argument("--port", type=int, default=8765, help="of the page, on 127.0.0.1 [8765]")
    found.add_argument("--seed", type=int, help="of environment and dream [the run's; drawn anew]")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--record", type=Path, metavar="OUT.mp4", help="write a video, no page")
    found.add_argument("--steps", type=int, help="of the video [200]")
    found.add_argument("--dream", action="store_true", help="begin in the dream")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError. Imports nothing large: mistakes are reported at once."""
    args = parser().parse_args(argv)
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise app.UsageError(f"--seed is {args.seed}; it can be 0 to {2**63 - 1}")
    if not 0 <= args.port < 2**16:
        raise app.UsageError(f"--port is {args.port}; it can be 0 (any free one) to {2**16 - 1}")
    if args.record and args.record.suffix != ".mp4":
        raise app.UsageError(f"--record is {args.record}; its name must end in .mp4")
    if args.record and args.record.is_dir():
        raise app.UsageError(f"--record is {args.record}, a folder: name a file")
    if not args.record and args.steps is not None:
        raise app.UsageError("--steps are those of a video: give --record OUT.mp4 as well")
    if args.steps is not None and args.steps < 1:
        raise app.UsageError(f"--steps is {args.steps}; it must be at least 1")
    if problem := app.missing_agent(args.logdir):
        raise app.UsageError(problem)
    return args


def start(args: argparse.Namespace) -> int:
    if args.record:
        return video(args)
    try:
        from play import server
    except ImportError as error:
        raise app.UsageError(
            f"the page needs its extra ({error.name}): {app.install_line('play')}; "
            "--record OUT.mp4 does without"
        ) from None
    with server.bind(args.port) as listening:
        player = server.Player(lambda: make_session(args), Path.cwd())
        agent = player.session.agent
        if agent.recorded():
            player.videos = agent.folder / "videos"
        port = listening.getsockname()[1]
        print(f"http://{server.HOST}:{port}  (Ctrl-C ends)", flush=True)
        server.serve(player, listening)
    return 0


def make_session(args: argparse.Namespace) -> Any:
    """The ``Session`` of an agent."""
    from library.agent import load
    from play.session import Session

    session = Session(load(args.logdir, device=args.device), args.seed)
    if args.dream:
        session.switch()
    return session


def video(args: argparse.Namespace) -> int:
    from play.movie import record

    steps = 200 if args.steps is None else args.steps
    with contextlib.closing(make_session(args)) as session:
        film = record(session, args.record, steps)
        print(f"{args.record}: {film.line(session.now.dreaming)}")
        if session.message:
            print(f"note: {session.message}", file=sys.stderr)
        return int(session.failures > 0)


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 done, 1 a file cannot be written or the environment failed while it was
    recorded, 2 bad arguments, 128 + signal.
    """
    try:
        args = parse(argv)
    except app.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from envs import EnvError
    from hidreamer.checkpoint import FolderError
    from tools import ConfigError

    try:
        return start(args)
    except (app.UsageError, ConfigError, FolderError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: a file cannot be written ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
