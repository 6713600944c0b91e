"""Every number of a comparison, each aggregate with its interval and method: the content of
summary.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comparison import seconds, stats
from comparison.runs import Run, config_hash, levels, single_lives

# Mean scores of random play and of a human on the 26 games of Atari 100k (the IRIS repository's
# result files, which are those of the DreamerV3 repository).
HUMAN = {
    "alien": (227.8, 7128.0),
    "amidar": (5.8, 1720.0),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.0),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37188.0),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "chopper_command": (811.0, 7388.0),
    "crazy_climber": (10780.0, 35829.0),
    "demon_attack": (152.1, 1971.0),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4335.0),
    "gopher": (257.6, 2412.0),
    "hero": (1027.0, 30826.0),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2666.0),
    "kung_fu_master": (258.5, 22736.0),
    "ms_pacman": (307.3, 6952.0),
    "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.0),
    "qbert": (163.9, 13455.0),
    "road_runner": (11.5, 7845.0),
    "seaquest": (68.4, 42055.0),
    "up_n_down": (533.4, 11693.0),
}
TAUS = 41  # points of the performance profile

Matrix = dict[str, dict[str, list[dict]]]  # {task: {model: the records of its finished runs}}


def summarise(runs: Sequence[Run], models: Sequence[str]) -> dict[str, Any]:
    """``models``: which to compare and in which order; the first is the baseline."""
    runs = [run for run in runs if run.model in models]
    tasks = sorted({run.task for run in runs})
    steps = {}
    for task in tasks:
        steps[task] = min(run.config["steps"] for run in runs if run.task == task)
    rows = [record(run, steps[run.task]) for run in runs]
    rows.sort(key=lambda row: (row["task"], models.index(row["model"]), row["seed"]))
    done: Matrix = {}
    for task in tasks:
        done[task] = {model: [] for model in models}
    complete = [row for row in rows if row["status"] == "complete"]
    for row in complete:
        done[row["task"]][row["model"]].append(row)
    scales = {}
    for task in tasks:
        of_task = [row for row in complete if row["task"] == task]
        scales[task] = scale(task, steps[task], of_task, runs)
        names = {run.name: run for run in runs if run.task == task}
        here = [row for row in rows if row["task"] == task]
        paired_runs = [names[f"{task}/{row['model']}/{row['seed']}"] for row in here]
        seconds.add(here, paired_runs, scales[task])
    for row in rows:
        rate(row, scales[row["task"]])
    out = {"models": list(models), "tasks": scales, "runs": rows} | aggregates(done, models)
    out["seconds"] = by_seconds(done, models) if seconds.known(scales) else None
    return out | {"per_task": per_task(done, models, scales), "costs": costs(rows, models)}


# ---------------------------------------------------------------- one run


def record(run: Run, steps: int) -> dict[str, Any]:
    """The entry of one run in summary.json, the comparison being over ``steps`` frames."""
    episodes = run.get("train_return")
    curve = stats.curve(episodes, steps)
    final = stats.final_return(run.get("score") if run.published else episodes, steps)
    status = "complete" if run.complete else "incomplete"
    if run.complete and math.isnan(final):
        status = "no episode ended"
    curve[stats.part_ends(steps) > max(run.step, steps if run.complete else 0)] = np.nan
    rates, frames = run.get("perf/updates_per_s"), run.get("perf/frames_per_s")
    moving = frames[frames[:, 1] > 0]
    wall = (np.diff(moving[:, 0], prepend=0.0) / moving[:, 1]).sum()
    peak, evaluated = run.get("perf/peak_mb"), run.get("eval_return")
    if run.config["steps"] > steps:  # of a longer run, what came later is not compared
        evaluated = evaluated[evaluated[:, 0] <= steps]
    return {
        "task": run.task,
        "model": run.model,
        "seed": run.seed,
        "status": status,
        "steps": run.step,
        "steps_asked": run.config["steps"],
        "config_hash": config_hash(run.config),
        "commit": run.start.get("commit", "unknown"),
        "hardware": run.start.get("hardware", "unknown"),
        "folder": str(run.folder),
        "final_return": final,
        "published": run.published,
        "known": run.known,
        "random_until": random_until(run),
        "first_end": float(episodes[0, 0]) if len(episodes) else math.inf,
        "area": float(curve.mean()),
        "curve": curve.tolist(),
        "eval_returns": evaluated.tolist(),
        "frames_per_s": median_late(frames),
        "updates_per_s": median_late(rates),
        "wall_s": float(wall) if len(moving) else None,
        "peak_mb": float(peak[:, 1].max()) if len(peak) else None,
        "levels": {name: at(stats.part_ends(steps), x) for name, x in levels(run).items()},
    }


def at(moments: np.ndarray, series: np.ndarray) -> list[float]:
    """A logged scalar (n, 2) at other steps; NaN before it was first logged."""
    return np.interp(moments, *series.T, left=np.nan).tolist()


def median_late(series: np.ndarray) -> float | None:
    """Median of the second half of (n, 2): by then a run trains all the time."""
    return float(np.median(series[len(series) // 2 :, 1])) if len(series) else None


def rate(row: dict, scale: Mapping[str, Any]) -> None:
    """Add what depends on the other runs of the task: the normalised scores and the time to its
    threshold.
    """
    curve, threshold = np.array(row["curve"], float), scale["threshold"]
    row["normalised"] = float((row["final_return"] - scale["zero"]) / scale["unit"])
    row["normalised_curve"] = ((curve - scale["zero"]) / scale["unit"]).tolist()
    for name, normal in (("final_s", "normalised_s"), ("curve_s", "normalised_curve_s")):
        if name in row:
            row[normal] = ((np.array(row[name]) - scale["zero"]) / scale["unit"]).tolist()
    row["steps_to"] = None
    if threshold is not None and not row["published"]:
        unknown = row["random_until"], row["first_end"]
        row["steps_to"] = stats.steps_to(curve, threshold, scale["steps"], *unknown)


def scale(task: str, steps: int, rows: list[dict], runs: Sequence[Run]) -> dict[str, Any]:
    """How the returns of a task are normalised, the same for all models, and the threshold of its
    learning speed.
    """
    own = [random_returns(run) for run in runs if run.task == task and not run.published]
    at_random = np.concatenate([*own, np.zeros(0)])
    finals = np.array([row["final_return"] for row in rows])
    chance = float(at_random.mean()) if len(at_random) else 0.0
    furthest = np.abs(finals - chance).round(9).max(initial=0.0)
    zero, unit, how = chance, float(furthest) or 1.0, "run"
    games = task.startswith("atari_") and task not in single_lives(runs)
    if games and task.removeprefix("atari_") in HUMAN:
        zero, human = HUMAN[task.removeprefix("atari_")]
        unit, how = human - zero, "human"
        chance = chance if len(at_random) else zero
    mean = float(finals.mean()) if len(finals) else chance
    threshold = (chance + mean) / 2.0 if mean > chance else None
    facts = {"steps": steps, "random_play": chance, "random_episodes": len(at_random)}
    return facts | {"zero": zero, "unit": unit, "normalisation": how, "threshold": threshold}


def random_until(run: Run) -> int:
    """The frame until which the run acted at random."""
    prefill = run.config["replay.prefill"] * run.config["env.action_repeat"]
    if run.config.get("expl.behavior") != "random":
        return prefill
    return max(prefill, run.config.get("expl.until") or run.config["steps"])


def random_returns(run: Run) -> np.ndarray:
    """Returns of the episodes that ended while the run still acted at random, or, if none did, at
    least half of which it did; later ones are a trained agent's.
    """
    episodes, until = run.get("train_return"), random_until(run)
    early = episodes[episodes[:, 0] <= until]
    return (early if len(early) else episodes[episodes[:, 0] <= 2 * until])[:, 1]


# ---------------------------------------------------------------- aggregates


def matrix(done: Matrix, model: str, key: str) -> np.ndarray:
    """(seeds, tasks, ...) of what ``key`` names in a model's rows, for the seeds whose runs
    finished on every task.
    """
    by_task = []
    for models in done.values():
        by_task.append({row["seed"]: row[key] for row in models[model]})
    common = sorted(set.intersection(*map(set, by_task))) if by_task else []
    values = []
    for seed in common:
        values.append([by_seed[seed] for by_seed in by_task])
    return np.array(values, float)


def aggregates(done: Matrix, models: Sequence[str]) -> dict[str, Any]:
    """Over all tasks, on normalised scores. What a model without a seed that finished every task
    has is left out.
    """
    scores = matrices(done, models, "normalised")
    taus = np.linspace(*span(list(scores.values())), TAUS)
    seeds = {model: len(scores.get(model, ())) for model in models}
    profiles = {model: stats.profile(x, taus) for model, x in scores.items()}
    out = {"seeds": seeds, "profile": {"tau": taus.tolist(), "models": profiles}}
    out["levels"] = {model: level_means(done, model) for model in scores}
    return out | over_tasks(done, models)


def by_seconds(done: Matrix, models: Sequence[str]) -> dict[str, Any]:
    """Over all tasks: what is returned within the seconds of each task's budget."""
    out = over_tasks(done, models, "_s")
    for model, entry in out["aggregates"].items():
        used = stats.estimate(matrix(done, model, "seconds"), stats.AGGREGATES["mean"])
        entry["seconds of a whole run (mean)"] = used
    return out


def over_tasks(done: Matrix, models: Sequence[str], suffix: str = "") -> dict[str, Any]:
    """{"aggregates", "curves", "comparisons": {model: ...}}. suffix: "_s" for what is returned in
    equal seconds.
    """
    out: dict[str, Any] = {"aggregates": {}, "curves": {}, "comparisons": {}}
    scores, base = matrices(done, models, "normalised" + suffix), models[0]
    for model, x in scores.items():
        curves = matrix(done, model, "normalised_curve" + suffix)
        estimates = {name: stats.estimate(x, fn) for name, fn in stats.AGGREGATES.items()}
        area = stats.estimate(curves.mean(-1), stats.AGGREGATES["IQM"])
        out["aggregates"][model] = estimates | {"area under the curve (IQM)": area}
        out["curves"][model] = stats.bands(curves)
        if model != base and base in scores:
            entry = comparison(done, model, base, len(models) - 1, "normalised" + suffix)
            entry["improvement"] = stats.improvement(x, scores[base])
            out["comparisons"][model] = entry
    return out


def matrices(done: Matrix, models: Sequence[str], key: str) -> dict[str, np.ndarray]:
    """``matrix`` of every model that has a seed whose runs finished on every task."""
    return {model: x for model in models if len(x := matrix(done, model, key))}


def span(scores: list[np.ndarray]) -> tuple[float, float]:
    """A little below the lowest and just above the highest score."""
    if not scores:
        return 0.0, 1.0
    low, high = min(x.min() for x in scores), max(x.max() for x in scores)
    return low - 0.05 * (high - low or 1.0), high + 0.02 * (high - low or 1.0)


def comparison(
    done: Matrix, model: str, base: str, comparisons: int, key: str = "normalised"
) -> dict[str, Any]:
    """Final normalised scores of a model against the baseline, with every finished run of every
    task. key: which of a row's scores.
    """
    scores, base_scores = normalised(done, model, key), normalised(done, base, key)
    found = stats.compare(scores, base_scores, comparisons)
    mean = float(np.mean([x.mean() for x in base_scores]))
    return found._asdict() | {"claimed": found.claimed, "baseline": mean, "method": stats.TEST}


def normalised(done: Matrix, model: str, key: str) -> list[np.ndarray]:
    """By task: the final normalised scores (runs,) of a model's finished runs."""
    scores = []
    for by_model in done.values():
        scores.append(np.array([row[key] for row in by_model[model]]))
    return scores


def level_means(done: Matrix, model: str) -> dict[str, Any]:
    """{"kl_0": mean curve over runs and tasks, mean of the last 10% with an interval}."""
    levels: Matrix = {}
    for task, by_model in done.items():
        own = [row["levels"] | {"seed": row["seed"]} for row in by_model[model]]
        levels[task] = {model: own}
    rows = [row for by_model in levels.values() for row in by_model[model]]
    out = {}
    for name in sorted(set.intersection(*map(set, rows)) - {"seed"}):
        x = matrix(levels, model, name)  # (seeds, tasks, BINS)
        last = x[..., -round(stats.LAST * stats.BINS) :].mean(-1)
        out[name] = {
            "curve": x.mean((0, 1)).tolist(),
            "last": stats.estimate(last, stats.AGGREGATES["mean"]),
        }
    return out


def per_task(
    done: Matrix, models: Sequence[str], scales: Mapping[str, dict]
) -> dict[str, dict[str, Any]]:
    """{task: {model: raw returns with intervals, normalised, difference from the baseline, steps
    to the threshold}}.

    done: finished runs. models: the first is the baseline. scales: by task, of ``scale``.
    """
    out: dict[str, dict[str, Any]] = {}
    for task, by_model in done.items():
        out[task] = {}
        for model in models:
            if not by_model[model]:
                continue
            entry = out[task][model] = task_entry(by_model[model], scales[task])
            if model != models[0] and by_model[models[0]]:
                entry["difference"] = comparison({task: by_model}, model, models[0], 1)
    return out


def task_entry(rows: list[dict], scale: Mapping[str, Any]) -> dict[str, Any]:
    """What the finished runs of a model on a task reached."""
    finals = np.array([[row["final_return"]] for row in rows])
    entry = {"runs": len(rows), "final": stats.estimate(finals, stats.AGGREGATES["mean"])}
    entry["normalised"] = float(np.mean([row["normalised"] for row in rows]))
    entry["curve"] = stats.bands(np.array([[row["curve"]] for row in rows]))
    evals = [row["eval_returns"][-1][1] for row in rows if row["eval_returns"]]
    entry["last_evaluation"] = None
    if evals:
        entry["last_evaluation"] = stats.estimate(np.array(evals)[:, None], np.mean)
    entry["iqm"] = stats.estimate(finals, stats.AGGREGATES["IQM"])
    if scale["clock"]:
        entry["curve_s"] = stats.bands(np.array([[row["curve_s"]] for row in rows]))
        within = np.array([[row["final_s"]] for row in rows])
        entry["final_s"] = stats.estimate(within, stats.AGGREGATES["mean"])
        areas = np.array([[row["area_s"]] for row in rows])
        entry["area_s"] = stats.estimate(areas, stats.AGGREGATES["mean"])
        entry["seconds"] = float(np.mean([row["seconds"] for row in rows]))
    if scale["threshold"] is not None and not any(row["published"] for row in rows):
        times = np.array([row["steps_to"] for row in rows])
        entry["reached"] = int(np.isfinite(times).sum())
        entry["steps_to"] = stats.median_steps(times, scale["steps"])
    return entry


# ---------------------------------------------------------------- world models on the same episodes


def paired(
    results: Mapping[str, Sequence[Mapping[str, np.ndarray]]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """{model: what each of its seeds' jobs measured}, the first model the baseline; the same seeds
    for all.
    """
    base, first = next(iter(results)), next(iter(results.values()))[0]
    names = [name.removeprefix("model/") for name in first if name.startswith("model/")]
    found = {}
    for name in names:
        columns = {}
        for model, runs in results.items():
            columns[model] = np.stack([x[f"model/{name}"] for x in runs])
        known = np.isfinite(np.stack(list(columns.values()))).all((0, 1))
        if known.any():
            found[name] = {
                "better": "higher" if name.endswith("likelihood") else "lower",
                "episodes": int(known.sum()),
                "values": {model: float(x[:, known].mean()) for model, x in columns.items()},
                "differences": stats.paired(columns, base),
                "baseline": float(first[f"baseline/{name}"][known].mean()),
            }
    facts = {"models": list(results), "seeds": len(results[base]), "updates": int(first["updates"])}
    facts |= {"train_episodes": int(first["training"]), "held_out": len(first[f"model/{names[0]}"])}
    return facts | {"metrics": found, "method": stats.PAIRED, **about}


def costs(rows: list[dict], models: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """{model: medians over its runs}."""
    out = {}
    for model in models:
        of_model = [row for row in rows if row["model"] == model]
        out[model] = {}
        for key in ("frames_per_s", "updates_per_s", "wall_s", "peak_mb"):
            known = [row[key] for row in of_model if row[key] is not None]
            out[model][key] = float(np.median(known)) if known else None
    return out


def plain(value: Any) -> Any:
    """``value`` as JSON has it: no arrays, and null for what is no number."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
