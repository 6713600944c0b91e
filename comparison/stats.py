"""Statistics of a comparison: aggregates with rliable's stratified bootstrap, and when a
difference may be claimed.

Scores of a model are a list with one array (runs,) per task; where it is rectangular, a matrix
(runs, tasks).

With few seeds a percentile bootstrap is too narrow to claim anything from: under no difference,
rliable's interval of the probability of improvement excludes one half in 20% of comparisons with 3
seeds and in 7% with 5 (250 simulations each, normal scores, one task). So its intervals describe,
and ``compare`` decides. benchmarks/error_rates.py simulated it, as all such numbers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from rliable import library, metrics

BINS = 20  # equal parts of a run, in which its episodes are averaged
LAST = 0.1  # share of a run that its final return is taken from
LEVEL = 0.95
REPS = 2000  # bootstrap replications
SHUFFLES = 20_000
POWER = 0.8
LEAST = 3  # runs of a model on a task, below which nothing is claimed
BOOTSTRAP = (
    f"rliable, {LEVEL:.0%} percentile bootstrap over seeds, stratified by task, {REPS} replications"
)
TEST = f"Welch's t over seeds, stratified by task, {LEVEL:.0%} jointly for all models"
PAIRED = f"{LEVEL:.0%}, t over seeds and over episodes, both being samples (Howe 1974)"

Scores = list[np.ndarray]
# value, low, high, method; low and high are None where there is no interval
Estimate = dict[str, Any]


# ---------------------------------------------------------------- one run


def final_return(episodes: np.ndarray, steps: int) -> float:
    """Mean return of the training episodes that ended in the last 10% of ``steps``; if none did, of
    the last one and those that ended with it, up to 10% before: environments side by side end
    long episodes together.

    episodes: (n, 2), frame at which each ended and its return. NaN if none ended.
    """
    ended = episodes[episodes[:, 0] <= steps]
    late = ended[ended[:, 0] > (1.0 - LAST) * steps]
    if not len(late):
        late = ended[ended[:, 0] > ended[:, 0].max(initial=0.0) - LAST * steps]
    # Rounded, so that means of equal returns are equal, however many there were.
    return float(f"{late[:, 1].mean():.10g}") if len(late) else math.nan


def curve(episodes: np.ndarray, steps: int) -> np.ndarray:
    """(BINS,): mean return of the episodes that ended in each part of the run.

    A part in which none ended has the value of the part before; before the first episode, that
    episode's part's.
    """
    ends = part_ends(steps)
    part = np.searchsorted(ends, episodes[:, 0])
    inside = part < BINS
    counts = np.bincount(part[inside], minlength=BINS)
    sums = np.bincount(part[inside], episodes[inside, 1], minlength=BINS)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return np.full(BINS, np.nan)
    source = filled[np.maximum(np.searchsorted(filled, np.arange(BINS), side="right") - 1, 0)]
    return sums[source] / counts[source]


def part_ends(steps: int) -> np.ndarray:
    """(BINS,): the frame at which each part of a run ends, the last one exactly at ``steps``."""
    ends = steps * np.arange(1, BINS + 1) / BINS
    ends[-1] = steps  # of seconds, which are no whole numbers, rounding could make it less
    return ends


def steps_to(
    curve: np.ndarray, threshold: float, steps: int, after: float = 0.0, first: float = 0.0
) -> float:
    """The end of the first part of the run whose mean return reaches ``threshold``; inf if none
    does (censored).

    Parts that begin before frame ``after``, when the run still acted at random, do not count; nor
    do those that end before ``first``, when the first episode ended: their value was not seen yet.
    """
    ends = part_ends(steps)
    known = (ends - steps / BINS >= after) & (ends >= first)
    reached = np.flatnonzero((curve >= threshold) & known)
    return float(ends[reached[0]]) if len(reached) else math.inf


# ---------------------------------------------------------------- aggregates


# The two statistics that are bootstrapped thousands of times are written out: scipy's, which
# rliable calls, take twenty times as long on so few numbers.


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over runs and tasks, for every entry of the last axis: (n, tasks, K) ->
    (K,); NaN where a run has no score. As rliable's, which is scipy's trimmed mean.
    """
    flat = np.sort(scores.reshape(-1, scores.shape[-1]), axis=0)  # (n * tasks, K), NaN last
    cut = int(0.25 * len(flat))
    return flat[cut : len(flat) - cut].mean(0) + 0.0 * flat[-1]


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Of a run of x (n, tasks) over one of y (m, tasks), a tie being a half: mean over tasks.

    As rliable's, which is the statistic of Mann and Whitney's test.
    """
    higher, equal = x[:, None] > y, x[:, None] == y  # (n, m, tasks)
    return float((higher + 0.5 * equal).mean())


def bootstrap(scores: Any, func: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """func(scores) (K,) and its interval (2, K); None for the interval of single runs.

    scores: an array (runs, tasks, ...) or a pair of them. The same data always give the same
    interval.
    """
    arrays = scores if isinstance(scores, tuple) else (scores,)
    if min(len(x) for x in arrays) < 2:
        return func(*arrays), None
    state = np.random.get_state()
    # rliable 1.2 draws from the global generator, whatever random_state it is given
    np.random.seed(0)
    try:
        values, intervals = library.get_interval_estimates(
            {"": scores}, func, reps=REPS, confidence_interval_size=LEVEL
        )
    finally:
        np.random.set_state(state)
    return values[""], intervals[""]


def estimate(scores: Any, func: Callable[..., float]) -> Estimate:
    """One number, its interval and where that comes from."""
    value, interval = bootstrap(scores, lambda *x: np.array([func(*x)]))
    low, high = (None, None) if interval is None else interval[:, 0].tolist()
    return {"value": float(value[0]), "low": low, "high": high, "method": BOOTSTRAP}


AGGREGATES = {
    "IQM": lambda scores: iqm(scores[..., None])[0],
    "mean": metrics.aggregate_mean,
}


def improvement(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Probability that a run of x (n, tasks) scores higher than one of y (m, tasks), mean over
    tasks; NaN where a run has no score.
    """
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return {"value": math.nan, "low": None, "high": None, "method": BOOTSTRAP}
    return estimate((x, y), probability_of_improvement)


def bands(scores: np.ndarray) -> dict[str, list[float] | None]:
    """IQM over runs (and tasks) at each of K moments, with its interval. scores: (n, tasks, K)."""
    value, interval = bootstrap(scores, iqm)
    low, high = (None, None) if interval is None else interval.tolist()
    return {"value": value.tolist(), "low": low, "high": high}


def profile(scores: np.ndarray, taus: np.ndarray) -> dict[str, list[float] | None]:
    """Share of runs (n, tasks) that score more than each tau, with its interval."""
    value, interval = bootstrap(scores, lambda x: library.score_distributions(x, taus))
    low, high = (None, None) if interval is None else interval.tolist()
    return {"value": value.tolist(), "low": low, "high": high}


def median_steps(times: np.ndarray, steps: int) -> Estimate:
    """Median frames to the threshold over runs (n,); anything beyond ``steps`` stands for "not
    within the run".

    Of an even number of runs the later middle one: half way to a run that never got there is no
    time at all.
    """
    censored = np.minimum(times, steps * (1.0 + 1.0 / BINS))
    return estimate(censored[:, None], lambda x: np.quantile(x, 0.5, method="higher"))


# ---------------------------------------------------------------- differences


class Difference(NamedTuple):
    """A model's mean score minus the baseline's, mean over tasks."""

    value: float
    low: float | None  # the interval at LEVEL, jointly for all comparisons; None for single runs
    high: float | None
    p: float  # of the permutation test, two-sided
    least_p: float  # the smallest p that so many runs can give
    alpha: float  # what p and the interval must meet
    detectable: float | None  # true difference that would be seen with a probability of POWER
    freedom: float | None  # degrees of freedom of the interval
    runs: int  # the fewest of a model on a task

    @property
    def claimed(self) -> bool:
        """The interval excludes 0, and so does a test that assumes nothing about how scores are
        distributed, but that both models' are alike; two runs of a model show nothing of that.
        """
        excludes = self.low is not None and (self.low > 0.0 or self.high < 0.0)
        return excludes and self.p <= self.alpha and self.runs >= LEAST


def compare(x: Scores, y: Scores, comparisons: int) -> Difference:
    """Model x against baseline y; ``comparisons`` is how many models are compared with it
    (Bonferroni).

    The interval is Welch's with Satterthwaite's degrees of freedom, the tasks being strata. A t
    interval alone can err: where runs either take off or do not, 3 against 3 separate completely
    by chance. The test that has to agree shuffles the runs of each task between the two models;
    where runs of both have one distribution it is right, whichever that is. Equal means alone are
    not enough for it (docs/statistics.md).
    """
    alpha = (1.0 - LEVEL) / comparisons
    value = float(np.mean([a.mean() - b.mean() for a, b in zip(x, y, strict=True)]))
    p, least_p, runs = permutation(x, y), least(x, y), min(map(len, (*x, *y)))
    if runs < 2:
        return Difference(value, None, None, p, least_p, alpha, None, None, runs)
    # variance, freedom
    parts = np.array([(a.var(ddof=1) / len(a) / len(x) ** 2, len(a) - 1) for a in (*x, *y)])
    variance = parts[:, 0].sum()
    error = math.sqrt(variance)
    freedom = variance**2 / (parts[:, 0] ** 2 / parts[:, 1]).sum() if variance else math.inf
    quantile = scipy.stats.t.ppf(1.0 - alpha / 2.0, freedom)
    detectable = standard_errors(freedom, alpha) * error
    return Difference(
        value,
        value - quantile * error,
        value + quantile * error,
        p,
        least_p,
        alpha,
        float(detectable),
        float(freedom),
        runs,
    )


def permutation(x: Scores, y: Scores) -> float:
    """Two-sided p of the difference of means under shuffling the runs of each task between the
    models.
    """
    rng = np.random.default_rng(0)
    seen, drawn = 0.0, np.zeros(SHUFFLES)
    for a, b in zip(x, y, strict=True):
        pool = rng.permuted(np.tile(np.concatenate([a, b]), (SHUFFLES, 1)), axis=1)
        drawn += pool[:, : len(a)].mean(1) - pool[:, len(a) :].mean(1)
        seen += a.mean() - b.mean()
    extreme = np.abs(drawn) >= abs(seen) * (1.0 - 1e-9)  # ties are ties despite rounding
    return float((1 + extreme.sum()) / (1 + SHUFFLES))


def least(x: Scores, y: Scores) -> float:
    """The smallest two-sided p that so many runs can give: two of all the ways to split them
    between the models, the one that was seen and its mirror image.

    Where a model has fewer runs there is no mirror image, and one way alone can be the furthest.
    """
    pairs = list(zip(x, y, strict=True))
    extreme = 2.0 if all(len(a) == len(b) for a, b in pairs) else 1.0
    return min(1.0, extreme / math.prod(math.comb(len(a) + len(b), len(a)) for a, b in pairs))


def standard_errors(freedom: float, alpha: float) -> float:
    """How many standard errors a true difference must be to be seen with a probability of POWER."""
    return scipy.stats.t.ppf(1.0 - alpha / 2.0, freedom) + scipy.stats.t.ppf(POWER, freedom)


def seeds_for(found: Mapping[str, Any], target: float, seeds: int) -> int:
    """About how many seeds show a difference of ``target``, if ``seeds``, at least 2, gave the
    Difference ``found``. With more of them the standard error falls, and so do t quantiles.
    """
    freedom, alpha = found["freedom"], found["alpha"]
    error = found["detectable"] / standard_errors(freedom, alpha) * math.sqrt(seeds)
    shown = lambda n: standard_errors(freedom * (n - 1) / (seeds - 1), alpha) * error / math.sqrt(n)
    low, more = 1, 2
    while shown(more) > target:  # the answer is above low and at most more
        low, more = more, 2 * more
    while more - low > 1:
        middle = (low + more) // 2
        low, more = (middle, more) if shown(middle) > target else (low, middle)
    return more


def two_way(differences: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of paired differences (seeds, episodes) and its interval; both are samples of what
    could have been.

    Half-widths of the two sources add as squares, each with its own t quantile (Howe 1974). Of
    4,000 simulations without a difference at most 5.8% excluded 0, for 2 to 5 seeds, 10 or 40
    episodes, and seeds from negligible to dominant.
    """
    seeds, episodes = differences.shape
    mean = differences.mean()
    if seeds < 2 or episodes < 2:
        return float(mean), None, None
    by_seed, by_episode = differences.mean(1) - mean, differences.mean(0) - mean
    rest = differences - mean - by_seed[:, None] - by_episode
    noise = (rest**2).sum() / ((seeds - 1) * (episodes - 1))
    seed = episodes * (by_seed**2).sum() / (seeds - 1)
    episode = max(seeds * (by_episode**2).sum() / (episodes - 1) - noise, 0.0)
    t = lambda n: scipy.stats.t.ppf(0.5 + LEVEL / 2.0, n - 1)
    half = math.sqrt((t(seeds) ** 2 * seed + t(episodes) ** 2 * episode) / (seeds * episodes))
    return float(mean), float(mean - half), float(mean + half)


def paired(
    columns: Mapping[str, np.ndarray], base: str
) -> dict[str, tuple[float, float | None, float | None]]:
    """{model: difference from ``base``} of {model: (seeds, episodes)}, over the episodes that all
    of them have.
    """
    known = np.isfinite(np.stack(list(columns.values()))).all((0, 1))
    return {
        name: two_way((x - columns[base])[:, known]) for name, x in columns.items() if name != base
    }
