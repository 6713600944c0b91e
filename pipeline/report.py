"""report.html of the whole pipeline: the chain, its gates, pictures, costs, the lineage's claims.

One file that opens offline, with the parts of a comparison's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from comparison import parts
from hidreamer import checkpoint
from hidreamer.provenance import provenance
from pipeline import data, gate, manifest, pictures, world_model
from pipeline.stage import Stage
from pipeline.token_model import load_all_tokens
from pipeline.world_model_gate import PAIRS
from tools import Config

NAME = "report.html"
Gates = Mapping[str, Mapping[str, Any]]  # by stage, as ``Gate.tree``


class Claim(NamedTuple):
    """Something that ssrhaso/hidreamer says of itself, and where the like is measured here."""

    what: str
    claimed: str
    stage: str
    metrics: tuple[str, ...]  # names of rows; "*: x" is x of every game
    why: str
    # What no run of the pipeline measures by itself, and the project did.
    elsewhere: str = ""
    source: str = ""  # file, and commit


CLAIMS = (
    Claim("norm of embeddings", "1.0", "encoder", ("*: norm",), "1 by construction"),
    Claim(
        "diversity",
        "1.411",
        "encoder",
        ("*: diversity",),
        "random pairs are orthogonal at 1.414: it says no more than that",
    ),
    Claim(
        "temporal ratio",
        "0.260",
        "encoder",
        ("*: temporal ratio",),
        "theirs is of one game's training frames, without a baseline; a constant code has 0",
    ),
    Claim(
        "correlation with the game's state",
        "0.267",
        "encoder",
        ("ball x: best r (lineage)", "ball x: R²", "player y: best r (lineage)", "player y: R²"),
        "theirs is the best of 384 numbers in sample, on labels that were constant for both"
        " paddles; R² on held-out episodes is the test",
    ),
    Claim(
        "codes in use",
        "256 of 256",
        "tokenizer",
        ("L0: codes in use", "L1: codes in use", "L2: codes in use"),
        "theirs counts one use in 300,000 training frames",
    ),
    Claim("perplexity", "240", "tokenizer", ("L0: perplexity",), "theirs is of the flat VQ"),
    Claim(
        "temporal smoothness",
        "0.811",
        "tokenizer",
        ("L0: persistence",),
        "it is what copying the last code gets right, and no merit",
    ),
    Claim(
        "cosine of the reconstruction",
        "0.73",
        "tokenizer",
        ("L0+L1+L2: cosine", "L0+L1+L2: dot product (lineage's cosine)"),
        "theirs was a dot product with vectors that are shorter than 1",
    ),
    Claim(
        "codes that all games share",
        "125 of 256",
        "tokenizer",
        ("L0: shared codes",),
        "theirs counts one use in any game and has no null",
    ),
    Claim(
        "frames in shared codes",
        "53%",
        "tokenizer",
        ("L0: frames in shared codes", "L0: bits about the game"),
        "the same; how much a code says about the game is the question",
    ),
    Claim(
        "commitment per level forces shared coarse codes",
        "[0.05, 0.25, 0.60]",
        "tokenizer",
        (),
        "on frozen embeddings it has no gradient to act by; with --joint it has",
        "frozen, two schedules give codebooks equal to the last bit",
        "tests/test_pipeline_tokenizer.py",
    ),
    Claim(
        "accuracy of the world model",
        "99.7 / 98.3 / 98.5%",
        "world_model",
        ("*: L0 accuracy", "*: L1 accuracy", "*: L2 accuracy"),
        "theirs validates on windows whose every step was trained on; on fresh data theirs had 81 /"
        " 63 / 44, the rate of copying",
    ),
    Claim(
        "the hierarchical mask keeps fine details out",
        "yes",
        "world_model",
        ("L0 nats", "L0 accuracy, changed"),
        "with two layers or more every row sees everything through L0; beside it stand a barrier"
        " and a causal mask",
    ),
    Claim(
        "experts: speed, parameters, long-horizon accuracy",
        "2.8x, -40%, +15%",
        "world_model",
        (),
        "there was no code",
        "4 experts, top 1, beside dense of as many parameters: 1.04x speed (CPU time; routing costs"
        " what fewer products save at this size); -67% active parameters, none fewer in all; L0"
        " right after 30 steps .219 against .271 (.234 for dense of the active size, .260 for"
        " keeping the last), one seed",
        "results/pipeline/experts.md, commit a24eaa52f7ae",
    ),
    Claim(
        "a policy on frozen tokens",
        "in progress",
        "policy",
        ("*: mean return",),
        "theirs never left the range of random play",
    ),
)


def measured(gates: Gates, claim: Claim) -> str:
    """The values of a claim's metrics, each with its baselines; a dash where there are none."""
    found = []
    for table in gates.get(claim.stage, {}).get("tables", []):
        game = table["title"].split(":")[0] + " " if ":" in table["title"] else ""
        for row in table["rows"]:
            for name in claim.metrics:
                of_game = name.startswith("*: ") and row["metric"].endswith(name[1:])
                if row["metric"] == name or of_game:
                    value = gate.number(row["value"])
                    others = [
                        f"{who} {gate.number(x)}"
                        for who, x in row["baselines"].items()
                        if x is not None
                    ]
                    beside = f" ({', '.join(others)})" if others else ""
                    game = "" if table["title"].startswith("Masks") else game
                    found.append(f"{game}{row['metric']} {value}{beside}")
    if not found and claim.elsewhere:
        return f"not by this run; measured by the project ({claim.source}): {claim.elsewhere}"
    return "; ".join(found) or "–"


def passing(gates: Gates, title: str, ending: str, baseline: str) -> list[str]:
    """In how many games each level's metric passes a baseline, a phrase for each level.

    title: of a table in the world model's gate. ending: of the metric's name.
    """
    counts: dict[str, list[bool]] = {}
    for table in gates.get("world_model", {}).get("tables", []):
        for row in table["rows"] if table["title"] == title else []:
            name = row["metric"].split(": ", 1)[-1]
            if name.endswith(ending) and name.startswith("L") and baseline in row["baselines"]:
                counts.setdefault(name.split()[0], []).append(baseline not in row["beaten_by"])
    return [f"{level} in {sum(x)} of {len(x)} games" for level, x in counts.items()]


def in_words(gates: Gates) -> parts.Section:
    """What the two last gates come to."""
    text, teacher, free = [], "Teacher-forced", "Free-running: tokens"
    for what, *where in (
        ("Teacher-forced accuracy passes copying the last code", teacher, " accuracy", "copy-last"),
        ("It passes counted pairs of codes", teacher, " accuracy", PAIRS),
        ("After 15 dreamt steps it passes keeping the last", free, " after 15", "keep the last"),
        ("After 15 dreamt steps it passes counted pairs", free, " after 15", PAIRS),
    ):
        if found := passing(gates, *where):
            text.append(f"{what}: {', '.join(found)}.")
    for table in gates.get("policy", {}).get("tables", []):
        passed = [row["metric"] for row in table["rows"] if not row["beaten_by"]]
        shown = any(metric.endswith(": above random play by") for metric in passed)
        for row in table["rows"]:
            if row["metric"].endswith(": mean return"):
                text.append(learned(row, shown))
    return parts.Section("In words", text)


def learned(row: Mapping[str, Any], shown: bool) -> str:
    """One sentence about a row of mean returns. shown: whether the gate shows more than chance."""
    by = row["baselines"]
    chance, online = by.get("random play"), by.get("online")
    above = chance is not None and row["value"] is not None and row["value"] > chance
    verdict = "is not shown to return more than random play" if above else "did not learn"
    verdict = "returns more than random play" if shown else verdict
    line = f"The policy {verdict}: {gate.number(row['value'])} in the real game, random play"
    line += f" {gate.number(chance)}"
    if online is not None:
        line += f", the same agent trained online with as many steps {gate.number(online)}"
    return line + ". One seed; the gate has the standard errors."


# ---------------------------------------------------------------- sections


def chain(root: Path, gates: Gates, needs: Mapping[str, tuple[str, ...]]) -> parts.Section:
    """A table of the finished stages: what each was made from, its gate, length and digest.

    needs: {stage: the stages before it whose outputs it reads}.
    """
    rows = []
    for name, found in gates.items():
        body = manifest.read(root / name) or {}
        count = len(found["warnings"])
        rows.append(
            [
                name,
                ", ".join(needs[name]) or "the games",
                "passed" if found["passed"] else f"{count} warning{'s' * (count != 1)}",
                f"{body['steps']:,}",
                f"{body['seconds'] / 60:.1f} min",
                str(found["facts"].get("parameters", "–")),
                body["digest"][:12],
            ]
        )
    header = ["stage", "made from", "gate", "steps", "time", "parameters", "digest"]
    total = sum((manifest.read(root / name) or {})["seconds"] for name in gates)
    note = f"All stages: {total / 60:.1f} minutes, gates included."
    return parts.Section("The chain", tables=[parts.Table(header, rows, note)])


def claims(gates: Gates) -> parts.Section:
    """What the lineage claims beside what the gates measured."""
    header = ["", "claimed by the lineage", "measured here", "why they differ"]
    rows = [[claim.what, claim.claimed, measured(gates, claim), claim.why] for claim in CLAIMS]
    text = [
        "The lineage is ssrhaso/hidreamer. Baselines stand in brackets. Sizes and data are those of"
        " this run, not theirs. Statements about theirs come from an audit of its code."
    ]
    return parts.Section(
        "Claimed and measured", text, tables=[parts.Table(header, rows, prose=True)]
    )


def gate_section(name: str, found: Mapping[str, Any]) -> parts.Section:
    """A stage's gate; found: its ``Gate.tree``."""
    tables = []
    for table in found["tables"]:
        header, rows = gate.cells(table)
        tables.append(parts.Table([table["title"], *header[1:]], rows, table["note"]))
    facts = [f"{key}: {value}" for key, value in found["facts"].items()]
    return parts.Section(
        f"Gate: {name}",
        warnings=found["warnings"],
        lists={"Facts": facts},
        tables=tables,
        folded=True,
    )


def drawn(
    root: Path, config: Config, device: torch.device, poll: Callable[[], None]
) -> list[parts.Section]:
    """The sections with pictures, made anew from the pipeline's folder ``root``. poll: called
    between updates of the picture decoder; may raise to stop.
    """
    recordings = data.load_all(root, config)
    tokens = load_all_tokens(root, recordings)
    model = world_model.load(root, config, device)
    codes = []
    for index in tokens:
        with torch.no_grad():
            found = model.dynamics.lookup(torch.from_numpy(index).to(device)).code[:, :, 0]
        codes.append((found / np.sqrt(found.shape[-1])).cpu().numpy().astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        decoder = pictures.Decoder(config, recordings, codes, device)
        decoder.fit(config.pipeline.picture_updates, poll)
    games = range(len(recordings))
    shown = [pictures.decodes(decoder, game) for game in games]
    dreamt = [pictures.dreams(decoder, model, config, tokens, game) for game in games]
    over = [pictures.codes_over_time(r, x) for r, x in zip(recordings, tokens, strict=True)]
    count = config.dynamics.hrvq.codes
    text = [
        "A decoder that was trained for these pictures alone draws frames from sums of codes"
        f" ({config.pipeline.picture_updates} updates); neither agent nor world model has one."
    ]
    return [
        parts.Section("Frames and their codes", text, figures=shown),
        parts.Section("Dreams", figures=dreamt),
        parts.Section("Codes", figures=[*over, pictures.codes_by_game(recordings, tokens, count)]),
    ]


def write(
    root: Path,
    config: Config,
    stages: Mapping[str, type[Stage]],
    device: torch.device,
    poll: Callable[[], None],
) -> Path:
    """report.html of a LOGDIR in which all ``stages`` are finished. -> its path."""
    gates = {name: gate.read(root / name) for name in stages}
    needs = {name: kind.needs for name, kind in stages.items()}
    made = provenance()
    sections = [chain(root, gates, needs), in_words(gates), claims(gates)]
    sections += drawn(root, config, device, poll)
    sections += [gate_section(name, found) for name, found in gates.items()]
    text = [f"Commit {made['commit']}, {made['hardware']}, torch {made['torch']}."]
    sections.append(parts.Section("How this was made", text, pre=[made["command"]]))
    games, steps = config.pipeline.games, config.pipeline.collect.steps
    warned = sum(not found["passed"] for found in gates.values())
    headline = f"{', '.join(games)} · {steps:,} steps each · seed {config.seed} · "
    headline += f"{warned} of {len(gates)} gates with warnings" if warned else "all gates passed"
    title = "The staged pipeline: frames, tokens, world model, policy"
    html = parts.render("html", title, headline, {}, sections)
    checkpoint.replace_text(root / NAME, html)
    return root / NAME
