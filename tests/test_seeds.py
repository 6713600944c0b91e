"""The command line of several seeds in one process: which seeds, which folders."""

import pytest
import torch
from small_runs import latest, one_line, run

import dreamer
import tools
from seeds import member_args, member_seeds, members_in
from tools import ConfigError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("two")
    assert run(folder, "--steps", 30, "--eval_episodes", 0, "--seeds", 0, 1) == 0
    return folder


def test_seeds_longer_than_a_float_are_different_ones():
    words = ["--seeds", "999999999999999999", "1000000000000000000"]
    assert member_seeds(tools.parse(words).overrides) == [10**18 - 1, 10**18]
    with pytest.raises(tools.ConfigError, match="64 bits"):
        member_seeds(tools.parse(["--seeds", str(2**63), "0"]).overrides)
    assert tools.load_config([], {"seed": str(2**53 + 1)}).seed == 2**53 + 1
    assert tools.load_config([], {"steps": "5e4"}).steps == 50_000


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--seed 0 1 2", "--seeds 0 1 2"),
        ("--seedz 0 1", "did you mean seeds?"),
        ("--populations 3", "did you mean population?"),
        ("--seeds 0 1 --resume {two}/0", "--logdir"),
        ("--seeds 0 7 --resume {two}", "none of seed 7"),
        ("--resume {two}", "seeds 0 1, which --seeds names"),
        ("--logdir {two}", "seeds 0 1, which --seeds continues"),
        ("--logdir {two}/0 --seeds 0 1", "folder of one run"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words, hint, two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.format(two=two).split()
    before = sorted(two.rglob("*"))
    assert dreamer.main(["--configs", "debug", "--task", "dummy_vector", *words]) == 2
    one_line(capsys, hint)
    assert sorted(two.rglob("*")) == before and not list(tmp_path.iterdir())


def test_each_seed_resumes_its_own(two, tmp_path):
    """From the folder of several; that of one run is where all begin."""
    words = ["--configs", "debug", "--resume", str(two), "--seeds", "0", "1"]
    found = member_args(tools.parse([*words, "--logdir", "new"])._replace(), [0, 1])
    assert [one.resume for one in found] == [str(two / "0"), str(two / "1")]
    assert [one.overrides["logdir"] for one in found] == ["new/0", "new/1"]
    words[3] = str(two / "0")
    found = member_args(tools.parse([*words, "--logdir", "new"]), [0, 1])
    assert [one.resume for one in found] == [str(two / "0")] * 2
    assert members_in(two) == [0, 1] and members_in(two / "0") == members_in(tmp_path) == []


def test_a_folder_of_several_seeds_is_continued_by_its_name(two, tmp_path, capsys):
    fork = ["--configs", "debug", "--task", "dummy_vector", "--steps", "1", "--video", "false"]
    fork += [
        "--eval_episodes",
        "0",
        "--replay.pretrain",
        "0",
        "--resume",
        str(two),
        "--logdir",
        str(tmp_path),
    ]
    assert dreamer.main([*fork, "--seeds", "0", "1"]) == 0
    for seed in "01":
        ours, theirs = (latest(folder / seed)["agent"]["params"] for folder in (tmp_path, two))
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert dreamer.main(["--resume", str(tmp_path), "--seeds", "0", "1", "--steps", "3"]) == 0
    assert [latest(tmp_path / seed)["config"]["steps"] for seed in "01"] == [3, 3]
    capsys.readouterr()
    assert dreamer.main(["--resume", str(tmp_path / "0"), "--steps", "5"]) == 0
    assert dreamer.main(["--resume", str(tmp_path), "--seeds", "0", "1"]) == 2
    one_line(capsys, "differ in steps", "--configs and keys")


def test_help_names_both_options(capsys):
    with pytest.raises(ConfigError, match="no config key 'seeds'"):
        tools.load_config([], {"seeds": "1"})  # so that --help has to say it itself
    assert dreamer.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--seeds SEED ..." in text and "--population COUNT" in text
