"""results/README.md: every file of results/ with what it shows, made from the files themselves and
from claims.yaml.

    python benchmarks/results_page.py            write the page
    python benchmarks/results_page.py --check    say what is wrong with results/, change nothing
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from comparison import words  # noqa: E402

PAGE = "results/README.md"
REPORT = " (report)"  # behind a commit that made a report and none of its runs
BINARY = (".png", ".gif", ".mp4", ".npz", ".pt")
ROOTS = "tmp|work|workspace|root|home|Users|mnt|data|scratch|content|opt|srv|nfs"
MACHINE = re.compile(rf"(?<![\w.])/(?:{ROOTS})/[\w.-]|\b[A-Z]:\\+Users\b")
STEP = 15  # of open-loop errors that are quoted
OFFLINE = ["reconstruction", "open loop, 15"]  # quoted of a comparison
INTRODUCTION = """# Results

Every file of this folder, with what it shows and what it does not. Made by
`python benchmarks/results_page.py`; a test fails where a file has no row, a commit is not in
history or a machine's path stands in a file. Numbers are means over seeds with 95% t intervals,
then every seed. *shown* says whether the data support the claim: "no" stands beside "yes"; "open"
is too few seeds, or no test. Of dreams, "yes" is less than the last frame seen: on Pong that is
little: a model that paints nothing that moves has about 0.026
([decision 007](../docs/decisions/007-which-posterior.md)).
"""


class Row(NamedTuple):
    claim: str
    number: str
    baseline: str
    seeds: str
    shown: str
    files: tuple[str, ...]
    commit: str
    command: str
    hardware: str


def look(value: Any, path: str) -> list[Any]:
    """What a path leads to: keys and indices between dots, `*` for every entry, `0,1` for two."""
    found = [value]
    for step in path.split("."):
        following = []
        for x in found:
            try:
                if step == "*":
                    following += x.values() if isinstance(x, dict) else x
                elif isinstance(x, dict):
                    following.append(x[step])
                else:
                    following += [x[int(i)] for i in step.split(",")]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(f"there is no {step!r} of {path!r}") from None
        found = following
    return found


def table(text: str) -> dict[str, dict[str, float]]:
    """{row: {column: number}} of the first table of a Markdown file."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header = [name.strip() for name in text.splitlines()[0].strip("|").split("|")][1:]
    found = {}
    for name, *values in cells[1:]:
        numbers = [x.replace(",", "") for x in values]
        known = zip(header, numbers, strict=False)
        found[name] = {column: float(x) for column, x in known if re.fullmatch(r"-?[\d.]+", x)}
    return found


def shown(values: list[Any]) -> str:
    """`mean [low, high] (each)` of numbers; text as it is. One entry with a value, low and high is
    an estimate of the file's own.
    """
    if not values:
        return "–"
    if len(values) == 1 and isinstance(values[0], dict) and {"low", "high"} <= values[0].keys():
        return words.estimate(values[0], sign=True)
    if not all(isinstance(x, int | float) for x in values):
        return ", ".join(map(str, values))
    if len(values) == 1:
        return words.number(float(values[0]))
    each = " / ".join(words.number(float(x)) for x in values)
    mean = words.number(float(np.mean(values)))
    return f"{mean} {words.interval(*interval(values))} ({each})"


def interval(values: list[float]) -> tuple[float, float]:
    """95% t interval of the mean of two numbers or more."""
    x = np.array(values, float)
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def origin(content: dict, entry: dict) -> tuple[str, str, str]:
    """-> commit, command, hardware: those of the entry, else of the file."""
    made = content.get("made") or content
    return tuple(str(entry.get(k, made.get(k, ""))) for k in ("commit", "command", "hardware"))


def of_runs(content: dict) -> tuple[str, str, str]:
    """`origin` of a comparison: the commits and machines of its runs, whatever made the report."""
    commit, command, hardware = origin(content, {})
    commits, machines = {}, {}  # in order, each once
    for run in content["runs"]:
        commits |= dict.fromkeys(run["commit"].split(", "))
        machines |= {run["hardware"]: None}
    for found in (commits, machines):
        found.pop("unknown", None)  # of published scores
    if commits and not any(commit.startswith(x) or x.startswith(commit) for x in commits):
        commits[f"{commit}{REPORT}"] = None
    return ", ".join(commits) or commit, command, "; ".join(machines) or hardware


# ---------------------------------------------------------------- rows


def agents(path: str, content: dict) -> Iterator[Row]:
    """Of benchmarks/learning.py: a row for each threshold that the runs are long enough for."""
    runs = content["runs"]
    more = f" {' '.join(content['more'])}" if content.get("more") else ""
    control = ", rewards and ends shuffled" if content["negative_control"] else ""
    for name, least in content["thresholds"].items():
        values = [run["figures"][name] for run in runs.values() if name in run["figures"]]
        if not values:
            continue
        copies = [run["figures"].get(f"{name}_copy") for run in runs.values()]
        if None not in copies:
            baseline = f"last seen {shown(copies)}; a table of counts comes near (decision 027)"
        else:
            baseline = f"random play {words.number(content.get('random_return'))}"
        met = sum(x >= least for x in values)
        verdict = f"{met} of {len(values)} reach {least:g}"
        agent = f"{content['task']}, {content['dynamics']}{more}{control}"
        claim = f"{agent}: {name.replace('_', ' ')}"
        yield Row(
            claim, shown(values), baseline, " ".join(runs), verdict, (path,), *origin(content, {})
        )


def world_models(root: Path, path: str, content: dict) -> Iterator[Row]:
    """Of benchmarks/quantisers.py: how far each variant's dreams are from what came."""
    metric = f"open loop {STEP}, moving"
    for name, runs in content["rows"].items():
        values = [run[metric] for run in runs.values() if metric in run]
        copies = [run[f"{metric}, copy"] for run in runs.values() if f"{metric}, copy" in run]
        if not values or not copies:
            continue
        better = "no"
        if max(values) < min(copies):  # in every run; the interval may still hold the baseline
            clear = len(values) > 1 and interval(values)[1] < min(copies)
            better = "yes" if clear else "open"
        claim = f"{name}: error of moving pixels after {STEP} dreamt steps"
        files = (path, path.replace(".json", ".md"))
        files = tuple(x for x in files if (root / x).exists())
        yield Row(
            claim,
            shown(values),
            f"last frame seen {shown(copies)}",
            " ".join(runs),
            better,
            files,
            *origin(content, {}),
        )


def comparisons(root: Path, path: str, content: dict) -> Iterator[Row]:
    """Of run_comparison.py: the differences from the baseline, and the offline ones."""
    folder = str(Path(path).parent)
    names = ("summary.json", "report.md", "report.html", "curves.png")
    files = tuple(f"{folder}/{x}" for x in names if (root / folder / x).exists())
    base = content["models"][0]
    tasks = ", ".join(content["tasks"])
    measures = {"final returns": content["comparisons"]}
    if content.get("seconds"):
        clocks = "/".join(sorted({task["clock"] for task in content["tasks"].values()}))
        measures[f"returns in equal {clocks} seconds"] = content["seconds"]["comparisons"]
    for what, by_model in measures.items():
        for model, found in by_model.items():
            yield Row(
                f"{model} against {base}, {tasks}: difference of normalised {what}",
                words.estimate(found, sign=True),
                f"{base} {words.number(found['baseline'])}",
                str(content["seeds"][model]),
                f"yes: {'higher' if found['value'] > 0 else 'lower'}"
                if found["claimed"]
                else "no difference shown",
                files,
                *of_runs(content),
            )
    offline = content.get("offline")
    for name in OFFLINE if offline else ():
        for metric in [x for x in offline["metrics"] if x == name]:
            entry = offline["metrics"][metric]
            for model, (value, low, high) in entry["differences"].items():
                clear = low is not None and (low > 0 or high < 0)
                yield Row(
                    f"{model} minus {offline['models'][0]} on the same episodes: {metric}",
                    words.estimate({"value": value, "low": low, "high": high}, sign=True),
                    f"{offline['models'][0]} {words.number(entry['values'][offline['models'][0]])}",
                    str(offline["seeds"]),
                    ("better" if value < 0 else "worse") if clear else "no difference shown",
                    files,
                    *origin(content, {}),
                )


def stated(root: Path, claims: dict) -> Iterator[Row]:
    """Of claims.yaml."""
    for entry in claims["files"]:
        if not (root / entry["file"]).exists():
            raise ValueError(f"claims.yaml names {entry['file']}, which does not exist")
        text = (root / entry["file"]).read_text()
        content = table(text) if entry["file"].endswith(".md") else json.loads(text)
        of_stage = {}
        if (
            entry["file"].startswith("results/pipeline/") and "commit" not in entry
        ):  # one run made all of its files
            of_stage = next(x for x in claims["files"] if x["file"].endswith("policy.json"))
        made = {k: of_stage[k] for k in ("commit", "command", "hardware", "seeds") if k in of_stage}
        try:
            number, baseline = (
                shown(look(content, entry[key])) if key in entry else "–"
                for key in ("number", "baseline")
            )
        except ValueError as error:
            raise ValueError(f"claims.yaml, {entry['file']}: {error}") from None
        entry = made | entry
        files = (entry["file"], *entry.get("with", ()))
        yield Row(
            entry["claim"],
            number,
            baseline,
            entry["seeds"],
            entry["shown"],
            files,
            *origin(content, entry),
        )


def rows(root: Path, claims: dict) -> list[Row]:
    """All rows, sorted by file."""
    found = list(stated(root, claims))
    for path in sorted(root.glob("results/**/*.json")):
        name, content = str(path.relative_to(root)), json.loads(path.read_text())
        if "thresholds" in content and "dynamics" in content:
            found += agents(name, content)
        elif "rows" in content and "episodes" in content:
            found += world_models(root, name, content)
        elif "comparisons" in content:
            found += comparisons(root, name, content)
    return sorted(found, key=lambda row: row.files[0])


# ---------------------------------------------------------------- the page


def names(commit: str) -> list[str]:
    """The names of a row's commits, as git knows them."""
    return [name.removesuffix(REPORT).partition("+")[0] for name in commit.split(", ")]


def date(commit: str) -> str:
    """Of a row's commits, ISO, each day once; "" for those that are not in history."""
    days = {}
    for name in names(commit):
        argv = ["git", "-C", str(ROOT), "show", "-s", "--format=%cs", name]
        done = subprocess.run(argv, capture_output=True, text=True)
        days |= {done.stdout.strip(): None} if done.returncode == 0 else {}
    return ", ".join(days)


def in_history(commit: str) -> bool:
    """Whether all of a row's commits are."""
    argv = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor"]
    for name in names(commit):
        if not name or subprocess.run([*argv, name, "HEAD"], capture_output=True).returncode:
            return False
    return True


def line(cells: list[str]) -> str:
    """A row of a table."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def page(root: Path, claims: dict) -> str:
    lines, origins = [INTRODUCTION], []
    header = "| claim | number | baseline | seeds | shown | files | made |\n|" + " --- |" * 7
    lines += ["## What was measured", "", header]
    for row in rows(root, claims):
        made = row[6:]
        if made not in origins:
            origins.append(made)
        files = " ".join(
            f"[{x.removeprefix('results/')}]({x.removeprefix('results/')})" for x in row.files
        )
        cells = [*row[:5], files, f"[{origins.index(made) + 1}](#how)"]
        lines.append(line(cells))
    lines += ["", "## What the lineage claimed", ""]
    lines.append("| of | claimed | measured | why they differ | file |\n|" + " --- |" * 5)
    for entry in claims["lineage"]:
        file = entry.get("file", "").removeprefix("results/")
        cells = [entry["of"], entry["claimed"], entry["measured"], entry["why"]]
        lines.append(line([*cells, f"[{file}]({file})" if file else "–"]))
    lines += ["", '## <a id="how"></a>How each was made', ""]
    lines.append("| | commit | date | hardware | command |\n|" + " --- |" * 5)
    for i, (commit, command, hardware) in enumerate(origins, 1):
        lines.append(line([str(i), commit, date(commit), hardware, f"`{command}`"]))
    return "\n".join(lines) + "\n"


def faults(root: Path, claims: dict) -> list[str]:
    """One line for each: a file without a row, a commit that is not in history, a machine's path,
    a page that is not the one that would be written.
    """
    found, made = [], rows(root, claims)
    covered = {PAGE, *(file for row in made for file in row.files)}
    lineage = [entry["file"] for entry in claims["lineage"] if "file" in entry]
    found += [f"claims.yaml names {x}, which does not exist" for x in lineage if x not in covered]
    for path in sorted(path for path in (root / "results").rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if name not in covered:
            picture = path.suffix == ".png" and any(
                Path(file).parent == Path(name).parent for file in covered - {PAGE}
            )
            if not picture:
                found.append(f"{name} has no row: add it to benchmarks/claims.yaml")
        readable = path.suffix not in BINARY and name != PAGE
        text = path.read_text(errors="replace") if readable else ""
        if match := MACHINE.search(text):
            where = " ".join(text[match.start() :][:60].split())
            found.append(f"{name} holds a machine's path: {where}")
    for commit in sorted({row.commit for row in made}):
        if not in_history(commit):
            files = ", ".join(row.files[0] for row in made if row.commit == commit)
            found.append(f"commit {commit or '(none)'} of {files} is not in history")
    written = root / PAGE
    if not written.exists() or written.read_text() != page(root, claims):
        found.append(f"{PAGE} is not up to date: run python benchmarks/results_page.py")
    return found


def load() -> dict:
    return YAML(typ="safe").load((ROOT / "benchmarks" / "claims.yaml").read_text())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is wrong")
    options = parser.parse_args(argv)
    claims = load()
    try:
        if not options.check:
            (ROOT / PAGE).write_text(page(ROOT, claims))
        found = faults(ROOT, claims)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(found) or f"{PAGE} is whole")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
