"""`model.l0_module.fold_at`: ends the stage with masks at its time, and keeps the selection after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.core import Callback, State, Time
from composer.loggers import Logger

from llmshearing.errors import ShearingError
from llmshearing.fold.selection import Selection
from llmshearing.training.callbacks.shearing import elapsed
from llmshearing.training.handover import FOLDED, selection_state
from llmshearing.training.resilience.saver import Saver


class FoldDue(Exception):
    """The stage with masks has ended; ``path`` is its last checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"to be folded: {path}")
        self.path = path


class FoldAt(Callback):
    """Saves the state at the first boundary of batches at or behind ``time``, and ends the stage there.

    It is to come after the saver, and after whatever follows a signal.

    Args:
        time: `model.l0_module.fold_at`, a Composer time string.
    """

    def __init__(self, time: str, saver: Saver) -> None:
        self.time, self.saver = Time.from_timestring(time), saver

    def due(self, state: State) -> bool:
        """Whether the time has come."""
        return elapsed(state, self.time.unit) >= self.time.value

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Between two batches."""
        if self.due(state):
            self.end(state, logger)

    def end(self, state: State, logger: Logger, *, anew: bool = False) -> None:
        """Save unless that is done, and raise :class:`FoldDue`. anew: save in any case.

        Raises:
            ShearingError: the state could not be saved.
        """
        if anew:
            self.saver._save_checkpoint(state, logger)
        path = self.saver.ensure(state, logger)
        if path is None:
            raise ShearingError(f"the model was not folded, its checkpoint was not saved: {self.saver.problem}")
        raise FoldDue(path)


class FoldedInRun(Callback):
    """Keeps in the checkpoints how the model was cut out of the run's source."""

    __qualname__ = FOLDED

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def state_dict(self) -> dict[str, Any]:
        """See :func:`selection_state`."""
        return selection_state(self.selection)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the run has read it before its model was built."""
