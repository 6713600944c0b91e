"""Do dreams promise more than the task gives? Imagined rewards and values beside real ones.

    python -m analysis.overestimation LOGDIR [--episodes N] [--seed S] [--recorded] [--out FILE]

The agent plays N new episodes, sampling its actions as in training. From steps of them it dreams
three times as far as in training by its own policy, and what it is promised stands beside what
came; a policy that has found what its world model is wrong about is promised too much (Kurutach et
al. 2018). The critic's value stands beside the discounted return that followed (after Fujimoto et
al. 2018, figure 1); behind the cut of an episode that did not end that is the critic's value again.

Beside these the dreams with the actions that were taken. They say something of the model where the
task is deterministic: actions that answered chance fail in another draw of it, in a perfect model
too. "Seen" imagines nothing: it is what the reward head says when the observation that came with a
reward is there.

--recorded: of episodes that the run recorded, evenly spaced from its first to its last. They are of
earlier policies, so the own policy and the critic are left out. What is right on them and wrong on
new ones was learned by heart, or what the policy does now was not learned yet.

Rewards are those that the agent learns from, a step; steps behind an end count as 0, and an
imagined reward counts as much as the dream is likely to have lasted until then. Gains are those
above 0, losses those below: two faults may cancel in their sum. A head that does not know whether
+1 or -1 comes says 0, and tells of neither. Every episode counts as much as any other.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analysis import evaluate
from hidreamer import app

EPISODES = 10
LEAST = 5  # episodes that a sentence needs
STARTS = 128  # dreams from each episode, at most, from evenly spaced steps
WINDOWS = 3  # of ``imag.horizon`` steps each; agents are trained on the first
KINDS = ("reward", "gains", "losses")
DREAMS = ("policy", "recorded")  # whose actions are imagined
VALUES = ("value", "discounted_return")
Rows = Mapping[str, np.ndarray]
Found = dict[str, Any]


def kinds(reward: np.ndarray) -> dict[str, float]:
    """Mean reward, and of it what is above and below 0."""
    parts = reward, reward.clip(min=0), reward.clip(max=0)
    return {kind: float(x.mean()) for kind, x in zip(KINDS, parts, strict=True)}


def following(x: np.ndarray, steps: np.ndarray, count: int, last: Any) -> np.ndarray:
    """The entries of x (T,...) at steps (N,) and after them, (N,count,...); ``last`` behind x."""
    x = np.concatenate([x, np.broadcast_to(last, (count, *x.shape[1:]))])
    return x[steps[:, None] + np.arange(count)]


def of_episode(agent: Any, rows: Rows, own: bool = True, generator: Any = None) -> Found:
    """One episode's rewards as they were seen and in each window, real and imagined, its value and
    its discounted return, both means over steps.

    agent: a ``LoadedAgent``. rows: as of its ``collect``, two or more. own: its policy as it is
    played them; otherwise what that imagines and values is left out. An episode that was cut has
    no windows at steps without a whole horizon behind them.
    """
    import torch

    from hidreamer.returns import lambda_return

    imag, reward = agent.config.imag, np.asarray(rows["reward"], np.float64)  # (T,)
    goes_on, total = 1.0 - np.asarray(rows["is_terminal"], np.float64), len(reward)
    horizon, ended = WINDOWS * imag.horizon, not goes_on[-1]
    latents = agent.encode(rows, sample=True, generator=generator)
    value, told = (x.double().cpu().numpy() for x in (latents.value, latents.reward))  # (T,) each
    out: Found = {"return": float(reward.sum()), "length": total - 1, "ended": bool(ended)}
    out["seen"] = {"real": kinds(reward[1:]), "recorded": kinds(told[1:])}
    steps = np.flatnonzero(goes_on[: total - 1])
    if own and len(steps):
        x = (torch.from_numpy(y)[None] for y in (reward, value, imag.discount * goes_on))
        returns = lambda_return(*x, 1.0)[0].numpy()  # (T-1,)
        out |= {"value": float(value[steps].mean())}
        out |= {"discounted_return": float(returns[steps].mean())}
    starts = steps if ended else steps[steps < total - horizon]
    out["windows"] = []
    if not len(starts):
        return out
    starts = starts[np.linspace(0, len(starts) - 1, min(STARTS, len(starts))).round().astype(int)]
    lasts = following(goes_on, starts, horizon, 0.0).cumprod(1)  # (N,H)
    found = {"real": following(reward, starts + 1, horizon, 0.0) * lasts}  # (N,H)
    action = np.asarray(rows["prev_action"])
    taken = following(action, starts + 1, horizon, action[-1])  # (N,H,A)
    for name in DREAMS if own else DREAMS[1:]:
        actor = taken if name == "recorded" else None
        dream = agent.dream(latents, actor, horizon, start=starts, generator=generator)
        cont = dream.cont[:, :-1].clone()  # (N,H)
        cont[:, 0] = 1.0  # no start is terminal
        found[name] = (dream.reward[:, 1:] * cont.cumprod(1)).double().cpu().numpy()
    for i in range(WINDOWS):
        part = slice(i * imag.horizon, (i + 1) * imag.horizon)
        out["windows"].append({name: kinds(x[:, part]) for name, x in found.items()})
    return out


def summarise(episodes: Sequence[Found], horizon: int, own: bool = True) -> Found:
    """Means over episodes with 95% t intervals, of differences too: {"windows": [{"steps": [first,
    last], "episodes", kind: {"real", "policy", "recorded", "policy - real", "recorded - real"}}],
    "value", "discounted_return", "value - return"}. The first window is what was seen, "steps" [0,
    0], and has no "policy".
    """
    from analysis.summary import over_seeds

    windows = []
    for i in range(WINDOWS + 1):
        there = [[x["seen"], *x["windows"]][i] for x in episodes if len(x["windows"]) >= i]
        window: Found = {"steps": [(i - 1) * horizon + 1, i * horizon] if i else [0, 0]}
        window["episodes"] = len(there)
        for kind in KINDS:
            dreams = DREAMS if own and i else DREAMS[1:]
            of = {who: [x[who][kind] for x in there] for who in ("real", *dreams)}
            cells = {who: over_seeds(values) for who, values in of.items()}
            for who in dreams:
                gaps = [a - b for a, b in zip(of[who], of["real"], strict=True)]
                cells[f"{who} - real"] = over_seeds(gaps)
            window[kind] = cells
        windows.append(window)
    out: Found = {"windows": windows}
    if own:
        valued = [x for x in episodes if "value" in x]
        out |= {key: over_seeds([x[key] for x in valued]) for key in VALUES}
        out["value - return"] = over_seeds([x[VALUES[0]] - x[VALUES[1]] for x in valued])
        out["valued"] = len(valued)  # episodes
    return out


def played(agent: Any, count: int, seed: int) -> Iterator[Rows]:
    """New episodes. Raises EnvError."""
    from envs import EnvError
    from envs.errors import one_line

    for i in range(count):
        number = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        try:
            rows = agent.collect(seed=number, greedy=False)
        except EnvError:
            raise
        except Exception as error:  # of an environment, which may raise anything
            cause = one_line(f"{type(error).__name__} {error}")
            raise EnvError(f"an environment failed in episode {i + 1}: {cause}") from error
        yield rows


def recorded(agent: Any, count: int) -> Iterator[Rows]:
    """Episodes of the run with more than one row. Raises UsageError."""
    from hidreamer.episodes import EpisodeError, load_episode
    from hidreamer.replay import row_spec

    files, spec = agent.recorded(), row_spec(agent.obs_space, agent.act_dim)
    if not files:
        raise app.UsageError("--recorded: there are no train_eps here; new episodes need none")
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
        try:
            rows = load_episode(files[i], spec)
        except EpisodeError as error:
            raise app.UsageError(f"--recorded: {files[i].name}: {error}") from None
        if len(rows["reward"]) > 1:
            yield rows


def measure(
    agent: Any, *, episodes: int = EPISODES, seed: int | None = None, replayed: bool = False
) -> Found:
    """Episodes of ``agent``, a ``LoadedAgent``, and ``summarise`` of them. seed: of all random
    numbers; None is the run's. replayed: episodes that the run recorded.
    Raises EnvError, UsageError.
    """
    import torch

    from hidreamer.provenance import provenance

    seed = agent.config.seed if seed is None else seed
    apart = np.random.SeedSequence([seed, episodes, 1])  # from those of ``played``
    generator = torch.Generator(agent.device).manual_seed(int(apart.generate_state(1)[0]))
    source = recorded(agent, episodes) if replayed else played(agent, episodes, seed)
    found = [of_episode(agent, rows, not replayed, generator) for rows in source]
    facts = {key: agent.facts[key] for key in ("task", "step", "commit")}
    facts |= {"dynamics": agent.config.dynamics.type, "trained_with_seed": agent.facts["seed"]}
    facts |= {"seed": seed, "source": "recorded" if replayed else "new"}
    facts |= {"horizon": agent.config.imag.horizon, "discount": agent.config.imag.discount}
    facts |= summarise(found, agent.config.imag.horizon, not replayed)
    return facts | {"episodes": found, "made_by": provenance()}


def verdict(gap: Mapping[str, float | None], episodes: int) -> str:
    """What a difference, imagined minus real, supports."""
    from comparison.words import estimate

    if episodes < LEAST:
        return f"unknown, of {episodes} episodes that are long enough; it takes {LEAST}"
    if gap["low"] > 0:
        return f"too high, by {estimate(gap)}"
    return f"too low, by {estimate(gap)}" if gap["high"] < 0 else "no difference shown"


def table(found: Found) -> str:
    """In Markdown."""
    from comparison.words import estimate

    own, blank = "value" in found, ["", ""]
    names = {"policy": "dreamt, own policy", "recorded": "dreamt, actions taken"}
    dreams = DREAMS if own else DREAMS[1:]
    head = ["", "real", *(x for who in dreams for x in (names[who], "minus real"))]
    lines = [row(head), "|---" * len(head) + "|"]
    for window in found["windows"]:
        for kind in KINDS:
            of = window[kind]
            cells = [f"{steps(window)}: {kind} a step", estimate(of["real"])]
            for who in dreams:
                gap = f"{who} - real"
                cells += [estimate(of[who]), estimate(of[gap], True)] if who in of else blank
            lines.append(row(cells))
    if own:
        value, real, gap = (found[key] for key in (*VALUES, "value - return"))
        cells = ["discounted return; dreamt: the critic's value", estimate(real), estimate(value)]
        lines.append(row([*cells, estimate(gap, True), *blank]))
    return "\n".join(lines)


def steps(window: Found) -> str:
    first, last = window["steps"]
    return f"steps {first} to {last}" if last else "seen"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text(found: Found) -> str:
    """For a screen: the table and what it supports."""
    lines, window = [table(found), ""], found["windows"][1]
    if "value" not in found:
        window = found["windows"][0]
        gap = verdict(window["reward"]["recorded - real"], window["episodes"])
        return "\n".join([*lines, f"reward that is seen: {gap}"])
    gap = verdict(window["reward"]["policy - real"], window["episodes"])
    lines.append(f"imagined reward, {steps(window)}: {gap}")
    gap = verdict(found["value - return"], found["valued"])
    return "\n".join([*lines, f"value: {gap}"])


def parser() -> app.Parser:
    name = " ".join(app.command("analysis.overestimation"))
    found = app.Parser(name, description=__doc__.splitlines()[0])
    evaluate.add_options(found, "of environments, actions and dreams [the run's]")
    found.add_argument("--episodes", type=evaluate.at_least(1), default=EPISODES, help="[10]")
    found.add_argument("--recorded", action="store_true", help="those that the run recorded")
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
