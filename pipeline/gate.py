"""What a stage ends with: its metrics, each beside its baselines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidreamer import checkpoint

HIGHER, LOWER, NEITHER = "higher", "lower", ""  # which values are better


@dataclass
class Row:
    """One metric. baselines: {who: value}, NaN where there is none.

    better: HIGHER or LOWER makes a value that does not pass every baseline a warning; NEITHER is
    for the record, and the table's note says why no value is better.
    beside: {who: value} that are shown with the baselines and not compared: bounds, and what would
    be no fair comparison.
    """

    metric: str
    value: float
    baselines: Mapping[str, float] = field(default_factory=dict)
    better: str = NEITHER
    beside: Mapping[str, float] = field(default_factory=dict)

    def beaten_by(self) -> list[str]:
        """The baselines that are at least as good; all of them where the value is no number."""
        if not self.better:
            return []
        sign = 1.0 if self.better == HIGHER else -1.0
        found = []
        for who, value in self.baselines.items():
            if math.isfinite(value) and not sign * self.value > sign * value:
                found.append(who)
        return found


@dataclass
class Table:
    """Rows of a gate. note: what the columns mean, and what a value does not show."""

    title: str
    rows: list[Row]
    note: str = ""


@dataclass
class Gate:
    """What a stage ends with. facts: {what: text or number} that need no baseline."""

    stage: str
    tables: list[Table]
    facts: dict[str, Any] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """One line for every metric that a baseline matches or beats."""
        lines = []
        for table in self.tables:
            for row in table.rows:
                if who := row.beaten_by():
                    others = ", ".join(f"{name} {number(row.baselines[name])}" for name in who)
                    text = f"{table.title}: {row.metric} {number(row.value)} is no better than"
                    lines.append(f"{text} {others}")
        return lines

    def tree(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None."""
        tables = []
        for table in self.tables:
            rows = []
            for row in table.rows:
                shown = {**row.baselines, **row.beside}
                baselines = {who: finite(x) for who, x in shown.items()}
                rows.append(
                    {
                        "metric": row.metric,
                        "value": finite(row.value),
                        "baselines": baselines,
                        "better": row.better,
                        "beaten_by": row.beaten_by(),
                    }
                )
            tables.append({"title": table.title, "rows": rows, "note": table.note})
        return {
            "stage": self.stage,
            "passed": not self.warnings(),
            "warnings": self.warnings(),
            "facts": self.facts,
            "tables": tables,
        }

    def write(self, folder: Path) -> list[Path]:
        """gate.json and gate.md, each replaced in one step. -> their paths."""
        texts = {
            "gate.json": json.dumps(self.tree(), indent=1, allow_nan=False) + "\n",
            "gate.md": markdown(self.tree()),
        }
        for name, text in texts.items():
            checkpoint.replace_text(folder / name, text)
        return [folder / name for name in texts]


def read(folder: Path) -> dict[str, Any]:
    """The ``Gate.tree`` of a finished stage."""
    return json.loads((folder / "gate.json").read_text("utf-8"))


def finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def number(x: float | None) -> str:
    """Four significant digits; a dash for what is no number."""
    if x is None or not math.isfinite(x):
        return "–"
    return f"{x:,.0f}" if abs(x) >= 10_000 or x == int(x) else f"{x:.4g}"


def cells(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """-> header and rows of a table of ``Gate.tree``, as text."""
    whos = list(dict.fromkeys(who for row in table["rows"] for who in row["baselines"]))
    better = {HIGHER: " ↑", LOWER: " ↓", NEITHER: ""}
    rows = []
    for row in table["rows"]:
        mark = " ⚠" if row["beaten_by"] else ""
        line = [row["metric"] + better[row["better"]], number(row["value"]) + mark]
        rows.append(line + [number(row["baselines"].get(who)) for who in whos])
    return ["", "here", *whos], rows


def markdown(gate: Mapping[str, Any]) -> str:
    """gate.md of a ``Gate.tree``."""
    lines = [f"# Gate of {gate['stage']}: {'passed' if gate['passed'] else 'with warnings'}", ""]
    lines += [f"> ⚠ {warning}\n" for warning in gate["warnings"]]
    lines += [f"- {name}: {value}" for name, value in gate["facts"].items()]
    for table in gate["tables"]:
        header, rows = cells(table)
        lines += ["", f"## {table['title']}", "", f"| {' | '.join(header)} |"]
        lines += ["| --- |" + " ---: |" * (len(header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", table["note"]] if table["note"] else []
    return "\n".join(lines) + "\n"
