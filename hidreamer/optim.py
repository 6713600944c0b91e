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


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): momentum of normalised gradients, where Adam normalises the
    momentum. Counters stay on the device, whatever ``capturable`` says.

        v = b2 v + (1 - b2) g^2;  m = b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)
        p = p - lr m / (1 - b1^t)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float | Tensor,
        eps: float,
        betas: tuple[float, float] = (0.9, 0.999),
        capturable: bool = False,
    ):
        super().__init__(params, {"lr": lr, "eps": eps, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    step = torch.zeros((), dtype=torch.float32, device=p.device)
                    moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": step} | moments
            if params:
                self._update(params, group["lr"], group["eps"], *group["betas"])

    def split_by_steps(self) -> None:
        """Let parameters that have made as many steps be a group: all of one are corrected by the
        same count.
        """
        by_steps: dict[float, list[Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                made = float(self.state[p]["step"]) if p in self.state else 0.0
                by_steps.setdefault(made, []).append(p)
        first = self.param_groups[0]
        self.param_groups = [first | {"params": params} for params in by_steps.values()]

    def _update(
        self, params: list[Tensor], lr: float | Tensor, eps: float, beta1: float, beta2: float
    ) -> None:
        keys = "step", "exp_avg", "exp_avg_sq"
        steps, mean, square = ([self.state[p][key] for p in params] for key in keys)
        grads = [p.grad for p in params]
        torch._foreach_add_(steps, 1.0)
        count = steps[0]  # a group is stepped together, see ``split_by_steps``
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1.0 - beta2)
        root = torch._foreach_sqrt(square)
        torch._foreach_mul_(root, torch.rsqrt(1.0 - beta2**count))
        torch._foreach_add_(root, eps)
        torch._foreach_lerp_(mean, torch._foreach_div(grads, root), 1.0 - beta1)
        torch._foreach_sub_(params, torch._foreach_mul(mean, lr / (1.0 - beta1**count)))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": adam, "laprop": LaProp}
PMIN = 1e-3  # the norm that AGC takes smaller parameters to have


class Optimizer:
    """Steps of the parameters of named modules, clipped by their global norm.

    ``step(loss)`` is ``gather(loss)``, then ``apply()``; several losses may be gathered before. It
    touches these parameters only, whatever else a loss depends on, and reads nothing on the host.

    algorithm: makes the optimiser of parameters, as those of OPTIMIZERS do. ``clip`` 0 means no
    clipping, ``agc`` 0 none by each parameter's own norm. warmup: steps over which the learning
    rate grows from 0 (the first step has none, as in DreamerV3 of 2024). ``capturable`` keeps the
    step counters on the device, as a CUDA graph needs.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        lr: float,
        eps: float,
        clip: float,
        agc: float = 0.0,
        warmup: int = 0,
        capturable: bool = False,
        algorithm: Callable[..., torch.optim.Optimizer] = adam,
    ):
        self.params: dict[str, nn.Parameter] = {}  # of all groups
        self.groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, module in modules.items():
            named = module.named_parameters()
            self.groups[name] = {f"{name}.{key}": p for key, p in named if p.requires_grad}
            self.params |= self.groups[name]
        self.clip, self.agc, self.warmup, self.lr = clip, agc, warmup, lr
        if warmup:  # changed in place, so that a recorded graph sees it
            lr = torch.zeros((), device=next(iter(self.params.values())).device)
        self.optim = algorithm(self.params.values(), lr=lr, eps=eps, capturable=capturable)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """loss: (). -> metrics of ``apply``."""
        self.gather(loss)
        return self.apply()

    def gather(
        self, loss: Tensor, modules: Iterable[str] | None = None, retain: bool = False
    ) -> None:
        """Add the gradient of ``loss`` (), for these modules (None: all), to the next step's.

        retain: keep the graph, for another loss that shares a part of it.
        """
        params = []
        for name in modules or self.groups:
            params += self.groups[name].values()
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": retain}
        grads = torch.autograd.grad(loss, params, **options)
        for param, grad in zip(params, grads, strict=True):
            grad = grad if param.grad is None else param.grad + grad
            # The fused kernel walks through memory. A gradient that lies there in another order
            # (channels last, from a convolution) would silently change other weights than its own:
            # autograd.grad does not put it right.
            aligned = grad.stride() == param.stride()
            param.grad = grad if aligned else torch.empty_like(param).copy_(grad)

    def apply(self) -> dict[str, Tensor]:
        """One step along what was gathered, for every module that it was gathered for.

        -> gradient norm in all, by module, and whether the step was clipped; each ().
        """
        grads: dict[str, list[Tensor]] = {}
        for name, group in self.groups.items():
            found = [p.grad for p in group.values() if p.grad is not None]
            if found:
                grads[name] = found
        every = [grad for group in grads.values() for grad in group]
        norms = self.norms(every)
        total = torch.linalg.vector_norm(norms, dim=0)
        metrics = {"grad_norm": total}
        if len(grads) > 1:
            parts = norms.split([len(group) for group in grads.values()])
            for name, part in zip(grads, parts, strict=True):
                metrics[f"grad_norm_{name}"] = torch.linalg.vector_norm(part, dim=0)
        if self.agc:
            metrics["agc_clipped"] = self.clip_each()
        if self.clip:
            if self.agc:  # which has shortened them: what is left is to be no longer than ``clip``
                total = torch.linalg.vector_norm(self.norms(every), dim=0)
            self.rescale(total)
            metrics["clipped"] = (total > self.clip).float()
        if self.warmup:
            self._set_rate()
        self._move()
        self.optim.zero_grad()
        return metrics

    def norms(self, grads: list[Tensor]) -> Tensor:
        """Of each of M gradients, (M,)."""
        return torch.stack(torch._foreach_norm(grads))

    @torch.no_grad()
    def rescale(self, total: Tensor) -> None:
        """Clip the gradients, whose norm is ``total``, ()."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        torch._foreach_div_(grads, (total / self.clip).clamp(min=1.0))

    @torch.no_grad()
    def clip_each(self) -> Tensor:
        """Adaptive gradient clipping (Brock et al. 2021), by whole parameters as in DreamerV3 of
        2024: no gradient is longer than ``agc`` times its parameter. -> share that was longer, ().
        """
        params = [p for p in self.params.values() if p.grad is not None]
        grads = [p.grad for p in params]
        upper = torch.stack(torch._foreach_norm(params)).clamp(min=PMIN) * self.agc
        ratio = torch.stack(torch._foreach_norm(grads)) / upper
        torch._foreach_div_(grads, ratio.clamp(min=1.0).unbind())
        return (ratio > 1.0).float().mean()

    def _set_rate(self) -> None:
        """Of the next step, from the steps that were made, so that it continues after a resume."""
        state = self.optim.state.get(next(iter(self.params.values())))
        rate = self.optim.param_groups[0]["lr"]
        if state:
            rate.copy_((state["step"] / self.warmup).clamp(max=1.0) * self.lr)

    def _move(self) -> None:
        self.optim.step()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {"step", "exp_avg", "exp_avg_sq"}}: by name, to fit another model."""
        state = self.optim.state
        return {key: dict(state[p]) for key, p in self.params.items() if p in state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse. Parameters that ``state`` lacks start afresh; rates stay as configured, and
        what was gathered for a next step is dropped.
        """
        self.optim.zero_grad()  # of an update that broke off
        self.optim.state.clear()
        for key, p in self.params.items():
            if key in state:
                self.optim.state[p] = {name: like(p, x) for name, x in state[key].items()}
        if isinstance(self.optim, LaProp):
            self.optim.split_by_steps()


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
    if config.optim == "joint":
        joint: dict[str, nn.Module] = {}
        for loss, group in modules.items():
            if loss != "probe":
                joint |= {joint_name(loss, name): module for name, module in group.items()}
        modules = {name: group for name, group in modules.items() if name == "probe"}
        modules |= {"joint": joint}
    optimizers = {}
    for name, group in modules.items():
        block = config[settings_of(name)]
        settings = {"lr": block.lr, "eps": block.eps, "clip": block.clip}
        settings |= {"agc": block.agc, "warmup": block.warmup, "capturable": capturable}
        optimizers[name] = make_optimizer(block.algorithm, group, cls, **settings)
    return optimizers


def settings_of(name: str) -> str:
    """The config's block that an optimiser has its settings from."""
    return "model" if name in ("joint", "probe") else name.removeprefix("expl_")


def of_same_algorithm(
    optim: Mapping[str, Any], theirs: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """Of the optimiser states ``optim`` of a run with the config ``theirs`` (a tree, empty for
    Adam's), by name, those that mean the same in a run with ``config``.

    LaProp's ``exp_avg`` is of normalised gradients: Adam would divide it by their size once more.
    """
    kept = {}
    for name, state in optim.items():
        block = settings_of(name)
        if theirs.get(block, {}).get("algorithm", "adam") == config[block]["algorithm"]:
            kept[name] = state
    return kept


def joint_name(loss_name: str, module: str) -> str:
    """The module's name in a joint optimiser: the explorer has an actor and a critic as well."""
    return f"expl_{module}" if loss_name.startswith("expl_") else module
