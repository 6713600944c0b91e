"""Tests run from anywhere, on one thread, and never touch the network."""

import gc
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# a shell's background job ignores Ctrl-C, and so would the programs that tests send it to
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that wait for a busy core make a test ten times as slow

import pytest  # noqa: E402
import torch  # noqa: E402

# Reports and offline comparisons: not on a machine without the extra "compare", such as one that is
# there for its GPU.
COMPARE = ("rliable", "pandas", "scipy", "matplotlib", "jinja2", "sklearn")
ABSENT = [name for name in COMPARE if importlib.util.find_spec(name) is None]
NEED_COMPARE = (
    "backends",
    "benchmarks",
    "claims",
    "comparison",
    "demo",
    "experts",
    "information",
    "inside",
    "judge",
    "known_factors",
    "library_folders",
    "offline",
    "other_device_programs",
    "overestimation",
    "probes",
    "report",
    "results",
    "scores",
)
PIPELINE = sorted(path.name for path in Path(__file__).parent.glob("test_pipeline*.py"))
collect_ignore = [*(f"test_{name}.py" for name in NEED_COMPARE), *PIPELINE] if ABSENT else []


def pytest_report_header():
    if ABSENT:
        return f"not collected, for {', '.join(ABSENT)} is missing: {', '.join(collect_ignore)}"
    return None


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run of 60 steps, with checkpoints at 45 and 60;
    ``tiny`` is a copy of it to change.
    """
    from small_runs import run

    folder = tmp_path_factory.mktemp("made") / "run"
    assert run(folder, "--steps", 60, "--checkpoint_every", 45) == 0
    return folder


@pytest.fixture
def tiny(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """A LOGDIR of the pipeline with a finished ``collect``: a few hundred steps of two games."""
    from small_pipeline import run

    folder = tmp_path_factory.mktemp("collected")
    assert run("collect", folder) == 0
    return folder


@pytest.fixture(scope="session")
def encoded(collected, tmp_path_factory):
    """And with a finished ``encoder``."""
    from small_pipeline import copied, run

    folder = copied(collected, tmp_path_factory.mktemp("encoded"), "collect")
    assert run("encoder", folder) == 0
    return folder


@pytest.fixture(scope="session")
def tokenized(encoded, tmp_path_factory):
    """And with a finished ``tokenizer``."""
    from small_pipeline import copied, run

    folder = copied(encoded, tmp_path_factory.mktemp("tokenized"), "collect", "encoder")
    assert run("tokenizer", folder) == 0
    return folder


@pytest.fixture(scope="session")
def modelled(tokenized, tmp_path_factory):
    """And with a finished ``world_model``."""
    from small_pipeline import copied, run

    stages = ("collect", "encoder", "tokenizer")
    folder = copied(tokenized, tmp_path_factory.mktemp("modelled"), *stages)
    assert run("world_model", folder) == 0
    return folder


@pytest.fixture(scope="session")
def acting(modelled, tmp_path_factory):
    """And with a finished ``policy``: every stage."""
    from small_pipeline import copied, run

    stages = ("collect", "encoder", "tokenizer", "world_model")
    folder = copied(modelled, tmp_path_factory.mktemp("acting"), *stages)
    assert run("policy", folder) == 0
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """``trained("hrvq", "image")``: the folder of a short run of dummy_image; each is made once."""
    from small_runs import short

    made = {}

    def make(kind: str, task: str):
        if (kind, task) not in made:
            folder = tmp_path_factory.mktemp("trained") / f"{kind}_{task}"
            assert short(folder, kind, task) == 0
            made[kind, task] = folder
        return made[kind, task]

    return make


# Files that take longest come first, so that processes side by side end together.
LONG = tuple(name for name in NEED_COMPARE if name.startswith("pipeline"))
LONG += ("cli", "dynamics", "compile", "installed", "learning", "scores", "run")
LONG += ("docs", "comparison", "configs", "env_faults", "dream_env", "agent", "envs", "gpu")
LONG += ("inside", "library", "offline", "evaluation", "report", "resume", "kill", "write_back")
LONG += ("population", "population_runs", "export", "demo")
# Threads stay in their processes, where tests/forked.py then copies nothing: those of the other
# device, which is to be there before autograd's first step, and Ray's.
OTHER = ("other_device", "other_device_programs")
LONG = (*OTHER, *LONG)
LAST = ("backends",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """``--dist loadfile``, but all files of the pipeline go to one process, which makes ``acting``
    and what that is made of once; before them those of the other device.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            together = ("test_other_device", "test_pipeline")
            return "pipeline" if Path(file).name.startswith(together) else file

    return Files(config, log)


def pytest_collection_modifyitems(items):
    """A test that needs CUDA carries the marker and is skipped by name where there is none."""
    gc.freeze()  # what was imported is no garbage, and a collection takes a tenth of a second
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    order |= {f"test_{name}.py": len(LONG) + 1 for name in LAST}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))  # else as they were
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
