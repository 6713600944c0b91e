"""What dreamerv3-torch wrote is understood: its own outputs are the reference."""

import shutil

import numpy as np
import pytest
import torch

import legacy
from conftest import ROOT
from hidreamer import checkpoint
from hidreamer import distributions as dists
from legacy import check

GOLDEN = ROOT / "tests" / "golden" / "dreamerv3_torch_vector"
IMAGE = ROOT / "tests" / "golden" / "dreamerv3_torch_image"
FIXTURES = ROOT.parent / "shared" / "fixtures" / "dreamerv3_torch"
ABSENT = pytest.mark.skip(
    reason="upstream's outputs at larger sizes lie in ../shared, which is absent here"
)
FOLDERS = [
    GOLDEN,
    IMAGE,
    *(sorted(p for p in FIXTURES.iterdir() if p.is_dir()) if FIXTURES.exists() else []),
]
FOLDERS += [] if FIXTURES.exists() else [pytest.param(FIXTURES, marks=ABSENT)]
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
trained = pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f is not IMAGE], ids=lambda folder: folder.name
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


@each
def test_agrees_with_upstream(folder, capsys):
    assert check.main(arguments(folder)) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    with np.load(folder / "expected.npz") as expected:
        assert all(key in shown for key in expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loss_that_is_checked_is_the_dynamics_own(reverse, monkeypatch, capsys):
    """The KL is what training minimises, not another computation of it:
    a fault there is noticed here.
    """
    real = dists.kl
    if reverse:
        monkeypatch.setattr(dists, "kl", lambda post, prior: real(prior, post))
    assert check.main(arguments(IMAGE)) == int(reverse)
    lines = {
        line.split()[0]: float(line.split()[1])
        for line in capsys.readouterr().out.splitlines()[:-1]
    }
    assert {"kl_loss", "kl_value"} == {name for name in lines if name.startswith("kl_")}
    assert all((lines[name] > 1e-3) == (reverse and name.startswith("kl_")) for name in lines)
    with np.load(IMAGE / "expected.npz") as expected:
        assert (expected["kl_value"] < 1).any() and (expected["kl_value"] > 1).any()


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


@trained  # IMAGE has none
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
        assert missing <= {
            "encoder.vector.blocks.0.linear.bias"
        }  # upstream has no such bias: it starts afresh
        for key, p in own.params.items():
            if key in missing:
                continue
            assert got[key]["exp_avg"].shape == p.shape and got[key]["step"] == 1
    # One of them by hand: upstream's numbering follows its state dict.
    keys = [k for k in state["agent_state_dict"] if k.startswith("_wm.")]
    theirs = state["optims_state_dict"][
        next(k for k in state["optims_state_dict"] if "_model_opt" in k)
    ]["state"]
    index = next(i for i, k in enumerate(keys) if k.endswith("reward.mean_layer.weight"))
    assert torch.equal(
        agent.optimizers["model"].state_dict()["reward.out.weight"]["exp_avg"],
        theirs[index]["exp_avg"],
    )


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    good = arguments(GOLDEN)
    assert check.main([str(tmp_path / "x.pt"), *good[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "list.json").write_text("[]")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for option, file in (("--config", "list.json"), ("--batch", "one.npy")):
        wrong = [str(tmp_path / file) if good[i - 1] == option else x for i, x in enumerate(good)]
        assert wrong != good and check.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
