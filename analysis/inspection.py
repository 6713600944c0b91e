"""What ``python -m analysis`` does once its arguments are known: measure, draw, write."""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import (
    attention,
    latents,
    loading,
    pictures,
    readout,
    recording,
    report,
    study,
    summary,
)
from comparison import runs
from envs import EnvError, open_env
from hidreamer.checkpoint import CheckpointError, writable_folder
from hidreamer.provenance import provenance
from tools import ConfigError


def run(args: argparse.Namespace) -> int:
    """args: of ``analysis.__main__``. -> exit status: 0 done, 2 for runs that do not fit."""
    folder = args.out or args.logdirs[0] / report.NAME
    try:
        subjects = loading.load_all(runs.find(args.logdirs))
        if not (args.pictures or loading.has_factors(subjects[0])):
            raise ConfigError(
                f"task {subjects[0].config.task} has no named factors to look for: --pictures makes"
                " the page without them"
            )
        writable_folder(folder)
        episodes = loading.collect(subjects, args.episodes, args.longest)
        analyse(subjects, episodes, args, folder)
    except (ConfigError, CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename or ''}: {error.strerror or error}"
        print(f"error: {what}: name another folder with --out", file=sys.stderr)
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
    counts = collections.Counter(episode.by for episode in episodes)
    by = {subject.name: counts[subject.name] for subject in subjects}
    found["episodes"] = {
        "count": len(episodes),
        "steps": sum(map(len, episodes)),
        "longest": args.longest,
        "seed": loading.SEED,
        "by": by,
    }
    if material.factors:
        check_steps(material)
        keys = subjects[0].agent.world_model.encoder.observed
        found["baseline"] = study.baseline(material, sorted(keys))
    else:
        found["factors"], found["lacks"] = {}, lacking(material, args.pictures)
    strips: dict[str, list] = {}
    shown, kept = set(), []
    for subject in subjects:
        print(f"{subject.name}: {subject.run.folder}", flush=True)
        trained = study.read_all(subject, subject.agent.world_model, material)
        entry = found["runs"][subject.name] = study.measure(subject, trained, material)
        if args.rerun:
            kept.append((subject, trained))
        if not args.compare:
            look(subject, episodes, trained, entry, strips, subject.run.model not in shown)
            shown.add(subject.run.model)
    found["models"] = summary.models(found)
    found["differing"] = loading.differing(subjects)
    report.write(found, strips, folder)
    if kept:
        index = longest(episodes)
        recording.write(folder / f"{report.NAME}.rrd", episodes[index], index, kept)


def lacking(material: study.Material, pictures: bool) -> str:
    """Why a page has no probes, in one sentence. pictures: whether none were asked for."""
    if not any(episode.factors for episode in material.episodes):
        return f"Task {material.task} has no named factors: no probes, only pictures and codes."
    if pictures:
        return "No probes were asked for (--pictures): only pictures and codes."
    return (
        f"The named factors of {material.task} hardly vary on these episodes: no probes, only"
        " pictures and codes. More of them (--episodes) may do."
    )


def check_steps(material: study.Material) -> None:
    """Raises ConfigError where too few steps are held out for any score."""
    held = min(int(side.sum()) for side in readout.split(material.episode))
    if held < readout.LEAST:
        raise ConfigError(
            f"{len(material.episodes)} episodes have {sum(material.lengths)} steps, of which {held}"
            f" are held out, and {readout.LEAST} are needed: raise --episodes"
        )


def longest(episodes: Sequence[loading.Episode]) -> int:
    """Its index."""
    return max(range(len(episodes)), key=lambda i: len(episodes[i]))


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
    index = longest(episodes)
    entry["kl"] = trained[index].kl.astype(float).round(3).tolist()
    scene = pictures.follow(subject, episodes[index], index)
    strips.setdefault("raster", []).append(pictures.code_raster(subject, trained[index]))
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
    with contextlib.closing(open_env(subject.config.task, subject.config.env.tree(), 0)) as env:
        space, names = env.act_space, pictures.action_names(env)
    made = {
        "decodes": pictures.decodes(scene),
        "resampled": pictures.resampled(scene),
        "dreams": pictures.counterfactual(scene, space, names),
        "codes": pictures.code_map(subject, episodes, trained),
        "surprises": pictures.surprises(scene, trained[index]),
    }
    for key, strip in made.items():
        if strip is not None:
            strips.setdefault(key, []).append(strip)
