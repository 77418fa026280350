"""The Algorithm between the backward pass and the optimizer's step: the masks' gradients averaged, then all clipped."""

from __future__ import annotations

from composer.algorithms.gradient_clipping.gradient_clipping import apply_gradient_clipping
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from llmshearing.masks.l0 import L0Masks
from llmshearing.training.distributed import average_gradients, clip_norm, clip_value, divide_sums


class Gradients(Algorithm):
    """Makes the gradients of a step what they are on one rank, in every layout.

    Composer's own GradientClipping fails under FSDP 2, where shards and whole masks meet.

    Args:
        masks: the model's masks, whose gradients DDP averages and FSDP does not; None: there are none.
        clipping, threshold: as ``algorithms.gradient_clipping``; None: no clipping.
    """

    def __init__(self, masks: L0Masks | None, clipping: str | None = None, threshold: float = 1.0) -> None:
        self.masks, self.clipping, self.threshold = masks, clipping, threshold

    def match(self, event: Event, state: State) -> bool:
        """Once the model is sharded, and after the backward passes of all microbatches."""
        return event in (Event.AFTER_LOAD, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """See the class."""
        if event == Event.AFTER_LOAD:
            divide_sums(state.model)
        else:
            self._finish(state)

    def _finish(self, state: State) -> None:
        if self.masks is not None and state.fsdp_enabled:
            average_gradients(self.masks.parameters())
        if self.clipping == "norm":
            clip_norm(state.model.parameters(), self.threshold)
        elif self.clipping == "value":
            clip_value(state.model.parameters(), self.threshold)
        elif self.clipping == "adaptive":
            apply_gradient_clipping(state.model, "adaptive", self.threshold, fsdp_enabled=False)
