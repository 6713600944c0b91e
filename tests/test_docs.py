"""README and docs/: links, lengths, and every block of code, shortened, in its own order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import blocks, commands, known, recipe, run, shortened

import forked
import tools
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"[A-Z]{4}|/shared/")  # such as CHECKPOINT
GENERATED = {"config.md"}  # by docs/site_hooks.py, when the site is built


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_version():
    import hidreamer

    version = hidreamer.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == version


def test_the_dockerfile_is_short_and_its_extras_exist():
    text = (ROOT / "Dockerfile").read_text()
    assert len(text.splitlines()) < 25
    extras = re.search(r"ARG EXTRAS=(\S+)", text)[1]
    assert known(["pip", "install", f".[{extras}]"])


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            path = link.partition("#")[0]
            if "://" in link or not path or path in GENERATED:
                continue
            found = page.parent / path
            # of a folder in docs/ the site has no page
            folder = found.is_dir() and found.parent == page.parent == ROOT / "docs"
            if folder or not found.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert wrong == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_commands_of_the_readme_work_in_its_order(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forked.popen)
    done = []
    for _, text in blocks(ROOT / "README.md", "sh"):
        for words in commands(text):
            assert run(words) in (0, None), words
            done.append(words)
    assert len(done) > 12
    script = "".join(text for _, text in blocks(ROOT / "README.md", "python"))
    names = {}
    exec(script, names)
    assert names["dream"].reward.shape == (1, 16) and "all" in names["pictures"]


def test_a_command_that_cannot_work_is_found(folder):
    """The negative control: the flat checkpoint that README once told to start a two-level run's
    weights from, an extra and a target that do not exist.
    """
    first = (
        "python dreamer.py --configs atari100k tiny_hdreamer --task dummy_vector --logdir runs/a"
    )
    again = (
        "python dreamer.py --configs atari100k --task dummy_vector --resume runs/a --logdir runs/b"
    )
    assert run(first.split()) == 0
    assert run([*again.split(), "--dynamics.hidden", "24"]) == 2
    assert not known(["pip", "install", "-e", ".[nonsense]"])
    assert not known(["make", "coffee"])
    demo = "python demo.py --configs demo_atari tiny_dreamerv3 --logdir runs/demo_atari --steps 9"
    assert recipe(["make", "demo-atari", "ARGS=--steps 9"]) == [demo.split()]
    assert shortened(["--resume", "x"])[:2] == ["--resume", "x"]


OWN = ["tutorial", "own_data", "clusters", "gpu", "fourth_state", "resuming", "comparing"]
OWN += ["levels", "presets", "reproduce"]


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("name", OWN)
def test_code_of_a_page(name, folder):
    for _, text in blocks(ROOT / "docs" / f"{name}.md", "sh"):
        for words in commands(text):
            if PLACEHOLDER.search(" ".join(words)):
                continue
            assert run(words) in (0, None), words


def test_every_page_has_its_place_and_its_code_a_test():
    """In the site's navigation; pages whose code tests of their own run are named here."""
    elsewhere = {"own_environment", "library", "analysis", "pipeline", "hrvq", "results"}
    elsewhere |= {"objectives"}
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}" in nav, page.name
        code = blocks(page, "sh", "python")
        assert not code or page.stem in elsewhere or page.stem in OWN, page.name


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run([*command, "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    keys = (tmp_path / "config.html").read_text()
    assert all(f"<code>{key}</code>" in keys for key in tools.load_config([], {}).flat())
    presets = (tmp_path / "presets.html").read_text()
    assert all(f"<code>{name}</code>" in presets for name in ("demo", "tiny_hidreamer"))
    assert "LoadedAgent" in (tmp_path / "api.html").read_text()
    pages = [path for path in tmp_path.rglob("*.html") if "repository" not in path.parts]
    outside = [
        path for path in pages if re.search(r'<(?:script|link)[^>]*"https?://', path.read_text())
    ]
    assert outside == []  # it is read offline
    assert len({Path(path).name for path in pages}) > 25
