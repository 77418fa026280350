"""Sharded checkpoints: folders of torch.distributed.checkpoint, read tensor by tensor, without torch.distributed.

    .metadata        what tensors there are, in which pieces, and where each piece stands (see :mod:`.metadata`)
    __R_0.distcp     what rank R saved: one small file of torch.save after another, one for each piece or plain value

A piece is one rank's part of a tensor. A tensor is put together from its pieces when it is asked for; each piece's
checksums are compared first. Plain values load with ``weights_only=True``.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.storage.lazy import LazyTensor
from llmshearing.storage.metadata import METADATA, Blob, Item, read_metadata
from llmshearing.storage.torch_file import damaged, plain_types


class ShardedFolder:
    """One folder.

    Raises:
        ShearingError: it is no such folder, damaged, or a file that its metadata names is missing or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._items = read_metadata(path / METADATA)
        self._check_files()

    def subtree(self, *keys: str) -> Any:
        """What stands under nested keys, with a :class:`LazyTensor` for each tensor; None where nothing does."""
        tree: dict[Any, Any] = {}
        for item in self._items:
            if item.path[: len(keys)] == keys:
                _put(tree, item.path, self._value(item))
        value = _with_lists(tree)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def verify(self) -> None:
        """Compare every record of every piece with its checksum.

        Raises:
            ShearingError: naming the file with the first that differs.
        """
        for blob in self._blobs():
            self._checked(blob)

    def _blobs(self) -> Iterator[Blob]:
        for item in self._items:
            for piece in item.pieces:
                yield piece.blob

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for blob in self._blobs():
            ends[blob.file] = max(ends.get(blob.file, 0), blob.start + blob.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise ShearingError(f"checkpoint {self.path}: its file {name} is missing; copy the whole folder")
            if file.stat().st_size < end:
                raise ShearingError(
                    f"checkpoint {self.path} is damaged: {name} is cut off, {file.stat().st_size:,} of {end:,} bytes"
                )

    def _checked(self, blob: Blob) -> io.BytesIO:
        """The bytes of a piece, a file of torch.save, with right checksums."""
        file = self.path / blob.file
        with damaged(file):
            with open(file, "rb") as opened:
                data = io.BytesIO(os.pread(opened.fileno(), blob.length, blob.start))
            with zipfile.ZipFile(data) as archive:
                if bad := archive.testzip():
                    raise ShearingError(f"checkpoint {file} is damaged: checksum of its record {bad} is wrong")
        data.seek(0)
        return data

    def _load(self, blob: Blob) -> Any:
        data = self._checked(blob)
        with damaged(self.path / blob.file), torch.serialization.safe_globals(plain_types()):
            return torch.load(data, weights_only=True, map_location="cpu")


    def _value(self, item: Item) -> Any:
        if item.dtype is None:
            return self._load(item.pieces[0].blob)
        return LazyTensor(item.shape, item.dtype, lambda: self._assemble(item))

    def _assemble(self, item: Item) -> Tensor:
        """The pieces cover the tensor exactly once: :func:`read_metadata` has seen to it."""
        whole = None if len(item.pieces) == 1 else torch.empty(item.shape, dtype=item.dtype)
        for piece in item.pieces:
            value = self._load(piece.blob)
            if not isinstance(value, Tensor) or value.dtype != item.dtype or tuple(value.shape) != piece.shape:
                name = ".".join(map(str, item.path))
                raise ShearingError(f"checkpoint {self.path / piece.blob.file}: its piece of {name} is something else")
            if whole is None:
                return value
            whole[tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.shape, strict=True))] = value
        return torch.empty(item.shape, dtype=item.dtype) if whole is None else whole


def _put(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _with_lists(tree: Any) -> Any:
    """Dicts with the keys 0, 1, ... are lists: torch.distributed.checkpoint numbers the items of those."""
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if values and all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values
