"""One world model trained on recorded episodes, and judged on others:
a job of ``--paired-offline``.

    python -m analysis.offline --configs PRESET ... --task TASK --seed S --logdir FOLDER
        --episodes FOLDER ... --updates N

Models that are given the same episodes and seed see the same batches in the same order. The same
command again continues; ``results.npz`` marks it as done.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import run_config
import tools
from analysis import heldout, probes
from comparison.runs import config_hash
from envs import EnvError, env_for_spaces
from hidreamer import app, checkpoint
from hidreamer.checkpoint import READ_ERRORS, CheckpointError
from hidreamer.episodes import EpisodeError, load_episode, named_rows, summary
from hidreamer.logger import Rates
from hidreamer.replay import Replay, Rows, Spec, row_spec
from hidreamer.update import train_model
from run_setup import check_objectives
from tools import Config, ConfigError

EVERY = 5  # each fifth episode is held out
LEAST = 2 * EVERY  # episodes that are needed, so that two are held out
MOST = 50  # held-out episodes that are looked at
LOG, SAVE = 20, 200  # updates between two records, two checkpoints
FIELDS = {  # of every checkpoint
    "update": int,
    "same": str,
    "agent": dict,
    "replay_rng": dict,
    "torch_rng": torch.Tensor,
}
RESULTS = "results.npz"


def find(folders: list[str]) -> list[Path]:
    """The episodes in run folders or in folders of .npz files. Raises ConfigError."""
    files: list[Path] = []
    for folder in map(tools.user_path, folders):
        inside = folder / "train_eps" if (folder / "train_eps").is_dir() else folder
        files += sorted(inside.glob("*.npz"))
    if len(files) < LEAST:
        raise ConfigError(
            f"{' '.join(folders)} holds {len(files)} episodes, and {LEAST} are needed: name a"
            " run's folder or its train_eps"
        )
    return files


def check(files: list[Path], config: Config) -> None:
    """Raises ConfigError where none of the first ``LEAST`` episodes is whole and
    of the config's task.
    """
    env = env_for_spaces(config.task, config.env.tree())
    spec, problems = row_spec(env.obs_space, env.act_dim), []
    for path in files[:LEAST]:
        try:
            load_episode(path, spec, named_rows(path))
            return
        except EpisodeError as error:
            problems.append(f"{path}: {error}")
    raise ConfigError(
        f"{problems[0]}; nor is another of the first {LEAST} episodes one of task {config.task}"
    )


def load(files: Iterable[Path], spec: Spec) -> dict[Path, Rows]:
    """The rows of the episodes that are whole and have those of ``spec``;
    a line is printed about the others.
    """
    files, found, problems = list(files), {}, []
    for path in files:
        try:
            found[path] = load_episode(path, spec, named_rows(path))
        except EpisodeError as error:
            problems.append((path, error))
    for line in summary(problems, len(files)):
        print(line)
    return found


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """-> for training, held out."""
    held = files[EVERY - 1 :: EVERY]
    others = set(files) - set(held)
    return [path for path in files if path in others], held


def spread(files: list[Path], most: int) -> list[Path]:
    """At most so many of them, evenly spaced."""
    picks = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)
    return [files[i] for i in picks]


def digest(files: Iterable[Path]) -> str:
    """Of the names of episodes."""
    names = "\n".join(str(path.resolve()) for path in files)
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def finished(
    folder: Path, updates: int, config: Config | None = None, files: Iterable[Path] = ()
) -> bool:
    """Whether a job's results are there, after so many updates.

    config, files: what is asked for, if known, whatever the seed. Raises ConfigError for results
    of another config or other episodes, which would stand in the report as what they are not.
    """
    try:
        with np.load(folder / RESULTS) as file:
            done = int(file["updates"]) == updates
            # results of older versions lack both
            made = [str(file[key]) for key in ("config", "episodes") if key in file]
    except READ_ERRORS:
        return False
    if config is not None and made:
        old = json.loads(made[0]) | {"seed": config.seed}
        run_config.check_same_run(folder, old, config, "choose another --logdir")
        if made[1] != digest(files):
            raise ConfigError(f"{folder} was trained on other episodes: choose another --logdir")
    return done


def read(folder: Path) -> dict[str, np.ndarray]:
    """What a finished job measured: ``Trainer.evaluate``, "updates" and "training" episodes."""
    with np.load(folder / RESULTS) as file:
        # before 0.2.0 the baseline's metrics were "sceptic/..."
        return {name.replace("sceptic/", "baseline/"): x for name, x in file.items()}


class Trainer:
    """A world model, its optimiser and its batches."""

    def __init__(self, config: Config, files: list[Path], logdir: Path, device: torch.device):
        check_objectives(config)
        self.config, self.logdir, self.device = config, logdir, device
        self.log = logdir / "metrics.jsonl"
        self.train_files, self.held_files = split(files)
        env = env_for_spaces(config.task, config.env.tree())
        self.spec = row_spec(env.obs_space, env.act_dim)
        rng = tools.seed_all(config.seed)["replay"]  # the same for every model of this seed
        self.agent = models.make_agent(env, config, device)
        self.agent.make_optimizers()
        self.untrained = copy.deepcopy(self.agent.world_model)
        self.load = functools.partial(load, spec=self.spec)
        episodes = self.load(self.train_files)
        self.count = len(episodes)
        # that probes are fitted on, of all ages of the run
        self.probed = {path: episodes[path] for path in spread(list(episodes), probes.EPISODES)}
        sizes = {"batch": config.replay.batch, "length": config.replay.length}
        total = sum(len(rows["reward"]) for rows in episodes.values())
        self.replay = Replay(self.spec, capacity=total, streams=1, rng=rng, **sizes)
        for rows in episodes.values():
            self.replay.streams[0].extend(rows)
        if not self.replay.ready():
            raise ConfigError(
                f"the episodes have {len(self.replay)} steps; "
                f"a sequence needs {config.replay.length}"
            )
        decoder = self.agent.world_model.decoder
        if not any(decoder.kinds.values()):
            raise ConfigError(
                "models are judged by what they decode, and this one decodes nothing: add"
                " --decoder.probe true"
            )
        rows = self.replay.streams[0].slice(0, total)
        keys = [*decoder.kinds["image"], *decoder.sizes]
        self.baseline = heldout.Baseline(rows, keys, config.reward.bins)
        self.update, self.signal = 0, 0
        self.same = config_hash(config.flat()) + digest(files)

    def batch(self, rows: Rows) -> models.Batch:
        return self.agent.tensors({key: x for key, x in rows.items() if key != "is_last"})

    # ------------------------------------------------------------ training

    def train(self, updates: int) -> None:
        """On to ``updates``, or to a signal, and save.
        Raises ArithmeticError where the loss is no number.
        """
        rates = Rates(0, self.update)
        self.logdir.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            while self.update < updates and not self.signal:
                loss = self.step()
                if self.update % LOG == 0 or self.update == updates:
                    if not loss.isfinite():
                        raise ArithmeticError(
                            f"model_loss became {loss.item()} by update {self.update}"
                        )
                    record = {"step": self.update, "model_loss": loss.item()}
                    record["perf/updates_per_s"] = rates(0, self.update)[1]
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                if self.update % SAVE == 0 and self.update < updates:
                    self.save()  # with all records so far: each was flushed
        self.save()

    def on_signal(self, signum: int, frame: Any) -> None:
        """A signal handler: ``train`` ends after the running update and saves."""
        self.signal = signum

    def step(self) -> torch.Tensor:
        """One update. -> the loss, detached."""
        batch = self.batch(self.replay.sample())
        loss = train_model(self.agent, models.networks.preprocess(batch))
        self.update += 1
        return loss

    def save(self) -> None:
        state = {"update": self.update, "same": self.same, "agent": self.agent.save_state()}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state |= {
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": cuda,
            "replay_rng": self.replay.rng.bit_generator.state,
            "log_size": self.log.stat().st_size,
        }
        checkpoint.save_checkpoint(self.logdir / "checkpoints" / "latest.pt", state)

    def resume(self, updates: int) -> None:
        """Continue towards ``updates`` from the folder's checkpoint, if there is one.

        Raises ConfigError where that was another training or a longer one, CheckpointError where
        it cannot be read.
        """
        folder = self.logdir / "checkpoints"
        state, _, problems = checkpoint.find_checkpoint(folder, FIELDS)
        if state is None:
            self.cut_log(0)
            return
        if state["same"] != self.same:
            raise ConfigError(
                f"{self.logdir} was trained on other episodes or with another config: "
                "choose a --logdir"
            )
        if state["update"] > updates:
            raise ConfigError(
                f"{self.logdir} has had {state['update']} updates: ask for as many or more, or"
                " move it away, for fewer cannot be had from it"
            )
        self.agent.load_state(state["agent"])
        self.update = state["update"]
        torch.set_rng_state(state["torch_rng"])
        if state.get("cuda_rng") is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if "log_size" in state:  # older checkpoints lack it
            self.cut_log(state["log_size"])
        self.replay.rng.bit_generator.state = state["replay_rng"]
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            checkpoint.set_aside(folder / "latest.pt")

    def cut_log(self, size: int) -> None:
        """Drop the records of updates that are made again, after whatever killed the job."""
        if self.log.exists():
            os.truncate(self.log, checkpoint.size_of_log(self.log, size)[0])

    # ------------------------------------------------------------ evaluating

    def held(self) -> dict[Path, Rows]:
        """At most MOST held-out episodes, of all ages of the run."""
        return self.load(spread(self.held_files, MOST))

    def evaluate(self) -> dict[str, np.ndarray]:
        """{"model/METRIC" and "baseline/METRIC": (held-out episodes,)}.
        Raises ConfigError where none can be read.
        """
        model, found = self.agent.world_model, []
        held = self.held()
        if not held:
            raise ConfigError(f"none of the {len(self.held_files)} held-out episodes can be read")
        for i, rows in enumerate(held.values()):
            batch = self.batch(heldout.chunks(rows, self.config.replay.length))
            torch.manual_seed(i)
            truth = model.postprocess(models.networks.preprocess(batch))
            score = functools.partial(
                heldout.score, truth=truth, batch=batch, length=self.config.replay.length
            )
            with self.agent.autocast():
                predicted = heldout.predict(model, batch)
            by = {"model": score(predicted), "baseline": score(self.baseline.predict(truth))}
            scores = {}
            for who, metrics in by.items():
                scores |= {f"{who}/{name}": x for name, x in metrics.items()}
            found.append(scores)
        scores = {}
        for name in found[0]:
            scores[name] = np.array([episode[name] for episode in found])
        return scores | probes.compare(self.probe(held))

    def probe(self, held: Mapping[Path, Rows]) -> dict[str, dict[str, probes.Squares]]:
        """``probes.squares`` of this model, its untrained self and raw pixels;
        empty where there is no RAM.
        """
        empty: dict[str, dict[str, probes.Squares]] = {"model": {}}
        if not probes.possible(self.config):
            return empty

        def chunks(path: Path, rows: Rows) -> Rows | None:
            ram = probes.cached(path, rows, self.config, self.logdir.parent.parent / "ram")
            if ram is None:
                return None
            return heldout.chunks(rows | {"ram": ram}, self.config.replay.length)

        @torch.no_grad()
        def features(model: models.WorldModel, batch: Rows) -> np.ndarray:
            torch.manual_seed(0)
            rows = {key: x for key, x in batch.items() if key != "ram"}
            obs = models.networks.preprocess(self.batch(rows))
            with self.agent.autocast():
                feat = model.observe(obs)[1].feat.cat()
            return feat.flatten(0, 1).float().cpu().numpy()

        encoders: dict[str, probes.Encode] = {"pixels": probes.pixels}
        encoders["model"] = functools.partial(features, self.agent.world_model)
        encoders["untrained"] = functools.partial(features, self.untrained)
        train = []
        for path, rows in self.probed.items():
            if (episode := chunks(path, rows)) is not None:
                train.append(episode)
        test = [chunks(path, rows) for path, rows in held.items()]
        if not train:
            return empty
        names = probes.BYTES[self.config.task]
        return probes.squares(encoders, train, test, names)


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 1 failure, 2 bad arguments, 128 + signal after a signal."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        args = tools.parse(argv)
        values: dict[str, Any] = dict(args.overrides)
        for key in ("logdir", "episodes", "updates"):
            if values.get(key, True) is True:  # a key without a value
                raise ConfigError(f"--{key} is missing; python -m analysis.offline --help has all")
        folders = values.pop("episodes")
        updates = tools.coerce("updates", values.pop("updates"), 0, "At least 1.")
        config = tools.load_config(args.presets, values)
        logdir = tools.user_path(config.logdir)
        files = find(folders if isinstance(folders, list) else [folders])
        trainer = Trainer(config, files, logdir, models.pick_device(config))
        trainer.resume(updates)
    except (ConfigError, CheckpointError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, trainer.on_signal)
    try:
        trainer.train(updates)
        if trainer.signal:
            return 128 + trainer.signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is lost by stopping from here on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        results: dict[str, Any] = trainer.evaluate()
        results |= {"updates": updates, "training": trainer.count}
        results |= {"config": json.dumps(config.flat()), "episodes": digest(files)}
        write = functools.partial(checkpoint.write_npz, rows=results, compressed=False)
        checkpoint.replace_file(logdir / RESULTS, write)
    except (ArithmeticError, ConfigError, EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
