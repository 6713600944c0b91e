"""One update of other people's implementations, from checkouts of theirs, at the sizes of a config
of ours: of random images of 64 x 64 and 6 actions, as ``beside.py`` measures it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure  # noqa: F401  finds the project's modules
import torch
from gymnasium import spaces
from ruamel.yaml import YAML

from hidreamer.spaces import random_rows
from tools import Config

ACTIONS = 6


class Modules:
    """A checkout's modules, which have the names of ours, in their place while a block runs."""

    def __init__(self, folder: Path):
        self.folder, self.theirs = str(folder), {}
        self.names = [path.stem for path in folder.glob("*.py")]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        ours = {name: sys.modules.pop(name) for name in self.names if name in sys.modules}
        sys.modules.update(self.theirs)
        sys.path.insert(0, self.folder)
        try:
            yield
        finally:
            sys.path.remove(self.folder)
            for name in self.names:
                if name in sys.modules:
                    self.theirs[name] = sys.modules.pop(name)
            sys.modules.update(ours)


def dreamerv3_torch(
    folder: Path, obs: dict[str, spaces.Space], config: Config, device: torch.device
) -> Callable[[], object]:
    """github.com/NM512/dreamerv3-torch: its atari100k preset, without its torch.compile."""
    with Modules(folder)():
        import models as theirs
    dyn, units, depth = config.dynamics, config.encoder.units, config.encoder.depth
    presets = YAML(typ="safe").load((folder / "configs.yaml").read_text())
    options = presets["defaults"]
    sizes = {
        "dyn_hidden": dyn.hidden,
        "dyn_deter": dyn.deter,
        "units": units,
        "num_actions": ACTIONS,
    }
    sizes |= {
        "dyn_stoch": dyn.rssm.stoch,
        "dyn_discrete": dyn.rssm.classes,
        "device": device.type,
        "compile": False,
    }
    nested = {"encoder": {"cnn_depth": depth}, "decoder": {"cnn_depth": depth}}
    for change in (presets["atari100k"], sizes, nested):
        for key, value in change.items():
            options[key] = options[key] | value if isinstance(value, dict) else value
    options = types.SimpleNamespace(**options)
    world = theirs.WorldModel(types.SimpleNamespace(spaces=obs), None, 0, options).to(device)
    behavior = theirs.ImagBehavior(options, world).to(device)
    # their update turns gradients on where it needs them
    for module in (world, behavior):
        module.requires_grad_(False)
    rows = random_rows(obs, spaces.Discrete(ACTIONS), config.replay.batch, config.replay.length)
    batch = {"action": rows.pop("prev_action"), **rows}

    def reward(feat, state, action) -> torch.Tensor:
        return world.heads["reward"](world.dynamics.get_feat(state)).mode()

    def update() -> None:
        post, _, _ = world._train(batch)
        behavior._train(post, reward)

    return update


class Node(dict):
    """A config whose keys are attributes."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


def nodes(value: Any, names: dict[str, Any]) -> Any:
    """A tree of YAML as Nodes, with ${...} replaced."""
    if isinstance(value, dict):
        return Node({key: nodes(x, names) for key, x in value.items()})
    is_name = isinstance(value, str) and value.startswith("${")
    return names[value[2:-1]] if is_name else value


def r2dreamer(
    folder: Path, obs: dict[str, spaces.Space], config: Config, device: torch.device
) -> Callable[[], object]:
    """github.com/NM512/r2dreamer with its decoder (rep_loss dreamer), float16 and on CUDA compiled,
    as it is by default. Its block GRU, its loss on replayed returns and its LaProp stay. Its replay
    is left out: a batch lies on the device. Needs tensordict.
    """
    modules = Modules(folder)
    with modules():
        import dreamer as theirs
    from tensordict import TensorDict

    dyn, units, depth = config.dynamics, config.encoder.units, config.encoder.depth
    sizes = {"deter": dyn.deter, "hidden": dyn.hidden, "discrete": dyn.rssm.classes}
    sizes |= {"depth": depth, "units": units, "act": "SiLU", "norm": True}
    names = {f"model.{key}": x for key, x in sizes.items()} | {"device": str(device)}
    for part in ("encoder", "decoder"):
        names |= {f"env.{part}.mlp_keys": "$^", f"env.{part}.cnn_keys": "image"}
    text = (folder / "configs/model/_base_.yaml").read_text()
    options = nodes(YAML(typ="safe").load(text), names)
    options |= {"rep_loss": "dreamer", "compile": device.type == "cuda"}
    options.rssm.stoch = dyn.rssm.stoch
    action = types.SimpleNamespace(n=ACTIONS, discrete=True)
    agent = theirs.Dreamer(options, types.SimpleNamespace(spaces=obs), action).to(device)
    rows = random_rows(obs, spaces.Discrete(ACTIONS), config.replay.batch, config.replay.length)
    rows["action"] = rows.pop("prev_action")
    rows |= {key: rows[key][..., None] for key in ("reward", "is_terminal")}
    rows["is_last"] = rows["is_terminal"]
    shape = config.replay.batch, config.replay.length
    batch = {key: torch.from_numpy(x).to(device) for key, x in rows.items()}
    stoch, deter = agent.rssm.initial(shape[0])

    class Rows:
        """In place of their replay."""

        def sample(self) -> tuple:
            return TensorDict(dict(batch), shape), None, (stoch, deter)

        def update(self, index: None, stoch: torch.Tensor, deter: torch.Tensor) -> None:
            pass

    def update() -> None:
        with modules():  # compiling imports them by name
            agent.update(Rows())

    return update
