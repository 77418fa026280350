"""Stored values read and compared; sharded checkpoints as torch.distributed.checkpoint itself makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmshearing.storage import LazyTensor

PLANNER = {"dedup_save_to_lowest_rank": True}  # as Composer makes it


def made(value: Any) -> Any:
    """Values with every lazy tensor read."""
    if isinstance(value, dict):
        return {key: made(item) for key, item in value.items()}
    if isinstance(value, list):
        return [made(item) for item in value]
    return value.make() if isinstance(value, LazyTensor) else value


def assert_same(one: Any, other: Any) -> None:
    if isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    elif isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def save_sharded(folder: Path, state: Any, ranks: int = 1) -> Path:
    """Write a nested state; with several ranks, each matrix in as many parts (by rows)."""
    if ranks == 1:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=DefaultSavePlanner(**PLANNER))
        return folder
    folder.mkdir(parents=True)
    torch.save(state, handed := folder.with_name(f"{folder.name}.whole"))
    torch.multiprocessing.spawn(_rank, (ranks, str(handed), str(folder)), nprocs=ranks)
    handed.unlink()
    return folder


def _rank(rank: int, ranks: int, handed: str, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{os.path.abspath(folder)}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))

    def sharded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sharded(item) for key, item in value.items()}
        matrix = isinstance(value, torch.Tensor) and value.dim() == 2
        return distribute_tensor(value, mesh, [Shard(0)]) if matrix else value

    state = sharded(torch.load(handed, weights_only=True))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=DefaultSavePlanner(**PLANNER))
    dist.barrier()
    # All is on disk. Taking gloo's groups apart waits for ever where the other rank has gone first (seen under load).
    os._exit(0)
