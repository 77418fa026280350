"""A saved state of either kind: one file of torch.save, or a folder of torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from llmshearing.storage.metadata import METADATA
from llmshearing.storage.sharded import ShardedFolder
from llmshearing.storage.torch_file import TorchFile


class Archive(Protocol):
    """Nested values in which a :class:`LazyTensor` stands for each tensor."""

    path: Path

    def subtree(self, *keys: str) -> Any:
        """What stands under nested keys; None where nothing does."""

    def verify(self) -> None:
        """Compare everything with its checksums; a ShearingError names what differs."""


def open_archive(path: Path) -> Archive:
    """Read what a file or folder holds, and none of its tensors.

    Raises:
        ShearingError: it is of neither kind, or damaged.
    """
    return ShardedFolder(path) if is_sharded(path) else TorchFile(path)


def is_sharded(path: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint."""
    return (path / METADATA).is_file()
