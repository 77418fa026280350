"""StopOnSignal: follows a signal at the next boundary: saves, and ends the run on all ranks at the same step."""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing.errors import Stopped
from llmshearing.training.resilience.saver import Saver
from llmshearing.training.resilience.signals import StopRequest

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Acts on a :class:`StopRequest` after each batch and, as an evaluation may take long, after each of its batches.

    A checkpoint made within an evaluation says so, and the run that goes on from it repeats that evaluation first.

    Args:
        request: of this rank; one rank's is enough. saver: None saves nothing.
    """

    def __init__(self, request: StopRequest, saver: Saver | None) -> None:
        self.request, self.saver = request, saver
        self.evaluate = False
        """Whether the loaded checkpoint was made within an evaluation."""
        self._within = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """From here on there is something to save."""
        self.request.deferred = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Between two batches."""
        self._act(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Between two batches of an evaluation, of one within training."""
        if self.request.deferred:
            self._within = True
            self._act(state, logger)
            self._within = False

    def _act(self, state: State, logger: Logger) -> None:
        asked = state.device.tensor_to_device(torch.tensor([self.request.number]))
        dist.all_reduce(asked, reduce_operation="MAX")
        if number := int(asked.item()):
            where = self.saver.ensure(state, logger) if self.saver is not None else None
            saved = f"saved {where}, start again to go on from it" if where else "nothing was saved"
            batch = state.timestamp.batch.value
            raise Stopped(f"stopped by {signal.Signals(number).name} after batch {batch}: {saved}")

    def state_dict(self) -> dict[str, Any]:
        """Whether an evaluation is under way."""
        return {"evaluate": self._within}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember it for :func:`llmshearing.train.train`."""
        self.evaluate = bool(state["evaluate"])
