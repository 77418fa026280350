"""MDS, version 2: a shard as its index describes it, and the columns of a sample. Reading needs no Streaming by this.

A sample is the lengths (u32) of its columns of no fixed size, then the bytes of each column in the index's order
(Streaming's `docs/preparing_datasets/dataset_format.md`). Columns of other kinds than ids and names are passed over.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from llmshearing.data.mds.compression import decompress

DTYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32",
    33: "int32", 34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
"""Byte before an array whose type the column does not give -> its type."""


@dataclass(frozen=True)
class StoredFile:
    """A file by its entry in the index. hashes: name of the algorithm -> hexadecimal digest."""

    basename: str
    bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class Shard:
    """One shard by its entry in the index; `zip_data` is the compressed file, where there is one."""

    samples: int
    raw_data: StoredFile
    zip_data: StoredFile | None
    compression: str | None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Shard:
        """From an entry that was checked (`index.py`)."""
        files = {key: StoredFile(**entry[key]) if entry.get(key) else None for key in ("raw_data", "zip_data")}
        kept = ("samples", "compression", "column_names", "column_encodings", "column_sizes")
        return cls(**files, **{key: entry.get(key) for key in kept})  # type: ignore[arg-type]

    def decompressed(self, data: bytes) -> bytes:
        """The raw file out of the compressed one. Raises what the algorithm's package does for damaged data."""
        return decompress(self.compression or "", data, self.raw_data.bytes)

    def decode(self, data: bytes) -> dict[str, Any]:
        """The columns of a sample that hold ids or text, by name.

        Raises:
            ValueError, struct.error, UnicodeDecodeError, IndexError, KeyError, TypeError: the bytes are no such sample.
        """
        at = 4 * sum(not size for size in self.column_sizes)
        told = iter(struct.unpack_from(f"<{at // 4}I", data))
        sample: dict[str, Any] = {}
        for name, kind, size in zip(self.column_names, self.column_encodings, self.column_sizes, strict=True):
            end = at + (size or next(told))
            if end > len(data):
                raise ValueError(f"column {name} ends at byte {end} of {len(data)}")
            if decode := _decoder(kind):
                sample[name] = decode(data[at:end])
            at = end
        return sample


def _decoder(kind: str) -> Callable[[bytes], Any] | None:
    name, _, rest = kind.partition(":")
    if name == "ndarray":
        return lambda data: _array(data, rest)
    plain: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "str": bytes.decode}
    return plain.get(kind)


def _array(data: bytes, rest: str) -> np.ndarray:
    """Of `ndarray:<dtype>:<shape>`; what the column leaves out stands before the values."""
    dtype, _, shape = rest.partition(":")
    at = 0
    if not dtype:
        dtype, at = DTYPES[data[0]], 1
    if shape:
        sizes = [int(size) for size in shape.split(",")]
    else:  # a byte: number of axes, and the width of each size as the power of two in its last two bits
        width = 1 << (data[at] & 3)
        end = at + 1 + (data[at] >> 2) * width
        sizes, at = np.frombuffer(data[at + 1 : end], f"<u{width}").tolist(), end
    return np.frombuffer(data, np.dtype(dtype), offset=at).reshape(sizes)


def _hashes() -> dict[str, Callable[[bytes], Any]]:
    plain = [name for name in hashlib.algorithms_available if hasattr(hashlib, name) and not name.startswith("shake_")]
    return {name: getattr(hashlib, name) for name in plain} | {
        name: getattr(xxhash, name) for name in xxhash.algorithms_available
    }


HASHES = _hashes()
"""Name of an algorithm, as Streaming writes it in the index -> its constructor."""


def digest(algorithm: str, data: bytes) -> str:
    """Hexadecimal digest; the algorithm is one of HASHES."""
    return str(HASHES[algorithm](data).hexdigest())
