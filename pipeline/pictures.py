"""The report's pictures: frames beside what their codes decode to, dreams, codes over time, and
which games use which codes.

Shapes: N frames, L levels, E numbers of an embedding, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from comparison import figures
from hidreamer.optim import make_optimizer
from pipeline import nets, training, world_model
from pipeline.encoder import Frames, reconstruction
from pipeline.token_model import TokenWorldModel, Windows, tensors, token_rows
from tools import Config

WEIGHTS = (0.2, 0.3, 0.5)  # the lineage's, of L0, L0+L1 and so on; the last also for all finer ones
LR = 1e-3
BATCH = 64
COLUMNS = 6  # frames of a picture


class Decoder:
    """Draws frames from sums of codes; made for the report alone, and no part of the agent."""

    def __init__(self, config: Config, recordings: list[Any], codes: list[np.ndarray], device):
        """codes: of all rows of every game, (N, L, E)."""
        self.recordings, self.stack, self.device = recordings, config.pipeline.stack, device
        self.sums = [torch.from_numpy(x.cumsum(1)) for x in codes]  # L0, L0+L1 ..
        shape = recordings[0].stacks(np.arange(1), self.stack).shape[1:]
        self.net = nets.StackDecoder(shape, codes[0].shape[-1]).to(device)

    def fit(self, updates: int, poll: Callable[[], None]) -> None:
        """Train on the training rows. poll: called before every update; may raise to stop."""
        settings = {"lr": LR, "eps": 1e-8, "clip": 1.0}
        capturable = torch.device(self.device).type == "cuda"
        optimizer = make_optimizer("adam", {"net": self.net}, **settings, capturable=capturable)
        frames = Frames(self.recordings, self.stack, 1)
        for step in range(updates):
            poll()
            training.set_lr(optimizer, training.cosine(step, updates, LR, 1e-5))
            rows = frames.draw(BATCH)
            stacks = nets.pixels(frames.stacks(rows), self.device)
            picked = zip(rows.game, rows.row, strict=True)
            sums = torch.stack([self.sums[game][row] for game, row in picked]).to(self.device)
            loss = 0.0
            for level in range(sums.shape[1]):
                weight = WEIGHTS[min(level, len(WEIGHTS) - 1)]
                loss = loss + weight * reconstruction(self.net(sums[:, level]), stacks, self.stack)
            optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, sums: Tensor) -> np.ndarray:
        """Sums of codes (N, E) -> the newest image of each, (N, H, W, C) in [0, 1]."""
        channels = self.recordings[0].image.shape[-1]
        out = self.net(sums.to(self.device))[:, -channels:]
        return out.clamp(0.0, 1.0).permute(0, 2, 3, 1).cpu().numpy()


def grid(rows: dict[str, np.ndarray], title: str) -> str:
    """Images {name: (COLUMNS, H, W, C) in [0, 1]}, a row each, as inline SVG."""
    with matplotlib.rc_context(figures.LOOK | {"image.cmap": "gray"}):
        height = 0.3 + 0.8 * len(rows)
        figure = Figure(figsize=(figures.WIDTH, height))
        axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=False):
                axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, vmin=0, vmax=1)
            for axis in line:
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
            line[0].set_ylabel(name, fontsize=6, rotation=0, ha="right", va="center")
        figure.suptitle(title, fontsize=9)
        out = io.StringIO()
        about = {"Date": None, "Creator": None}
        figure.savefig(out, format="svg", transparent=True, metadata=about)
    return out.getvalue()[out.getvalue().index("<svg") :]


def decodes(decoder: Decoder, game: int) -> str:
    """Held-out frames beside their decodes of L0, L0+L1 and so on."""
    recording = decoder.recordings[game]
    held = recording.rows(held=True)
    rows = held[np.linspace(0, len(held) - 1, COLUMNS).round().astype(int)]
    images = {"frame": recording.image[rows] / 255.0}
    sums, name = decoder.sums[game][rows], ""
    for level in range(sums.shape[1]):
        name += f"{'+' if level else ''}L{level}"
        images[name] = decoder(sums[:, level])
    return grid(images, f"{recording.game}: held-out frames and their codes")


@torch.no_grad()
def dreams(
    decoder: Decoder, model: TokenWorldModel, config: Config, tokens: list[np.ndarray], game: int
) -> str:
    """A held-out stretch beside what the model dreams with its actions."""
    recordings, block = decoder.recordings, config.pipeline.world_model
    actions = world_model.actions_of(config)
    rows = []
    for i, (recording, index) in enumerate(zip(recordings, tokens, strict=True)):
        rows.append(token_rows(recording, index, actions, i))
    longest = min(recording.longest(held=True) for recording in recordings)
    context = min(block.context, longest - 1)
    length = min(context + 30, longest)
    windows = Windows(recordings, rows, 1, length, False, held=True)
    where = windows.apart(game)
    where = where._make(x[:1] for x in where)
    batch = tensors(windows.read(where), torch.device(decoder.device))
    carry, post, _ = model.observe({key: x[:, :context] for key, x in batch.items()})
    start = model.dynamics.starts(carry, post, 1)
    action = batch["prev_action"][:, context:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, feat, _ = model.dynamics.imagine(start, action, action.shape[1])
    steps = np.linspace(1, action.shape[1], COLUMNS).round().astype(int)
    embed = model.dynamics.embedding(feat.stoch[0, steps].float())
    first = int(where.row[0]) + context - 1
    true = first + steps
    recording = recordings[game]
    images = {
        "frame": recording.image[true] / 255.0,
        "its codes": decoder(decoder.sums[game][true, -1]),
        "dream": decoder(embed),
    }
    shown = ", ".join(map(str, steps))
    return grid(images, f"{recording.game}: {shown} steps after the last frame seen")


def codes_over_time(recording: Any, tokens: np.ndarray) -> str:
    """The codes of a held-out episode, numbered by when they first appear."""
    part = recording.episodes(True)[0]

    def draw(axis: Any) -> None:
        for level in range(tokens.shape[1]):
            codes = tokens[part, level]
            _, first, index = np.unique(codes, return_index=True, return_inverse=True)
            order = first.argsort().argsort()
            colour = figures.COLOURS[level % len(figures.COLOURS)]
            style = {"color": colour, "markersize": 2.0, "linestyle": "none"}
            axis.plot(order[index], marker=".", label=f"L{level}", **style)
        axis.set(xlabel="step", ylabel="code, by first use")
        axis.set_title(f"{recording.game}: codes over time")
        axis.legend()

    return figures.picture(draw)


def codes_by_game(recordings: list[Any], tokens: list[np.ndarray], count: int) -> str:
    """A figure: how often every game uses every code of L0, most shared ones first.

    tokens: (N, L) of each recording. count: codes of a level.
    """
    share = []
    for index in tokens:
        share.append(np.bincount(index[:, 0], minlength=count) / len(index))
    stacked = np.stack(share)
    order = np.lexsort((-stacked.sum(0), -(stacked > 0).sum(0)))

    def draw(axis: Any) -> None:
        for i, recording in enumerate(recordings):
            style = {"color": figures.COLOURS[(i + 1) % len(figures.COLOURS)], "linewidth": 0.9}
            axis.plot(stacked[i][order], label=recording.game, **style)
        axis.set(xlabel="code of L0, those of most games first", ylabel="share of frames")
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title("Which games use which codes")
        axis.legend()

    return figures.picture(draw)
