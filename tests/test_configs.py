"""Every preset builds, every key is read, and a wrong argument is told in one line."""

import re

import numpy as np
import pytest
from gymnasium import spaces
from ruamel.yaml import YAML

import models
import tools

PRESETS = [name for name in YAML(typ="safe").load(tools.CONFIGS.read_text()) if name != "defaults"]
IMAGE = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset):
    assert isinstance(tools.load_config([preset], {}), tools.Config)


def test_presets_stack_left_to_right():
    config = tools.load_config(["atari100k", "tiny_dreamerv3"], {"dynamics.deter": "99"})
    assert (config.replay.ratio, config.dynamics.rssm.stoch, config.dynamics.deter) == (1024, 12, 99)
    assert config.model.lr == 1e-4 and isinstance(config.model.lr, float)  # PyYAML would have made it a string


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
    assert "dynamics" in wrong({"dynamics": "x"})  # a group is no key


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("steps", "many", "whole number"),
        ("steps", "1.5", "whole number"),
        ("steps", "0", "at least 1"),
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
    config = tools.load_config([], {"steps": "4e5", "env.size": "32,32", "video": "False", "actor.entropy": "1e-3"})
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


@pytest.mark.parametrize("preset", ["tiny_hidreamer", "hidreamer", "hidreamer_spatial"])
@pytest.mark.parametrize("suite", ["atari100k", "minatar", "gym", "crafter"])
def test_tokens_have_the_sizes_of_their_preset_on_every_suite(suite, preset):
    """Presets of suites with a small state of their own must not shrink what a preset of a state says it is."""
    latent = lambda *presets: tools.load_config(list(presets), {}).dynamics
    ours, alone = latent(suite, preset), latent(preset)
    assert ours.hrvq.tree() == alone.hrvq.tree() and (ours.deter, ours.hidden) == (alone.deter, alone.hidden)


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
        models.Agent({"image": spaces.Box(0, 255, (*size, 3), np.uint8)}, spaces.Discrete(6), 6, config)
