"""How often do the statistics of a comparison claim a difference that is not there, and how often
do they see one that is?

    python benchmarks/error_rates.py [--simulations 1000] [--out F]

Nothing is trained: final scores of a baseline and two models are drawn, with every model as good as
the others or with a known difference, and go through comparison/stats.py as those of real runs do.
Shares are of --simulations comparisons, of the bootstrap of a quarter and of paired ones of four
times as many; each part draws from a generator of its own with seed 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np

from comparison import stats
from hidreamer.provenance import provenance

MODELS = 2  # that are compared with the baseline
DESIGNS = ((3, 1), (3, 2), (5, 1), (5, 5))  # seeds, tasks
EFFECT = 0.2  # of the baseline's score, as reports ask for

Rng = np.random.Generator
Draw = Callable[[Rng, tuple[int, ...]], np.ndarray]

# Final scores of runs, the same for all models.
SPREADS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed (log-normal)": lambda rng, shape: np.exp(rng.normal(size=shape)),
    "half of the runs take off": lambda rng, shape: (
        rng.integers(0, 2, shape) + rng.normal(0.0, 0.1, shape)
    ),
    "one of five runs takes off": lambda rng, shape: (
        (rng.random(shape) < 0.2) + rng.normal(0.0, 0.1, shape)
    ),
}


def compared(model: np.ndarray, base: np.ndarray) -> stats.Difference:
    """As a report compares. model, base: (tasks, seeds)."""
    return stats.compare(list(model), list(base), MODELS)


def false_claims(rng: Rng, count: int) -> dict[str, Any]:
    """Share of comparisons of equal models in which at least one is claimed to differ; beside it,
    the share in which at least one interval leaves out 0.
    """
    out: dict[str, Any] = {}
    kinds = [(name, draw, 1.0) for name, draw in SPREADS.items()]
    kinds.append(("normal, models spread three times as wide", SPREADS["normal"], 3.0))
    for seeds, tasks in DESIGNS:
        for name, draw, wider in kinds:
            claimed = excluded = 0
            for _ in range(count):
                base, *models = draw(rng, (1 + MODELS, tasks, seeds))
                found = [compared(wider * model, base) for model in models]
                claimed += any(x.claimed for x in found)
                excluded += any(x.low > 0.0 or x.high < 0.0 for x in found)
            out[f"{seeds} seeds, {tasks} tasks, {name}"] = {
                "claimed": claimed / count,
                "interval excludes 0": excluded / count,
            }
    return out


def unlike(rng: Rng, count: int) -> dict[str, float]:
    """Share of comparisons of two models that are as good on average, one model against the
    baseline, in which they are claimed to differ though their runs scatter otherwise, or are not as
    many. {"runs of the model, of the baseline, tasks, their scores": share}.
    """
    steady = lambda rng, shape: rng.normal(0.0, 0.1, shape)
    centred = lambda name, mean: lambda rng, shape: SPREADS[name](rng, shape) - mean
    log_normal = centred("skewed (log-normal)", math.exp(0.5))
    kinds: dict[str, tuple[Draw, Draw]] = {
        "log-normal three times as wide, log-normal": (
            lambda rng, shape: 3.0 * log_normal(rng, shape),
            log_normal,
        ),
        "half take off, steady": (centred("half of the runs take off", 0.5), steady),
        "one of five takes off, steady": (centred("one of five runs takes off", 0.2), steady),
    }
    out: dict[str, float] = {}
    for own, others, tasks in ((5, 5, 1), (10, 10, 1), (5, 5, 5), (3, 10, 1), (10, 3, 1)):
        for name, (model, base) in kinds.items():
            claimed = 0
            for _ in range(count):
                x, y = model(rng, (tasks, own)), base(rng, (tasks, others))
                claimed += stats.compare(list(x), list(y), 1).claimed
            out[f"{own}, {others}, {tasks}, {name}"] = claimed / count
    return out


def seen(rng: Rng, count: int) -> dict[str, Any]:
    """Share of comparisons with a true difference of the size called detectable, at the true spread
    of 1, that is seen: by the interval, and by interval and test together, which is a claim.
    """
    out: dict[str, Any] = {}
    for seeds, tasks in DESIGNS:
        size = detectable(1.0, seeds, tasks)
        found = [
            compared(size + rng.normal(size=(tasks, seeds)), rng.normal(size=(tasks, seeds)))
            for _ in range(count)
        ]
        out[f"{seeds} seeds, {tasks} tasks"] = {
            "difference in standard deviations": round(size, 3),
            "interval excludes 0": sum(x.low > 0.0 for x in found) / count,
            "claimed": sum(x.claimed and x.value > 0.0 for x in found) / count,
        }
    return out


def detectable(spread: float, seeds: int, tasks: int) -> float:
    """What stats.compare calls so where both models' runs have this standard deviation."""
    error = spread * math.sqrt(2.0 / seeds / tasks)
    return stats.standard_errors(2 * (seeds - 1) * tasks, (1.0 - stats.LEVEL) / MODELS) * error


def seeds_asked(rng: Rng, count: int) -> dict[str, Any]:
    """Seeds that a report says would show EFFECT: quantiles of its answers, and the answer of the
    same formula at the true spread (0.1 to 0.3 of the score, from run to run).
    """
    out: dict[str, Any] = {}
    for spread in (0.1, 0.2, 0.3):
        for seeds in (3, 5, 10):
            known = {"detectable": detectable(spread, seeds, 1), "freedom": 2 * (seeds - 1)}
            known |= {"alpha": (1.0 - stats.LEVEL) / MODELS}
            answers = []
            for _ in range(count):
                model, base = 1.0 + spread * rng.normal(size=(2, 1, seeds))
                answers.append(stats.seeds_for(compared(model, base)._asdict(), EFFECT, seeds))
            quantiles = np.quantile(answers, (0.1, 0.5, 0.9), method="nearest").tolist()
            out[f"spread {spread}, from {seeds} seeds"] = {
                "at the true spread": stats.seeds_for(known, EFFECT, seeds),
                "answers, 10% 50% 90%": quantiles,
            }
    return out


def bootstrapped(rng: Rng, count: int) -> dict[str, float]:
    """Share of comparisons of equal models, one task, in which rliable's interval of the
    probability of improvement leaves out one half.
    """
    out: dict[str, float] = {}
    count = max(1, count // 4)  # each draws 2,000 replications
    for seeds in (3, 5, 10):
        outside = 0
        for _ in range(count):
            x, y = rng.normal(size=(2, seeds, 1))
            found = stats.improvement(x, y)
            outside += not found["low"] <= 0.5 <= found["high"]
        out[f"{seeds} seeds"] = outside / count
    return out


def paired(rng: Rng, count: int) -> dict[str, float]:
    """Share of paired comparisons of equal models in which the interval over seeds and episodes
    leaves out 0, by the standard deviation between seeds and between episodes; of the rest it is 1.
    """
    out: dict[str, float] = {}
    count *= 4  # each is quick
    for seeds in (2, 3, 5):
        for episodes in (10, 40):
            for by_seed, by_episode in ((0.0, 0.0), (0.3, 0.3), (3.0, 0.0), (0.0, 3.0)):
                outside = 0
                for _ in range(count):
                    differences = rng.normal(size=(seeds, episodes))
                    differences += by_seed * rng.normal(size=(seeds, 1))
                    differences += by_episode * rng.normal(size=(1, episodes))
                    _, low, high = stats.two_way(differences)
                    outside += not low <= 0.0 <= high
                name = f"{seeds} seeds, {episodes} episodes, between them {by_seed} {by_episode}"
                out[name] = outside / count
    return out


PARTS = {
    "false claims": false_claims,
    "false claims, runs that scatter otherwise": unlike,
    "seen": seen,
    "seeds asked": seeds_asked,
    "bootstrap excludes one half": bootstrapped,
    "paired excludes 0": paired,
}


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = provenance() | {"simulations": args.simulations, "models": MODELS}
    for name, part in PARTS.items():
        report[name] = part(np.random.default_rng(0), args.simulations)
        print(f"{name}: done", file=sys.stderr, flush=True)
    measure.write(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
