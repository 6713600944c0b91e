"""What pip installs works in an empty folder, without the repository.

A wheel is built and installed into a virtual environment of its own, which has no path to the
repository. What hidreamer depends on is not downloaded again: a .pth file there names the
site-packages of this environment, whose own .pth files, those of editable installs among them, are
then not read.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_layers import Project

import forked
from conftest import ROOT

DEBUG = ["--configs", "debug", "--task", "dummy_vector"]
UNNEEDED = (".*", "*.egg-info", "__pycache__", "build", "results", "runs", "tests")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository: a build leaves files behind where it works."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("source") / "copy"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*UNNEEDED))


def environment(folder, *installed):
    """A new virtual environment in ``folder`` with ``installed``, arguments of pip install.
    -> its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages(python) / "others.pth").write_text("\n".join(others))
    subprocess.run([*PIP, "--python", python, "install", *OFFLINE, *installed], check=True)
    return python


def site_packages(python):
    (folder,) = (python.parent.parent / "lib").glob("python*/site-packages")
    return folder


@pytest.fixture(scope="module")
def python(source, tmp_path_factory):
    """Of an environment with the wheel, inside a git repository of somebody else."""
    folder = tmp_path_factory.mktemp("theirs")
    subprocess.run([*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    python = environment(folder / "venv", wheel)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(folder)]
    if shutil.which("git"):
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=theirs"], check=True)
    return python


def start(cwd, *words, path=()):
    """-> the finished process, in ``cwd``. path: PYTHONPATH, which goes before what is
    installed.
    """
    paths = os.pathsep.join(map(str, path))
    env = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    words = [str(word) for word in words]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_wheel_holds_every_module_under_one_name(python):
    """A folder or a script that pyproject.toml does not name would be missing."""
    site = site_packages(python)
    names = {path.name.split("-")[0] for path in site.iterdir()}
    assert names == {"hidreamer", "others.pth"}
    wanted = {path.relative_to(ROOT) for path in Project(ROOT).paths.values()}
    wanted |= {Path("configs.yaml"), *(path.relative_to(ROOT) for path in ROOT.glob("*/page.*"))}
    app = Path("hidreamer/_app")
    wanted = {path for path in wanted if path.parts[0] != "benchmarks"}
    wanted = {path if path.parts[0] == "hidreamer" else app / path for path in wanted}
    found = {path.relative_to(site) for path in (site / "hidreamer").rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix != ".pyc"} == wanted


def test_it_trains_and_reports_beside_modules_of_the_same_names(python, tmp_path):
    """Runs are processes of their own, and so are their environments."""
    hidreamer = python.with_name("hidreamer")
    theirs, work = tmp_path / "theirs", tmp_path / "work"
    for folder in (theirs, work):
        for name in ("models.py", "tools.py", "envs/__init__.py", "comparison/__init__.py"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text("raise RuntimeError('of another project')")
    words = [*DEBUG, "--models", "tiny_dreamerv3", "--seeds", 1, "--logdir", "out"]
    words += ["--steps", 200, "--env.parallel", "true"]
    done = start(work, hidreamer, "compare", *words, path=[theirs])
    run = work / "out" / "dummy_vector" / "tiny_dreamerv3" / "0"
    assert done.returncode == 0, done.stdout + done.stderr
    log = run.with_suffix(".log").read_text()
    assert "done: 200 steps" in log and "continue:   hidreamer train" in log
    assert "hidreamer compare" in (work / "out" / "report.md").read_text()
    notes = (run / "starts.jsonl").read_text()
    assert '"commit": "version ' in notes  # and not that of the repository around
    assert str(python.parent.parent) not in notes

    look = [hidreamer, "analyse", run, "--pictures", "--episodes", 10]
    done = start(work, *look, path=[theirs])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hidreamer analyse" in (run / "analysis" / "analysis.html").read_text()

    script = f"import hidreamer; print(hidreamer.load({str(run)!r}).facts['step'])"
    done = start(work, python, "-I", "-c", script)  # -I: without modules of the current folder
    assert done.stdout == "200\n", done.stderr

    again = [python, "-m", "hidreamer", "train", "--resume", run, "--steps", 220]
    done = start(work, *again, path=[theirs])
    assert done.returncode == 0, done.stderr
    assert "at step 200" in done.stdout and "done: 220 steps" in done.stdout


def test_the_library_and_the_page_in_an_empty_folder(python, trained, tmp_path):
    """Beside modules of the same names in that folder, which come first there."""
    for name in ("models.py", "tools.py", "library.py", "play.py"):
        (tmp_path / name).write_text("raise RuntimeError('of another project')")
    script = f"""
import hidreamer
assert {str(site_packages(python))!r} in hidreamer.__file__
agent = hidreamer.load({str(trained("hrvq", "vector"))!r})
print(agent.dream(agent.encode(agent.collect(seed=0)), horizon=3).reward.shape)
hidreamer.export({str(trained("hrvq", "vector"))!r}, "out")
import gymnasium
env = gymnasium.make("hidreamer/Dream-v0", logdir="out", start="real")
print(env.reset(seed=0)[0].shape)
"""
    done = start(tmp_path, python, "-c", script)
    assert done.stdout.split() == ["torch.Size([1,", "4])", "(4,)"], done.stderr
    command = [python.with_name("hidreamer")]
    done = start(tmp_path, *command, "play", "out", "--record", "a.mp4", "--steps", 3)
    assert done.returncode == 0 and (tmp_path / "a.mp4").exists(), done.stderr
    done = start(tmp_path, *command, "evaluate", "out", "--out", "scores.json")
    assert done.returncode == 0 and '"eval_return"' in (tmp_path / "scores.json").read_text()
    done = start(tmp_path, *command, "evaluate", "nowhere")
    assert (
        done.returncode == 2
        and done.stderr == "error: there is no folder nowhere: name that of a run or of an export\n"
    )


def test_a_missing_extra_is_installed_by_the_name_of_the_wheel(python, tmp_path):
    """In a checkout by its folder, which is not the one that the command was given in."""
    (tmp_path / "crafter.py").write_text("raise ModuleNotFoundError(name='crafter')")
    train = ["-m", "hidreamer", "train", "--task", "crafter_reward", "--logdir", "run"]
    ways = {python: ([], "pip install 'hidreamer[crafter]'")}
    ways[sys.executable] = ([ROOT], f"pip install -e '{ROOT}[crafter]'")
    for interpreter, (path, line) in ways.items():
        done = start(tmp_path, interpreter, *train, path=[tmp_path, *path])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.rstrip().endswith(line)


def test_lines_that_install_come_from_one_place(monkeypatch, tmp_path):
    """``app.install_line``; ``envs``, which imports nothing of the project, has its equal."""
    from envs import errors
    from hidreamer import app

    literal = re.compile(r"pip install .*(?:-e|hidreamer)")
    sources = [path for path in Project(ROOT).paths.values() if literal.search(path.read_text())]
    names = {str(path.relative_to(ROOT)) for path in sources}
    assert {name for name in names if "benchmarks" not in name} == {
        "hidreamer/app.py",
        "envs/errors.py",
    }
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        for extra in ("", "play"):
            assert app.install_line(extra) == errors.install_line(extra)


def test_a_foreign_module_that_is_loaded_is_one_line(python, tmp_path):
    script = """
import json, sys
sys.modules["models"] = json
from hidreamer.__main__ import main
sys.exit(main(["train", "--help"]))
"""
    done = start(tmp_path, python, "-c", script)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "error: hidreamer needs its own module 'models'" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "says"),
    {
        "nothing": ([], 2, "hidreamer COMMAND"),
        "help": (["--help"], 0, "  compare "),
        "version": (["--version"], 0, "hidreamer 0."),
        "unknown": (["trian"], 2, "error: there is no command 'trian'; there are demo, train"),
        "help of compare": (["compare", "--help"], 0, "hidreamer compare --steps 50000"),
        "doctor": (["doctor", "--help"], 0, "hidreamer doctor"),
        "demo": (["demo", "--help"], 0, "hidreamer demo"),
        "wrong arguments": (["train", "--stepz", "3"], 2, "error: "),
    }.values(),
)
def test_the_command(words, status, says, tmp_path):
    """In a checkout that is not installed, from another folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = forked.run([sys.executable, "-m", "hidreamer", *words], cwd=tmp_path, env=env)
    assert done.returncode == status and says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == says.startswith("error")


def test_an_editable_install_works_from_any_folder(source, tmp_path):
    python = environment(tmp_path / "venv", "--editable", source)
    done = start(tmp_path, python.with_name("hidreamer"), "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "hidreamer train --configs PRESET" in done.stdout and "  --dynamics.type " in done.stdout
    where = "from hidreamer import app; app.enter(); import tools; print(tools.__file__)"
    assert start(tmp_path, python, "-c", where).stdout.strip() == str(source / "tools.py")


@pytest.mark.slow  # minutes on a busy machine
@pytest.mark.parametrize("backend", ["ray", "slurm"])
def test_clusters_and_recorded_episodes(backend, python, tmp_path):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[backend])
    command = [
        python.with_name("hidreamer"),
        "compare",
        *DEBUG,
        "--models",
        "tiny_dreamerv3",
        "--seeds",
        1,
    ]
    command += ["--backend", backend, "--logdir", "out"]
    done = start(tmp_path, *command, "--steps", 600)
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = "out/dummy_vector/tiny_dreamerv3/0"
    done = start(tmp_path, *command, "--updates", 10, "--paired-offline", recorded)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "offline" / "report.html").exists()
