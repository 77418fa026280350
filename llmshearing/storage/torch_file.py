"""Files of torch.save, read tensor by tensor.

    archive/data.pkl      the values; a tensor is a reference to a record, with shape, strides and offset
    archive/data/<key>    the bytes of one storage, uncompressed, with a CRC-32 in the zip directory

The values are unpickled with ``weights_only=True`` while torch's fake tensors stand for the real ones, so that no
tensor is read; torch tells the position of each one's bytes. Tensors are then read with `pread`: the pages of a mapped
file would count as the process's memory. Every record is compared with its checksum when it is read.
"""

from __future__ import annotations

import datetime
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llmshearing.errors import ShearingError
from llmshearing.storage.lazy import LazyTensor
from llmshearing.storage.window import Window

CHUNK = 16 << 20  # bytes read at once
TENSORS = "/data/"  # in the names of records that hold tensors
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: the lengths of the name and of the extra field after it
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before torch 1.6: its magic number, pickled."""


class TorchFile:
    """One file, or the part of one from ``start`` on; kept open.

    Args:
        allowed: further types that its values may hold, as :func:`only_types` takes them.

    Raises:
        ShearingError: it is not a file of torch.save, or damaged, or its values are more than plain data.
    """

    def __init__(
        self, path: Path, start: int = 0, length: int | None = None, allowed: Sequence[Any] = ()
    ) -> None:
        self.path = path
        self._tensors: dict[tuple[Any, ...], LazyTensor] = {}
        with damaged(path):
            self._file = Window(path, start, length)
            self._records = self._directory()
            self._verify({start: item for start, item in self._records.items() if TENSORS not in item.filename})
            self._file.seek(0)
            with FakeTensorMode(), only_types([*plain_types(), *allowed]):
                values = torch.load(self._file, weights_only=True)
            self._state = self._lazy(values)

    def subtree(self, *keys: str) -> Any:
        """What stands under nested keys, with a :class:`LazyTensor` for each tensor; None where nothing does."""
        value = self._state
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def verify(self) -> None:
        """Compare every record with its checksum: one pass over the file, in chunks.

        Raises:
            ShearingError: naming the first record that differs.
        """
        with damaged(self.path):
            self._verify(self._records)

    def _directory(self) -> dict[int, zipfile.ZipInfo]:
        """Offset of a record's bytes -> record. They begin after its local header, not where the directory says."""
        records = {}
        header = memoryview(bytearray(_LOCAL_HEADER.size))
        with zipfile.ZipFile(self._file) as archive:
            for record in archive.infolist():
                self._file.fill(header, record.header_offset)
                start = record.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
                if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > self._file.length:
                    raise zipfile.BadZipFile(f"record {record.filename} is compressed or cut off")
                records[start] = record
        return records

    def _verify(self, records: Mapping[int, zipfile.ZipInfo]) -> None:
        spare = memoryview(bytearray(CHUNK))
        for start, record in records.items():
            self._pour(record, start, spare)

    def _pour(self, record: zipfile.ZipInfo, start: int, into: memoryview) -> None:
        """Read a record and compare its checksum. ``into`` holds all of it, or one chunk, which is used again."""
        checksum, whole = 0, len(into) >= record.file_size
        for at in range(0, record.file_size, CHUNK):
            size = min(CHUNK, record.file_size - at)
            chunk = into[at : at + size] if whole else into[:size]
            self._file.fill(chunk, start + at)
            checksum = zlib.crc32(chunk, checksum)
        if checksum != record.CRC:
            raise ShearingError(f"checkpoint {self.path} is damaged: checksum of its record {record.filename} is wrong")

    def _lazy(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._lazy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._lazy(item) for item in value]
        if not isinstance(value, FakeTensor) or value.layout != torch.strided:
            return value
        start: int = value.untyped_storage()._checkpoint_offset
        place = start, value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
        return self._tensors.setdefault(place, LazyTensor(tuple(value.shape), value.dtype, lambda: self._read(*place)))

    def _read(
        self, start: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> Tensor:
        with damaged(self.path):
            record = self._records[start]
            data = torch.empty(record.file_size, dtype=torch.uint8)
            self._pour(record, start, memoryview(data.numpy()))
            return data.view(dtype).as_strided(shape, stride, offset)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Whatever a damaged or hostile file makes zipfile, pickle or torch raise is one error that names the file."""
    try:
        yield
    except ShearingError:
        raise
    except Exception as error:
        reason = _reason(error, path)
        raise ShearingError(f"checkpoint {path} is damaged or no checkpoint of torch.save: {reason}") from error


def _reason(error: Exception, path: Path) -> str:
    """What was wrong, in a line. torch's own text on refused pickles advises to load them unsafely: not repeated."""
    if isinstance(error, zipfile.BadZipFile) and _begins_with(path, BEFORE_ZIP):
        return "it is in the format of torch before 1.6; load it with torch and save it again"
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"GLOBAL (\S+)", text)
        return f"it names {refused[1]}, which is no plain data" if refused else "its pickle is no plain data"
    return text.splitlines()[0] if text else type(error).__name__


def _begins_with(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(mark)) == mark
    except OSError:
        return False


@contextmanager
def only_types(types: Sequence[Any]) -> Iterator[None]:
    """Within the block ``torch.load`` accepts these types beyond torch's own list, and no others.

    ``torch.serialization.safe_globals`` adds to what any library of the process has allowed (megatron-core allows
    a dozen types when it is imported); what a file may hold must not depend on that.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(types))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def plain_types() -> list[Any]:
    """The types beyond torch's own list in Composer's files: RNG and timestamps. None of them runs code."""
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    # Its module moved between numpy 1 and 2: files of either load.
    arrays = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    dtypes = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SUO"]
    return [*arrays, np.ndarray, np.dtype, *dtypes, datetime.timedelta, torch.torch_version.TorchVersion]
