"""Rows of a table of benchmarks/quantisers.py against one another, the same seeds side by side.

    python benchmarks/paired.py results/hrvq/memories.json --metric 'ball 15'
        --baselines rssm sampled [--out results/hrvq/memories_paired.md]

One Markdown table: each row's mean over seeds, and its difference from each baseline with a 95% t
interval over seeds, and in how many seeds it is above.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure

from analysis.summary import over_seeds
from comparison import words
from hidreamer.provenance import provenance


def difference(row: dict[str, Any], base: dict[str, Any], metric: str) -> str:
    """Of two rows, {seed: {metric: number}}, over the seeds that both have."""
    seeds = sorted(row.keys() & base.keys(), key=int)
    gaps = [row[seed][metric] - base[seed][metric] for seed in seeds]
    above = sum(gap > 0 for gap in gaps)
    return f"{words.estimate(over_seeds(gaps), sign=True)}, {above} of {len(gaps)}"


def table(rows: dict[str, Any], metric: str, baselines: list[str]) -> str:
    header = ["", f"{metric}, mean", *(f"minus {base}" for base in baselines)]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, row in rows.items():
        mean = words.number(over_seeds([x[metric] for x in row.values()])["value"])
        cells = ["–" if name == base else difference(row, rows[base], metric) for base in baselines]
        lines.append("| " + " | ".join([name, mean, *cells]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = measure.argument_parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--metric", default="ball 15")
    parser.add_argument("--baselines", nargs="+", default=["rssm"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {}
    for name, row in json.loads(args.file.read_text())["rows"].items():
        if all(args.metric in x for x in row.values()):
            rows[name] = row
    if not rows:
        parser.error(f"no row of {args.file} has {args.metric!r} for every seed")
    if lost := [base for base in args.baselines if base not in rows]:
        parser.error(f"no row {lost[0]!r} with {args.metric!r}; there are {'; '.join(rows)}")
    made = provenance()
    text = f"`{made['command']}`, {made['commit']}\n\n{table(rows, args.metric, args.baselines)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
