"""What a stage is, and the loop that runs one.

A stage owns ``LOGDIR/NAME``, written like a run of ``dreamer.py``: config.yaml, metrics.jsonl,
TensorBoard events, checkpoints. It ends with a gate (gate.json, gate.md), and last of all a
manifest. The same command again continues after whatever killed it; once finished, it shows the
gate and changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import tools
from hidreamer import checkpoint, precision
from hidreamer.logger import Logger, Screen
from hidreamer.metrics import Means
from hidreamer.provenance import note_start, provenance
from pipeline import gate, manifest
from pipeline.gate import Gate
from pipeline.manifest import InputError, again
from run_config import differences
from run_setup import write_yaml
from tools import Config

FIELDS = {  # of every checkpoint of a stage
    "stage": str,
    "step": int,
    "seconds": float,
    "log_size": int,
    "config": dict,
    "inputs": dict,
    "window": list,
    "torch_rng": Tensor,
    "body": dict,
}
# Keys that decide what a stage makes, whichever it is.
COMMON = ("seed", "pipeline.games", "pipeline.stack", "pipeline.held_out")


class StageError(Exception):
    """One line: the stage cannot continue, and why. Exit status 1."""


class Stage:
    """One stage of the pipeline, made anew by each process; ``load_state`` puts it where it was.

    On one machine and thread count, a stage that was killed and continued makes, bit for bit, what
    one that was never killed makes, but for the speed in the gate of ``collect``: ``advance`` reads
    the clock for nothing else, and all randomness is torch's global generator (which the runner
    saves) or in ``save_state``.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # stages that it is built on
    keys: ClassVar[tuple[str, ...]] = ()  # config keys, or groups of them, that decide its outputs
    total = 1  # steps; set in __init__
    step = 0  # steps done; ``advance`` moves it

    def __init__(self, config: Config, root: Path, device: torch.device, report: Callable):
        self.config, self.root, self.device, self.report = config, root, device, report
        self.folder = root / self.name
        self.poll: Callable[[], None] = lambda: None  # called in a long ``finish``; it may raise

    def advance(self) -> Mapping[str, Tensor | float]:
        """One step or several. -> metrics by name, () each; the next record has their means."""
        raise NotImplementedError

    def save_state(self) -> dict[str, Any]:
        """All that ``advance`` depends on besides config and inputs: tensors and plain values."""
        raise NotImplementedError

    def load_state(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def finish(self) -> tuple[Gate, list[Path]]:
        """Write the outputs. -> the gate, and the paths of what was written."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the manifest says of this stage alone: plain values by name."""
        return {}

    def refuse_used(self) -> None:
        """Raises FolderError where there is no checkpoint but something that would be replaced."""
        checkpoint.refuse_used_folder(self.folder)

    def close(self) -> None:
        """Release what ``__init__`` took."""

    @classmethod
    def export(cls, config: Config, root: Path, report: Callable) -> None:
        """Write what was asked for outside of LOGDIR and is not there; the stage is finished.

        Raises OSError.
        """

    @classmethod
    def identity(cls, config: Config) -> dict[str, Any]:
        """The config keys that decide this stage's outputs, with their values."""
        return manifest.relevant(config.flat(), (*COMMON, *cls.keys))


class StageScreen(Screen):
    """A live bar with the stage's name, its last metrics and the time left."""

    def __init__(self, stage: str, total: int):
        super().__init__(total, "{task.description} {task.fields[losses]} left")
        self.stage = stage
        self.bar.update(self.task, description=stage)

    def _show(self, step: int, updates: int, losses: Mapping[str, float], score: Any) -> None:
        self.shown, self.latest = time.monotonic(), None
        shown = " ".join(f"{name} {value:.3g}" for name, value in losses.items())
        self.bar.update(self.task, completed=step, losses=shown)
        if self.bar.disable:
            self.line(f"[{self.stage} {step}/{self.total}] {shown}")


class Runner:
    """Runs one stage to its end. ``poll`` is called between two steps and may raise to stop it."""

    def __init__(self, stage: Stage, inputs: Mapping[str, str]):
        self.stage, self.inputs = stage, dict(inputs)
        self.folder, self.config = stage.folder, stage.config
        self.seconds, self.since = 0.0, time.monotonic()  # of earlier processes; this one's start
        self.window = Means(stage.device)
        self.names: tuple[str, ...] = ()
        self.shown: dict[str, float] = {}
        size = self._restore()
        write = functools.partial(write_yaml, tree=self.config.tree())
        checkpoint.replace_file(self.folder / "config.yaml", write)
        note_start(self.folder, provenance())
        block = self.config.pipeline
        self.every = {
            "log": tools.Every(block.log_every),
            "checkpoint": tools.Every(block.checkpoint_every),
        }
        for every in self.every.values():
            every.done(stage.step)
        self.logger = Logger(self.folder, stage.step, size or 0)
        if size is None:
            self.save()  # from now on the stage can be continued if killed at any moment

    def _restore(self) -> int | None:
        """-> size of metrics.jsonl that the checkpoint vouches for, None where there is none.

        Raises FolderError.
        """
        folder = self.folder / "checkpoints"
        state, _, problems = checkpoint.find_checkpoint(folder, FIELDS)
        if state is None:
            self.stage.refuse_used()
            return None
        for problem in problems:
            self.stage.report(problem)
        if changed := differences(state["config"], self.stage.identity(self.config)):
            raise InputError(
                f"{self.folder} holds a stage with another config ({changed}): choose another"
                " --logdir, or move it away"
            )
        if state["inputs"] != self.inputs:
            raise InputError(
                f"{self.folder} was begun on other inputs than are there now: {again(self.folder)}"
            )
        self.stage.load_state(state["body"])
        self.stage.step, self.seconds = state["step"], state["seconds"]
        names, sums, self.window.count = state["window"]
        self.names, self.window.sums = tuple(names), sums.to(self.stage.device)
        torch.set_rng_state(state["torch_rng"])
        if problems:
            checkpoint.set_aside(folder / "latest.pt")
        if state.get("cuda_rng") is not None and self.stage.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.stage.device)
        return checkpoint.size_of_log(self.folder / "metrics.jsonl", state["log_size"])[0]

    def run(self, poll: Callable[[], None], screen: StageScreen) -> Gate:
        """Raises what ``poll`` raises, after which ``save`` may be called, and StageError."""
        stage = self.stage
        while stage.step < stage.total:
            poll()
            self._record(stage.advance())
            if self.every["log"].due(stage.step) or stage.step >= stage.total:
                self.log()
            if self.every["checkpoint"].due(stage.step) or stage.step >= stage.total:
                self.save()
            screen.update(stage.step, stage.step, self.shown, None)
        found, outputs = stage.finish()
        outputs = [*outputs, *found.write(self.folder)]
        facts = {
            "stage": stage.name,
            "config": stage.identity(self.config),
            "seed": self.config.seed,
            "steps": stage.step,
            "seconds": round(self._seconds(), 1),
            **provenance(),
            **stage.facts(),
        }
        manifest.write(self.folder, outputs, self.inputs, facts)
        return found

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.since

    def _record(self, metrics: Mapping[str, Tensor | float]) -> None:
        if not metrics:
            return
        if tuple(metrics) != self.names:
            self.log()
            self.names = tuple(metrics)
        values = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
        self.window.add(torch.stack([x.detach().to(self.stage.device) for x in values]))

    def log(self) -> None:
        """Record the means since the last record. Raises StageError where one is not finite."""
        if not self.window.count:
            return
        means = self.window.read(self.names)
        step = self.stage.step
        if name := self.window.first_nonfinite(means):
            raise StageError(
                f"{name} became {means[name]} by step {step} of {self.stage.name}; the last good"
                f" checkpoint is {self.folder / 'checkpoints' / 'latest.pt'}"
            )
        self.logger.scalars(step, means)
        self.shown = dict(list(means.items())[:3])
        self.window.reset()
        self.every["log"].done(step)

    def save(self) -> None:
        """Write a checkpoint. Raises OSError."""
        stage = self.stage
        cuda = torch.cuda.get_rng_state(stage.device) if stage.device.type == "cuda" else None
        state = {
            "stage": stage.name,
            "step": stage.step,
            "seconds": self._seconds(),
            "log_size": self.logger.flush(),
            "config": stage.identity(self.config),
            "inputs": self.inputs,
            "window": [list(self.names), self.window.sums, self.window.count],
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": cuda,
            "body": stage.save_state(),
        }
        checkpoint.save_checkpoint(self.folder / "checkpoints" / "latest.pt", state)
        self.every["checkpoint"].done(stage.step)

    def close(self) -> None:
        self.logger.close()
        self.stage.close()


def finished(kind: type[Stage], config: Config, root: Path) -> dict[str, Any] | None:
    """The gate of a stage that is done; None where it is still to be run.

    Raises InputError where what is there was made with another config, from other inputs, or is
    damaged, or its inputs are.
    """
    folder = root / kind.name
    body = manifest.read(folder)
    if body is None:
        return None
    if changed := differences(body["config"], kind.identity(config)):
        raise InputError(
            f"{folder} holds a finished stage with another config ({changed}): choose another"
            " --logdir, or move it away"
        )
    for name in (*kind.needs, kind.name):
        manifest.check_input(root, name, kind.name, config.flat())
    return gate.read(folder)


def run(
    kind: type[Stage],
    config: Config,
    root: Path,
    device: torch.device,
    poll: Callable[[], None],
    stops: Iterable[type[BaseException]] = (),
) -> dict[str, Any]:
    """Run or continue a stage. -> its gate, as ``Gate.tree``.

    stops: exceptions of ``poll`` before which the state is saved. Raises FolderError, ConfigError,
    StageError, OSError.
    """
    if (found := finished(kind, config, root)) is not None:
        kind.export(config, root, print)
        return found
    inputs = {}
    for name in kind.needs:
        inputs[name] = manifest.check_input(root, name, kind.name, config.flat())
    with checkpoint.locked(root / kind.name), contextlib.ExitStack() as stack:
        precision.set_precision(config, device)
        tools.seed_all(config.seed)  # networks begin the same in every process of a stage
        stage = kind(config, root, device, print)
        stack.callback(stage.close)
        runner = Runner(stage, inputs)
        stack.callback(runner.logger.close)
        screen = stack.enter_context(StageScreen(kind.name, stage.total))
        stage.report, stage.poll = screen.line, poll
        try:
            found = runner.run(poll, screen).tree()
        except tuple(stops):
            runner.save()
            raise
        kind.export(config, root, stage.report)
        return found
