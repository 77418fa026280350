"""The page's figures as pictures for W&B and TensorBoard: arrays [height, width, 3] of uint8, drawn with numpy alone.

They have no letters; the name under which a picture is logged says what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmshearing.report.maps import decoded

PAPER, INK, GREY = (np.array(color) for color in ([250, 250, 247], [29, 91, 145], [150, 150, 150]))
WIDTH, HEIGHT = 512, 160  # of a curve; a map is about as wide


def map_image(found: Mapping[str, Any]) -> np.ndarray:
    """A mask map: a line for each row, dark where units are there."""
    rows = decoded(found["rows"])
    wide = max((len(row) for row in rows), default=0)
    if not wide:
        return np.tile(PAPER.astype(np.uint8), (1, 1, 1))
    across, down = max(1, WIDTH // wide), max(3, min(24, 256 // len(rows)))
    image = np.tile(PAPER.astype(float), (down * len(rows), across * wide, 1))
    for number, row in enumerate(rows):
        cells = np.repeat(row, across)[None, :, None]
        image[number * down : (number + 1) * down - 1, : cells.shape[1]] = PAPER + cells * (INK - PAPER)
    return image.round().astype(np.uint8)


def curve_image(wanted: Sequence[float], expected: Sequence[float]) -> np.ndarray:
    """Parts of 1 over time, the top being 1: grey what is wanted, blue what is expected."""
    image = np.tile(PAPER.astype(np.uint8), (HEIGHT, WIDTH, 1))
    for values, color in ((wanted, GREY), (expected, INK)):
        at = np.linspace(0, len(values) - 1, WIDTH)
        heights = np.interp(at, np.arange(len(values)), np.nan_to_num(np.asarray(values, dtype=float)).clip(0, 1))
        lines = ((1 - heights) * (HEIGHT - 3)).round().astype(int)
        for column, line in enumerate(lines):
            low, high = sorted((int(line), int(lines[max(0, column - 1)])))
            image[low : high + 2, column] = color
    return image
