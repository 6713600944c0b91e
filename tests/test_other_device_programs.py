"""Programs on a device that is not the CPU (``other_device``): training, and what reads a run."""

import shutil

import pytest
import small_pipeline
from other_device import DEVICE, other_device

import dreamer
import hidreamer
import models
from analysis import __main__ as analysis
from analysis import evaluate
from play import __main__ as play


@pytest.fixture
def there(monkeypatch):
    """All runs and what reads them are there."""
    monkeypatch.setattr(models, "pick_device", lambda config: DEVICE)
    with other_device() as device:
        yield device
    assert device.copies and device.reads


@pytest.mark.usefixtures("there")
def test_seeds_are_trained_resumed_and_read(tmp_path):
    words = ["--configs", "debug", "--task", "dummy_vector", "--dynamics.type", "hrvq"]
    folder, seeds = str(tmp_path / "runs"), ["--seeds", "0", "1"]
    assert dreamer.main([*words, *seeds, "--steps", "100", "--logdir", folder]) == 0
    assert dreamer.main(["--resume", folder, *seeds, "--steps", "120"]) == 0
    assert dreamer.main(["--resume", f"{folder}/1", "--steps", "140"]) == 0
    record = ["--record", str(tmp_path / "dream.mp4"), "--steps", "3"]
    assert play.main([f"{folder}/1", *record]) == 0
    assert evaluate.main([f"{folder}/1", "--episodes", "1"]) == 0
    agent = hidreamer.load(f"{folder}/1")
    latents = agent.encode(agent.recorded()[0])
    dream = agent.dream(latents, horizon=3)
    assert latents.deter.device == dream.reward.device == DEVICE


@pytest.mark.slow
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", ["hrssm", "hrvq"])
def test_levels_are_looked_into(trained, tmp_path, kind):
    folder = shutil.copytree(trained(kind, "image"), tmp_path / "run")
    assert analysis.main([str(folder), "--pictures", "--episodes", "10"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("there")
def test_stages_of_the_pipeline(tmp_path):
    for stage in ("collect", "encoder", "tokenizer", "world_model", "policy"):
        assert small_pipeline.run(stage, tmp_path) == 0
