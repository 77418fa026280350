"""CheckpointInfo: makes a checkpoint say what model, masks and configuration it holds."""

from __future__ import annotations

from typing import Any

from composer.core import Callback


class CheckpointInfo(Callback):
    """Rides in the checkpoint as the state of a callback: plain data that loads with ``weights_only=True``.

    Args:
        info: ``hf_config``, ``masks``, ``run_config``, ``tokenizer`` and ``history`` (:mod:`llmshearing.checkpoint`).
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info

    def state_dict(self) -> dict[str, Any]:
        """The information."""
        return dict(self.info)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the running configuration holds."""
