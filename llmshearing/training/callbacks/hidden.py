"""Hidden states count less and less: sets how much before each batch (`distill.hidden`, `distill.hidden_until`)."""

from __future__ import annotations

from composer.core import Callback, State, Time
from composer.loggers import Logger

from llmshearing.training.callbacks.shearing import elapsed
from llmshearing.training.hidden import HiddenStates


class HiddenWeight(Callback):
    """Follows the clock, so that a resumed run needs no state of it."""

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden, self.until = hidden, Time.from_timestring(hidden.until)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Set the elapsed part, and log the weight."""
        self.hidden.progress = elapsed(state, self.until.unit) / self.until.value
        logger.log_metrics({"distill/hidden_weight": self.hidden.weight})
