"""What an agent learns from, judged on MinAtar: default and each objective, seed by seed.

    python benchmarks/objectives.py --games breakout --seeds 10 11 12 [--arms default ac_cpc ...]
        [--dynamics rssm | hrssm | hrvq | stacked | gru] [--steps 30000]
        [--logdir runs/objectives] [--out results/F.json]
    python benchmarks/objectives.py --report --logdir runs/objectives [--from results/F.json ...]
        [--games ...] [--arms ...]
    python benchmarks/objectives.py --offline 2000 --games breakout --seeds 10 11 12 ...

Pairs are written with a plus: --arms default ac_cpc+replay_loss. Runs lie in
LOGDIR/GAME/DYNAMICS/ARM/SEED and continue where they stopped; finished ones are kept. All arms of a
seed come before the next seed, so that a stop at any time leaves pairs. All arms of a game get the
same keys but their own, the same seeds and as many frames.

--offline UPDATES: world models alone, each arm's on the episodes that the default's run of the same
seed recorded, judged on those held out, as run_comparison.py --paired-offline does; in
LOGDIR/offline.

--from: what --out wrote of runs that lie elsewhere, or no longer anywhere, is reported beside those
in LOGDIR; of a run that is in several places, the first one that is evaluated, else the one that
got furthest. --games and --arms leave out all others. A line under the verdicts names pairs whose
runs are of different commits.

Returns are those of an evaluation at the end: at 30,000 frames an episode of Freeway has ended once
in each environment. They are compared by seed with the default's, where both runs are finished. An
arm wins a game where the 95% interval of its mean difference is above 0, and loses it where it is
below: an arm without any effect is ahead in half of the games. It can become the default where it
wins three of five games and loses none, once every game has an interval; intervals are not
corrected for the number of arms. "random
play" is what a run's episodes returned before it trained. "passes 4" is the first thousand frames
in which training episodes of Breakout return more than 4 on average.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, SINGLE, keys
from learning import curve, longer, returns_in
from measure import ROOT, argument_parser, save

import dreamer
import tools
from analysis import heldout, offline
from analysis.summary import over_seeds
from comparison import summary, words
from comparison.options import HOUSEKEEPING
from comparison.runs import config_hash, finished, read, with_defaults
from hidreamer.provenance import provenance
from run_config import differences, idle
from tools import ConfigError

GAMES = ("breakout", "freeway", "asterix", "seaquest", "space_invaders")
BAR, WIDTH = 4.0, 1000  # mean return that is to be passed on Breakout, in so many frames
EVALUATION = 20  # episodes
STATES = {kind: ["--dynamics.type", kind] for kind in ("rssm", "hrssm", "hrvq")}
STATES |= {x: [*STATES["hrvq"], "--dynamics.hrvq.memory", x] for x in ("stacked", "gru")}
NOT_SHARED = set().union(*ARMS.values()) | HOUSEKEEPING | {"seed"}  # keys that pairs may differ in
NEEDED = 3  # games, of all, on which an arm is to win before it becomes the default


def arm_name(text: str) -> str:
    """Checked, for the command line."""
    keys(text)
    return text


def command(game: str, dynamics: str, arm: str, seed: int, folder: Path) -> list[str]:
    """What a run and an offline job of one arm have in common, without the program."""
    found = ["--configs", "minatar", "--task", f"minatar_{game}", *STATES[dynamics]]
    found += ["--seed", str(seed), "--logdir", str(folder), "--threads", "1"]
    for key, value in keys(arm).items():
        found += [f"--{key}", str(value).lower()]
    return found


def train(game: str, dynamics: str, arm: str, seed: int, steps: int, folder: Path) -> int:
    """One run. -> exit status. Raises ConfigError where FOLDER holds one of another config."""
    if longer(folder, steps):
        return 2
    words = [*command(game, dynamics, arm, seed, folder), "--steps", str(steps)]
    words += ["--eval_every", str(steps), "--eval_episodes", str(EVALUATION), "--video", "false"]
    whole = finished(folder, steps, config_of(words))
    if whole and evaluated(read(folder).get("eval_return"), steps) is not None:
        return 0
    return dreamer.main(words)


def train_offline(
    game: str, dynamics: str, arm: str, seed: int, updates: int, logdir: Path, folder: Path
) -> int:
    """One world model on the episodes of the default's run. -> exit status. Raises ConfigError
    where FOLDER holds one of another config or other episodes.
    """
    source = logdir / game / dynamics / "default" / str(seed)
    words = command(game, dynamics, arm, seed, folder)
    if offline.finished(folder, updates, config_of(words), offline.find([str(source)])):
        return 0
    job = [sys.executable, "-m", "analysis.offline", *words]
    job += ["--episodes", str(source), "--updates", str(updates)]
    return subprocess.run(job, cwd=ROOT, check=False).returncode


def config_of(words: list[str]) -> tools.Config:
    args = tools.parse(words)
    return tools.load_config(args.presets, args.overrides)


def evaluated(returns: np.ndarray, steps: int) -> float | None:
    """The return of the evaluation after ``steps`` frames, of (n, 2): step, return; None where the
    next one is of a longer run.
    """
    late = returns[(returns[:, 0] >= steps) & (returns[:, 0] < steps + WIDTH), 1]
    return float(late[0]) if len(late) else None


def objective(key: str) -> bool:
    """Whether a key is a setting of an objective, and so an arm's own."""
    group, *rest = key.split(".")
    return group == "model" and f"model.losses.{rest[0]}" in NOT_SHARED


def figures(folder: Path, game: str, steps: int) -> dict[str, Any]:
    """Of one run so far: frames, its curve, what it returns at the end (null before), when it
    passed.
    """
    run = read(folder)
    ended, done = run.get("train_return"), run.step >= steps
    points = curve(folder, min(steps, run.step), WIDTH) if len(ended) else []
    last = returns_in(ended, steps - 5000, steps) if done else np.zeros(0)
    passed = [step for step, mean in points if mean > BAR] if game == "breakout" else []
    at_random = summary.random_returns(run)
    return {
        "frames": run.step,
        "config": {k: x for k, x in run.config.items() if k not in NOT_SHARED and not objective(k)},
        "settings": {
            k: x for k, x in run.config.items() if objective(k) and not idle(k, run.config)
        },
        "evaluation": evaluated(run.get("eval_return"), steps),
        "random": round(float(at_random.mean()), 3) if len(at_random) else None,
        "last_5000": round(float(last.mean()), 3) if len(last) else None,
        "passes_4": passed[0] if passed else None,
        "curve": points,
        "commits": [x for x in run.start.get("commit", "").split(", ") if x],
    }


def report(logdir: Path, steps: int) -> dict[str, Any]:
    """{game: {dynamics: {arm: {seed: figures}}}} of all runs of ARMS that are there."""
    found: dict[str, Any] = {}
    for log in sorted(logdir.glob("*/*/*/*/metrics.jsonl")):
        game, dynamics, arm, seed = log.parent.relative_to(logdir).parts
        if game in GAMES and not set(arm.split("+")) - ARMS.keys():
            runs = found.setdefault(game, {}).setdefault(dynamics, {}).setdefault(arm, {})
            runs[seed] = figures(log.parent, game, steps)
    return found


def merged(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Add the runs of another report to ``found``, where they are neither evaluated nor further."""
    rank = lambda run: math.inf if run["evaluation"] is not None else run["frames"]
    for game, by_state in other.items():
        for dynamics, arms in by_state.items():
            for arm, runs in arms.items():
                own = found.setdefault(game, {}).setdefault(dynamics, {}).setdefault(arm, {})
                for seed, run in runs.items():
                    if seed not in own or rank(own[seed]) < rank(run):
                        own[seed] = run


def earlier(path: Path, steps: int) -> dict[str, Any]:
    """``report`` as --out wrote it; a run whose config is not in the file has None for it. Raises
    ConfigError.
    """
    try:
        body = json.loads(path.expanduser().read_text(encoding="utf-8"))
        runs, of, configs = body["runs"], body["steps"], body.get("configs", {})
        for run in every(runs):
            run["config"] = configs.get(run.get("config"))
            if not isinstance(run["frames"], int) or "evaluation" not in run:
                raise ValueError("a run lacks its figures")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--from {path} is no file that --out of this program wrote ({error})"
        ) from None
    if of != steps:
        raise ConfigError(f"--from {path} is of {of} frames: give --steps {of}")
    return runs


def every(runs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of all runs of ``report``."""
    for by_state in runs.values():
        for arms in by_state.values():
            for by_seed in arms.values():
                yield from by_seed.values()


def packed(runs: dict[str, Any]) -> dict[str, Any]:
    """{name: config} of all runs, which keep the name alone."""
    configs = {}
    for run in every(runs):
        if run["config"] is not None:
            name = config_hash(run["config"])
            configs[name], run["config"] = run["config"], name
    return configs


def same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two configs are one, or neither is known. A key that one of them lacks is younger."""
    if one is None or other is None:
        return one is other
    one, other = with_defaults(one), with_defaults(other)
    return not differences(one, other, [key for key in one if objective(key)])


def refuse_other_settings(arm: str, runs: dict[str, Any]) -> None:
    """Raises ConfigError where runs of an arm have other settings of its objective; a key that one
    of them lacks is younger.
    """
    values: dict[str, set[str]] = {}
    for run in runs.values():
        for key, value in run.get("settings", {}).items():
            values.setdefault(key, set()).add(str(value))
    for key, several in values.items():
        if len(several) > 1:
            raise ConfigError(
                f"{arm} has runs with {key} {' and '.join(sorted(several))}: leave those of one of"
                " them out"
            )


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """{dynamics: {arm: {game: its difference from the default}}}, by seeds that both finished:
    "seeds", "value", and "low" and "high" of the 95% t interval, from two seeds on; "commits" where
    the runs of a seed are not of the same, "blind" how many are of unknown configs. Raises
    ConfigError where two runs differ in more than an arm's keys, or may do so: of one the config is
    known, of the other it is not.
    """
    out: dict[str, Any] = {}
    for game, by_state in found.items():
        for dynamics, arms in by_state.items():
            base = arms.get("default", {})
            for arm, runs in arms.items():
                pairs, commits = {}, set()
                for seed in runs.keys() & base.keys():
                    run, other = runs[seed], base[seed]
                    if not same(run["config"], other["config"]):
                        raise ConfigError(
                            f"{game}/{dynamics}/{arm}/{seed} and default/{seed} differ in more than"
                            " the keys of the arm: train one of them anew, in another --logdir"
                        )
                    if run["evaluation"] is not None and other["evaluation"] is not None:
                        pairs[seed] = round(run["evaluation"] - other["evaluation"], 9)
                        if run["commits"] != other["commits"]:
                            commits |= {*run["commits"], *other["commits"]}
                refuse_other_settings(f"{game}/{dynamics}/{arm}", runs)
                if arm != "default" and pairs:
                    difference = over_seeds(list(pairs.values()))
                    cell = {key: x and round(x, 9) for key, x in difference.items()}
                    cell = {"seeds": sorted(pairs, key=int)} | cell
                    cell |= {"commits": sorted(commits)} if commits else {}
                    blind = sum(runs[seed]["config"] is None for seed in pairs)
                    cell |= {"blind": blind} if blind else {}
                    out.setdefault(dynamics, {}).setdefault(arm, {})[game] = cell
    return out


def table(found: dict[str, Any]) -> str:
    names = ["game", "state", "arm", "seed", "frames", "evaluation", "random play", "last 5,000"]
    lines = [f"| {' | '.join([*names, 'passes 4 at'])} |", "|---" * (len(names) + 1) + "|"]
    shown = lambda x: "-" if x is None else str(x)
    for game, by_state in found.items():
        for dynamics, arms in by_state.items():
            for arm, runs in arms.items():
                for seed, run in runs.items():
                    cells = [game, dynamics, arm, seed, str(run["frames"])]
                    cells += [shown(run["evaluation"]), shown(run.get("random"))]
                    cells += [shown(run["last_5000"]), shown(run["passes_4"])]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(differences: dict[str, Any]) -> list[str]:
    """A line for each arm: differences, and whether it is to be the default."""
    lines = []
    for dynamics, arms in differences.items():
        for arm, games in arms.items():
            told = [f"{game} {words.estimate(x, sign=True)}" for game, x in games.items()]
            ahead = sum(x["value"] > 0 for x in games.values())
            shown = [x for x in games.values() if x["low"] is not None]
            won, lost = sum(x["low"] > 0 for x in shown), sum(x["high"] < 0 for x in shown)
            missing = len(GAMES) - len(shown)
            line = f"{dynamics}, {arm}: {', '.join(told)}. Ahead in {ahead} of {len(games)} games,"
            line += f" won {won} (interval above 0), lost {lost} (below): "
            if missing:
                line += f"open, {missing} of {len(GAMES)} games have no two pairs"
            else:
                better = won >= NEEDED and not lost
                line += "it can be the default" if better else "the default stays"
            lines.append(line)
            for game, x in games.items():
                if x.get("blind"):
                    of = f"{x['blind']} of {len(x['seeds'])}"
                    lines.append(f"  {game}: {of} pairs are of unknown configs")
                if x.get("commits"):
                    lines.append(f"  {game}: pairs of different commits, {', '.join(x['commits'])}")
    return lines


def held_out(logdir: Path, updates: int) -> dict[str, Any]:
    """{game: {dynamics: errors on held-out episodes, as run_comparison.py has them}}, of the seeds
    that all arms of a game finished.
    """
    out: dict[str, Any] = {}
    for home in sorted(path for path in logdir.glob("offline/*/*") if path.is_dir()):
        arms = sorted(home.iterdir(), key=lambda path: (path.name != "default", path.name))
        done = {path.name: finished_seeds(path, updates) for path in arms}
        done = {arm: seeds for arm, seeds in done.items() if seeds}
        seeds = sorted(set.intersection(*done.values()), key=int) if done else []
        if "default" not in done or len(done) < 2 or not seeds:
            continue
        results = {arm: [offline.read(home / arm / seed) for seed in seeds] for arm in done}
        game, dynamics = home.relative_to(logdir / "offline").parts
        about = {"baseline": heldout.BASELINE, "note": heldout.NOTE, "task": f"minatar_{game}"}
        found = summary.paired(results, about | {"sources": ["the default's episodes"]})
        out.setdefault(game, {})[dynamics] = found | {"seeds": seeds}
    return out


def finished_seeds(arm: Path, updates: int) -> set[str]:
    return {path.name for path in arm.iterdir() if offline.finished(path, updates)}


def main() -> int:
    try:
        return judge()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def judge() -> int:
    """What the command line asks for. -> exit status. Raises ConfigError."""
    parser = argument_parser(__doc__)
    parser.add_argument("--games", nargs="+", choices=GAMES)
    parser.add_argument("--arms", nargs="+", type=arm_name)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--dynamics", default="rssm", choices=STATES)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--logdir", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--offline", type=int, default=0, metavar="UPDATES")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logdir = args.logdir.expanduser().resolve()
    before = [earlier(path, args.steps) for path in args.files]
    games, arms = args.games or ["breakout"], args.arms or SINGLE
    todo = [(s, g, a) for s in args.seeds for g in games for a in arms]
    for seed, game, arm in [] if args.report else todo:
        inside = Path(game) / args.dynamics / arm / str(seed)
        if args.offline:
            where = args.offline, logdir, logdir / "offline" / inside
            status = train_offline(game, args.dynamics, arm, seed, *where)
        else:
            status = train(game, args.dynamics, arm, seed, args.steps, logdir / inside)
        if status:
            return status
    found = report(logdir, args.steps)
    for runs in before:
        merged(found, runs)
    if args.report:
        found = {game: x for game, x in found.items() if game in (args.games or GAMES)}
        for by_state in found.values():
            for state, by_arm in by_state.items():
                kept = {arm: x for arm, x in by_arm.items() if arm in (args.arms or by_arm)}
                by_state[state] = kept
    judgement = judged(found)
    print(table(found), *verdicts(judgement), sep="\n")
    if args.out:
        of_arms = {arm for states in found.values() for arms in states.values() for arm in arms}
        body = provenance() | {"steps": args.steps, "arms": {a: keys(a) for a in sorted(of_arms)}}
        body |= {"configs": packed(found), "runs": found, "differences": judgement}
        body |= {"offline": held_out(logdir, args.offline)} if args.offline else {}
        save(body, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
