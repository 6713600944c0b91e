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

SCALER = "scaler"  # in the state of an optimiser, beside its parameters


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


class ScaledOptimizer(Optimizer):
    """For losses of float16 products: they are scaled up before the gradient is taken, so that
    small gradients do not become 0, and a step whose gradients overflowed is left out (Micikevicius
    et al. 2018). Nothing is read on the host: the fused kernel leaves it out.

    Arguments as of ``Optimizer``, whose algorithm must be fused.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, device: torch.device, **settings: Any):
        super().__init__(modules, **settings)
        self.scaler = torch.amp.GradScaler(device.type)

    def gather(self, loss: Tensor, modules: Iterable[str] | None = None) -> None:
        super().gather(self.scaler.scale(loss), modules)

    def apply(self) -> dict[str, Tensor]:
        """As of ``Optimizer``, with "skipped", () 0 or 1; gradient norms of such a step count 0."""
        self.scaler.unscale_(self.optim)
        metrics = super().apply()
        overflow = ~metrics["grad_norm"].isfinite()
        metrics = {name: torch.where(overflow, 0.0, x) for name, x in metrics.items()}
        self.scaler.update()
        return metrics | {"skipped": overflow.float()}

    def _move(self) -> None:
        self.scaler.step(self.optim)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {SCALER: self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({key: x for key, x in state.items() if key != SCALER})
        self.scaler.load_state_dict(state[SCALER])


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
