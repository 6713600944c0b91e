"""Optimisers by name: gradients for exactly the given modules, their norms, clipping, one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def adam(
    params: Iterable[Tensor], *, lr: float, eps: float, capturable: bool
) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, eps=eps, fused=True, capturable=capturable)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": adam}


class Optimizer:
    """Steps of the parameters of named modules, clipped by their global norm.

    ``step(loss)`` is ``gather(loss)``, then ``apply()``; several losses may be gathered before. It
    touches these parameters only, whatever else a loss depends on, and reads nothing on the host.

    algorithm: makes the optimiser of parameters, as those of OPTIMIZERS do. ``clip`` 0 means no
    clipping. ``capturable`` keeps the step counters on the device, as a CUDA graph needs.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        lr: float,
        eps: float,
        clip: float,
        capturable: bool = False,
        algorithm: Callable[..., torch.optim.Optimizer] = adam,
    ):
        self.params: dict[str, nn.Parameter] = {}  # of all groups
        self.groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, module in modules.items():
            named = module.named_parameters()
            self.groups[name] = {f"{name}.{key}": p for key, p in named if p.requires_grad}
            self.params |= self.groups[name]
        self.clip = clip
        self.optim = algorithm(self.params.values(), lr=lr, eps=eps, capturable=capturable)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """loss: (). -> metrics of ``apply``."""
        self.gather(loss)
        return self.apply()

    def gather(self, loss: Tensor, modules: Iterable[str] | None = None) -> None:
        """Add the gradient of ``loss`` (), for these modules (None: all), to the next step's."""
        params = []
        for name in modules or self.groups:
            params += self.groups[name].values()
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        for param, grad in zip(params, grads, strict=True):
            grad = grad if param.grad is None else param.grad + grad
            # The fused kernel walks through memory. A gradient that lies there in another order
            # (channels last, from a convolution) would silently change other weights than its own:
            # autograd.grad does not put it right.
            aligned = grad.stride() == param.stride()
            param.grad = grad if aligned else torch.empty_like(param).copy_(grad)

    def apply(self) -> dict[str, Tensor]:
        """One step along what was gathered, for every module.

        -> gradient norm in all, by module, and whether the step was clipped; each ().
        """
        norms = {}
        for name, group in self.groups.items():
            norms[name] = self.norm([p.grad for p in group.values()])
        total = torch.stack(list(norms.values())).norm(dim=0)
        metrics = {"grad_norm": total}
        if len(norms) > 1:
            metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        if self.clip:
            self.rescale(total)
            metrics["clipped"] = (total > self.clip).float()
        self._move()
        self.optim.zero_grad()
        return metrics

    def norm(self, grads: list[Tensor]) -> Tensor:
        """Of all of them together, ()."""
        return nn.utils.get_total_norm(grads)

    def rescale(self, total: Tensor) -> None:
        """Clip the gradients, whose norm is ``total``."""
        nn.utils.clip_grads_with_norm_(self.params.values(), self.clip, total)

    def _move(self) -> None:
        self.optim.step()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {"step", "exp_avg", "exp_avg_sq"}}: by name, to fit another model."""
        state = self.optim.state
        return {key: dict(state[p]) for key, p in self.params.items() if p in state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse. Parameters that ``state`` lacks start afresh; rates stay as configured."""
        self.optim.state.clear()
        for key, p in self.params.items():
            if key in state:
                self.optim.state[p] = {name: like(p, x) for name, x in state[key].items()}


@torch.no_grad()
def like(param: Tensor, x: Tensor) -> Tensor:
    """A copy of state ``x`` of a parameter on its device, in its order in memory (``gather``)."""
    if x.shape != param.shape:  # the count of steps
        return x.detach().clone().to(param.device)
    return torch.empty_like(param, dtype=x.dtype).copy_(x.detach())


def make_optimizer(
    kind: str,
    modules: Mapping[str, nn.Module],
    cls: type[Optimizer] = Optimizer,
    **settings: float,
) -> Optimizer:
    """An ``Optimizer`` whose algorithm is one of OPTIMIZERS; settings as ``Optimizer`` takes them.

    Raises ValueError for a name that there is not.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(
            f"there is no optimiser {kind!r}; there are {', '.join(sorted(OPTIMIZERS))}"
        )
    return cls(modules, algorithm=OPTIMIZERS[kind], **settings)


def make_optimizers(
    modules: Mapping[str, Mapping[str, nn.Module]],
    config: Any,
    capturable: bool,
    cls: type[Optimizer] = Optimizer,
) -> dict[str, Optimizer]:
    """For {loss: {name: module}}: one for each loss, or for ``optim: joint`` one, "joint", for all.

    A "probe" always has its own: its gradient has no part in the others' norm. config: of all keys;
    the explorer's losses have the settings of the others. capturable: whether steps can be recorded
    in a CUDA graph.
    """
    blocks = {"model": config.model, "actor": config.actor, "critic": config.critic}
    blocks |= {"joint": config.model, "probe": config.model}
    if config.optim == "joint":
        joint: dict[str, nn.Module] = {}
        for loss, group in modules.items():
            if loss != "probe":
                joint |= {joint_name(loss, name): module for name, module in group.items()}
        modules = {name: group for name, group in modules.items() if name == "probe"}
        modules |= {"joint": joint}
    optimizers = {}
    for name, group in modules.items():
        block = blocks[name.removeprefix("expl_")]
        settings = {"lr": block.lr, "eps": block.eps, "clip": block.clip}
        optimizers[name] = make_optimizer("adam", group, cls, **settings, capturable=capturable)
    return optimizers


def joint_name(loss_name: str, module: str) -> str:
    """The module's name in a joint optimiser: the explorer has an actor and a critic as well."""
    return f"expl_{module}" if loss_name.startswith("expl_") else module
