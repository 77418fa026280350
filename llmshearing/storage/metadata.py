"""The `.metadata` of a sharded checkpoint: a pickle of torch.distributed.checkpoint's records, read as plain data.

Of what the pickle names nothing is called but stand-ins for the record classes, which keep their fields. What these say
is checked before it is believed: names stay inside the folder, and the pieces of a tensor cover it exactly once.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmshearing.errors import ShearingError
from llmshearing.files import is_plain_name

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# Classes of torch.distributed.checkpoint (torch 2.3 to 2.7), and what else their fields hold.
_RECORDS = {
    f"{_DCP}.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    # plans of saving, which Megatron leaves in
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
}  # fmt: skip


@dataclass(frozen=True)
class Blob:
    """Bytes of a file in the folder."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it begins on each dimension, its shape, its bytes."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True)
class Item:
    """A tensor (dtype, whole shape, pieces) or a plain value (dtype None, one piece), and its place in the state."""

    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class _Record:
    """Stands for a class of the pickle: keeps the state that it is given, and runs nothing."""

    def __init__(self, *called: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into it and is not loaded")


def read_metadata(file: Path) -> list[Item]:
    """All that a sharded checkpoint holds.

    Raises:
        ShearingError: the file is missing, damaged or not what torch.distributed.checkpoint writes; or it names files
            outside the folder, or pieces that do not make up their tensor.
    """
    try:
        told = _fields(_Unpickler(io.BytesIO(file.read_bytes())).load(), "Metadata")
        places = {_index(key): _blob(value) for key, value in told["storage_data"].items()}
        paths = told["planner_data"]
        return [_item(name, value, paths, places) for name, value in told["state_dict_metadata"].items()]
    except ShearingError as error:
        raise ShearingError(f"checkpoint {file.parent}: {error}") from None
    except Exception as error:  # a pickle of random bytes raises every kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShearingError(f"checkpoint {file} is damaged or not of torch.distributed.checkpoint: {reason}") from error


def _fields(record: Any, kind: str) -> Any:
    """The state of a record: its fields by name (TensorProperties: in a tuple, the dtype first)."""
    if type(record).__name__ != kind or not isinstance(record, _Record):
        raise TypeError(f"a {type(record).__name__} stands where a {kind} belongs")
    return record.state


def _index(key: Any) -> tuple[str, tuple[int, ...] | None]:
    """Name and offsets of a piece; a plain value has no offsets."""
    told = _fields(key, "MetadataIndex")
    return told["fqn"], told.get("offset")


def _blob(value: Any) -> Blob:
    told = _fields(value, "_StorageInfo")
    name, start, length = told["relative_path"], told["offset"], told["length"]
    if not is_plain_name(name):
        raise ShearingError(f"its metadata names the file {name!r}, which is not in the folder")
    if told.get("transform_descriptors"):
        raise ShearingError(f"{name} is compressed ({told['transform_descriptors']}); save it without extensions")
    if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
        raise TypeError(f"{name}: bytes {start!r} and on, {length!r} of them")
    return Blob(name, start, length)


def _item(name: str, value: Any, paths: Any, places: Mapping[Any, Blob]) -> Item:
    path = tuple(paths[name]) if paths else (name,)
    if not all(isinstance(key, (str, int)) for key in path):
        raise TypeError(f"{name}: its place {path!r}")
    if type(value).__name__ == "BytesStorageMetadata":
        return Item(path, None, (), (Piece((), (), places[name, None]),))
    told = _fields(value, "TensorStorageMetadata")
    dtype, shape = _fields(told["properties"], "TensorProperties")[0], _sizes(told["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: dtype {dtype!r}")
    pieces = []
    for chunk in told["chunks"]:
        said = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(said["offsets"]), _sizes(said["sizes"])
        blob = places[name, offsets]
        if math.prod(sizes) * dtype.itemsize > blob.length:
            raise ShearingError(f"{name}: a piece of {list(sizes)} does not fit into its {blob.length} bytes")
        pieces.append(Piece(offsets, sizes, blob))
    _check_cover(name, shape, pieces)
    return Item(path, dtype, shape, tuple(pieces))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(size) is int and size >= 0 for size in value):
        raise TypeError(f"{value!r} is no shape")
    return value


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    """Within the tensor, apart from one another, and as many elements as it has: then every element is there once."""
    inside = all(
        len(piece.offsets) == len(piece.shape) == len(shape)
        and all(at + size <= whole for at, size, whole in zip(piece.offsets, piece.shape, shape, strict=True))
        for piece in pieces
    )
    elements = sum(math.prod(piece.shape) for piece in pieces)
    if not inside or elements != math.prod(shape) or any(_overlap(*two) for two in itertools.combinations(pieces, 2)):
        parts = ", ".join(f"{list(piece.shape)} at {list(piece.offsets)}" for piece in pieces[:4])
        raise ShearingError(f"{name}: its pieces ({parts}) do not make up its shape {list(shape)}")


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        max(a, b) < min(a + size, b + width)
        for a, size, b, width in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )
