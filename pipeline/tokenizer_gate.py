"""What tokens keep, how they move, and whether games share them: the tokenizer's gate.

Shapes: N frames, L levels, E numbers of an embedding, K codes, games g.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import tools
from pipeline import nets, probing, tokenizer
from pipeline.data import Recording
from pipeline.gate import HIGHER, NEITHER, Gate, Row, Table

PERMUTATIONS = 20
LEVEL_NOTE = (
    "Held-out episodes of all games. Persistence: how often a code is that of the frame before,"
    " beside the same frames in random order; it is also what a world model gets right by copying,"
    " so that more of it is no merit. Bits: the entropy of the codes in use, perplexity in another"
    " unit. Neither they nor the number of codes in use say how good codes are: those of noise are"
    " the most, and an untrained encoder's (beside) may be more or fewer. A level of one code is a"
    " warning. A flat VQ of as many codes is level 0 alone."
)
ENERGY_NOTE = (
    "Held-out episodes. Cosine: between an embedding and the sum of its codes. The lineage reported"
    " their dot product under that name. Explained energy: 1 - squared error / squared length;"
    " explained variance: the same around the mean embedding. The mean alone: one code for every"
    " frame. Flat, equal bits: one level whose L groups have a codebook each. Untrained, for the"
    " record: the same quantiser on an untrained encoder's embeddings, which differ less from each"
    " other and are easier to code whatever they say; the probes below compare what they say."
)
PROBE_NOTE = (
    "R² of linear probes of the sum of codes, held-out episodes. Before quantising: of the"
    " embedding."
)
SHARED_NOTE = (
    f"Codes that every game uses. Null: game labels shuffled over frames ({PERMUTATIONS} times):"
    " what is shared where codes say nothing of the game. Shared codes far below it belong to"
    " games. No direction is better: codes of games' own can be as good as shared ones."
)
TRANSFER_NOTE = (
    "Explained energy of a game's held-out episodes by codebooks that never saw it, beside"
    " codebooks of its own, random ones, nothing at all and the mean embedding of the other games."
    " The encoder saw all games."
)


# ---------------------------------------------------------------- metrics


def persists(code: np.ndarray, successors: np.ndarray) -> np.ndarray:
    """(M,) bool: is a code of (N,) that of the frame before? successors: (M,) rows that go on."""
    return code[successors + 1] == code[successors]


def shuffled_persistence(code: np.ndarray) -> float:
    """That of the same codes (N,) in random order: the chance that two of them are equal."""
    counts = np.unique(code, return_counts=True)[1]
    total = len(code)
    return float((counts * (counts - 1)).sum() / max(total * (total - 1), 1))


def entropy_bits(code: np.ndarray) -> float:
    """Of the codes (N,) in use."""
    share = np.unique(code, return_counts=True)[1] / len(code)
    return float(-(share * np.log2(share)).sum()) + 0.0  # never -0


def cosine(z: np.ndarray, codes: np.ndarray) -> float:
    """Mean cosine of (N, E) and (N, E)."""
    norms = np.linalg.norm(z, axis=-1) * np.linalg.norm(codes, axis=-1)
    return float(((z * codes).sum(-1) / np.maximum(norms, 1e-12)).mean())


def dot(z: np.ndarray, codes: np.ndarray) -> float:
    """What the lineage called a cosine."""
    return float((z * codes).sum(-1).mean())


def explained_energy(z: np.ndarray, codes: np.ndarray) -> float:
    return float(1.0 - np.square(z - codes).sum() / np.square(z).sum())


def explained_variance(z: np.ndarray, codes: np.ndarray) -> float:
    """As the energy, of what differs between frames: coding nothing but their mean explains 0."""
    return float(1.0 - np.square(z - codes).sum() / np.square(z - z.mean(0)).sum())


def shared(code: np.ndarray, game: np.ndarray, count: int) -> tuple[int, float]:
    """-> codes that all games use, and the mean over games of their frames' share in these.

    code, game (N,); count: codes that there are.
    """
    games = np.unique(game)
    used = np.stack([np.bincount(code[game == g], minlength=count) > 0 for g in games])
    common = used.all(0)
    return int(common.sum()), float(np.mean([common[code[game == g]].mean() for g in games]))


def mutual_information(code: np.ndarray, game: np.ndarray) -> float:
    """Bits that a code (N,) says about the game (N,), plug-in estimate."""
    joint = game * (int(code.max()) + 1) + code
    return entropy_bits(code) + entropy_bits(game) - entropy_bits(joint)


def permuted(fn: Any, code: np.ndarray, game: np.ndarray) -> np.ndarray:
    """Mean of ``fn(code, game)`` over shuffled games."""
    rng = np.random.default_rng(0)
    return np.mean([fn(code, rng.permutation(game)) for _ in range(PERMUTATIONS)], 0)


# ---------------------------------------------------------------- the gate


def evaluate(stage: Any, embeddings: list[np.ndarray], tokens: list[np.ndarray]) -> Gate:
    """The gate of a finished ``Tokenizer`` stage. embeddings (N, E), tokens (N, L): of all rows of
    each game.
    """
    untrained = untrained_embeddings(stage)
    control = fit_all(stage, untrained)
    coded = tokenizer.encode(control, held(stage, untrained))
    tables = [level_table(stage, tokens, coded[0][:, :, 0])]
    tables.append(energy_table(stage, embeddings, untrained, coded[1]))
    if len(tokens) > 1:
        tables += [shared_table(stage, tokens), transfer_table(stage, embeddings)]
    for recording, embed, other in zip(stage.recordings, embeddings, untrained, strict=True):
        tables.append(probe_table(stage, recording, embed, other, control))
    config, quantizer = stage.config, stage.quantizer
    facts: dict[str, Any] = {
        "posterior": quantizer.kind,
        "code bits a frame": quantizer.levels * np.log2(quantizer.codes).item(),
        "joint": config.pipeline.tokenizer.joint,
    }
    if quantizer.kind == "nearest" and not config.pipeline.tokenizer.joint:
        facts["commitment"] = "without effect: the embeddings are frozen (--joint lets it act)"
    return Gate(stage.name, tables, facts)


def untrained_embeddings(stage: Any) -> list[np.ndarray]:
    """Of all rows of every game, by the encoder as its stage began."""
    from pipeline import encoder

    with torch.random.fork_rng(devices=[]):
        tools.seed_all(stage.config.seed)  # as ``stage.run`` does before a stage is made
        net, _ = encoder.make(stage.config, stage.device)
    stack, out = stage.config.pipeline.stack, []
    for recording in stage.recordings:
        rows = np.arange(len(recording))
        out.append(nets.embed(net, recording, rows, stack, stage.device, stage.poll))
    return out


def training_rows(stage: Any, embeddings: list[np.ndarray], games: list[int]) -> torch.Tensor:
    parts = []
    for i in games:
        parts.append(embeddings[i][stage.recordings[i].rows(held=False)])
    return torch.from_numpy(np.concatenate(parts)).to(stage.device)


def fit_all(
    stage: Any, embeddings: list[np.ndarray], games: list[int] | None = None, **sizes: int
) -> Any:
    """A control: a quantiser of these embeddings, with as many updates as the stage's own."""
    games = list(range(len(embeddings))) if games is None else games
    train = training_rows(stage, embeddings, games)
    return tokenizer.fit(stage.config, train, stage.total, **sizes, poll=stage.poll)


def held(stage: Any, parts: list[np.ndarray]) -> np.ndarray:
    """The held-out rows of (N, ...) of every game, one after another."""
    both = zip(stage.recordings, parts, strict=True)
    return np.concatenate([x[recording.rows(held=True)] for recording, x in both])


def level_table(stage: Any, tokens: list[np.ndarray], control: np.ndarray) -> Table:
    """Use, persistence and entropy of each level's codes.

    tokens: (N, L) of each game. control: (M, L) of all held-out rows, from an untrained encoder.
    """
    codes, rows = held(stage, tokens), []  # (N, L)
    total = stage.quantizer.codes
    for level in range(codes.shape[1]):
        code, name = codes[:, level], f"L{level}"
        same = []
        for recording, index in zip(stage.recordings, tokens, strict=True):
            successors = recording.pairs(1, held=True)
            same.append(persists(index[:, level], successors))
        kept = float(np.concatenate(same).mean())
        bits = entropy_bits(code)
        theirs = control[:, level]
        used = len(np.unique(code))
        # One code is a failure; of more, the rest of the gate says what they are worth.
        better = HIGHER if used == 1 else NEITHER
        by = {"a collapsed level": 1.0} if used == 1 else {}
        beside = {"untrained": len(np.unique(theirs)), "there are": total}
        rows.append(Row(f"{name}: codes in use", used, by, better, beside))
        beside = {"untrained": 2.0 ** entropy_bits(theirs), "there are": total}
        rows.append(Row(f"{name}: perplexity", 2.0**bits, beside=beside))
        rows.append(Row(f"{name}: persistence", kept, {"shuffled": shuffled_persistence(code)}))
        rows.append(Row(f"{name}: bits", bits, beside={"there are": np.log2(total).item()}))
    whole = [entropy_bits(codes[:, level]) for level in range(codes.shape[1])]
    rows.append(Row("all levels: bits a frame", sum(whole)))
    return Table("Levels", rows, LEVEL_NOTE)


def energy_table(
    stage: Any, embeddings: list[np.ndarray], untrained: list[np.ndarray], control: np.ndarray
) -> Table:
    """How well sums of codes (L0, L0+L1, ...) give the embedding back, on held-out rows.

    embeddings, untrained: (N, E) of each game, by the trained encoder and before training. control:
    codes (M, L, E) of the latter's held-out rows, by a quantiser fitted on the others.
    """
    quantizer, levels = stage.quantizer, stage.quantizer.levels
    z = held(stage, embeddings)
    sums = tokenizer.encode(quantizer, z)[1].cumsum(1)  # (N, L, E)
    other = held(stage, untrained)
    theirs = control.cumsum(1)
    flat: dict[str, np.ndarray] = {}
    if z.shape[1] % levels == 0 and levels > 1:
        product = fit_all(stage, embeddings, groups=levels, levels=1)
        flat["flat, equal bits"] = tokenizer.encode(product, z)[1][:, 0]
    rows, name = [], ""
    mean = np.broadcast_to(z.mean(0), z.shape)
    for level in range(levels):
        name += f"{'+' if level else ''}L{level}"
        last = flat if level == levels - 1 else {}
        measures = {"cosine": cosine, "explained energy": explained_energy}
        for what, fn in (measures | {"explained variance": explained_variance}).items():
            fair = {"the mean alone": mean} | last
            by = {who: fn(z, codes) for who, codes in fair.items()}
            beside = {"untrained": fn(other, theirs[:, level])}
            rows.append(Row(f"{name}: {what}", fn(z, sums[:, level]), by, HIGHER, beside))
        rows.append(Row(f"{name}: dot product (lineage's cosine)", dot(z, sums[:, level])))
    return Table("Reconstruction of the embedding", rows, ENERGY_NOTE)


def shared_table(stage: Any, tokens: list[np.ndarray]) -> Table:
    """How far games share codes, beside a permutation of the games. tokens: (N, L) of each."""
    games = [np.full(len(index), i) for i, index in enumerate(tokens)]
    codes, game, rows = np.concatenate(tokens), np.concatenate(games), []
    count = stage.quantizer.codes
    for level in range(codes.shape[1]):
        stage.poll()
        code = codes[:, level]
        measure = lambda code, game: (*shared(code, game, count), mutual_information(code, game))
        null = permuted(measure, code, game)
        most = entropy_bits(game)
        names = ("shared codes", "frames in shared codes", "bits about the game")
        for i, (name, value) in enumerate(zip(names, measure(code, game), strict=True)):
            by = {"shuffled games": float(null[i])}
            by |= {"the game's own": most} if i == 2 else {}
            rows.append(Row(f"L{level}: {name}", value, by))
    return Table("Across games", rows, SHARED_NOTE)


def transfer_table(stage: Any, embeddings: list[np.ndarray]) -> Table:
    """How well codebooks that never saw the last game give its embeddings (N, E) back."""
    last, recording = len(embeddings) - 1, stage.recordings[-1]
    z = embeddings[last][recording.rows(held=True)]
    others = fit_all(stage, embeddings, list(range(last)))
    own = fit_all(stage, embeddings, [last])
    random = tokenizer.fit(stage.config, training_rows(stage, embeddings, [last]), 0)
    mean = np.mean([embeddings[i].mean(0) for i in range(last)], 0)  # (E,)
    energy = lambda quantizer: explained_energy(z, tokenizer.encode(quantizer, z)[1].sum(1))
    rows = [
        Row(
            f"{recording.game}: codebooks of the other games",
            energy(others),
            {
                "random": energy(random),
                "no code": 0.0,
                "the others' mean": explained_energy(z, mean),
            },
            HIGHER,
        ),
        Row(f"{recording.game}: codebooks of its own", energy(own)),
    ]
    return Table("Transfer to a game that the codebooks never saw", rows, TRANSFER_NOTE)


def probe_table(
    stage: Any, recording: Recording, embed: np.ndarray, untrained: np.ndarray, control: Any
) -> Table:
    """R2 of every variable of the console's memory from the codes of all levels, and from fewer.

    embed, untrained: (N, E) of ``recording``, by the trained encoder and before training. control:
    a quantiser fitted on the latter.
    """
    sums = tokenizer.encode(stage.quantizer, embed)[1].cumsum(1)  # (N, L, E)
    other = tokenizer.encode(control, untrained)[1].sum(1)  # (N, E)
    scale, levels = np.float32(np.sqrt(embed.shape[1])), sums.shape[1]
    features: dict[str, probing.Features] = {
        "here": lambda rows: scale * sums[rows, -1],
        "untrained": lambda rows: scale * other[rows],
        "pixels": probing.pixels(recording),
        "before quantising": lambda rows: scale * embed[rows],
    }
    for level in range(levels - 1):
        name = "+".join(f"L{i}" for i in range(level + 1))
        features[name] = lambda rows, level=level: scale * sums[rows, level]
    found = probing.r2(features, recording, stage.config.pipeline.probe_steps, stage.poll)
    rows = []
    for name in probing.variables(recording):
        by = {who: shares.get(name, float("nan")) for who, shares in found.items()}
        own = by.pop("here")
        baselines = {who: by.pop(who) for who in ("untrained", "pixels")}
        rows.append(Row(f"{name}: R²", own, baselines, HIGHER if np.isfinite(own) else ""))
        for who, value in by.items():
            rows.append(Row(f"{name}: R², {who}", value))
    return Table(f"{recording.game}: what a linear probe finds in the codes", rows, PROBE_NOTE)
