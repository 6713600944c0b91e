"""Look inside trained agents: one page that opens offline, and JSON beside it.

    python -m analysis LOGDIR [LOGDIR ...] [--out FOLDER] [--episodes N] [--compare | --pictures]

A LOGDIR is a run's folder, or one with runs below it; all of one task. The agents play new
episodes, taking turns, and every one is judged on all of them: probes of named factors beside the
raw observation and the untrained model, information of levels about factors, which level holds what
the agent moves, and pictures of what levels show. See docs/analysis.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs import EnvError, make_env
from hidreamer import app
from hidreamer.checkpoint import CheckpointError
from hidreamer.provenance import provenance
from tools import ConfigError

try:
    from analysis import attention, latents, loading, pictures, readout, report, study, summary
    from comparison import runs
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"error: an analysis needs its extra: pip install -e '.[compare]' ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

EPISODES = 40
LEAST = 2 * 5  # episodes that are needed, so that two are for testing
LONGEST = 300  # steps of an episode


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=" ".join(app.command("analysis")),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("logdirs", type=Path, nargs="+", metavar="LOGDIR")
    parser.add_argument("--out", type=Path, help="folder of the page; by default LOGDIR/analysis")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"default {EPISODES}")
    parser.add_argument(
        "--longest", type=int, default=LONGEST, help=f"steps of an episode, default {LONGEST}"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compare", action="store_true", help="the tables of all runs, no pictures")
    only.add_argument(
        "--pictures", action="store_true", help="no probes: also for tasks without named factors"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 done, 2 for runs or arguments that do not fit."""
    args = parse(argv)
    try:
        if args.episodes < LEAST:
            raise ConfigError(
                f"--episodes is {args.episodes}; at least {LEAST} are needed, so that some can be"
                " held out"
            )
        if args.longest <= latents.CONTEXT + 1:
            raise ConfigError(
                f"--longest is {args.longest}; it must be above {latents.CONTEXT + 1}"
            )
        for folder in args.logdirs:
            if not folder.is_dir():
                raise ConfigError(f"there is no folder {folder}: give that of a run")
        subjects = loading.load_all(runs.find(args.logdirs))
        if not (args.pictures or loading.has_factors(subjects[0])):
            raise ConfigError(
                f"task {subjects[0].config.task} has no named factors to look for: --pictures makes"
                " the page without them"
            )
        episodes = loading.collect(subjects, args.episodes, args.longest)
        folder = args.out or args.logdirs[0] / report.NAME
        analyse(subjects, episodes, args, folder)
    except (ConfigError, CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"page: {folder / report.NAME}.html")
    return 0


def analyse(
    subjects: Sequence[loading.Subject],
    episodes: Sequence[loading.Episode],
    args: argparse.Namespace,
    folder: Path,
) -> None:
    """Measure, draw, and write the page into ``folder``."""
    material = study.Material(episodes, subjects[0].config.task)
    if args.pictures:
        material.factors = {}
    found: dict[str, Any] = {"task": material.task, "made": provenance(), "runs": {}}
    found["factors"], found["dropped"] = dict(material.kinds), material.dropped
    by = {subject.name: sum(e.by == subject.name for e in episodes) for subject in subjects}
    found["episodes"] = {
        "count": len(episodes),
        "steps": sum(map(len, episodes)),
        "longest": args.longest,
        "seed": loading.SEED,
        "by": by,
    }
    if material.factors:
        check_steps(material)
        found["baseline"] = study.baseline(material, sorted(loading.observed(subjects[0])))
    else:
        found["factors"] = {}
    strips: dict[str, list] = {}
    shown = set()
    for subject in subjects:
        print(f"{subject.name}: {subject.run.folder}", flush=True)
        trained = study.read_all(subject, subject.agent.world_model, material)
        entry = found["runs"][subject.name] = study.measure(subject, trained, material)
        if not args.compare:
            look(subject, episodes, trained, entry, strips, subject.run.model not in shown)
            shown.add(subject.run.model)
    found["models"] = summary.models(found)
    report.write(found, strips, folder)


def check_steps(material: study.Material) -> None:
    """Raises ConfigError where too few steps are held out for any score."""
    held = min(int(side.sum()) for side in readout.split(material.episode))
    if held < readout.LEAST:
        raise ConfigError(
            f"{len(material.episodes)} episodes have {sum(material.lengths)} steps, of which {held}"
            f" are held out, and {readout.LEAST} are needed: raise --episodes"
        )


def look(
    subject: loading.Subject,
    episodes: Sequence[loading.Episode],
    trained: Sequence[latents.Latents],
    entry: dict[str, Any],
    strips: dict[str, list],
    draw: bool,
) -> None:
    """Add a subject's pictures to ``strips``, attention and its longest episode to ``entry``."""
    if not draw:  # one run of each model: others of it look alike
        return
    longest = max(range(len(episodes)), key=lambda i: len(episodes[i]))
    entry["kl"] = [[round(float(x), 3) for x in row] for row in trained[longest].kl]
    scene = pictures.follow(subject, episodes[longest], longest)
    strips.setdefault("raster", []).append(pictures.code_raster(subject, trained[longest]))
    with subject.agent.autocast():
        seen = attention.look(subject.agent.world_model, scene.obs)
    if seen:
        entry["attention"] = {
            "names": seen.names,
            "by level": seen.by_level.round(4).tolist(),
            "by level, equal weights": seen.by_level_equal.round(4).tolist(),
            "by distance": seen.by_distance.round(4).tolist(),
            "by distance, equal weights": seen.by_distance_equal.round(4).tolist(),
        }
    if not pictures.drawable(subject):
        return
    env = make_env(subject.config.task, subject.config.env.tree(), 0)
    try:
        space, names = env.act_space, pictures.action_names(env)
    finally:
        env.close()
    made = {
        "decodes": pictures.decodes(scene),
        "resampled": pictures.resampled(scene),
        "dreams": pictures.counterfactual(scene, space, names),
        "codes": pictures.code_map(subject, episodes, trained),
        "surprises": pictures.surprises(scene, trained[longest]),
    }
    for key, strip in made.items():
        if strip is not None:
            strips.setdefault(key, []).append(strip)


if __name__ == "__main__":
    sys.exit(app.run(main))
