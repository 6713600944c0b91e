"""What dreamerv3-torch wrote is understood: its own outputs are the reference."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import legacy
import tools
from legacy import check

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "dreamerv3_torch"
NAMES = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir()) if FIXTURES.exists() else ["(none)"]
pytestmark = pytest.mark.skipif(
    not FIXTURES.exists(), reason="upstream's outputs lie in ../shared, which is absent here"
)


def arguments(folder):
    return [
        str(folder / "latest.pt"),
        *(
            w
            for n, e in (("config", "json"), ("batch", "npz"), ("expected", "npz"))
            for w in (f"--{n}", str(folder / f"{n}.{e}"))
        ),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_upstream(name, capsys):
    assert check.main(arguments(FIXTURES / name)) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    with np.load(FIXTURES / name / "expected.npz") as expected:
        assert all(key in shown for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_weight_is_noticed(name, tmp_path, capsys):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    path = tmp_path / name / "latest.pt"
    state = torch.load(path, weights_only=True)
    for key, x in state["agent_state_dict"].items():
        if "_wm." in key and key.endswith("_cell.layers.GRU_linear.weight"):
            x[0, 0] += 0.5
    torch.save(state, path)
    assert check.main(arguments(tmp_path / name)) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_optimiser_states_arrive(name):
    state = tools.load_checkpoint(FIXTURES / name / "latest.pt")
    converted = legacy.convert(state)
    with np.load(FIXTURES / name / "batch.npz") as batch:
        agent = check.build(FIXTURES / name / "latest.pt", FIXTURES / name / "config.json", dict(batch))
    agent.make_optimizers()
    agent.load_state(converted)
    for optimizer, count in (("model", 58), ("actor", 8), ("critic", 8)):
        own = agent.optimizers[optimizer]
        got = own.state_dict()
        assert len(got) == len(own.params) == count
        for key, p in own.params.items():
            assert got[key]["exp_avg"].shape == p.shape and got[key]["step"] == 1
    # One of them by hand: upstream's numbering follows its state dict.
    keys = [k for k in state["agent_state_dict"] if k.startswith("_wm.")]
    theirs = state["optims_state_dict"][next(k for k in state["optims_state_dict"] if "_model_opt" in k)]["state"]
    index = next(i for i, k in enumerate(keys) if k.endswith("reward.mean_layer.weight"))
    assert torch.equal(agent.optimizers["model"].state_dict()["reward.out.weight"]["exp_avg"], theirs[index]["exp_avg"])


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    good = arguments(FIXTURES / NAMES[0])
    assert check.main([str(tmp_path / "x.pt"), *good[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
