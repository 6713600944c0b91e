"""What dreamerv3-torch wrote is understood: its own outputs are the reference."""

import shutil

import numpy as np
import pytest
import torch

import legacy
from conftest import ROOT
from hidreamer import checkpoint
from legacy import check

GOLDEN = ROOT / "tests" / "golden" / "dreamerv3_torch_vector"
FIXTURES = ROOT.parent / "shared" / "fixtures" / "dreamerv3_torch"
ABSENT = pytest.mark.skip(reason="upstream's outputs for images lie in ../shared, which is absent here")
FOLDERS = [GOLDEN, *(sorted(p for p in FIXTURES.iterdir() if p.is_dir()) if FIXTURES.exists() else [])]
FOLDERS += [] if FIXTURES.exists() else [pytest.param(FIXTURES, marks=ABSENT)]
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def arguments(folder):
    return [
        str(folder / "latest.pt"),
        *(
            w
            for n, e in (("config", "json"), ("batch", "npz"), ("expected", "npz"))
            for w in (f"--{n}", str(folder / f"{n}.{e}"))
        ),
    ]


@each
def test_agrees_with_upstream(folder, capsys):
    assert check.main(arguments(folder)) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    with np.load(folder / "expected.npz") as expected:
        assert all(key in shown for key in expected)


@each
def test_a_wrong_weight_is_noticed(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "latest.pt"
    state = torch.load(path, weights_only=True)
    for key, x in state["agent_state_dict"].items():
        if "_wm." in key and key.endswith("_cell.layers.GRU_linear.weight"):
            x[0, 0] += 0.5
    torch.save(state, path)
    assert check.main(arguments(tmp_path / "x")) == 1
    assert "DIFFERS" in capsys.readouterr().out


@each
def test_optimiser_states_arrive(folder):
    state = checkpoint.load_checkpoint(folder / "latest.pt")
    converted = legacy.convert(state)
    with np.load(folder / "batch.npz") as batch:
        agent = check.build(folder / "latest.pt", folder / "config.json", dict(batch))
    agent.make_optimizers()
    agent.load_state(converted)
    for optimizer in ("model", "actor", "critic"):
        own = agent.optimizers[optimizer]
        got = own.state_dict()
        missing = set(own.params) - set(got)
        assert missing <= {"encoder.vector.blocks.0.linear.bias"}  # upstream has no such bias: it starts afresh
        for key, p in own.params.items():
            if key in missing:
                continue
            assert got[key]["exp_avg"].shape == p.shape and got[key]["step"] == 1
    # One of them by hand: upstream's numbering follows its state dict.
    keys = [k for k in state["agent_state_dict"] if k.startswith("_wm.")]
    theirs = state["optims_state_dict"][next(k for k in state["optims_state_dict"] if "_model_opt" in k)]["state"]
    index = next(i for i, k in enumerate(keys) if k.endswith("reward.mean_layer.weight"))
    assert torch.equal(agent.optimizers["model"].state_dict()["reward.out.weight"]["exp_avg"], theirs[index]["exp_avg"])


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    good = arguments(GOLDEN)
    assert check.main([str(tmp_path / "x.pt"), *good[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
