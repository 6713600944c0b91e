"""The world model's gate: teacher-forced and free-running predictions of held-out episodes.

Shapes: B windows, T steps, N rows, L levels, H steps of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import probes
from hidreamer.dynamics.base import Post
from hidreamer.quantizer import code_accuracy
from hidreamer.replay import Addresses
from pipeline import probing
from pipeline.gate import HIGHER, LOWER, Gate, Row, Table
from pipeline.token_model import TokenWorldModel, Windows, tensors

HORIZONS = (1, 5, 15, 30)
FEW = 10.0  # pairs that count as much as what is known without them
BATCH = 16  # windows that are judged at a time
ROLLOUTS = 64  # of a game at most
PAIRS = "counted pairs"
TEACHER_NOTE = (
    "Held-out episodes, teacher-forced. Nats: of a step's code given the past and the coarser codes"
    " of its step, beside a mixture of copying the last code and the code's frequency, fitted on"
    " training episodes. Accuracy: beside copying the last code. Changed: steps where copying is"
    " wrong. Counted pairs: which code of a level follows which, counted on training episodes: what"
    " is known without memory, actions and other levels. Reward: how well predicted rewards tell"
    " steps with a reward from others (area under the curve; 0.5 is chance). Ends: the same of the"
    " continue head, on the last window of each episode; and how probable it takes an end that"
    " comes, beside how often steps of training episodes are ends."
)
ROLLOUT_NOTE = (
    "Held-out episodes: dreamt from a few observed steps with the actions that were taken, codes"
    " drawn, not the likeliest ones. Tokens: share that is right so many steps on, beside keeping"
    " the last ones observed, and beside codes drawn from counted pairs step by step. R²: linear"
    " probes, fitted on the true codes of training episodes, read the dreamt ones; true codes: what"
    " they find in the real ones."
)


# ---------------------------------------------------------------- teacher forcing


def observed(
    stage: Any, model: TokenWorldModel, windows: Windows, where: Addresses
) -> Iterator[tuple[dict[str, Tensor], Post]]:
    """Windows and what the model makes of them, BATCH at a time."""
    for first in range(0, len(where.row), BATCH):
        stage.poll()
        part = where._make(x[first : first + BATCH] for x in where)
        batch = tensors(windows.read(part), stage.device)
        _, post, _ = model.observe(batch)
        yield batch, post


@torch.no_grad()
def predictions(
    stage: Any, model: TokenWorldModel, windows: Windows, game: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """All windows of a game that share no row.

    -> prior logits (B,T,1,K) by level, tokens (B,T,L), is_first, predicted and real rewards (B,T).
    """
    found = []
    for batch, post in observed(stage, model, windows, windows.apart(game)):
        reward = model.reward(post.feat.cat()).mode()
        levels = [level.prior.float() for level in post.levels]
        found.append(
            [*levels, batch["index"].long(), batch["is_first"].bool(), reward, batch["reward"]]
        )
    *logits, index, is_first, reward, real = (torch.cat(x) for x in zip(*found, strict=True))
    return logits, index, is_first, reward, real


class CopyModel:
    """Predicts the last code with the share that it was right in training, else by frequency."""

    def __init__(self, tokens: np.ndarray, successors: np.ndarray, codes: int):
        """tokens (N, L) and which of their rows go on, (M,), in training episodes."""
        self.kept = (tokens[successors + 1] == tokens[successors]).mean(0)  # (L,)
        self.frequency = []
        for level in range(tokens.shape[1]):
            counts = np.bincount(tokens[successors, level], minlength=codes) + 1.0
            self.frequency.append(counts / counts.sum())

    def nats(self, now: np.ndarray, before: np.ndarray, level: int) -> float:
        """Mean cross-entropy of codes now (N,), given those before (N,)."""
        kept = np.clip(self.kept[level], 0.01, 0.99)
        return float(
            -np.log(kept * (now == before) + (1 - kept) * self.frequency[level][now]).mean()
        )


class PairModel:
    """Which code of a level follows which, counted on training episodes.

    A code that was hardly seen is followed as ``CopyModel`` has it, which counts for FEW pairs.
    """

    def __init__(self, tokens: np.ndarray, successors: np.ndarray, codes: int):
        """As of ``CopyModel``."""
        copy = CopyModel(tokens, successors, codes)
        self.next = []  # (K, K) by level: probabilities of the next code, a row for each last one
        for level, (kept, frequency) in enumerate(zip(copy.kept, copy.frequency, strict=True)):
            kept = np.clip(kept, 0.01, 0.99)
            counts = FEW * (kept * np.eye(codes) + (1 - kept) * frequency)
            np.add.at(counts, (tokens[successors, level], tokens[successors + 1, level]), 1.0)
            self.next.append(counts / counts.sum(1, keepdims=True))

    def nats(self, now: np.ndarray, before: np.ndarray, level: int) -> float:
        """As of ``CopyModel``."""
        return float(-np.log(self.next[level][before, now]).mean())

    def right(self, now: np.ndarray, before: np.ndarray, level: int) -> np.ndarray:
        """Whether the likeliest code is that, (N,)."""
        return self.next[level].argmax(1)[before] == now

    def drawn(self, now: np.ndarray, before: np.ndarray, level: int, steps: int) -> float:
        """How often codes that are drawn step by step are right, ``steps`` after those before."""
        return float(np.linalg.matrix_power(self.next[level], steps)[before, now].mean())


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive has the higher score, ties counting half; NaN without both."""
    order = np.concatenate([score[positive], score[~positive]])
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    _, inverse, counts = np.unique(order, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2.0)[inverse]
    return float((ranks[:n].sum() - n * (n + 1) / 2.0) / (n * m))


def teacher_rows(stage: Any, model: TokenWorldModel, windows: Windows, game: int) -> list[Row]:
    """Of one game, beside copying."""
    recording, tokens = stage.recordings[game], stage.tokens[game]
    logits, index, is_first, reward, real = predictions(stage, model, windows, game)
    accuracy = code_accuracy(logits, index.unsqueeze(-1), is_first)
    counted = tokens, recording.pairs(1, held=False), stage.quantizer.codes
    copy, pairs = CopyModel(*counted), PairModel(*counted)
    inside = (~is_first[:, 1:]).cpu().numpy()
    rows = []
    for level, logit in enumerate(logits):
        logp = torch.log_softmax(logit[:, 1:, 0], -1).gather(-1, index[:, 1:, level, None])
        nats = float(-logp[..., 0].cpu().numpy()[inside].mean())
        now = index[:, 1:, level].cpu().numpy()[inside]
        before = index[:, :-1, level].cpu().numpy()[inside]
        by = {"copy or frequency": copy.nats(now, before, level)}
        by[PAIRS] = pairs.nats(now, before, level)
        rows.append(Row(f"{recording.game}: L{level} nats", nats, by, LOWER))
        value = lambda name, level=level: float(accuracy[f"accuracy{name}_{level}"])
        right = pairs.right(now, before, level)
        by = {"copy-last": value("_copy"), PAIRS: float(right.mean())}
        rows.append(Row(f"{recording.game}: L{level} accuracy", value(""), by, HIGHER))
        changed = now != before
        by = {"copy-last": 0.0, PAIRS: float(right[changed].mean()) if changed.any() else math.nan}
        rows.append(
            Row(f"{recording.game}: L{level} accuracy, changed", value("_changed"), by, HIGHER)
        )
    score, paid = np.abs(reward.cpu().numpy()).ravel(), (real != 0).cpu().numpy().ravel()
    area = area_under_curve(score, paid)
    better = HIGHER if np.isfinite(area) else ""
    rows.append(Row(f"{recording.game}: reward found (area)", area, {"chance": 0.5}, better))
    return rows + end_rows(stage, model, windows, game)


@torch.no_grad()
def end_rows(stage: Any, model: TokenWorldModel, windows: Windows, game: int) -> list[Row]:
    """Whether the continue head tells the ends of held-out episodes, in the last window of each."""
    recording, found = stage.recordings[game], []
    for batch, post in observed(stage, model, windows, windows.tails(game)):
        ends = 1.0 - model.cont(post.feat.cat()).undiscounted().mean()  # (B, T)
        found.append((ends.cpu(), batch["is_terminal"].cpu()))
    ends, real = (torch.cat(x).numpy().ravel() for x in zip(*found, strict=True))
    real = real != 0
    area = area_under_curve(ends, real)
    expected = float(ends[real].mean()) if real.any() else math.nan
    often = float(recording.is_terminal[recording.rows(held=False)].mean())
    name, better = recording.game, HIGHER if np.isfinite(area) else ""
    return [
        Row(f"{name}: ends found (area)", area, {"chance": 0.5}, better),
        Row(f"{name}: probability of ends that come", expected, {"frequency": often}, better),
    ]


# ---------------------------------------------------------------- free-running


@torch.no_grad()
def rollouts(
    stage: Any, model: TokenWorldModel, windows: Windows, game: int, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> first rows (B,) of windows, dreamt tokens (B, H, L) and embeddings (B, H, E) of the steps
    after ``context`` observed ones.
    """
    stage.poll()
    starts = windows.starts[game]
    picks = np.linspace(0, len(starts) - 1, min(ROLLOUTS, len(starts))).round().astype(int)
    where = Addresses(np.full(len(picks), game), starts[picks])
    batch = tensors(windows.read(where), stage.device)
    observed = {key: x[:, :context] for key, x in batch.items()}
    carry, post, _ = model.observe(observed)
    dynamics = model.dynamics
    start = dynamics.starts(carry, post, 1)
    action = batch["prev_action"][:, context:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, feat, _ = dynamics.imagine(start, action, action.shape[1])
    stoch = feat.stoch[:, 1:].float()
    tokens, embed = dynamics.tokens(stoch), dynamics.embedding(stoch)
    return where.row, tokens.cpu().numpy(), embed.cpu().numpy()


def right_rows(stage: Any, game: int, last: np.ndarray, dreamt: np.ndarray) -> list[Row]:
    """Accuracies at every horizon of dreamt tokens (B, H, L), which follow rows ``last`` (B,)."""
    recording, tokens, out = stage.recordings[game], stage.tokens[game], []
    pairs = PairModel(tokens, recording.pairs(1, held=False), stage.quantizer.codes)
    for h in [h for h in HORIZONS if h <= dreamt.shape[1]]:
        true = tokens[last + h]
        right, kept = dreamt[:, h - 1] == true, tokens[last] == true
        for level in range(tokens.shape[1]):
            by = {"keep the last": float(kept[:, level].mean())}
            by[PAIRS] = pairs.drawn(true[:, level], tokens[last, level], level, h)
            value = float(right[:, level].mean())
            out.append(Row(f"{recording.game}: L{level} right after {h}", value, by, HIGHER))
    return out


def read_rows(
    stage: Any, model: TokenWorldModel, game: int, last: np.ndarray, dreamt: np.ndarray
) -> list[Row]:
    """R2 at every horizon of linear probes of dreamt sums of codes (B, H, E), which follow rows
    ``last`` (B,): of the sums before, and of the true ones, as well.

    The probes are the same for all: they are fitted on the true codes of training episodes.
    """
    recording, steps = stage.recordings[game], stage.config.pipeline.probe_steps
    known = code_sums(model, stage.tokens[game])  # (N, E)
    views, held = [], []
    for h in [h for h in HORIZONS if h <= dreamt.shape[1]]:
        seen = {"dreamt": dreamt[:, h - 1], "keep the last": known[last]}
        for who, x in (seen | {"true codes": known[last + h]}).items():
            views.append((h, who))
            held.append({"ram": recording.ram[last + h][None], "sums": x})
    train = []
    for rows in probing.training_rows(recording, steps):
        train.append({"ram": recording.ram[rows][None], "sums": known[rows]})
    scale, names = np.float32(np.sqrt(known.shape[1])), probing.variables(recording)
    encoders = {"sums": probing.polled(lambda chunk: scale * chunk["sums"], stage.poll)}
    found = probes.squares(encoders, train, held, names, steps)["sums"]
    scores = {}
    for variable, x in found.items():
        for (h, who), score in zip(views, x.each.tolist(), strict=True):
            scores[h, variable, who] = score
    out = []
    for h in dict.fromkeys(h for h, _ in views):
        for variable in names:
            whos = ("dreamt", "keep the last", "true codes")
            own, kept, truth = (scores.get((h, variable, who), math.nan) for who in whos)
            better = HIGHER if np.isfinite(own) else ""
            name = f"{recording.game}: {variable} R² after {h}"
            out.append(Row(name, own, {"keep the last": kept}, better))
            out.append(Row(f"{name}, true codes", truth))
    return out


@torch.no_grad()
def code_sums(model: TokenWorldModel, tokens: np.ndarray) -> np.ndarray:
    """(N, L) -> the sums of their codes, (N, E)."""
    device = model.dynamics.bos_token.device
    codes = model.dynamics.lookup(torch.from_numpy(tokens).to(device)).code  # (N, L, 1, E)
    return codes.sum(-3)[:, 0].cpu().numpy() / np.float32(np.sqrt(codes.shape[-1]))


# ---------------------------------------------------------------- the gate


def evaluate(stage: Any) -> Gate:
    """The gate of a finished ``WorldModel`` stage."""
    block, games = stage.block, range(len(stage.recordings))
    sizes = {"batch": block.batch, "balance": False, "held": True}
    windows = Windows(stage.recordings, stage.rows, length=block.length, **sizes)
    shortest = min(recording.longest(held=True) for recording in stage.recordings)
    context = min(block.context, shortest - 1)
    long = min(context + max(HORIZONS), shortest)
    rollout_windows = Windows(stage.recordings, stage.rows, length=long, **sizes)
    teacher, tokens, probed = [], [], []
    for game in games:
        model = stage.models[0]
        teacher += teacher_rows(stage, model, windows, game)
        first, dreamt, embed = rollouts(stage, model, rollout_windows, game, context)
        last = first + context - 1
        tokens += right_rows(stage, game, last, dreamt)
        probed += read_rows(stage, model, game, last, embed)
    tables = [
        Table("Teacher-forced", teacher, TEACHER_NOTE),
        Table("Free-running: tokens", tokens, ROLLOUT_NOTE),
        Table("Free-running: what a linear probe reads", probed, ROLLOUT_NOTE),
    ]
    if len(stage.masks) > 1:
        tables.append(mask_table(stage, [*teacher, *tokens], windows, rollout_windows, context))
    count = sum(p.numel() for p in stage.models[0].parameters() if p.requires_grad)
    facts = {"parameters": count, "mask": stage.masks[0], "updates of each mask": stage.updates}
    return Gate(stage.name, tables, facts)


def mask_table(
    stage: Any, own: list[Row], windows: Windows, rollout_windows: Windows, context: int
) -> Table:
    """The config's mask, whose rows of all games are ``own``, beside the others, means over games.

    windows, rollout_windows: held-out sequences, for teacher-forced accuracy and for rollouts of
    which ``context`` steps are given.
    """
    by_mask = {stage.masks[0]: own}
    for mask, model in zip(stage.masks[1:], stage.models[1:], strict=True):
        by_mask[mask] = []
        for game in range(len(stage.recordings)):
            by_mask[mask] += teacher_rows(stage, model, windows, game)
            first, dreamt, _ = rollouts(stage, model, rollout_windows, game, context)
            by_mask[mask] += right_rows(stage, game, first + context - 1, dreamt)
    means: dict[str, dict[str, float]] = {}
    better: dict[str, str] = {}
    for mask, found in by_mask.items():
        values: dict[str, list[float]] = {}
        for row in found:
            name = row.metric.split(": ", 1)[1]
            values.setdefault(name, []).append(row.value)
            better[name] = better.get(name) or row.better  # "" in a game without rewards
        means[mask] = {name: probing.mean(np.array(x)) for name, x in values.items()}
    rows = []
    for name, value in means.pop(stage.masks[0]).items():
        by = {mask: found[name] for mask, found in means.items()}
        rows.append(Row(name, value, by, better[name]))
    note = (
        "Means over games; every mask with the same seed, batches and updates. One seed: a warning"
        " here says that the config's mask is not ahead, not that another one is."
    )
    return Table(f"Masks: {stage.masks[0]} here", rows, note)
