"""The depth network: the levels of one step, each given its memory and the coarser levels.

P(L0 | memory) P(L1 | memory, L0) ..., as the depth part of the RQ-Transformer (Lee et al. 2022),
with small weights of its own for every level in place of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hidreamer.nets import Block


class Depth(nn.Module):
    """Memories (..., W) and coarser codes -> what each level's prior is a linear layer of.

    That of level 0 is the memory itself; without ``chain`` that of all levels is. width: W; size:
    numbers of a level's codes; names: ``norm`` and ``act`` of the blocks.
    """

    def __init__(self, width: int, size: int, levels: int, units: int, chain: bool, **names: str):
        super().__init__()
        self.size, self.levels = size, levels
        self.widths = [width, *[units if chain else width] * (levels - 1)]
        self.blocks = nn.ModuleList()
        for i in range(1, levels if chain else 1):
            self.blocks.append(Block(width + i * size, units, **names))

    def forward(self, level: int, memory: Tensor, coarser: list[Tensor]) -> Tensor:
        """Memories (..., W), the codes (..., size) of the levels before -> (..., widths[level])."""
        if not level or not len(self.blocks):
            return memory
        return self.blocks[level - 1](torch.cat([memory, *coarser[:level]], -1))
