"""How far a run is, in one line (`llmshearing.progress`), where Composer's own bar takes three and writes them anew."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from llmshearing.progress import tqdm

SHOWN = {"loss/train/cross_entropy": "loss", "metrics/eval/LanguageCrossEntropy": "evaluated"}
"""Name of a metric -> what the line calls it; nats per token."""


class ProgressLine(LoggerDestination):
    """One line for training and for the evaluations in it, on the first rank of a machine."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.unit = ""
        """Of the run's length, as an attribute of Composer's timestamps; empty in an evaluation outside of training."""
        self.values: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take what the line shows."""
        self.values |= {name: f"{float(metrics[key]):.3f}" for key, name in SHOWN.items() if key in metrics}
        if self.bar is not None:
            self.bar.set_postfix(self.values, refresh=False)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Begin the line, where the run stands."""
        end = state.max_duration
        if end is None or dist.get_local_rank() != 0:
            return
        self.unit = end.unit.name.lower()
        done = int(getattr(state.timestamp, self.unit))
        self.bar = tqdm(total=end.value, initial=done, desc="training", unit=f" {end.unit.value}", unit_scale=False)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move it on."""
        if self.bar is not None:
            self.bar.update(int(getattr(state.timestamp, self.unit)) - self.bar.n)

    def eval_start(self, state: State, logger: Logger) -> None:
        """An evaluation before training has a line of its own."""
        if self.bar is None and dist.get_local_rank() == 0:
            self.bar = tqdm(total=state.dataloader_len and int(state.dataloader_len), desc="evaluating", unit=" ba")

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Say how far the evaluation is."""
        if self.bar is None:
            return
        done = int(state.eval_timestamp.batch)
        if self.unit:
            number = f"/{int(state.dataloader_len)}" if state.dataloader_len is not None else ""
            self.bar.set_description(f"evaluating {done}{number}")
        else:
            self.bar.update(done - self.bar.n)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Back to training."""
        if self.unit and self.bar is not None:
            self.bar.set_description("training")
        else:
            self._end()

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last line."""
        self._end()

    def close(self, state: State, logger: Logger) -> None:
        """The last line of a run that was stopped."""
        self._end()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.unit = None, ""
