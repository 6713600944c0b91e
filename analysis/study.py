"""All measurements of one trained agent, as plain numbers: probes, information, contrast, codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis import factors, information, latents, levels, readout
from analysis.latents import HORIZONS, Latents
from analysis.loading import Episode, Subject, preprocessed
from models import WorldModel

PIXELS, UNTRAINED = "raw observation", "untrained"
Found = dict[str, Any]


class Material:
    """What is the same for all subjects: episodes, their factors, their raw observations.

    N steps of all episodes. Factors that hardly vary are left out and named in ``dropped``.
    """

    def __init__(self, episodes: Sequence[Episode], task: str):
        self.episodes, self.task = episodes, task
        self.lengths = [len(episode) for episode in episodes]
        self.episode = np.repeat(np.arange(len(episodes)), self.lengths)  # (N,)
        everything = stacked([episode.factors for episode in episodes])
        varies = {name: changes(x) for name, x in everything.items()}
        self.factors = {name: x for name, x in everything.items() if varies[name]}
        self.dropped = [name for name in everything if not varies[name]]
        self.kinds = {name: factors.kind(task, name) for name in self.factors}

    @property
    def y(self) -> np.ndarray:
        """(N, factors)."""
        return np.stack(list(self.factors.values()), 1)

    def pixels(self, keys: Sequence[str], horizon: int) -> np.ndarray:
        """(N, numbers): what was observed ``horizon`` steps before each; NaN before that."""
        out = []
        for episode in self.episodes:
            x = [episode.rows[key].reshape(len(episode), -1) for key in keys]
            x = np.concatenate(x, 1).astype(np.float32)
            late = np.full_like(x, math.nan)
            first = latents.CONTEXT - 1 if horizon else 0
            if len(x) > first + horizon:
                late[first + horizon :] = x[first : len(x) - horizon]
            out.append(late)
        return np.concatenate(out)


def changes(x: np.ndarray) -> bool:
    """Whether a factor (N,) has enough values to be read: more than one, each more than rare."""
    there = x[np.isfinite(x)]
    if len(there) < 2 * readout.LEAST:
        return False
    _, counts = np.unique(there, return_counts=True)
    return len(there) - int(counts.max()) >= readout.LEAST


def stacked(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """[{name: (T, ...)}] of episodes -> {name: (N, ...)}."""
    out = {}
    for name in found[0] if found else ():
        out[name] = np.concatenate([x[name] for x in found])
    return out


def read_all(subject: Subject, model: WorldModel, material: Material) -> list[Latents]:
    """Of every episode, each with a seed of its own, the same for all subjects."""
    out = []
    for i, episode in enumerate(material.episodes):
        with subject.agent.autocast():
            out.append(latents.read(model, preprocessed(subject.agent, episode.rows), i))
    return out


def features(model: WorldModel, found: Sequence[Latents], horizon: int) -> dict[str, np.ndarray]:
    """{part: (N, numbers)} at a horizon; the encoder's own output where that is 0."""
    by_episode = []
    for one in found:
        parts = {} if horizon else {"encoder": one.embed}
        parts |= latents.parts(model.dynamics, one.feat[horizon])
        by_episode.append({name: x.cpu().numpy() for name, x in parts.items()})
    return stacked(by_episode)


# ---------------------------------------------------------------- probes


def probe(x: np.ndarray, material: Material) -> Found:
    """{"linear", "mlp": {factor: R2 or None}} of features (N, F)."""
    scores = readout.scores(x, material.y, material.episode)
    return {kind: named(row, material) for kind, row in scores.items()}


def named(row: np.ndarray, material: Material) -> dict[str, float | None]:
    values = (float(x) if math.isfinite(x) else None for x in row)
    return dict(zip(material.factors, values, strict=True))


def baseline(material: Material, keys: Sequence[str]) -> Found:
    """{horizon: scores} of the raw observation, that many steps old."""
    return {str(h): probe(material.pixels(keys, h), material) for h in HORIZONS}


def probes(
    subject: Subject, trained: Sequence[Latents], fresh: Sequence[Latents], material: Material
) -> Found:
    """{"trained", "untrained": {horizon: {part: scores}}}; of the untrained model the open loop has
    everything together only; of the trained one the state from before it as well, which dreamt
    nothing.
    """
    out: Found = {"trained": {}, "untrained": {}}
    for who, model, found in (
        ("trained", subject.agent.world_model, trained),
        ("untrained", subject.untrained, fresh),
    ):
        for horizon in HORIZONS:
            parts = features(model, found, horizon)
            if who == "untrained" and horizon:
                parts = {"all": parts["all"]}
            elif horizon:
                still = [latents.moved(one.feat[0].cat(), horizon).cpu().numpy() for one in found]
                parts[latents.STILL] = np.concatenate(still)
            scores = {name: probe(x, material) for name, x in parts.items()}
            out[who][str(horizon)] = scores
    return out


# ---------------------------------------------------------------- information and contrast


def inform(found: Sequence[Latents], fresh: Sequence[Latents], material: Material) -> Found:
    """Mutual information of each level's codes and each factor, from the latents of every episode,
    those of an untrained model of the same shape beside them.

    -> {"entropy": {factor: bits}, "levels": {level: {factor: {"bits", "chance", "p",
    "untrained"}}}, ...}
    """
    codes, other = (stacked([one.codes for one in x]) for x in (found, fresh))
    classes = [information.discretise(x) for x in material.factors.values()]
    untrained = information.best_bits(other, classes)
    table = information.table(codes, material.factors, material.lengths)
    out: Found = {"estimator": information.ESTIMATOR, "permutations": information.PERMUTATIONS}
    out["entropy"] = dict(zip(material.factors, map(float, table.entropy), strict=True))
    out["levels"] = {}
    for i, level in enumerate(codes):
        cells = {}
        for j, name in enumerate(material.factors):
            cell = {"bits": table.bits[i, j], "chance": table.null[i, j], "p": table.p[i, j]}
            cell["untrained"] = untrained[i, j]
            cells[name] = {key: float(x) for key, x in cell.items()}
        out["levels"][level] = cells
    return out


def ego(
    subject: Subject, found: Sequence[Latents], fresh: Sequence[Latents], material: Material
) -> Found | None:
    """``levels.contrast`` of the coarsest and the finest level of a subject, and under "pairs" of
    all others, from the latents of every episode, of the trained model and, under "untrained", of
    the one before training: do they differ in what they hold of ego and world? None for a flat
    state.
    """
    model = subject.agent.world_model
    level = latents.names(model.dynamics)
    if len(level) < 2:
        return None
    pairs = list(itertools.combinations(level, 2))
    pairs.sort(key=lambda pair: pair != (level[0], level[-1]))
    trained, untrained = features(model, found, 0), features(subject.untrained, fresh, 0)
    out = []
    for top, bottom in pairs:
        entry = contrasted(trained[top], trained[bottom], material, len(pairs))
        before = contrasted(untrained[top], untrained[bottom], material, len(pairs), shuffles=0)
        if entry["value"] is not None:
            entry["untrained"] = [before[key] for key in ("value", "low", "high")]
        out.append({"top": top, "bottom": bottom} | entry)
    return out[0] | {"pairs": out[1:]}


def contrasted(
    top: np.ndarray, bottom: np.ndarray, material: Material, pairs: int, **more: int
) -> Found:
    """``levels.contrast`` of features (N, F) of two levels, as plain values."""
    first = [material.kinds[name] == factors.EGO for name in material.factors]
    more["pairs"] = pairs
    got = levels.contrast(top, bottom, material.y, first, material.episode, **more)
    out: Found = {"factors": {}, "value": got.value}
    for i, name in enumerate(material.factors):
        cell = {"kind": material.kinds[name], "top": float(got.top[i])}
        cell["bottom"] = float(got.bottom[i])
        cell["difference"] = [float(x) if math.isfinite(x) else None for x in got.difference[i]]
        out["factors"][name] = cell
    if got.value is not None:
        out |= {"low": got.low, "high": got.high, "control": list(got.control)}
        out |= dict(zip(("ego", "world"), got.groups.tolist(), strict=True))
    return out | {"supported": got.supported, "divided": got.divided}


# ---------------------------------------------------------------- codes


def code_use(subject: Subject, found: Sequence[Latents]) -> dict[str, Found]:
    """{level: shares and nats}: how much of its codes a level uses, and how fast they change."""
    dynamics, out = subject.agent.world_model.dynamics, {}
    codes = stacked([one.codes for one in found])
    for i, (name, (_, classes)) in enumerate(zip(codes, dynamics.shapes, strict=True)):
        changed = [one.codes[name][1:] != one.codes[name][:-1] for one in found]
        changed = np.concatenate(changed)  # (steps, S): every step counts the same, not episode
        used = [np.bincount(column, minlength=classes) / len(column) for column in codes[name].T]
        nats = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in used]
        kl = np.concatenate([one.kl[1:, i] for one in found])
        vague = np.concatenate([one.post_entropy[:, i] for one in found])
        out[name] = {
            "variables": codes[name].shape[1],
            "classes": classes,
            "perplexity": float(np.exp(nats).mean()),
            "changed": float(changed.mean()) if len(changed) else None,
            "kl": float(kl.mean()) if len(kl) else None,
            "posterior entropy": float(vague.mean()),
        }
    return out


# ---------------------------------------------------------------- everything


def measure(subject: Subject, trained: Sequence[Latents], material: Material) -> Found:
    """All numbers of one subject; without named factors only those of its codes."""
    run, dynamics = subject.run, subject.agent.world_model.dynamics
    out: Found = {
        "model": run.model,
        "seed": run.seed,
        "steps": run.step,
        "state": run.config["dynamics.type"],
        "levels": latents.names(dynamics),
        "commit": run.start.get("commit", ""),
        "hardware": run.start.get("hardware", ""),
        "codes": code_use(subject, trained),
    }
    if material.factors:
        fresh = read_all(subject, subject.untrained, material)
        out["probes"] = probes(subject, trained, fresh, material)
        out["information"] = inform(trained, fresh, material)
        out["contrast"] = ego(subject, trained, fresh, material)
    return out
