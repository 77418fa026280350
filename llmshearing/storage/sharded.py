"""Sharded checkpoints: folders of torch.distributed.checkpoint, read tensor by tensor, without torch.distributed.

    .metadata        what tensors there are, in which pieces, and where each piece stands (see :mod:`.metadata`)
    __R_0.distcp     what rank R saved: one small file of torch.save after another, one for each piece or plain value

A piece is one rank's part of a tensor. A tensor is put together from its pieces when it is asked for; each piece's
checksums are compared first. Plain values load with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.storage.lazy import LazyTensor
from llmshearing.storage.metadata import METADATA, Blob, Item, Piece, read_metadata
from llmshearing.storage.torch_file import TorchFile


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

    def tensors(self) -> dict[str, Item]:
        """Name -> what there is of every tensor; the keys of nested states are joined by dots."""
        return {".".join(map(str, item.path)): item for item in self._items if item.dtype is not None}

    def at(self, item: Item, *index: int) -> LazyTensor:
        """The part of a tensor at these places of its first dimensions; only pieces that have some of it are read.

        Raises:
            ShearingError: the item is no tensor.
        """
        if item.dtype is None:
            raise ShearingError(f"checkpoint {self.path}: {item.path} is no tensor")
        return LazyTensor(item.shape[len(index) :], item.dtype, lambda: self._assemble(item, index))

    def verify(self) -> None:
        """Compare every record of every piece with its checksum.

        Raises:
            ShearingError: naming the file with the first that differs.
        """
        for blob in self._blobs():
            self._open(blob).verify()

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

    def _open(self, blob: Blob) -> TorchFile:
        return TorchFile(self.path / blob.file, blob.start, blob.length)

    def _value(self, item: Item) -> Any:
        if item.dtype is None:
            return self._open(item.pieces[0].blob).subtree()
        return LazyTensor(item.shape, item.dtype, lambda: self._assemble(item))

    def _assemble(self, item: Item, index: tuple[int, ...] = ()) -> Tensor:
        """The pieces cover the tensor exactly once: :func:`read_metadata` has seen to it."""
        if len(item.pieces) == 1 and not index:
            return self._part(item, item.pieces[0])
        whole, fixed = torch.empty(item.shape[len(index) :], dtype=item.dtype), len(index)
        for piece in item.pieces:
            places = [slice(at, at + size) for at, size in zip(piece.offsets, piece.shape, strict=True)]
            chosen = [*zip(index, places[:fixed], strict=True)]
            if all(place.start <= at < place.stop for at, place in chosen):
                own = tuple(at - place.start for at, place in chosen)
                whole[tuple(places[fixed:])] = self._part(item, piece)[own]
        return whole

    def _part(self, item: Item, piece: Piece) -> Tensor:
        stored = self._open(piece.blob).subtree()
        if not isinstance(stored, LazyTensor) or (stored.dtype, stored.shape) != (item.dtype, piece.shape):
            name = ".".join(map(str, item.path))
            raise ShearingError(f"checkpoint {self.path / piece.blob.file}: its part of {name} is something else")
        return stored.make()


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
