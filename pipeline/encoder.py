"""encoder: stacks of frames to one vector each, without actions or rewards.

Shapes: B frames of all games, E embedding; stacks are (., C, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer import checkpoint
from hidreamer.optim import make_optimizer
from pipeline import data, encoder_gate, nets, training
from pipeline.data import Recording
from pipeline.gate import Gate
from pipeline.stage import Stage
from tools import Config, ConfigError, user_path

FAR = 10  # steps that the lineage's negative lies away at least
LAST_LR = 1e-6
CLIP = 1.0


def info_nce(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) with the batch as negatives.

    anchor, positive: unit vectors (B, E). -> loss (), in nats.
    """
    logits = anchor @ positive.t() / temperature  # (B, B)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def one_negative(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """The lineage's objective: each anchor's positive against one negative.

    anchor, positive, negative: unit vectors (B, E). -> loss (), in nats.
    """
    margin = ((anchor * negative).sum(-1) - (anchor * positive).sum(-1)) / temperature
    return F.softplus(margin).mean()


def reconstruction(decoded: Tensor, stacks: Tensor, stack: int) -> Tensor:
    """Squared error, summed over a frame's pixels, a mean over the stack and the batch.

    decoded, stacks: (B, stack * C, H, W) in [0, 1]. stack: frames in each. -> loss ().
    """
    return (decoded - stacks).square().flatten(1).sum(-1).mean() / stack


class Rows(NamedTuple):
    """Rows of several games."""

    game: np.ndarray  # (B,)
    row: np.ndarray  # (B,)


class Frames:
    """Draws of training frames of all games, each pair as likely as any other."""

    def __init__(self, recordings: list[Recording], stack: int, distance: int):
        self.recordings, self.stack, self.distance = recordings, stack, distance
        pairs = [recording.pairs(distance, held=False) for recording in recordings]
        self.game = np.repeat(np.arange(len(pairs)), [len(rows) for rows in pairs])
        self.row = np.concatenate(pairs)
        self.train = [recording.rows(held=False) for recording in recordings]

    def draw(self, count: int) -> Rows:
        picks = torch.randint(len(self.row), (count,)).numpy()
        return Rows(self.game[picks], self.row[picks])

    def after(self, rows: Rows) -> Rows:
        """The positives: ``distance`` steps on, in the same episode."""
        return rows._replace(row=rows.row + self.distance)

    def far(self, rows: Rows) -> Rows:
        """The lineage's negatives: of the same game, at least FAR rows away."""
        out = rows.row.copy()
        for game, train in enumerate(self.train):
            mine = np.flatnonzero(rows.game == game)
            left = mine
            while len(left):
                out[left] = train[torch.randint(len(train), (len(left),)).numpy()]
                left = mine[np.abs(out[mine] - rows.row[mine]) < min(FAR, len(train) // 3)]
        return rows._replace(row=out)

    def stacks(self, rows: Rows) -> np.ndarray:
        """uint8 (B, C, H, W)."""
        out: np.ndarray | None = None
        for game, recording in enumerate(self.recordings):
            mine = rows.game == game
            if mine.any():
                found = recording.stacks(rows.row[mine], self.stack)
                out = np.empty((len(mine), *found.shape[1:]), np.uint8) if out is None else out
                out[mine] = found
        return out


def make(config: Config, device: torch.device) -> tuple[nn.Module, tuple[int, int, int]]:
    """-> the config's encoder with new weights, and the shape of a stack (C, H, W).

    Raises ConfigError, FolderError.
    """
    block = config.pipeline.encoder
    channels = 1 if config.env.atari.grayscale else 3
    height, width = config.env["size"]
    shape = (config.pipeline.stack * channels, height, width)
    if block.kind == "dinov2":
        return nets.DINOv2(user_path(block.weights), channels).to(device), shape
    try:
        return nets.StackEncoder(shape, block.dim).to(device), shape
    except ValueError as error:
        raise ConfigError(str(error)) from None


class Objective(nn.Module):
    """The encoder, the decoder where there is one, and the loss that the config names."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.block, self.stack = config.pipeline.encoder, config.pipeline.stack
        self.encoder, shape = make(config, device)
        self.decoder: nn.Module | None = None
        if self.block.kind == "cnn" and self.block.objective in ("reconstruction", "both"):
            self.decoder = nets.StackDecoder(shape, self.block.dim).to(device)

    def modules_by_name(self) -> dict[str, nn.Module]:
        both = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: module for name, module in both.items() if module is not None}

    def loss(
        self, frames: Frames, rows: Rows, device: torch.device, code: Callable = lambda z: z
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> the loss () and its parts, of frames ``rows`` (B,). code: what becomes of embeddings
        (B, E) before they are compared and decoded.
        """
        block = self.block
        stacks = nets.pixels(frames.stacks(rows), device)
        z = code(self.encoder(stacks))
        metrics = {}
        embed = lambda rows: code(self.encoder(nets.pixels(frames.stacks(rows), device)))
        if block.objective in ("infonce", "both"):
            metrics["infonce_loss"] = info_nce(z, embed(frames.after(rows)), block.temperature)
        if block.objective == "lineage":
            others = embed(frames.after(rows)), embed(frames.far(rows))
            metrics["lineage_loss"] = one_negative(z, *others, block.temperature)
        if self.decoder is not None:
            error = reconstruction(self.decoder(z), stacks, self.stack)
            metrics["reconstruction_loss"] = error * (
                block.pixels if block.objective == "both" else 1.0
            )
        return sum(metrics.values()), {name: x.detach() for name, x in metrics.items()}


class Encoder(Stage):
    """Trains the encoder of frame stacks by ``Objective``; a frozen DINOv2 is used as it is."""

    name = "encoder"
    needs = ("collect",)
    keys = ("pipeline.encoder", "pipeline.probe_steps")

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        super().__init__(config, root, device, report)
        block = self.block = config.pipeline.encoder
        self.objective = Objective(config, device)
        self.untrained = copy.deepcopy(self.objective.encoder)
        self.recordings = data.load_all(root, config)
        if block.kind != "cnn":
            return  # nothing to train: one empty step
        self.frames = Frames(self.recordings, config.pipeline.stack, block.distance)
        if len(self.frames.row) < block.batch:
            raise ConfigError(
                f"pipeline.encoder.batch is {block.batch} and there are {len(self.frames.row)}"
                f" training frames that an episode goes on for {block.distance} steps after"
            )
        self.total = block.epochs * (len(self.frames.row) // block.batch)
        parts = self.objective.modules_by_name()
        settings = {"lr": block.lr, "eps": 1e-8, "clip": CLIP}
        capturable = device.type == "cuda"
        self.optimizer = make_optimizer("adam", parts, **settings, capturable=capturable)

    def advance(self) -> Mapping[str, Tensor]:
        if self.block.kind != "cnn":
            self.step = self.total
            return {}
        lr = training.cosine(self.step, self.total, self.block.lr, LAST_LR)
        training.set_lr(self.optimizer, lr)
        rows = self.frames.draw(self.block.batch)
        loss, metrics = self.objective.loss(self.frames, rows, self.device)
        steps = self.optimizer.step(loss)
        self.step += 1
        return {"encoder_loss": loss.detach()} | metrics | {"grad_norm": steps["grad_norm"]}

    def save_state(self) -> dict[str, Any]:
        if self.block.kind != "cnn":
            return {}
        params = self.objective.state_dict()
        return {"params": params, "optim": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.objective.load_state_dict(state["params"])
            self.optimizer.load_state_dict(state["optim"])

    # ------------------------------------------------------------ outputs and gate

    def finish(self) -> tuple[Gate, list[Path]]:
        outputs = [training.save_params(self.folder / "objective.pt", self.objective)]
        stack, found = self.config.pipeline.stack, []
        for recording in self.recordings:
            args = (recording, np.arange(len(recording)), stack, self.device, self.poll)
            own = nets.embed(self.objective.encoder, *args)
            outputs.append(save_embeddings(self.folder, recording.game, own))
            found.append({"here": own})
            if self.block.kind == "cnn":
                found[-1]["untrained"] = nets.embed(self.untrained, *args)
        count = sum(p.numel() for p in self.objective.encoder.parameters())
        objective = self.block.objective if self.block.kind == "cnn" else "none: frozen DINOv2"
        facts = {"parameters": count, "objective": objective}
        steps = self.config.pipeline.probe_steps
        tables = encoder_gate.tables(found, self.recordings, steps, self.poll)
        return Gate(self.name, tables, facts), outputs


def save_embeddings(folder: Path, game: str, embeddings: np.ndarray) -> Path:
    """(N, E) float32 of all rows of a game. -> the file."""
    return save_array(folder / "embeddings" / f"{game}.npy", embeddings)


def save_array(path: Path, x: np.ndarray) -> Path:
    """In one step. -> the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_array(path, x)
    return path


def load_embeddings(root: Path, game: str) -> np.ndarray:
    """(N, E) of all rows of a game, as the encoder stage wrote them."""
    return np.load(root / "encoder" / "embeddings" / f"{game}.npy", allow_pickle=False)


def load_objective(root: Path, config: Config, device: torch.device) -> Objective:
    """What the encoder stage trained, from the pipeline's folder ``root``. Raises FolderError,
    ConfigError.
    """
    objective = Objective(config, device)
    training.load_params(root / "encoder" / "objective.pt", objective)
    return objective
