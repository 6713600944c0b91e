"""Who sees whom, entry by entry, and what that really means at depth."""

import pytest
import torch

from hidreamer.mask import KINDS, attn_mask, make_level_mask, visible
from hidreamer.parallel import Whole
from hidreamer.transformer import Transformer, rotary

LEVELS, STEPS = 3, 3
POSITION = {"L0": 0, "L1": 1, "L2": 2, "A": 3}
# The table of the design: what a row sees of its own step, and of the past.
HIERARCHICAL = {
    "L0": (("L0",), ("L0", "L1", "L2", "A")),
    "L1": (("L0", "L1"), ("L0", "A")),
    "L2": (("L0", "L1", "L2"), ("L0", "A")),
    "A": (("L0", "L1", "L2", "A"), ("L0", "A")),
}
BARRIER = {
    "L0": (("L0",), ("L0", "A")),
    "L1": (("L0", "L1"), ("L0", "L1", "A")),
    "L2": (("L0", "L1", "L2"), ("L0", "L1", "L2", "A")),
    "A": (("L0", "A"), ("L0", "A")),
}


@pytest.mark.parametrize(("kind", "table"), [("hierarchical", HIERARCHICAL), ("barrier", BARRIER)])
def test_every_entry_is_the_tables(kind, table):
    seen = visible(kind, STEPS, LEVELS)
    for row_step in range(STEPS):
        for row, (same, past) in table.items():
            for column_step in range(STEPS):
                for column in POSITION:
                    expected = {0: column in same, 1: column in past}.get(
                        min(row_step - column_step, 1), False
                    )
                    got = seen[4 * row_step + POSITION[row], 4 * column_step + POSITION[column]]
                    assert got == expected, (row, row_step, column, column_step)


def test_causal_is_all_before():
    assert torch.equal(visible("causal", 4, 2), torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_causal_reflexive_and_of_the_right_shape(kind, levels):
    seen = visible(kind, 4, levels)
    assert seen.shape == (4 * (levels + 1),) * 2 and seen.dtype == torch.bool
    assert seen.diagonal().all() and not seen.triu(1).any()


@pytest.mark.parametrize(
    ("kind", "expected"), [("hierarchical", False), ("barrier", True), ("causal", True)]
)
def test_transitivity(kind, expected):
    """A mask holds at any depth only if seeing someone who sees x never shows more
    than the mask allows.
    """
    seen = visible(kind, 5, LEVELS).float()
    assert bool(((seen @ seen > 0) == (seen > 0)).all()) == expected


def test_window():
    level_mask, time, level = (
        make_level_mask("causal", 1),
        torch.arange(6).repeat_interleave(2),
        torch.arange(2).repeat(6),
    )
    seen = attn_mask(level_mask, (time, level), (time, level), window=2)
    assert seen[10].nonzero().flatten().tolist() == [8, 9, 10]  # L0 of step 5 sees steps 4 and 5


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="hierarchical, barrier, causal"):
        make_level_mask("hierarchic", 3)


def influence(kind, depth, steps=4):
    """(P, P) how much each position's input moves each position's output,
    from the Jacobian of a random transformer.
    """
    torch.manual_seed(0)
    net = Transformer(16, depth, 2, 16).double()
    seen = visible(kind, steps, LEVELS)
    time = torch.arange(steps).repeat_interleave(LEVELS + 1)
    x = torch.randn(len(time), 16, dtype=torch.float64)
    rope = rotary(time, net.head_dim, x.dtype)
    level = torch.arange(LEVELS + 1).repeat(steps)
    run = lambda x: net(x[None, None], rope, level, Whole(seen))[0][0, 0]
    return torch.autograd.functional.jacobian(run, x).abs().amax((1, 3))


def test_barrier_is_one_at_depth_three():
    """From finer to coarser levels exactly nothing, at every step;
    with the hierarchical mask there is a leak.
    """
    rank = torch.tensor([0, 1, 2, 0]).repeat(4)
    upward = rank.unsqueeze(1) < rank  # rows of coarse levels, columns of finer ones
    assert influence("barrier", 3)[upward].max() == 0.0
    assert influence("hierarchical", 3)[upward].max() > 1e-3


def test_hierarchical_blocks_one_hop_and_leaks_in_two():
    """Past fine levels do not reach an L1 row in one layer, and do, through L0, in two."""
    row, column = 4 * 3 + 1, 4 * 1 + 2  # L1 of step 3, L2 of step 1
    assert influence("hierarchical", 1)[row, column] == 0.0
    assert influence("hierarchical", 2)[row, column] > 1e-4
    assert influence("causal", 1)[row, column] > 1e-4
