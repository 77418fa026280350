"""SelfDescription: makes a checkpoint say what model, masks and configuration it holds."""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from llmshearing.checkpoints.checkpoint import INFO
from llmshearing.training.callbacks.losses import evaluation_record


class SelfDescription(Callback):
    """Rides in the checkpoint as the state of a callback: plain data that loads with ``weights_only=True``.

    Args:
        info: the fields of :class:`llmshearing.checkpoints.checkpoint.CheckpointInfo`; ``evaluation`` is kept up
            to date.
        set_names: domains of the evaluations. comparable: evaluations are of the model that the checkpoint holds or
            folds to (not of one as large as the masks are just then).
    """

    # Composer saves a callback's state under this name; in files it is the name of what the state holds.
    __qualname__ = INFO

    def __init__(self, info: dict[str, Any], set_names: list[str], comparable: bool = True) -> None:
        self.info, self.set_names, self.comparable = info, list(set_names), comparable

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the evaluation."""
        if self.comparable:
            self.info["evaluation"] = evaluation_record(state, self.set_names)

    def state_dict(self) -> dict[str, Any]:
        """The information; what is a mapping in it, as a list of pairs.

        torch.distributed.checkpoint takes mappings apart: when it loads it wants each key that is here now to have been
        saved (an evaluation, or a key that a newer transformers has, was not), and writes into the mapping itself.
        """
        return {key: list(value.items()) if isinstance(value, dict) else value for key, value in self.info.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The evaluation; for the rest the running configuration holds."""
        evaluation = state.get("evaluation")
        self.info["evaluation"] = None if evaluation is None else dict(evaluation)
