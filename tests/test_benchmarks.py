"""The programs in benchmarks/ start, whatever their modules depend on has become."""

import subprocess
import sys

import pytest
from small_pipeline import DEBUG, copied
from small_runs import one_line

from conftest import ROOT

MAIN = 'if __name__ == "__main__":'
FOLDER = ROOT / "benchmarks"
PROGRAMS = [path.stem for path in sorted(FOLDER.glob("*.py")) if MAIN in path.read_text()]
HELP = """
import importlib, sys
for name in sys.argv[1:]:
    program = importlib.import_module(name)
    sys.argv = [name, "--help"]
    try:
        status = program.main(*[["--help"]] * bool(program.main.__code__.co_argcount))
    except SystemExit as stop:
        status = stop.code
    if status:
        sys.exit(f"{name}: {status}")
"""


def test_all_say_what_they_are():
    assert len(PROGRAMS) > 25
    argv = [sys.executable, "-c", HELP, *PROGRAMS]
    out = subprocess.run(argv, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-500:]
    assert out.stdout.count(f"python benchmarks/{PROGRAMS[0]}.py") == 1
    assert all(f"benchmarks/{name}.py" in out.stdout for name in PROGRAMS)


def test_variants_of_a_stage_become_a_table(collected, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import encoders

    monkeypatch.setattr(encoders, "OBJECTIVES", ("infonce", "both"))
    folder, table = copied(collected, tmp_path / "pipeline", "collect"), tmp_path / "table.md"
    argv = [*DEBUG, "--logdir", str(folder)]
    assert encoders.main(argv) == 2
    one_line(capsys, "--out is missing")
    assert encoders.main([*argv, "--out", str(table)]) == 0
    text = table.read_text(encoding="utf-8")
    assert text.startswith("|  | infonce | both | untrained | pixels |\n")
    assert "2 variants trained at commit " in text


@pytest.mark.parametrize("name", ["update", "process"])
def test_a_misspelt_key_is_one_line(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    program = __import__(name)
    assert program.main(["--replay.bach", "4"]) == 2
    one_line(capsys, "replay.batch")
