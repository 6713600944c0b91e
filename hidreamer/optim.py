"""One optimiser step: gradients of a loss for exactly the given modules, their norms, clipping, fused Adam."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer:
    """Adam over the parameters of named modules, clipped by the global norm.

    ``step(loss)`` touches these parameters only, whatever else the loss depends on, and reads nothing on the host.
    ``clip`` 0 means no clipping. ``capturable`` keeps the step counters on the device, as a CUDA graph needs.
    """

    def __init__(self, modules: dict[str, nn.Module], *, lr: float, eps: float, clip: float, capturable: bool = False):
        self.groups = {
            name: {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
            for name, module in modules.items()
        }
        self.params = {key: p for group in self.groups.values() for key, p in group.items()}
        self.clip = clip
        self.adam = torch.optim.Adam(self.params.values(), lr=lr, eps=eps, fused=True, capturable=capturable)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """loss: (). -> gradient norm in all, by module, and whether the step was clipped; each ()."""
        params = list(self.params.values())
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        for param, grad in zip(params, grads, strict=True):
            # The fused kernel walks through memory. A gradient that lies there in another order (channels last, from a
            # convolution) would silently change other weights than its own: autograd.grad does not put it right.
            param.grad = grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
        norms = {name: nn.utils.get_total_norm([p.grad for p in group.values()]) for name, group in self.groups.items()}
        total = torch.stack(list(norms.values())).norm()
        metrics = {"grad_norm": total}
        if len(norms) > 1:
            metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        if self.clip:
            nn.utils.clip_grads_with_norm_(params, self.clip, total)
            metrics["clipped"] = (total > self.clip).float()
        self.adam.step()
        self.adam.zero_grad()
        return metrics

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {"step", "exp_avg", "exp_avg_sq"}}: by name, so that it can move to another model."""
        return {key: dict(self.adam.state[p]) for key, p in self.params.items() if p in self.adam.state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse; parameters that ``state`` does not name start afresh. Rates stay as configured now."""
        self.adam.state.clear()
        for key, p in self.params.items():
            if key in state:
                self.adam.state[p] = {name: x.detach().clone().to(p.device) for name, x in state[key].items()}
