"""hidreamer doctor: what is there, and what installs the rest."""

import sys

import pytest

import doctor
from envs import EnvError

QUICK = {"MinAtar": ("minatar_breakout", ""), "Crafter": ("crafter_reward", "crafter")}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "SUITES", QUICK)


def test_what_is_there(quick, capsys):
    doctor.main([])
    out = capsys.readouterr().out
    for word in ("Python ", "torch ", "device ", "threads ", "ok  MinAtar", "extras", "compare"):
        assert word in out


def test_a_missing_extra_is_no_fault_and_its_line_installs_it(quick, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    monkeypatch.delitem(sys.modules, "envs.crafter", raising=False)
    monkeypatch.setattr(doctor, "packages", lambda: [(True, "torch", "2")])
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "--  Crafter  pip install -e '.[crafter]'" in out and "ready: python demo.py" in out


def test_a_suite_that_should_work_and_does_not_is_a_fault(quick, capsys, monkeypatch):
    import envs

    def broken(task, block, seed):
        raise EnvError("no display")

    monkeypatch.setattr(envs, "make_env", broken)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "--  MinAtar  no display" in out and "not ready" in out


def test_a_missing_package_is_a_fault(quick, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["torch", "no-such-package"])
    assert doctor.main([]) == 1
    assert "--  no-such-package  pip install no-such-package" in capsys.readouterr().out


def test_every_extra_that_users_choose_is_listed():
    """But not those of developers, nor the suites, which are tried."""
    import tomllib

    from conftest import ROOT

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(doctor.EXTRAS) | {extra for _, extra in doctor.SUITES.values()} | {"dev", "docs"}
    assert set(extras["optional-dependencies"]) <= known


def test_arguments(capsys):
    assert doctor.main(["--help"]) == 0 and doctor.main(["now"]) == 2
    assert capsys.readouterr().err == "error: python doctor.py takes no arguments\n"
