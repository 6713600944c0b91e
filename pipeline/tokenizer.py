"""tokenizer: embeddings to L codes each, by the online agent's quantiser.

Frozen: the encoder's embeddings stay as they are. Codebooks of ``nearest`` are moving averages
then, and a commitment has nothing to act on; kinds that learn by gradient learn to reconstruct.
``joint``: the encoder goes on learning by its own objective, from what the codes say, and the
commitment reaches it.

Shapes: N frames, L levels, one group of E numbers, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hidreamer.optim import make_optimizer
from hidreamer.quantizer import Codes, Quantizer, per_level
from pipeline import data, encoder, nets, training
from pipeline.gate import Gate
from pipeline.manifest import InputError
from pipeline.stage import Stage
from tools import Config, ConfigError

CLIP = 1.0
BATCH = 4096  # embeddings that are coded at a time where nothing is learned
BY_GRADIENT = ("sampled", "fsq")  # kinds of quantisers


def make_quantizer(config: Config, dim: int, groups: int = 1, levels: int = 0) -> Quantizer:
    """Of ``dynamics.hrvq``; levels 0 means the config's. Raises ConfigError."""
    block = config.dynamics.hrvq
    try:
        kind, levels = block.posterior, levels or block.levels
        return Quantizer(kind, levels, groups, block.codes, dim // groups)
    except ValueError as error:
        raise ConfigError(f"dynamics.hrvq: {error}") from None


def grouped(embed: Tensor, groups: int = 1) -> Tensor:
    """Unit vectors (N, E) as the quantiser wants them: (N, G, d), numbers of about 1."""
    return (math.sqrt(embed.shape[-1]) * embed).unflatten(-1, (groups, -1))


def quantised(codes: Codes) -> Tensor:
    """The sum of all levels' codes as an embedding, (N, E)."""
    total = codes.code.sum(-3).flatten(-2)  # (N, E)
    return total / math.sqrt(total.shape[-1])


def reconstruction_error(z: Tensor, codes: Codes) -> Tensor:
    """Mean squared error of a number. z (N, G, d). -> ()."""
    return (z - codes.code.sum(-3)).square().mean()


def commitment(codes: Codes, weights: list[float]) -> Tensor:
    """|residual - code|^2, a mean over numbers, weighted by level; at the encoder, not at codes."""
    error = (codes.residual - codes.code.detach()).square().mean((-1, -2)).mean(0)  # (L,)
    return (error * error.new_tensor(weights)).sum()


def fit_step(quantizer: Quantizer, z: Tensor, rate: float, optimizer: Any) -> tuple[Tensor, Codes]:
    """One update on embeddings z (N, G, d) that stay as they are. -> error (), and codes.

    optimizer: of a quantiser that learns by gradient, otherwise None.
    """
    codes = quantizer.encode(z)
    error = reconstruction_error(z, codes)
    if optimizer is not None:
        optimizer.step(error)
    quantizer.update_codebook(codes, rate)
    return error.detach(), codes


def make_fit_optimizer(config: Config, quantizer: Quantizer, device: torch.device) -> Any:
    """Adam by pipeline.tokenizer.lr; None for a quantiser whose codebooks are not learned by
    gradient.
    """
    if quantizer.kind not in BY_GRADIENT:
        return None
    settings = {"lr": config.pipeline.tokenizer.lr, "eps": 1e-8, "clip": CLIP}
    parts = {"quantizer": quantizer}
    return make_optimizer("adam", parts, **settings, capturable=device.type == "cuda")


def fit(
    config: Config,
    embed: Tensor,
    updates: int,
    groups: int = 1,
    levels: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Quantizer:
    """A quantiser of unit vectors ``embed`` (N, E), trained as the stage trains its own, for
    baselines.

    groups, levels: of the quantiser; 0 levels: those of the config. poll: called before every
    update; it may raise.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        quantizer = make_quantizer(config, embed.shape[-1], groups, levels).to(embed.device)
        optimizer = make_fit_optimizer(config, quantizer, embed.device)
        block = config.pipeline.tokenizer
        for _ in range(updates):
            poll()
            picks = torch.randint(len(embed), (block.batch,), generator=generator)
            fit_step(quantizer, grouped(embed[picks], groups), block.rate, optimizer)
    return quantizer


@torch.no_grad()
def encode(quantizer: Quantizer, embed: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, E) -> indices (N, L, G) int64, codes (N, L, E) of length about 1, float32."""
    groups, device = quantizer.groups, next(iter(quantizer.state_dict().values())).device
    indices, codes = [], []
    for first in range(0, len(embed), BATCH):
        part = torch.as_tensor(embed[first : first + BATCH], device=device)
        found = quantizer.encode(grouped(part, groups), sample=False)
        indices.append(found.index.cpu().numpy())
        codes.append((found.code.flatten(-2) / math.sqrt(part.shape[-1])).cpu().numpy())
    return np.concatenate(indices), np.concatenate(codes)


class Tokenizer(Stage):
    """Trains the residual quantiser of the embeddings, and writes the tokens of all frames."""

    name = "tokenizer"
    needs = ("collect", "encoder")
    keys = ("pipeline.tokenizer", "pipeline.probe_steps")
    keys += tuple(f"dynamics.hrvq.{key}" for key in ("levels", "codes", "posterior", "commitment"))

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        super().__init__(config, root, device, report)
        self.block, hrvq = config.pipeline.tokenizer, config.dynamics.hrvq
        self.objective = encoder.load_objective(root, config, device)
        self.recordings = data.load_all(root, config)
        dim = self.objective.encoder.dim
        self.quantizer = make_quantizer(config, dim).to(device)
        try:
            self.weights = per_level(hrvq.commitment, hrvq.levels, "dynamics.hrvq.commitment")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.block.joint and config.pipeline.encoder.kind != "cnn":
            raise ConfigError("pipeline.tokenizer.joint needs encoder.kind cnn: a DINOv2 is frozen")
        self.frames = encoder.Frames(
            self.recordings, config.pipeline.stack, config.pipeline.encoder.distance
        )
        train = [recording.rows(held=False) for recording in self.recordings]
        if self.block.joint:
            self.optimizer = self._joint_optimizer()
            count = len(self.frames.row)
        else:
            found = [encoder.load_embeddings(root, recording.game) for recording in self.recordings]
            parts = [embed[rows] for embed, rows in zip(found, train, strict=True)]
            self.embed = torch.from_numpy(np.concatenate(parts)).to(device)  # (N, E)
            self.optimizer = make_fit_optimizer(config, self.quantizer, device)
            count = len(self.embed)
        if count < self.block.batch:
            raise ConfigError(
                f"pipeline.tokenizer.batch is {self.block.batch}, and there are {count} frames"
            )
        self.total = self.block.epochs * (count // self.block.batch)

    def _joint_optimizer(self) -> Any:
        parts: dict[str, nn.Module] = self.objective.modules_by_name()
        if self.quantizer.kind in BY_GRADIENT:
            parts["quantizer"] = self.quantizer
        settings = {"lr": self.block.lr, "eps": 1e-8, "clip": CLIP}
        return make_optimizer("adam", parts, **settings, capturable=self.device.type == "cuda")

    def advance(self) -> Mapping[str, Tensor]:
        self.step += 1
        metrics, codes = self._joint_step() if self.block.joint else self._step()
        return metrics | self.quantizer.usage(codes.index)

    def _step(self) -> tuple[dict[str, Tensor], Codes]:
        picks = torch.randint(len(self.embed), (self.block.batch,))
        z = grouped(self.embed[picks.to(self.device)])
        error, codes = fit_step(self.quantizer, z, self.block.rate, self.optimizer)
        return {"tokenizer_loss": error}, codes

    def _joint_step(self) -> tuple[dict[str, Tensor], Codes]:
        loss, metrics, codes = self.joint_loss(self.frames.draw(self.block.batch))
        steps = self.optimizer.step(loss)
        self.quantizer.update_codebook(codes, self.block.rate)
        metrics = {"tokenizer_loss": loss.detach()} | metrics
        return metrics | {"grad_norm": steps["grad_norm"]}, codes

    def joint_loss(self, rows: encoder.Rows) -> tuple[Tensor, dict[str, Tensor], Codes]:
        """Of frames ``rows`` (B,): the encoder's objective, of what the codes say, and the
        commitment. -> loss (), its parts, the frames' own codes.
        """
        found: list[Codes] = []

        def code(embed: Tensor) -> Tensor:
            found.append(self.quantizer.encode(grouped(embed)))
            return nn.functional.normalize(quantised(found[-1]), dim=-1)

        loss, metrics = self.objective.loss(self.frames, rows, self.device, code)
        if self.quantizer.kind == "nearest":
            commit = commitment(found[0], self.weights)
            loss, metrics["commitment_loss"] = loss + commit, commit.detach()
        return loss, metrics, found[0]

    def save_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"quantizer": self.quantizer.state_dict()}
        if self.block.joint:
            state["objective"] = self.objective.state_dict()
        optimizer = self.optimizer
        return state | {"optim": optimizer.state_dict() if optimizer is not None else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.quantizer.load_state_dict(state["quantizer"])
        if self.block.joint:
            self.objective.load_state_dict(state["objective"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optim"])

    def finish(self) -> tuple[Gate, list[Path]]:
        from pipeline import tokenizer_gate

        outputs = [training.save_params(self.folder / "quantizer.pt", self.quantizer)]
        if self.block.joint:
            outputs.append(training.save_params(self.folder / "objective.pt", self.objective))
        embeddings, tokens = [], []
        for recording in self.recordings:
            embed = self.embeddings(recording)
            index, _ = encode(self.quantizer, embed)
            path = self.folder / "tokens" / f"{recording.game}.npy"
            outputs.append(save_tokens(path, index[:, :, 0]))
            embeddings.append(embed)
            tokens.append(index[:, :, 0])
        found = tokenizer_gate.evaluate(self, embeddings, tokens)
        return found, outputs

    def embeddings(self, recording: data.Recording) -> np.ndarray:
        """(N, E) of all rows of a game, by the encoder as it is now."""
        if not self.block.joint:
            return encoder.load_embeddings(self.root, recording.game)
        rows = np.arange(len(recording))
        stack = self.config.pipeline.stack
        return nets.embed(self.objective.encoder, recording, rows, stack, self.device, self.poll)


def save_tokens(path: Path, index: np.ndarray) -> Path:
    """(N, L) -> the file, int16."""
    return encoder.save_array(path, index.astype(np.int16))


def load_tokens(root: Path, recording: data.Recording) -> np.ndarray:
    """(N, L) int64 of all rows of a game. Raises InputError."""
    path = root / "tokenizer" / "tokens" / f"{recording.game}.npy"
    index = np.load(path, allow_pickle=False).astype(np.int64)
    if len(index) != len(recording):
        raise InputError(f"{path} has {len(index)} rows, and {len(recording)} were collected")
    return index


def load(root: Path, config: Config, device: torch.device) -> tuple[nn.Module, Quantizer]:
    """The encoder and the quantiser that made the tokens, from the pipeline's folder ``root``.
    Raises FolderError, ConfigError.
    """
    objective = encoder.load_objective(root, config, device)
    if config.pipeline.tokenizer.joint:
        training.load_params(root / "tokenizer" / "objective.pt", objective)
    quantizer = make_quantizer(config, objective.encoder.dim).to(device)
    training.load_params(root / "tokenizer" / "quantizer.pt", quantizer)
    return objective.encoder, quantizer
