"""The old name of `llmshearing.checkpoints.checkpoint`, for scripts that import it."""

from llmshearing.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    is_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

__all__ = ["Checkpoint", "CheckpointInfo", "is_checkpoint", "read_checkpoint", "save_checkpoint"]
