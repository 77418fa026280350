"""FirstBatch: do the weights that were loaded do what they did when they were last evaluated?"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)


class FirstBatch(Callback):
    """Compares the first batch's loss with the evaluation that is recorded with the weights, domain by domain.

    Args:
        info: the run's CheckpointInfo; its ``evaluation`` (nats per token) is that of the source, or of the checkpoint
            that the run goes on from. A domain that it does not name is not compared.
        set_names: of the data's ``set``. vocabulary: its size; a model that knows nothing has a loss of its logarithm.
        tolerance: nats above the recorded loss that stop the run.
    """

    def __init__(self, info: dict[str, Any], set_names: list[str], vocabulary: int, tolerance: float) -> None:
        self.info, self.set_names, self.tolerance = info, list(set_names), tolerance
        self.recorded: dict[str, float] = {}
        self.uniform = math.log(vocabulary)
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._done = False

    def after_load(self, state: State, logger: Logger) -> None:
        """Take the recorded losses, before this run evaluates. Sampled gates make another model of the source."""
        if self.info["masks"] is None and self.info["evaluation"] is not None:
            self.recorded = dict(self.info["evaluation"]["domains"])

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begin anew (also where a batch is tried again in smaller microbatches)."""
        self._sums = torch.zeros(3, dtype=torch.float64)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add a microbatch's samples, of domains that were evaluated if any were."""
        if self._done:
            return
        losses, sets = state.outputs["sample_loss"].detach().double().tolist(), state.batch["set"].tolist()
        counts = state.outputs["counts"].tolist() if "counts" in state.outputs else [1.0] * len(losses)
        for loss, index, weight in zip(losses, sets, counts, strict=True):
            expected = self.recorded.get(self.set_names[index] if self.set_names else "")
            if expected is not None or not self.recorded:
                self._sums += weight * torch.tensor([loss, expected or 0.0, 1.0], dtype=torch.float64)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Compare, before the first step."""
        if self._done:
            return
        self._done = True
        sums = state.device.tensor_to_device(self._sums.float())
        dist.all_reduce(sums, reduce_operation="SUM")
        total, expected, count = sums.tolist()
        if not count:
            return
        loss, expected = total / count, expected / count
        if self.recorded and loss > expected + self.tolerance:
            raise ShearingError(
                f"the first batch's loss is {loss:.3f}, but when the weights were saved they had {expected:.3f} on its "
                "domains: they were not loaded rightly, or the data are of another tokenizer or kind. If the data are "
                f"meant to differ, raise first_batch_tolerance = {self.tolerance:g} (null: no check)"
            )
        if loss > self.uniform - 0.1:
            log.warning(
                "the first batch's loss is %.3f; that of a model that knows nothing is %.3f (ln of its vocabulary): "
                "is the source trained, and are the data of its tokenizer?", loss, self.uniform,
            )  # fmt: skip
