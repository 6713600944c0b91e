"""Colours of the planes of a board."""

import numpy as np

PALETTE = np.array(  # one colour per plane; black where no plane is set
    [
        (0, 0, 0), (230, 230, 230), (240, 80, 60), (250, 170, 60), (70, 150, 230), (80, 200, 120),
        (180, 110, 220), (250, 230, 90), (90, 220, 220), (240, 140, 190), (150, 110, 70),
    ],
    np.uint8,
)  # fmt: skip
