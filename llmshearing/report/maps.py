"""Mask maps: which units of each layer are there, small enough for a page.

    values [rows, N] in 0..1  -->  {"units": N, "rows": [text, ...], "sums": [number, ...]}

A row is a layer, or the one row that all layers share. A character of its text is the mean of neighbours, as many as
make at most WIDTH cells, in 64 steps, by the alphabet of base64 for URLs: `A` is 0, `_` is 1. `sums` has the sum of
each row, of all of its units.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

WIDTH = 128
"""Most cells of a row."""
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
TOP = len(ALPHABET) - 1


def binned(row: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Means [min(N, width)] of runs of neighbours whose lengths differ by at most one."""
    edges = np.linspace(0, len(row), min(len(row), width) + 1).astype(int)
    return np.add.reduceat(row, edges[:-1]) / np.diff(edges) if len(row) else row


def encoded(values: Sequence[np.ndarray] | np.ndarray, width: int = WIDTH) -> dict[str, Any]:
    """Rows of numbers in 0..1 (they may differ in length) as text; see the module."""
    rows = [np.asarray(row, dtype=np.float64) for row in values]
    texts = ["".join(ALPHABET[level] for level in np.rint(binned(row, width) * TOP).astype(int)) for row in rows]
    units = max((len(row) for row in rows), default=0)
    return {"units": units, "rows": texts, "sums": [float(row.sum()) for row in rows]}


def decoded(rows: Sequence[str]) -> list[np.ndarray]:
    """The means back, each within half a step.

    Raises:
        ValueError: a character is none of the alphabet.
    """
    return [np.array([ALPHABET.index(letter) for letter in row], dtype=np.float64) / TOP for row in rows]
