"""The lineage's encoder of frame stacks, a decoder that mirrors it, and a frozen DINOv2.

Shapes: N stacks of C channels (images times channels), H x W pixels in [0, 1], E embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidreamer import app
from hidreamer.checkpoint import FolderError
from pipeline.data import Recording
from tools import ConfigError

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride
HIDDEN = 512
BATCH = 512  # stacks that are encoded at a time where nothing is learned
PATCH = 14  # side of DINOv2's patches, in pixels
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation


def sides(size: int) -> list[int]:
    """Of the maps between the convolutions, the input's first.

    Raises ValueError where none is left.
    """
    out = [size]
    for _, kernel, stride in CONVOLUTIONS:
        out.append((out[-1] - kernel) // stride + 1)
    if out[-1] < 1:
        raise ValueError(f"env.size {size} is too small for the encoder: 36 at least")
    return out


class StackEncoder(nn.Module):
    """(N, C, H, W) -> (N, E) of length 1: three convolutions, a hidden layer, a LayerNorm.

    For 4 x 84 x 84 and E = 384 it has 1,881,888 parameters, as ssrhaso/hidreamer's.
    """

    def __init__(self, shape: tuple[int, int, int], dim: int):
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for out, kernel, stride in CONVOLUTIONS:
            layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
            channels = out
        flat = channels * sides(height)[-1] * sides(width)[-1]
        layers += [nn.Flatten(), nn.Linear(flat, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, dim)]
        self.layers, self.norm, self.dim = nn.Sequential(*layers), nn.LayerNorm(dim), dim
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.layers(x)), dim=-1)


class StackDecoder(nn.Module):
    """The way back, layer by layer: (N, E) -> (N, C, H, W)."""

    def __init__(self, shape: tuple[int, int, int], dim: int):
        super().__init__()
        channels, *size = shape
        maps = list(zip(*(sides(side) for side in size), strict=True))  # (height, width) each
        inp = CONVOLUTIONS[-1][0]
        flat = inp * math.prod(maps[-1])
        self.inp = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, flat))
        self.grid = (inp, *maps[-1])
        outs = [channels, *(out for out, _, _ in CONVOLUTIONS[:-1])]
        layers: list[nn.Module] = []
        for i in reversed(range(len(CONVOLUTIONS))):
            inp, kernel, stride = CONVOLUTIONS[i]
            # what the convolution's stride left over at the edge
            rest = tuple(
                side - kernel - (s - 1) * stride
                for side, s in zip(maps[i], maps[i + 1], strict=True)
            )
            up = nn.ConvTranspose2d(inp, outs[i], kernel, stride, output_padding=rest)
            layers += [nn.ReLU(), up]
        self.layers, self.scale = nn.Sequential(*layers), math.sqrt(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(self.scale * x)  # of vectors of length 1: numbers of about 1
        return self.layers(x.unflatten(-1, self.grid))


class DINOv2(nn.Module):
    """A frozen DINOv2 (Oquab et al. 2023) of the newest image of a stack: (N, C, H, W) -> (N, E).

    folder: as transformers' ``save_pretrained`` or timm's ``save_for_hf`` writes it. Read from
    safetensors alone, which cannot hold code. Raises ConfigError, FolderError.
    """

    def __init__(self, folder: Path, image_channels: int):
        super().__init__()
        if not (folder / "model.safetensors").is_file():
            raise FolderError(
                f"pipeline.encoder.weights: {folder} holds no model.safetensors: name the folder of"
                " a DINOv2 that transformers or timm saved, such as a download of"
                " facebook/dinov2-small"
            )
        try:
            settings = json.loads((folder / "config.json").read_text("utf-8"))
            load = load_timm if "architecture" in settings else load_transformers
            model, self.dim = load(folder)
        except ImportError as error:
            name = getattr(error, "name", None) or "transformers"
            raise ConfigError(
                f"encoder.kind dinov2 needs the package {name!r} for {folder}: pip install"
                f" {name}, or {app.install_line('dinov2')} for all that transformers needs"
            ) from error
        except Exception as error:  # whatever a damaged or foreign folder makes it raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FolderError(
                f"pipeline.encoder.weights: {folder} is no DINOv2: {reason}"
            ) from None
        self.model, self.channels = model.requires_grad_(False).eval(), image_channels
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The newest image of each stack (N, stack * C, H, W) in [0, 1] -> unit vectors (N, E)."""
        x = x[:, -self.channels :].expand(-1, 3, -1, -1)
        size = [max(PATCH, side // PATCH * PATCH) for side in x.shape[-2:]]
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with torch.no_grad():
            out = self.model((x - self.mean) / self.std)
            out = getattr(out, "pooler_output", out)  # of transformers
        return F.normalize(out, dim=-1)


def load_transformers(folder: Path) -> tuple[nn.Module, int]:
    """-> a network of images (N, 3, H, W), and the size of what it pools."""
    from transformers import Dinov2Model

    model: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model, model.config.hidden_size


def load_timm(folder: Path) -> tuple[nn.Module, int]:
    """As ``load_transformers``; the network gives the pooled class token itself.

    Raises ValueError for another architecture.
    """
    import timm

    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = config["architecture"]
    if "dinov2" not in str(name):
        raise ValueError(f"its architecture is {name!r}")
    settings = {"num_classes": 0, "dynamic_img_size": True}
    checkpoint = str(folder / "model.safetensors")
    arguments = config.get("model_args", {}) | settings
    model = timm.create_model(name, checkpoint_path=checkpoint, **arguments)
    return model, model.num_features


def pixels(stacks: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, C, H, W) -> the same in [0, 1] on the device."""
    return torch.from_numpy(stacks).to(device).float() / 255.0


@torch.no_grad()
def embed(
    encoder: nn.Module,
    recording: Recording,
    rows: np.ndarray,
    stack: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Embeddings (M, E) float32 of rows (M,). poll: called for every batch; it may raise."""
    parts = []
    for first in range(0, len(rows), BATCH):
        poll()
        stacks = recording.stacks(rows[first : first + BATCH], stack)
        parts.append(encoder(pixels(stacks, device)).float().cpu().numpy())
    return np.concatenate(parts)
