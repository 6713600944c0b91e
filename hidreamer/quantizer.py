"""Residual quantisation: G groups of d numbers become L levels of codes, each near the residual.

Level l sees the residual r_l = z - sum of the codes of the levels before it, the codes detached:
attached, they would cancel its loss's gradient at the encoder. In place of the codes that were
drawn it can be those that were expected, so that no level undoes the draws of coarser ones
(``dynamics.hrvq.residual``), and with "innovation" the code that its prior expects is taken off as
well. Four ways to choose and learn codes:

- ``sampled``: drawn from softmax(-|r - e|^2 / tau), tau learned per level; codes learned by
  gradient. A level is then a categorical like any other of Dreamer's, and can be trained to be
  predictable.
- ``nearest`` (van den Oord et al. 2017; residual: Zeghidour et al. 2021): the nearest code; codes
  are moving averages of their residuals; a commitment loss keeps the encoder near them.
- ``frozen``: the nearest of random codes that nothing trains; a control.
- ``fsq`` (Mentzer et al. 2023, residual): a few numbers of each residual, bounded and rounded; no
  codebook to learn.

Shapes: (..., G, d) numbers, (..., G, K) per code, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hidreamer import distributions as dists
from hidreamer.losses import mean_where
from hidreamer.nets import linear

KINDS = ("sampled", "nearest", "frozen", "fsq")
SCALES = (1.0, 0.7, 0.5)  # deviation of the first codes by level; the last also for all finer ones
HARD_LOGIT = 50.0  # logit of a code that is chosen hard: its probability is 1 to within float32


class Codes(NamedTuple):
    """What ``encode`` found, levels first to last."""

    code: Tensor  # (..., L, G, d) straight-through
    index: Tensor  # (..., L, G) int64
    logit: tuple[Tensor, ...]  # (..., G, K) each; for hard codes constants that single one out
    residual: Tensor  # (..., L, G, d) what each level had to code


def onehots(index: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(...) -> (..., count); torch's own reads the host to check the range."""
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(dtype)


def per_level(values: list[float], levels: int, name: str) -> list[float]:
    """One value for every level: the same for all, or the first of several.

    ``name`` is the config's key. Raises ValueError for too few.
    """
    if len(values) == 1:
        return list(values) * levels
    if len(values) < levels:
        raise ValueError(
            f"{name} has {len(values)} values for {levels} levels; give one, or one for each"
        )
    return list(values[:levels])


def split_codes(codes: int) -> list[int]:
    """The fewest FSQ sides of 3 to 8 steps whose product is ``codes``, largest first.

    Raises ValueError where there are none.
    """
    for count in range(1, 7):
        found = _factors(codes, count, 8)
        if found:
            return found
    raise ValueError(
        f"fsq cannot make {codes} codes out of numbers with 3 to 8 steps; 32 is 8 x 4, "
        "256 is 8 x 8 x 4"
    )


def _factors(number: int, count: int, most: int) -> list[int] | None:
    """``count`` factors of ``number``, between ``most`` and 3, largest first, or None."""
    if count == 0:
        return [] if number == 1 else None
    for side in range(most, 2, -1):
        if number % side == 0:
            others = _factors(number // side, count - 1, side)
            if others is not None:
                return [side, *others]
    return None


class Quantizer(nn.Module):
    """Codebooks of every level and group; ``shared``: one codebook per level for all groups."""

    def __init__(
        self,
        kind: str,
        levels: int,
        groups: int,
        codes: int,
        dim: int,
        *,
        unimix: float = 0.0,
        shared: bool = False,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"the posterior is {kind!r}; it can be {', '.join(KINDS)}")
        self.kind, self.levels, self.groups, self.codes = kind, levels, groups, codes
        self.unimix, self.shared = unimix, shared
        books = 1 if shared else groups
        scale = torch.tensor([SCALES[min(i, len(SCALES) - 1)] for i in range(levels)])
        if kind == "fsq":
            sides = split_codes(codes)
            self.down = nn.ModuleList(linear(dim, len(sides)) for _ in range(levels))
            self.up = nn.ModuleList(linear(len(sides), dim) for _ in range(levels))
            sides = torch.tensor(sides, dtype=torch.float32)
            self.register_buffer("sides", sides, persistent=False)
            return
        book = torch.randn(levels, books, codes, dim) * scale[:, None, None, None]
        if kind == "sampled":
            self.book = nn.Parameter(book)
            # Distances grow with the square of the codes' scale and the root of their size.
            self.log_tau = nn.Parameter((1.5 * math.sqrt(dim) * scale.square()).log())
        else:
            self.register_buffer("book", book)
        if kind == "nearest":
            # Counts of one: from zero, the first average would give unused codes a norm of 1e5.
            self.register_buffer("count", torch.ones(levels, books, codes))
            self.register_buffer("total", book.clone())

    def encode(
        self,
        z: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: Sequence[Tensor | None] | None = None,
        residual: str = "drawn",
        expected: Callable[[int, list[Tensor]], Tensor] | None = None,
    ) -> Codes:
        """z (..., G, d) -> Codes.

        ``sample``, ``generator`` and ``noise`` concern ``sampled`` only; without ``sample`` the
        likeliest code is taken. noise: by level, uniform (..., G, 1) that was drawn before.
        residual: what a finer level codes, a value of ``dynamics.hrvq.residual``. expected: for
        "innovation", a level and the codes (..., G * d) of coarser ones -> the code (..., G, d)
        that is expected there.
        """
        left = z  # what the codes before leave
        codes, indices, logits, residuals = [], [], [], []
        for level in range(self.levels):
            given = left
            if residual == "innovation":
                given = left - expected(level, [code.flatten(-2) for code in codes]).detach()
            if noise is not None:
                drawn = noise[level]
            else:
                sampled = sample and self.kind == "sampled"
                like, shape = given, (*given.shape[:-1], 1)
                drawn = dists.uniform(shape, like, generator) if sampled else None
            code, index, logit = self._encode_level(level, given, drawn)
            codes.append(code)
            indices.append(index)
            logits.append(logit)
            residuals.append(given)
            taken = code if residual == "drawn" else self.expected(level, logit)
            left = left - taken.detach()
        return Codes(
            torch.stack(codes, -3),
            torch.stack(indices, -2),
            tuple(logits),
            torch.stack(residuals, -3),
        )

    def expected(self, level: int, logit: Tensor) -> Tensor:
        """The mean (..., G, d) of codes that logits (..., G, K) are of."""
        probs = dists.unimix_probs(logit, self.unimix if self.kind == "sampled" else 0.0)
        return self.decode(level, probs.to(self._dtype()))

    def _dtype(self) -> torch.dtype:
        return (self.up[0].weight if self.kind == "fsq" else self.book).dtype

    def index(self, codes: Tensor) -> Tensor:
        """Which codes (..., L, G, d) are, (..., L, G) int64: the nearest."""
        every = torch.eye(self.codes, dtype=codes.dtype, device=codes.device)
        found = []
        for level in range(self.levels):
            if self.kind == "fsq":
                book = self.decode(level, every)  # (K, d)
                distance = torch.cdist(codes[..., level, :, :], book)
            else:
                distance = self.distance(level, codes[..., level, :, :])
            found.append(distance.argmin(-1))
        return torch.stack(found, -2)

    def _encode_level(
        self, level: int, residual: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(..., G, d) -> code (..., G, d), straight-through, index (..., G), logits (..., G, K)."""
        if self.kind == "fsq":
            return self._encode_fsq(level, residual)
        distance = self.distance(level, residual)
        if self.kind == "sampled":
            logit = -distance / self.log_tau[level].exp()
            onehot = dists.sample_onehot(dists.unimix_probs(logit, self.unimix), noise)
            return self.decode(level, onehot.to(residual.dtype)), onehot.argmax(-1), logit
        index = distance.argmin(-1)
        onehot = onehots(index, self.codes, residual.dtype)
        code = dists.straight_through(self.decode(level, onehot), residual)
        return code, index, HARD_LOGIT * onehot

    def distance(self, level: int, residual: Tensor) -> Tensor:
        """Squared distances (..., G, K) of (..., G, d) to a level's codes, in float32 at least."""
        book = dists.at_least_float32(self.book[level])  # (G or 1, K, d)
        x = dists.at_least_float32(residual)
        # autocast would round by more than codes differ
        with torch.autocast(x.device.type, enabled=False):
            cross = torch.einsum("...gd,gkd->...gk", x, book.expand(self.groups, -1, -1))
        return x.square().sum(-1, keepdim=True) - 2.0 * cross + book.square().sum(-1)

    def decode(self, level: int, onehot: Tensor) -> Tensor:
        """The codes (..., G, d) that one-hots (..., G, K) name, with a gradient to the one-hots."""
        if self.kind == "fsq":
            return self.up[level](onehot @ self._fsq_values().to(onehot.dtype))
        onehot = dists.at_least_float32(onehot)
        book = self.book[level].expand(self.groups, -1, -1).to(onehot.dtype)  # (G, K, d)
        # a code as ``lookup`` has it, which autocast would round
        with torch.autocast(onehot.device.type, enabled=False):
            return torch.einsum("...gk,gkd->...gd", onehot, book)

    def lookup(self, level: int, index: Tensor) -> Tensor:
        """The codes (..., G, d) of indices (..., G)."""
        if self.kind == "fsq":
            return self.up[level](self._fsq_values().to(self.up[level].weight.dtype)[index])
        book = self.book[level].expand(self.groups, -1, -1)  # (G, K, d)
        return book[torch.arange(self.groups, device=index.device), index]

    def _fsq_values(self) -> Tensor:
        """(K, numbers): the rounded numbers of every FSQ code, in [-1, 1]."""
        sides = self.sides.long()
        index = torch.arange(self.codes, device=sides.device).unsqueeze(-1)  # (K, 1)
        digits = index.div(self._radix(), rounding_mode="floor") % sides
        return 2.0 * digits / (sides - 1.0) - 1.0

    def _radix(self) -> Tensor:
        """(numbers,): what a step of each number adds to the index of a code."""
        return torch.cat([self.sides.new_ones(1), self.sides[:-1]]).cumprod(0).long()

    def _encode_fsq(self, level: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_encode_level``."""
        bound = dists.at_least_float32(torch.tanh(self.down[level](residual)))  # (..., G, numbers)
        digits = ((bound + 1.0) / 2.0 * (self.sides - 1.0)).round()
        index = (digits.long() * self._radix()).sum(-1)
        onehot = onehots(index, self.codes, residual.dtype)
        rounded = dists.straight_through(2.0 * digits / (self.sides - 1.0) - 1.0, bound)
        return self.up[level](rounded.to(residual.dtype)), index, HARD_LOGIT * onehot

    @torch.no_grad()
    def update_codebook(
        self,
        codes: Codes,
        rate: float = 0.02,
        floor: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Move ``nearest`` codebooks towards their codes' residuals (van den Oord et al. 2017).

        Once per training update, after backward; ``codes`` (..., L, G, .) are what ``encode``
        found. A code whose running count of uses falls below ``floor`` is replaced by a random
        residual of its own level. Reads nothing on the host. The other kinds learn by gradient or
        not at all.
        """
        if self.kind != "nearest":
            return
        residual = codes.residual.flatten(0, -4).float()  # (N, L, G, d)
        onehot = onehots(codes.index.flatten(0, -3), self.codes)  # (N, L, G, K)
        if self.shared:  # all groups use one codebook: they become more samples of it
            residual = residual.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (N * G, L, 1, d)
            onehot = onehot.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (N * G, L, 1, K)
        self.count.lerp_(onehot.sum(0), rate)  # (L, G, K)
        self.total.lerp_(torch.einsum("nlgk,nlgd->lgkd", onehot, residual), rate)
        book = self.total / self.count.clamp(min=1e-5).unsqueeze(-1)
        where = {"device": residual.device, "generator": generator}
        pick = torch.randint(len(residual), self.count.shape, **where)  # (L, G, K)
        level, group = (torch.arange(n, device=residual.device) for n in self.count.shape[:2])
        random_residual = residual[pick, level[:, None, None], group[None, :, None]]  # (L, G, K, d)
        dead = self.count < floor
        self.book.copy_(torch.where(dead.unsqueeze(-1), random_residual, book))
        self.count.copy_(torch.where(dead, 1.0, self.count))
        self.total.copy_(torch.where(dead.unsqueeze(-1), random_residual, self.total))

    @torch.no_grad()
    def usage(self, index: Tensor) -> dict[str, Tensor]:
        """index (..., L, G) -> perplexity and number of unused codes of each level, ().

        Both are means over a level's codebooks.
        """
        frequency = onehots(index.flatten(0, -3), self.codes).mean(0)  # (L, G, K)
        if self.shared:  # all groups use one codebook
            frequency = frequency.mean(1, keepdim=True)  # (L, 1, K)
        entropy = -torch.special.xlogy(frequency, frequency).sum(-1)  # (L, G or 1)
        perplexity = entropy.exp().mean(-1)  # (L,)
        dead = (frequency == 0).float().sum(-1).mean(-1)
        metrics = {f"perplexity_{i}": perplexity[i] for i in range(self.levels)}
        return metrics | {f"dead_{i}": dead[i] for i in range(self.levels)}


@torch.no_grad()
def code_accuracy(priors: list[Tensor], index: Tensor, is_first: Tensor) -> dict[str, Tensor]:
    """How often the likeliest code is right, of all and of those that changed, and a copy is.

    index: (B, T, L, G).
    """
    metrics, same_episode = {}, ~is_first[:, 1:].unsqueeze(-1)  # (B, T-1, 1)
    same_episode = same_episode.expand(-1, -1, index.shape[-1])  # (B, T-1, G)
    for i, prior in enumerate(priors):
        now, before = index[:, 1:, i], index[:, :-1, i]  # (B, T-1, G)
        right = (prior[:, 1:].argmax(-1) == now).float()
        changed = same_episode & (now != before)
        metrics[f"accuracy_{i}"] = mean_where(right, same_episode)
        metrics[f"accuracy_copy_{i}"] = mean_where((now == before).float(), same_episode)
        metrics[f"accuracy_changed_{i}"] = mean_where(right, changed)
    return metrics
