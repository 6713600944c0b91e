"""Attention masks over positions ``[L0 .. L_{levels-1}, A]`` of each time step.

Three kinds. Rows and columns are (time, level), A being level ``levels``; all are causal.

- ``hierarchical`` (ssrhaso/hidreamer): rows of L0 see everything before them; all other rows see
  their own step, and of the past only L0 and A. It is a bias, not a barrier: with two layers or
  more, past fine levels reach every row through L0.
- ``barrier``: a row sees columns that are as coarse as itself or coarser, A counting as L0. It is
  transitive, so at any depth the coarse stream (L0 and A) depends on no finer level.
- ``causal``: everything before; the control.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("hierarchical", "barrier", "causal")


def make_level_mask(kind: str, levels: int) -> Tensor:
    """(2, levels + 1, levels + 1) bool, by row and column level: in the past, and within one step.

    Raises ValueError for an unknown kind.
    """
    n = levels + 1
    level = torch.arange(n)
    # (row, column): a step's positions come in order of level
    earlier = level.unsqueeze(1) >= level
    if kind == "causal":
        past = torch.ones(n, n, dtype=torch.bool)
    elif kind == "barrier":
        rank = torch.where(level == levels, 0, level)
        past = rank.unsqueeze(1) >= rank
    elif kind == "hierarchical":
        past = torch.zeros(n, n, dtype=torch.bool)
        past[:, [0, levels]] = True
        past[0] = True
    else:
        raise ValueError(f"the mask is {kind!r}; it can be {', '.join(KINDS)}")
    return torch.stack([past, earlier & past if kind == "barrier" else earlier])


def read_levels(kind: str, levels: int, chain: bool) -> int:
    """How many of the coarsest levels need a position at all: the others' rows no one reads.

    Read are rows that others may look at, and with ``chain`` those that predict the next level.
    """
    if kind != "barrier":
        return levels
    return max(1, levels - 1) if chain else 1


def attn_mask(
    level_mask: Tensor, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor], window: int = 0
) -> Tensor:
    """(.., Q, K) bool: True where a row may see a column, under ``window`` steps (0: any) back.

    level_mask: of ``make_level_mask``; row: times (.., Q) and levels (Q,); column: times and levels
    (K,), or (Q, K).
    """
    (row_time, row_level), (column_time, column_level) = row, column
    ago = row_time.unsqueeze(-1) - column_time  # (.., Q, K)
    past, same = level_mask[:, row_level.unsqueeze(-1), column_level]  # (Q, K) each
    seen = torch.where(ago == 0, same, past & (ago > 0))
    return seen & (ago < window) if window else seen


def visible(kind: str, steps: int, levels: int) -> Tensor:
    """(P, P) bool, P = steps * (levels + 1): True where the row may attend to the column."""
    time = torch.arange(steps).repeat_interleave(levels + 1)
    level = torch.arange(levels + 1).repeat(steps)
    return attn_mask(make_level_mask(kind, levels), (time, level), (time, level))
