"""A latent state that is added as docs/fourth_state.md says is tested as the others are."""

import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

PARTS = ["hidreamer", "envs", "tests", "configs.yaml", "pyproject.toml", "tools.py", "networks.py"]
MINE = """from hidreamer.dynamics.rssm import RSSM


class Mine(RSSM):
    pass
"""


def edited(path, *pairs):
    text = path.read_text()
    for before, after in pairs:
        assert text.count(before) == 1, (path.name, before)
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the interface's tests need, with rssm once more under the name "mine"."""
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "hidreamer" / "dynamics" / "mine.py").write_text(MINE)
    edited(
        tmp_path / "hidreamer" / "dynamics" / "__init__.py",
        ("import RSSM\n", "import RSSM\nfrom hidreamer.dynamics.mine import Mine\n"),
        ('"rssm": RSSM, ', '"rssm": RSSM, "mine": Mine, '),
    )
    configs = tmp_path / "configs.yaml"
    block = re.search(r"^    rssm:\n(?:      .*\n)+", configs.read_text(), re.M)[0]
    edited(
        configs,
        ("One of: rssm hrssm hrvq.", "One of: rssm hrssm hrvq mine."),
        (block, block + block.replace("rssm:", "mine:", 1)),
    )
    edited(
        tmp_path / "tests" / "test_dynamics.py",
        ('SIZES["hrvq"] = {', 'SIZES["mine"] = SIZES["rssm"]\nSIZES["hrvq"] = {'),
    )
    return tmp_path


def test_the_tests_of_the_interface_run_for_it(checkout):
    some = "mine and (shapes or law_chunk or carry_is_a_carry or weights_that_read)"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some]
    out = subprocess.run(
        [*argv, "tests/test_dynamics.py"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    assert re.search(r"^4 passed", out.stdout, re.M), out.stdout[-500:]
