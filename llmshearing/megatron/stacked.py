"""Megatron's distributed checkpoints (`torch_dist`), read without Megatron and without torch.distributed.

    .metadata, *.distcp     what torch.distributed.checkpoint writes
    common.pt               plain values of all ranks, the arguments among them

They hold the whole model of one rank, whatever the number of ranks that saved it. The layers are stacked on a first
dimension. Each is read as a rank's tensor of that layer; only its own pieces are read.
"""

from __future__ import annotations

from pathlib import Path

from llmshearing.megatron.shards import Shards


def is_stacked(path: Path | str) -> bool:
    """Whether a folder is one of Megatron's distributed checkpoints."""
    return False


def open_stacked(path: Path | str) -> Shards:
    """Read what it holds."""
    raise NotImplementedError
