"""world_model: the hierarchical transformer over tokens and actions, with reward and continue.

Besides the config's mask, others are trained in the same way for the gate (``compare``): same seed,
same batches, as many updates. Shapes: B windows, T steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hidreamer.optim import Optimizer
from pipeline import data, tokenizer, training
from pipeline.gate import Gate
from pipeline.manifest import InputError, again
from pipeline.stage import Stage
from pipeline.token_model import (
    Actions,
    TokenWorldModel,
    Windows,
    load_all_tokens,
    tensors,
    token_rows,
    window_starts,
)
from tools import Config

BETAS = (0.9, 0.95)
LAST_LR = 1e-6


def make_optimizer(model: TokenWorldModel, block: Config, device: torch.device) -> Optimizer:
    """AdamW for dynamics and heads. block: pipeline.world_model of the config."""
    parts = {name: getattr(model, name) for name in ("dynamics", "reward", "cont")}
    settings: dict[str, Any] = {"lr": block.lr, "eps": 1e-8, "clip": block.clip}
    algorithm = training.adamw(block.decay, BETAS)
    settings |= {"capturable": device.type == "cuda", "algorithm": algorithm}
    if block.float16:
        return training.ScaledOptimizer(parts, device=device, **settings)
    return Optimizer(parts, **settings)


def actions_of(config: Config) -> Actions:
    """The action spaces of all games, put together."""
    widths = [data.space(config, game).actions for game in config.pipeline.games]
    return Actions(widths, config.pipeline.world_model.game_token)


class WorldModel(Stage):
    """Trains the token transformer with its reward and continue heads, once for every mask."""

    name = "world_model"
    needs = ("collect", "encoder", "tokenizer")
    keys = ("pipeline.world_model", "pipeline.probe_steps", "dynamics", "reward", "cont")
    keys += ("model.losses.reward", "model.losses.cont", "imag.contdisc", "precision")

    @classmethod
    def identity(cls, config: Config) -> dict[str, Any]:
        """As of ``Stage``; the discount is one of them where the continue head learns it."""
        learned = {"imag.discount": config.imag.discount} if config.imag.contdisc else {}
        return super().identity(config) | learned

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        super().__init__(config, root, device, report)
        block = self.block = config.pipeline.world_model
        own = config.dynamics.hrvq.mask
        self.masks = list(dict.fromkeys([own, *(m for m in block.compare if m != "none")]))
        self.encoder, self.quantizer = tokenizer.load(root, config, device)
        self.recordings = data.load_all(root, config)
        self.tokens = load_all_tokens(root, self.recordings)
        self.actions = actions_of(config)
        self.rows = []
        for i, (recording, tokens) in enumerate(zip(self.recordings, self.tokens, strict=True)):
            self.rows.append(token_rows(recording, tokens, self.actions, i))
        # Of windows alone: dropout draws from the global one, as often as the mask has positions.
        self.generator = torch.Generator()
        sizes = {"batch": block.batch, "length": block.length, "balance": block.balance}
        self.windows = Windows(self.recordings, self.rows, **sizes, generator=self.generator)
        for recording in self.recordings:  # the gate needs them: not to be told after training
            window_starts(recording, block.length, held=True)
        steps = sum(len(recording.rows(held=False)) for recording in self.recordings)
        each = steps // (block.batch * block.accumulate * block.length)
        self.updates = block.epochs * max(each, 1)  # of each mask
        self.total = self.updates * len(self.masks)
        self.rng = torch.get_rng_state()  # with which every mask begins
        self.models: list[TokenWorldModel] = []  # those that are finished, and the present one
        self._begin(0)

    def _begin(self, index: int) -> None:
        """The model and the batches of another mask begin as those of the first."""
        torch.set_rng_state(self.rng)
        self.generator.manual_seed(self.config.seed)
        quantizer, mask = copy.deepcopy(self.quantizer), self.masks[index]
        model = TokenWorldModel(self.encoder, quantizer, self.actions.width, self.config, mask)
        self.models.append(model.to(self.device))
        self.optimizer = make_optimizer(model, self.block, self.device)

    def advance(self) -> Mapping[str, Tensor]:
        index, update = divmod(self.step, self.updates)
        if index == len(self.models):
            self._begin(index)
        block = self.block
        warmup = min(block.warmup, self.updates // 4)  # of short runs, too
        lr = training.cosine(update, self.updates, block.lr, LAST_LR, warmup)
        training.set_lr(self.optimizer, lr)
        metrics = accumulate(self.models[index], self.optimizer, self._batches(), self.config)
        self.step += 1
        prefix = "" if index == 0 else f"{self.masks[index]}/"
        return {prefix + name: x for name, x in metrics.items()}

    def _batches(self) -> list[dict[str, Tensor]]:
        return [tensors(self.windows.sample(), self.device) for _ in range(self.block.accumulate)]

    def save_state(self) -> dict[str, Any]:
        params = [model.state_dict() for model in self.models]
        state = {"params": params, "optim": self.optimizer.state_dict()}
        return state | {"draws": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for one of an older version, whose masks saw different windows."""
        if "draws" not in state:
            raise InputError(
                f"{self.folder} was begun by an older version, which drew windows otherwise:"
                f" {again(self.folder)}"
            )
        for i, params in enumerate(state["params"]):
            if i == len(self.models):
                self._begin(i)
            self.models[i].load_state_dict(params)
        self.optimizer.load_state_dict(state["optim"])
        self.generator.set_state(state["draws"])

    def finish(self) -> tuple[Gate, list[Path]]:
        from pipeline import world_model_gate

        for model in self.models:
            model.eval()
        outputs = [training.save_params(self.folder / "world_model.pt", self.models[0])]
        return world_model_gate.evaluate(self), outputs


def accumulate(
    model: TokenWorldModel, optimizer: Optimizer, batches: list[dict[str, Tensor]], config: Config
) -> dict[str, Tensor]:
    """One update along the mean gradient of several batches, that of a large one. -> metrics."""
    device, found = batches[0]["reward"].device, []
    float16 = config.pipeline.world_model.float16
    dtype = torch.float16 if float16 else torch.bfloat16
    half = {"enabled": float16 or config.precision == "bfloat16", "cache_enabled": False}
    for batch in batches:
        with torch.autocast(device.type, dtype, **half):
            losses, _, _, _, metrics = model.loss(batch)
        loss = sum(losses.values()).mean()
        optimizer.gather(loss / len(batches))
        named = {f"{name}_loss": x.detach().mean() for name, x in losses.items()}
        found.append({"model_loss": loss.detach()} | named | metrics)
    steps = optimizer.apply()
    means = {}
    for name in found[0]:
        means[name] = torch.stack([each[name] for each in found]).mean()
    shown = ("grad_norm", "skipped")  # the second is of float16
    return means | {name: steps[name] for name in shown if name in steps}


def load(
    root: Path, config: Config, device: torch.device, game: int | None = None
) -> TokenWorldModel:
    """What the stage trained. game: an index among the config's; its own action vectors are then
    those of the model. Raises FolderError, ConfigError.
    """
    encoder, quantizer = tokenizer.load(root, config, device)
    actions = actions_of(config)
    model = TokenWorldModel(encoder, quantizer, actions.width, config).to(device)
    training.load_params(root / "world_model" / "world_model.pt", model)
    if game is not None:
        dynamics, columns = model.dynamics, actions.columns[game]
        layer = dynamics.token[-1]  # (W, A): of the actions
        layer.weight = torch.nn.Parameter(layer.weight.detach()[:, columns].clone())
        layer.in_features = dynamics.act_dim = columns.stop - columns.start
    return model.eval()
