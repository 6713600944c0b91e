"""Do dreams promise more than the task gives? Imagined rewards and values beside real ones.

    python -m analysis.overestimation LOGDIR [--episodes N] [--seed S] [--recorded] [--out FILE]

The agent plays N new episodes, sampling its actions as in training. From steps of them it dreams
three times as far as in training, once by its own policy, once with the actions that were then
taken, and what it is promised stands beside what came. The two differ where an actor found what
its world model is wrong about (model exploitation: Kurutach et al. 2018, Janner et al. 2019). The
critic's value stands beside the discounted return that followed (Fujimoto et al. 2018, figure 1).

--recorded: of episodes that the run trained on instead, evenly spaced from its first to its last.
They are of earlier policies, so there the actions taken alone are imagined. A world model that is
right on them and wrong on new ones has learned them by heart, or not yet what its policy does now.

Rewards are as the agent is trained on them, a step, as their sum and apart those above and below 0:
a dream that knows all points won and half of those lost is wrong in the sum alone. An imagined
reward counts as much as the dream is likely to have lasted until then. "Step 0" imagines nothing:
it is what the model says of a reward when it has seen the observation that came with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analysis import evaluate
from hidreamer import app

EPISODES = 10
STARTS = 128  # dreams from each episode, at most, from evenly spaced steps
WINDOWS = 3  # of ``imag.horizon`` steps each; agents are trained on the first
REST = 0.05  # share of a return that may lie behind the step at which an episode was cut
KINDS = ("reward", "gains", "losses")
DREAMS = ("policy", "recorded")  # whose actions are imagined
VALUES = ("value", "discounted_return")
Found = dict[str, Any]


def kinds(reward: np.ndarray) -> dict[str, float]:
    """Mean reward, and of it what is above and below 0."""
    parts = reward, reward.clip(min=0), reward.clip(max=0)
    return {kind: float(x.mean()) for kind, x in zip(KINDS, parts, strict=True)}


def followed(x: np.ndarray, starts: np.ndarray, horizon: int, last: Any) -> np.ndarray:
    """The ``horizon`` entries of x (T,...) after each start (N,), (N,H,...); ``last`` behind it."""
    x = np.concatenate([x, np.broadcast_to(last, (horizon, *x.shape[1:]))])
    return x[starts[:, None] + 1 + np.arange(horizon)]


def discounted(reward: np.ndarray, discount: float) -> np.ndarray:
    """(T,) -> (T,): the discounted sum of the rewards after each step."""
    out = np.zeros(len(reward))
    for t in reversed(range(len(reward) - 1)):
        out[t] = reward[t + 1] + discount * out[t + 1]
    return out


def reach(discount: float) -> float:
    """Steps after which a share of ``REST`` of a return is left."""
    return math.ceil(math.log(REST) / math.log(discount)) if discount < 1.0 else math.inf


def of_episode(
    agent: Any, rows: Mapping[str, np.ndarray], own: bool = True, generator: Any = None
) -> Found:
    """One episode's rewards in each window, real and imagined, its values and returns. The first
    window is step 0.

    agent: a ``LoadedAgent``. rows: as of its ``collect``. own: its policy as it is played them;
    otherwise what that imagines and values is left out. Where an episode ended, nothing comes
    behind; where it was cut, steps without a whole horizon behind them are left out, and in values
    those behind which more than ``REST`` of a return may lie.
    """
    imag, reward = agent.config.imag, np.asarray(rows["reward"], np.float64)  # (T,)
    horizon, total, ended = WINDOWS * imag.horizon, len(reward), bool(rows["is_terminal"][-1])
    out: Found = {"return": float(reward.sum()), "length": total - 1, "ended": ended}
    out |= {"value": None, "discounted_return": None}
    count = total - 1 if ended else total - horizon
    latents = agent.encode(rows, sample=True, generator=generator)
    told = latents.reward.double().cpu().numpy()  # (T,)
    out["windows"] = [{"real": kinds(reward[1:]), "recorded": kinds(told[1:])}]
    if count > 0:
        starts = np.linspace(0, count - 1, min(STARTS, count)).round().astype(int)  # (N,)
        taken = followed(rows["prev_action"], starts, horizon, rows["prev_action"][-1])  # (N,H,A)
        found = {"real": followed(reward, starts, horizon, 0.0)}  # (N,H)
        for name in DREAMS if own else DREAMS[1:]:
            actor = taken if name == "recorded" else None
            dream = agent.dream(latents, actor, horizon, start=starts, generator=generator)
            lasts = dream.cont[:, :-1].cumprod(1)  # (N,H)
            found[name] = (dream.reward[:, 1:] * lasts).double().cpu().numpy()
        for i in range(WINDOWS):
            part = slice(i * imag.horizon, (i + 1) * imag.horizon)
            out["windows"].append({name: kinds(x[:, part]) for name, x in found.items()})
    count = total - 1 if ended else max(0, total - reach(imag.discount))
    if own and count:
        out["value"] = float(latents.value[:count].double().mean())
        out["discounted_return"] = float(discounted(reward, imag.discount)[:count].mean())
    return out


def summarise(episodes: Sequence[Found], horizon: int) -> Found:
    """Means over episodes with 95% t intervals, of differences too: {"windows": [{"steps": [first,
    last], kind: {"real", "policy", "recorded", "policy - real", "recorded - real"}}], "value",
    "discounted_return", "value - return"}. Of step 0 and of another policy's episodes there is no
    "policy".
    """
    from analysis.summary import over_seeds

    windows = []
    for i in range(WINDOWS + 1):
        there = [x["windows"][i] for x in episodes if len(x["windows"]) > i]
        window: Found = {"steps": [(i - 1) * horizon + 1, i * horizon] if i else [0, 0]}
        for kind in KINDS:
            dreams = [who for who in DREAMS if all(who in x for x in there)]
            of = {who: [x[who][kind] for x in there] for who in ("real", *dreams)}
            cells = {who: over_seeds(values) for who, values in of.items()}
            for who in dreams:
                gaps = [a - b for a, b in zip(of[who], of["real"], strict=True)]
                cells[f"{who} - real"] = over_seeds(gaps)
            window[kind] = cells
        windows.append(window)
    valued = [x for x in episodes if x["value"] is not None]
    out: Found = {key: over_seeds([x[key] for x in valued]) for key in VALUES}
    out["value - return"] = over_seeds([x[VALUES[0]] - x[VALUES[1]] for x in valued])
    return {"windows": windows} | out


def played(agent: Any, count: int, seed: int) -> Iterator[Mapping[str, np.ndarray]]:
    """New episodes. seed: the first one's. Raises EnvError."""
    for i in range(count):
        yield agent.collect(seed=seed + i, greedy=False)


def recorded(agent: Any, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    """Episodes of the run. Raises UsageError."""
    from hidreamer.episodes import EpisodeError, load_episode

    files = agent.recorded()
    if not files:
        raise app.UsageError("--recorded: there are no train_eps here; new episodes need none")
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
        try:
            yield load_episode(files[i])
        except EpisodeError as error:
            raise app.UsageError(f"--recorded: {files[i].name} cannot be read: {error}") from None


def measure(
    agent: Any, *, episodes: int = EPISODES, seed: int | None = None, replayed: bool = False
) -> Found:
    """Episodes of ``agent``, a ``LoadedAgent``, and ``summarise`` of them. seed: of all random
    numbers, and of the first episode's environment; None is the run's. replayed: episodes that the
    run recorded. Raises EnvError, UsageError.
    """
    import torch

    from hidreamer.provenance import provenance

    seed = agent.config.seed if seed is None else seed
    generator = torch.Generator(agent.device).manual_seed(seed)
    source = recorded(agent, episodes) if replayed else played(agent, episodes, seed)
    found = [of_episode(agent, rows, not replayed, generator) for rows in source]
    facts = {key: agent.facts[key] for key in ("task", "step", "commit")}
    facts |= {"dynamics": agent.config.dynamics.type, "trained_with_seed": agent.facts["seed"]}
    facts |= {"seed": seed, "source": "recorded" if replayed else "new"}
    facts |= {"horizon": agent.config.imag.horizon, "discount": agent.config.imag.discount}
    facts |= summarise(found, agent.config.imag.horizon)
    return facts | {"episodes": found, "made_by": provenance()}


def number(cell: Mapping[str, float | None], sign: str = "") -> str:
    """ "mean [low, high]", the interval where there is one."""
    if cell["value"] is None:
        return "-"
    text = f"{cell['value']:{sign}.4f}"
    if cell["low"] is None:
        return text
    return f"{text} [{cell['low']:{sign}.4f}, {cell['high']:{sign}.4f}]"


def verdict(gap: Mapping[str, float | None]) -> str:
    """What a difference, imagined minus real, supports."""
    if gap["value"] is None or gap["low"] is None:
        return "unknown: it takes an interval, and so at least two episodes that are long enough"
    if gap["low"] > 0:
        return f"too high, by {number(gap)}"
    return f"too low, by {number(gap)}" if gap["high"] < 0 else "no difference shown"


def table(found: Found) -> str:
    """In Markdown."""
    dreams = [who for who in DREAMS if who in found["windows"][1][KINDS[0]]]
    names = {"policy": "dreamt, own policy", "recorded": "dreamt, actions taken"}
    head = ["", "real", *(x for who in dreams for x in (names[who], "minus real"))]
    lines = [row(head), "|---" * len(head) + "|"]
    for window in found["windows"]:
        for kind in KINDS:
            of = window[kind]
            cells = [f"{steps(window)}: {kind} a step", number(of["real"])]
            for who in dreams:
                there = who in of
                cells += [number(of[who]), number(of[f"{who} - real"], "+")] if there else ["", ""]
            lines.append(row(cells))
    if found["value"]["value"] is not None:
        value, real, gap = (found[key] for key in (*VALUES, "value - return"))
        cells = ["discounted return; dreamt: the critic's value", number(real), number(value)]
        lines.append(row([*cells, number(gap, "+"), "", ""]))
    return "\n".join(lines)


def steps(window: Found) -> str:
    first, last = window["steps"]
    return f"steps {first} to {last}" if last else "step 0"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text(found: Found) -> str:
    """For a screen: the table and what it supports."""
    window, lines = found["windows"][1], [table(found), ""]
    who = "policy" if "policy" in window[KINDS[0]] else "recorded"
    gap = window[KINDS[0]][f"{who} - real"]
    lines.append(f"imagined reward, {steps(window)}: {verdict(gap)}")
    if who == "policy":
        lines.append(f"value: {verdict(found['value - return'])}")
    return "\n".join(lines)


def parser() -> app.Parser:
    name = " ".join(app.command("analysis.overestimation"))
    found = app.Parser(name, description=__doc__.splitlines()[0])
    evaluate.add_options(found, "the first episode's, the others count on [the run's]")
    found.add_argument("--episodes", type=evaluate.at_least(1), default=EPISODES, help="[10]")
    found.add_argument("--recorded", action="store_true", help="those that the run trained on")
    return found


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 done, 1 an environment failed or the disk did, 2 bad arguments."""

    def measured(agent: Any, args: argparse.Namespace) -> tuple[Found, str]:
        found = measure(agent, episodes=args.episodes, seed=args.seed, replayed=args.recorded)
        return found, text(found)

    if importlib.util.find_spec("scipy") is None and not {"-h", "--help"} & set(argv):
        print(f"error: intervals need an extra: {app.install_line('compare')}", file=sys.stderr)
        return 2
    return evaluate.command(parser(), argv, measured)


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
