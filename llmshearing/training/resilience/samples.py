"""SampleRecord: which samples each batch was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing import files as durable


class SampleRecord(Callback):
    """A JSON line for each batch and rank: ``batch`` (number of batches before it), ``set`` and ``sample``.

    Going on from a checkpoint cuts off the lines of work that was lost.

    Args:
        folder: gets ``samples-rank<rank>.jsonl``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / f"samples-rank{dist.get_global_rank()}.jsonl"

    def fit_start(self, state: State, logger: Logger) -> None:
        """Keep the lines of the batches that count."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        durable.write_text(self.path, "".join(f"{line}\n" for line in lines[: state.timestamp.batch.value]))

    def batch_start(self, state: State, logger: Logger) -> None:
        """Add a line."""
        columns = {name: state.batch[name].tolist() for name in ("set", "sample")}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": state.timestamp.batch.value, **columns}) + "\n")
