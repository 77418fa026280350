"""Compressions of MDS shards under the names that Streaming gives them: `zstd`, or with a level `zstd:7`."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable
from importlib import import_module
from typing import Any

import zstandard

from llmshearing.errors import ShearingError

LEVELS = {"br": range(12), "bz2": range(1, 10), "gz": range(10), "snappy": range(0), "zstd": range(1, 23)}
"""Algorithm -> the levels that may be named."""
NAMES = frozenset(LEVELS) | {f"{name}:{level}" for name, levels in LEVELS.items() for level in levels}
PACKAGES = {"br": ("brotli", "brotli"), "snappy": ("snappy", "python-snappy")}
"""Algorithm -> module, and package that brings it; the others need nothing more."""


def decompress(compression: str, data: bytes, size: int) -> bytes:
    """The data of one of NAMES; of more than `size` bytes, the length that the index gives, not much more than those.

    Raises ShearingError where the algorithm's package is not installed, and the package's errors for damaged data.
    """
    name = compression.partition(":")[0]
    if name in PACKAGES:
        return _foreign(name, data)
    opens: dict[str, Callable[..., Any]] = {"bz2": bz2.open, "gz": gzip.open, "zstd": zstandard.open}
    with opens[name](io.BytesIO(data), "rb") as file:
        return bytes(file.read(size + 1))


def _foreign(name: str, data: bytes) -> bytes:
    module, package = PACKAGES[name]
    try:
        return bytes(import_module(module).decompress(data))
    except ModuleNotFoundError:
        raise ShearingError(f"shards compressed as {name} need a package: pip install {package}") from None
