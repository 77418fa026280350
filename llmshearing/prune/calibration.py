"""Sequences to choose by, and others to report on. Reading them from files is `llmshearing.prune.sequences`' work.

Shape legend: N sequences to select by, M to report on, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llmshearing.errors import ShearingError


@dataclass(frozen=True)
class Calibration:
    """Token ids of the source's vocabulary, packed and without padding.

    Methods read ``select`` only. ``report`` is what perplexity before and after is measured on; no document is in both.
    """

    select: Tensor
    """int64 [N, T]."""
    report: Tensor
    """int64 [M, T]."""
    select_name: str
    """Where ``select`` is from, for messages and the report."""
    report_name: str
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, ids in ((self.select_name, self.select), (self.report_name, self.report)):
            if ids.dim() != 2 or not ids.numel():
                raise ShearingError(f"calibration {name} is shorter than one sequence; give more text or a shorter one")

    def batches(self, part: str = "select") -> Iterator[Tensor]:
        """Batches int64 [at most batch_size, T] of a part."""
        yield from (self.select if part == "select" else self.report).split(self.batch_size)
