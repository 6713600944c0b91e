"""What the training stages share: learning rates, AdamW, files of parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hidreamer import checkpoint
from hidreamer.optim import Optimizer
from pipeline.manifest import InputError


def cosine(step: int, total: int, lr: float, last: float, warmup: int = 0) -> float:
    """The learning rate of update ``step`` of ``total``: linear up to ``lr``, then a half cosine
    down to ``last``.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return last + (lr - last) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.optim.param_groups:
        group["lr"] = lr


def adamw(decay: float, betas: tuple[float, float]) -> Callable[..., torch.optim.Optimizer]:
    """An algorithm for ``Optimizer``: AdamW whose ``decay`` is of matrices only, not of biases,
    gains and single vectors.
    """

    def make(
        params: Iterable[Tensor], *, lr: float, eps: float, capturable: bool
    ) -> torch.optim.Optimizer:
        params = list(params)
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        settings = {"lr": lr, "eps": eps, "betas": betas, "capturable": capturable}
        return torch.optim.AdamW(groups, fused=True, **settings)

    return make


def save_params(path: Path, module: nn.Module, **facts: Any) -> Path:
    """Parameters and buffers of a module, and plain ``facts``, in one step. -> ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoint.plain({"params": module.state_dict(), **facts})
    checkpoint.replace_file(path, functools.partial(checkpoint.write_tensors, state=state))
    return path


def load_params(path: Path, module: nn.Module) -> Mapping[str, Any]:
    """Into ``module``. -> the file's facts. Raises CheckpointError, InputError."""
    state = checkpoint.load_checkpoint(path, {"params": dict})
    try:
        module.load_state_dict(state["params"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit the config: {reason}") from None
    return state
