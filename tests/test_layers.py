"""A file imports from lower layers only, or acyclically from its own package."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

# Each entry is a file or a folder; what else is in a folder belongs to the folder's entry.
LAYERS = {
    "benchmarks": 14,
    "pipeline": 13,
    "run_comparison": 11,
    "simple_test": 11,
    "dreamer": 12,
    "population": 11,
    "demo": 13,
    "doctor": 11,
    "training": 10,
    "analysis": 10,
    "play": 10,
    "library": 9,
    "comparison": 9,
    "legacy.check": 9,
    "run_state": 9,
    "run_setup": 9,
    "models": 8,
    "networks": 7,
    "seeds": 7,
    "signals": 7,
    "run_config": 7,
    "legacy": 6,
    "tools": 6,
    "envs": 5,
    "hidreamer.dynamics": 7,
    "hidreamer.behavior": 4,
    "hidreamer.carries": 4,
    "hidreamer.explorer": 4,
    "hidreamer.objectives": 4,
    "hidreamer.update": 5,
    "hidreamer.dynamics.rssm": 4,
    "hidreamer.dynamics.hrssm": 4,
    "hidreamer.dynamics.hrvq": 6,
    "hidreamer.dynamics.hrvq_gru": 4,
    "hidreamer.dynamics.residual_scan": 3,
    "hidreamer.dynamics.cell_scan": 2,
    "hidreamer.dynamics.sequences": 5,
    "hidreamer.dynamics.tokens": 2,
    "hidreamer.dynamics.recurrent": 3,
    "hidreamer.parallel": 4,
    "hidreamer.rollout": 3,
    "hidreamer.branches": 2,
    "hidreamer.experts": 2,
    "hidreamer.dynamics.base": 1,
    "hidreamer.dynamics.sampler": 1,
    "hidreamer.dynamics.scan": 2,
    "hidreamer.dynamics.scan_steps": 1,
    "hidreamer.depth": 1,
    "hidreamer.quantizer": 1,
    "hidreamer.transformer": 1,
    "hidreamer.mask": 1,
    "hidreamer": 0,
}
ALONE = ("hidreamer", "envs")  # import nothing else of this project
ON_DEMAND = ("legacy",)  # loaded only when asked for
# May import by a name that is not written out: the command its scripts, gym_MODULE:ID the module of
# a user, hidreamer.root what the modules of ROOT import.
DYNAMIC = ("hidreamer.__main__", "hidreamer.root", "envs.gym")
# The one import upwards: hidreamer.load and its like, and only inside a function.
UPWARDS = ("hidreamer", "library")
BY_NAME = ("import_module", "__import__", "run_module", "run_path")
OUTSIDE = (
    "docs",
    "tests",
    "examples",
    "results",
    "runs",
    "build",
)  # folders without code of the project


class Project:
    """The modules of a folder, and what they import from each other."""

    def __init__(self, root: Path):
        self.paths: dict[str, Path] = {}  # by dotted name
        for top in sorted(root.iterdir()):
            if top.name in OUTSIDE or top.name.startswith("."):
                continue
            for path in (
                sorted(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py")
            ):
                parts = path.relative_to(root).with_suffix("").parts
                self.paths[".".join(parts).removesuffix(".__init__")] = path
        self.faults: list[str] = []
        self.always: dict[str, set[str]] = {}  # what a module imports as it is loaded
        self.lazily: dict[str, set[str]] = {}  # and inside its functions
        for name in self.paths:
            self.always[name], self.lazily[name] = self._imports(name)

    def _imports(self, name: str) -> tuple[set[str], set[str]]:
        always, lazily = set(), set()
        for node, inside in walk(ast.parse(self.paths[name].read_text())):
            found = lazily if inside else always
            if isinstance(node, ast.Import):
                found |= {self._owner(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                self.faults.append(f"{name} has a relative import")
            elif isinstance(node, ast.ImportFrom):
                found |= {self._owner(f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Call) and called(node) in BY_NAME:
                self._by_name(name, node, found)
        return always - {"", name}, lazily - {"", name}

    def _by_name(self, name: str, call: ast.Call, found: set[str]) -> None:
        """A constant is an import like any other; f"envs.{suite}" may be anything in ``envs``."""
        what = call.args[0]
        start = what.values[0] if isinstance(what, ast.JoinedStr) else what
        if isinstance(start, ast.Constant):
            found.add(self._owner(str(start.value).rstrip(".")))
        elif name not in DYNAMIC:
            self.faults.append(f"{name} imports by a name that is not written out")

    def _owner(self, name: str) -> str:
        """The module of this project that holds ``name``; "" if none does."""
        while name and name not in self.paths:
            name = name.rpartition(".")[0]
        return name


def walk(node: ast.AST, inside: bool = False):
    """All nodes, and whether they stand in a function."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, inside or function)


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def layer_of(name: str) -> str:
    """The entry of LAYERS that a module belongs to; "" if it has none."""
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
    return name


def faults(root: Path) -> list[str]:
    """What is wrong with the imports of the project in ``root``, one line each."""
    project = Project(root)
    found = project.faults
    for name in project.paths:
        if not layer_of(name):
            found.append(f"{name} has no layer")
            continue
        for other in sorted(project.always[name] | project.lazily[name]):
            if (name, other) == UPWARDS and other not in project.always[name]:
                continue
            here, there = layer_of(name), layer_of(other)
            if here != there and there and LAYERS[there] >= LAYERS[here]:
                layers = LAYERS[here], LAYERS[there]
                found.append(f"{name} (layer {layers[0]}) imports {other} (layer {layers[1]})")
            top, above = name.split(".")[0], other.split(".")[0]
            if top in ALONE and above != top:
                found.append(f"{name} imports {other}: {top} stands alone")
            if above in ON_DEMAND and top not in ON_DEMAND and other in project.always[name]:
                found.append(f"{name} always loads {other}")
    return found + cycles(project.always)


def cycles(graph: dict[str, set[str]]) -> list[str]:
    found, done, path = [], set(), []

    def visit(name: str) -> None:
        if name in path:
            found.append("cycle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)
    return found


def test_nothing_imports_upwards():
    assert faults(ROOT) == []


def test_every_entry_exists():
    assert sorted(LAYERS.keys() - Project(ROOT).paths.keys()) == [
        "benchmarks"
    ]  # a folder of scripts


def test_the_dynamics_never_import_each_other():
    project = Project(ROOT)
    kinds = {name for name in project.paths if name.startswith("hidreamer.dynamics.")}
    shared = ("base", "recurrent", "scan", "tokens", "sequences")
    shared += ("cell_scan", "residual_scan", "sampler", "scan_steps")
    kinds -= {f"hidreamer.dynamics.{name}" for name in shared}
    for name in kinds:
        assert not (project.always[name] | project.lazily[name]) & (kinds - {name})


LAZY = "def f():\n    import {}\n"
PLANTED = {  # file: its text, and what is said of it
    "upward": ({"networks.py": "import models"}, "networks (layer 7) imports models (layer 8)"),
    "upward, in a function": (
        {"tools.py": LAZY.format("training")},
        "tools (layer 6) imports training (layer 10)",
    ),
    "upward, in a try": (
        {"models.py": "try:\n    import dreamer\nfinally:\n    pass"},
        "models (layer 8) imports dreamer",
    ),
    "one layer": (
        {"envs/a.py": "", "hidreamer/b.py": "from envs import a"},
        "hidreamer.b (layer 0) imports envs.a",
    ),
    "from the root": (
        {"hidreamer/a.py": LAZY.format("tools")},
        "hidreamer.a imports tools: hidreamer stands alone",
    ),
    "by name": (
        {"hidreamer/a.py": "__import__('models')"},
        "hidreamer.a imports models: hidreamer stands alone",
    ),
    "by a hidden name": (
        {"hidreamer/a.py": "import_module(x)"},
        "hidreamer.a imports by a name that is not written",
    ),
    "downward, not alone": (
        {"envs/a.py": "import hidreamer"},
        "envs.a imports hidreamer: envs stands alone",
    ),
    "an application": (
        {"comparison/a.py": "from analysis import b", "analysis/b.py": ""},
        "comparison.a (layer 9) imp",
    ),
    "applications, of a library": (
        {"models.py": LAZY.format("comparison")},
        "models (layer 8) imports comparison",
    ),
    "always loaded": ({"training.py": "import legacy"}, "training always loads legacy"),
    "a cycle": (
        {"envs/a.py": "import envs.b", "envs/b.py": "import envs.a"},
        "cycle: envs.a -> envs.b -> envs.a",
    ),
    "no layer": ({"elsewhere/a.py": ""}, "elsewhere.a has no layer"),
    "the upward import, from elsewhere": (
        {"hidreamer/a.py": LAZY.format("library")},
        "hidreamer.a imports library: hidreamer stands alone",
    ),
    "the upward import, always": (
        {"hidreamer/__init__.py": "import library"},
        "hidreamer imports library: hidreamer stands alone",
    ),
    "the upward import, to elsewhere": (
        {"hidreamer/__init__.py": LAZY.format("models")},
        "hidreamer imports models: hidreamer stands alone",
    ),
    "an application, of the loader": (
        {"library/a.py": LAZY.format("play")},
        "library.a (layer 9) imports play (layer 10)",
    ),
    "relative": ({"envs/a.py": "from . import b"}, "envs.a has a relative import"),
}


def build(root: Path, files: dict[str, str]) -> Path:
    """A project without fault, but for ``files``."""
    folders = {name.split(".")[0] for name in LAYERS}
    empty = {f"{folder}/__init__.py": "import os" for folder in folders}
    for name, text in (empty | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in folders:
        if (root / f"{name}.py").exists():  # instead of the folder
            (root / name / "__init__.py").unlink()
    return root


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case, tmp_path):
    """The negative control of the tests above."""
    files, message = PLANTED[case]
    assert faults(build(tmp_path / "without", {})) == []
    assert any(message in line for line in faults(build(tmp_path / "with", files)))


def test_tools_stays_small():
    """Upstream's grew to 1,000 lines, one fork's to 1,790."""
    assert len((ROOT / "tools.py").read_text().splitlines()) <= 320
