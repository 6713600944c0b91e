"""Every preset builds, every key is read, and a wrong argument is one clear line."""

import contextlib
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ruamel.yaml import YAML
from torch.optim import optimizer

import models
import tools
from hidreamer.dynamics import TYPES
from hidreamer.spaces import random_rows

PRESETS = [name for name in YAML(typ="safe").load(tools.CONFIGS.read_text()) if name != "defaults"]
IMAGE = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset):
    assert isinstance(tools.load_config([preset], {}), tools.Config)


def test_presets_stack_left_to_right():
    config = tools.load_config(["atari100k", "tiny_dreamerv3"], {"dynamics.deter": "99"})
    assert (config.replay.ratio, config.dynamics.rssm.stoch, config.dynamics.deter) == (
        1024,
        12,
        99,
    )
    assert config.model.lr == 1e-4 and isinstance(
        config.model.lr, float
    )  # PyYAML would have made it a string


def test_every_key_has_a_sentence():
    says = tools.sentences()
    for key in tools.load_config([], {}).flat():
        assert re.fullmatch(r"[A-Z].*\.", says[f"defaults.{key}"]), key
    assert all(says[preset] for preset in PRESETS)


def wrong(overrides=None, presets=()):
    with pytest.raises(tools.ConfigError) as error:
        tools.load_config(list(presets), overrides or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_misspelt_names_are_told_with_the_nearest():
    assert "model.lr" in wrong({"model.lrr": "1"})
    assert "tiny_dreamerv3" in wrong(presets=["tiny_dreamer"])
    assert "defaults" not in wrong(presets=["zzz"]).split(";")[0]
    assert wrong({"zzzz": "1"}).count(",") == 2 and len(wrong({"zzzz": "1"})) < 150  # not all keys
    assert "dynamics" in wrong({"dynamics": "x"})  # a group is no key


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("steps", "many", "whole number"),
        ("steps", "1.5", "whole number"),
        ("steps", "0", "at least 1"),
        ("steps", "1" + 20 * "0", "64 bits"),
        ("threads", "100000", "at most 1024"),
        ("model.lr", "fast", "a number"),
        ("model.lr", "nan", "a number"),
        ("video", "yes", "true or false"),
        ("device", "gpu", "auto, cpu, cuda"),
        ("imag.discount", "1.5", "at most 1"),
        ("env.size", ["64", "x"], "whole number"),
    ],
)
def test_wrong_values(key, value, hint):
    message = wrong({key: value})
    assert key in message and hint in message


def test_values_that_people_write():
    config = tools.load_config(
        [], {"steps": "4e5", "env.size": "32,32", "video": "False", "actor.entropy": "1e-3"}
    )
    assert config.steps == 400_000 and config.env["size"] == [32, 32]
    assert config.video is False and config.actor.entropy == 1e-3
    assert tools.load_config([], {"env.size": ["32", "32"]}).env["size"] == [32, 32]


def test_frozen():
    config = tools.load_config([], {})
    with pytest.raises(AttributeError):
        config.seed = 3
    with pytest.raises(AttributeError, match=r"actor\.nett"):
        _ = config.actor.nett
    tree = config.tree()
    tree["actor"]["lr"] = 0.0
    assert config.actor.lr == 3e-5


def test_the_file_is_parsed_once_and_no_config_can_tell(tmp_path, monkeypatch):
    """Parsing takes most of what making a small agent takes."""
    size = tools.load_config([], {}).env.size
    size.append(3)
    with monkeypatch.context() as patched:
        patched.setattr(tools, "YAML", None)
        assert tools.load_config([], {}).env.size == size[:2]
    text = tools.CONFIGS.read_text()
    (tmp_path / "configs.yaml").write_text(text.replace("\n  steps: ", "\n  steps: 1"))
    monkeypatch.setattr(tools, "CONFIGS", tmp_path / "configs.yaml")
    assert str(tools.load_config([], {}).steps)[0] == "1"


def test_round_trip_through_yaml():
    config = tools.load_config(["tiny_dreamerv3"], {"actor.lr": 1e-7})
    assert YAML(typ="safe").load(tools.dump_yaml(config.tree())) == config.tree()


SMALL = {
    "encoder.depth": 2,
    "decoder.depth": 2,
    "encoder.units": 8,
    "decoder.units": 8,
    "dynamics.deter": 8,
    "dynamics.hidden": 8,
}


LATENT = [name for name in PRESETS if "dreamer" in name]  # the presets of a latent state


@pytest.mark.parametrize("preset", LATENT)
@pytest.mark.parametrize("suite", ["atari100k", "minatar", "gym", "crafter"])
def test_a_latent_state_has_the_sizes_of_its_preset_on_every_suite(suite, preset):
    """Presets of suites with a small state of their own must not shrink what a preset
    of a state says it is.
    """
    latent = lambda *presets: tools.load_config(list(presets), {}).dynamics.tree()
    ours, alone = latent(suite, preset), latent(preset)
    kind = alone["type"]
    assert [ours[key] for key in ("type", "deter", "hidden", kind)] == [
        alone[key] for key in ("type", "deter", "hidden", kind)
    ]


SPACES = {  # what tasks of a suite show, and what can be done there
    "minatar": ({"grid": spaces.Box(0, 1, (10, 10, 4), np.bool_)}, spaces.Discrete(3)),
    "gym": ({"vector": spaces.Box(-9, 9, (4,), np.float32)}, spaces.Discrete(2)),
    "dmc": ({"image": IMAGE["image"]}, spaces.Box(-1, 1, (6,), np.float32)),
    "proprio": (
        {"velocity": spaces.Box(-9, 9, (9,), np.float32)},
        spaces.Box(-1, 1, (6,), np.float32),
    ),
    "games": (IMAGE, spaces.Discrete(6)),
}


def networks():
    """{(sizes of all networks, suite): names of the presets and latent states that have them}."""
    found = {}
    between = {f"size{n}m" for n in (12, 25, 50, 100)}  # the smallest and the largest do
    for preset in ["defaults", *(name for name in PRESETS if name not in between)]:
        for kind in TYPES:
            config = tools.load_config(
                [preset] if preset in PRESETS else [], {"dynamics.type": kind}
            )
            suite = "proprio" if config.env.dmc.proprio else config.task.split("_")[0]
            used = {
                key: x
                for key, x in config.dynamics.tree().items()
                if key not in TYPES or key == kind
            }
            heads = [
                config[name].tree()
                for name in ("encoder", "decoder", "reward", "cont", "actor", "critic")
            ]
            suite = suite if suite in SPACES else "games"
            found.setdefault((str([used, heads]), suite), []).append((preset, kind))
    return found


@pytest.fixture
def meta(monkeypatch):
    """The device, with what torch has not told of it: no autocast there, but fused optimisers.

    With ``FakeTensorMode``, which needs neither, an update takes twice as long.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    known = optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*known, "meta"])
    return torch.device("meta")


@pytest.mark.parametrize(
    ("suite", "names"), [(suite, names) for (_, suite), names in networks().items()], ids=str
)
def test_every_preset_trains_with_every_latent_state(suite, names, meta):
    """Built, and updated once, at its own widths.

    Tensors are on the device "meta" (shapes without numbers): no memory, little time.
    """
    preset, kind = names[0]
    small = {
        "dynamics.type": kind,
        "replay.batch": 2,
        "replay.length": 2,
        "imag.horizon": 1,
        "imag.starts": 1,
    }
    if kind == "hrvq":
        small["replay.write_back"] = False  # its carry grows with its window
    config = tools.load_config([preset] if preset in PRESETS else [], small)
    obs_space, act_space = SPACES[suite]
    if "image" in obs_space:  # of the preset's size
        obs_space = {"image": spaces.Box(0, 255, (*config.env["size"], 3), np.uint8)}
    rows = random_rows(obs_space, act_space, 2, 2)
    with meta:
        agent = models.Agent(obs_space, act_space, rows["prev_action"].shape[-1], config)
        agent.make_optimizers()
        metrics = agent.update({key: torch.from_numpy(x).to(meta) for key, x in rows.items()})
    assert metrics.shape == (len(agent.metric_names),)
    for one in agent.optimizers.values():
        assert one.state_dict().keys() == one.params.keys(), "every parameter has moments"


def test_heads_that_do_not_divide_the_width_are_told_with_both_keys():
    config = tools.load_config([], {"dynamics.type": "hrvq", "dynamics.hrvq.heads": 6})
    with pytest.raises(ValueError) as error, torch.device("meta"):
        models.Agent(IMAGE, spaces.Discrete(6), 6, config)
    assert (
        str(error.value)
        == "dynamics.deter 512 must be dynamics.hrvq.heads (6) times an even number"
    )


@pytest.mark.parametrize(
    ("gradient", "discrete", "continuous"),
    [("auto", False, True), ("reinforce", False, False), ("dynamics", True, True)],
)
def test_which_gradient_the_actor_has(gradient, discrete, continuous):
    config = tools.load_config(
        ["debug"], {"actor.gradient": gradient, "expl.behavior": "plan2explore"}
    )
    for space, dim, expected in (
        (spaces.Discrete(3), 3, discrete),
        (spaces.MultiDiscrete([2, 3]), 5, discrete),
        (spaces.Box(-1, 1, (2,), np.float32), 2, continuous),
    ):
        agent = models.Agent(SPACES["gym"][0], space, dim, config)
        assert agent.behavior.backprop == agent.explorer.behavior.backprop == expected


def test_preset_sizes():
    agent = models.Agent(IMAGE, spaces.Discrete(6), 6, tools.load_config(["tiny_dreamerv3"], {}))
    dyn = agent.world_model.dynamics
    assert (dyn.stoch_dim, dyn.deter_dim, dyn.feat_dim, dyn.bits) == (384, 256, 640, 60)
    # dreamerv3-torch at the same sizes: 3,534,787 + 231,942 + 295,935 trainable numbers.
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == 4_062_664


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"env.size": [60, 60]}, "minres"),
        ({"encoder.keys": "imagee"}, "imagee"),
        ({"imag.starts": 65}, "65"),
    ],
)
def test_sizes_that_do_not_fit(overrides, hint):
    config = tools.load_config([], SMALL | overrides)
    size = config.env["size"]
    with pytest.raises(ValueError, match=hint):
        models.Agent(
            {"image": spaces.Box(0, 255, (*size, 3), np.uint8)}, spaces.Discrete(6), 6, config
        )


def test_a_word_of_the_command_line_without_its_s_is_guessed():
    for word, guess in (("config", "configs"), ("resum", "resume"), ("capacitys", "capacity")):
        with pytest.raises(tools.ConfigError, match=f"did you mean .*{guess}"):
            tools.load_config([], {word: "minatar"})
