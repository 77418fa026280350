"""The Algorithm that drives the masks: step and warm-up before each batch, projection or exact shift after it."""

from __future__ import annotations

from collections.abc import Mapping

from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger

from llmshearing.masks.l0 import L0Masks
from llmshearing.training.rates import Rates


def elapsed(state: State, unit: TimeUnit) -> float:
    """Training time since the start, in a unit of Composer's; a duration is the fraction of the whole run."""
    now = state.timestamp
    if unit == TimeUnit.DURATION:
        whole = state.max_duration
        return elapsed(state, whole.unit) / whole.value if whole is not None and whole.value else 1.0
    if unit == TimeUnit.EPOCH:
        length = state.dataloader_len
        return now.epoch.value + (now.batch_in_epoch.value / length.value if length else 0.0)
    if unit == TimeUnit.SECOND:
        return now.total_wct.total_seconds() if now.total_wct is not None else 0.0
    return float(now.get(unit).value)


def warmup_progress(state: State, warmup: Time) -> float:
    """Elapsed part of the warm-up, 0 or more; a warm-up of 0 is over at once."""
    return elapsed(state, warmup.unit) / warmup.value if warmup.value else 1.0


class Shearing(Algorithm):
    """Sets the masks' step and progress before a batch and projects log alpha after it.

    Under the exact constraint log alpha is shifted instead, to the target of the batch that comes: gates are always
    sampled from rows that expect it. What a checkpoint holds is on target too, so that going on shifts nothing.

    Args:
        masks: the model's masks. warmup: time over which target sparsity rises, a Composer time string.
        constant_lr: learning rate of masks and multipliers where they do not follow the weights' schedule, else None.
        rates: their learning rates where these follow the stage's length, else None.
    """

    def __init__(
        self, masks: L0Masks, warmup: str, constant_lr: float | None = None, rates: Rates | None = None
    ) -> None:
        self.masks, self.warmup, self.constant_lr = masks, Time.from_timestring(warmup), constant_lr
        self.rates = rates

    def match(self, event: Event, state: State) -> bool:
        """Batch start and end."""
        return event in (Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """See the class."""
        if event == Event.BATCH_START:
            self._start(state)
        elif self.masks.exact:
            self.masks.progress = warmup_progress(state, self.warmup)  # the clock has moved on to the next batch
            self.masks.hold()
        else:
            self.masks.project()

    def _start(self, state: State) -> None:
        self.masks.step = state.timestamp.batch.value
        self.masks.progress = warmup_progress(state, self.warmup)
        if self.masks.exact and not self.masks.step:
            self.masks.hold()
        if self.rates is not None:
            self._set_rates(state, self.rates.at(self.masks.step))
        elif self.constant_lr is not None:
            self._set_rates(state, dict.fromkeys(("masks", "multipliers"), self.constant_lr))

    @staticmethod
    def _set_rates(state: State, rates: Mapping[str, float]) -> None:
        """rates: by name of the optimizer's group; the others keep theirs."""
        for group in state.optimizers[0].param_groups:
            if group.get("name") in rates:
                group["lr"] = rates[group["name"]]
