"""Files of torch.save and of safetensors, written tensor by tensor. The formats are theirs, the order of work is ours.

torch.save and safetensors' save_file want every tensor at once. Here the header is written from shapes and dtypes, then
one tensor after another is made, written and let go; the next ones are made meanwhile.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.files import new_file
from llmshearing.lookahead import in_order
from llmshearing.storage.lazy import LazyTensor

# dtype -> the class that torch.save names for its storage, and safetensors' name.
DTYPES: dict[torch.dtype, tuple[Any, str]] = {
    torch.float64: (torch.DoubleStorage, "F64"),
    torch.float32: (torch.FloatStorage, "F32"),
    torch.float16: (torch.HalfStorage, "F16"),
    torch.bfloat16: (torch.BFloat16Storage, "BF16"),
    torch.int64: (torch.LongStorage, "I64"),
    torch.int32: (torch.IntStorage, "I32"),
    torch.int16: (torch.ShortStorage, "I16"),
    torch.int8: (torch.CharStorage, "I8"),
    torch.uint8: (torch.ByteStorage, "U8"),
    torch.bool: (torch.BoolStorage, "BOOL"),
}
ALIGNMENT = 64  # of records, as torch.save aligns them: torch.load(mmap=True) uses them where they stand
AHEAD = 2  # tensors in the making while one is written: reading and copying leave Python's lock to others
_ZIP_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of a zip record's local header without names, and of its 64-bit sizes


def write_torch_file(path: Path, values: Any, progress: Callable[[], object] | None = None) -> Path:
    """Write values with :class:`LazyTensor` in them as torch.save writes the tensors; `torch.load` reads them.

    Args:
        progress: called after each tensor.

    Raises:
        ShearingError: the file cannot be written, or a tensor's dtype has no place in it.
    """
    write_torch_files({path: values}, progress)
    return path


def write_torch_files(files: Mapping[Path, Any], progress: Callable[[], object] | None = None) -> None:
    """Several such files at once: the first tensor of each, then the second of each, and so on.

    Files that hold parts of the same tensors are so written while these are at hand. Arguments and errors as in
    :func:`write_torch_file`.
    """
    with ExitStack() as opened:
        parts = [opened.enter_context(_torch_file(path, values)) for path, values in files.items()]
        rounds = zip_longest(*(part.tensors.items() for part in parts))
        turns = [(part, item) for turn in rounds for part, item in zip(parts, turn, strict=True) if item is not None]
        for (part, (_, key)), data in zip(turns, _made(tensor for _, (tensor, _) in turns), strict=True):
            _record(part.file, part.archive, f"data/{key}", data)
            if progress is not None:
                progress()


@dataclass(frozen=True)
class _Part:
    """A file that has its values, and waits for its tensors (tensor -> key of its record)."""

    file: BinaryIO
    archive: zipfile.ZipFile
    tensors: Mapping[LazyTensor, str]


@contextmanager
def _torch_file(path: Path, values: Any) -> Iterator[_Part]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(values)
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        _record(file, archive, "data.pkl", buffer.getvalue())
        _record(file, archive, "byteorder", sys.byteorder.encode())
        yield _Part(file, archive, pickler.keys)
        _record(file, archive, "version", b"3\n")


class _Storage:
    """Stands in the pickle for the bytes of a tensor."""

    def __init__(self, tensor: LazyTensor, key: str) -> None:
        elements = tensor.nbytes // tensor.dtype.itemsize
        self.id = ("storage", _names(tensor.dtype)[0], key, "cpu", elements)


class _Pickler(pickle.Pickler):
    """Plain values as they are; a lazy tensor as torch.save writes the contiguous tensor that it will be."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.keys: dict[LazyTensor, str] = {}

    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return NotImplemented
        storage = _Storage(value, self.keys.setdefault(value, str(len(self.keys))))
        strides = torch.empty(value.shape, device="meta").stride()
        hooks: Any = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, strides, False, hooks)


def _record(file: BinaryIO, archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")
    start = file.tell() + _ZIP_HEADER + len(record.filename) + _ZIP64_EXTRA + 4
    padding = -start % ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=True) as opened:
        opened.write(data)


def _made(tensors: Iterable[LazyTensor]) -> Iterator[memoryview]:
    """The bytes of each tensor, in order. The next ones are read and folded while the caller writes."""
    pool = ThreadPoolExecutor(AHEAD)
    try:
        for _, data in in_order(tensors, lambda tensor: pool.submit(raw, tensor), AHEAD):
            yield data
    finally:
        pool.shutdown(cancel_futures=True)


def raw(tensor: LazyTensor) -> memoryview:
    """Make a tensor; its bytes, in order.

    Raises:
        ShearingError: it is not of the shape and dtype that were told before.
    """
    value = tensor.make()
    if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
        raise ShearingError(
            f"a tensor of {list(tensor.shape)} {tensor.dtype} was announced, {list(value.shape)} {value.dtype} was made"
        )
    return memoryview(_bytes(value).numpy())


def _bytes(value: Tensor) -> Tensor:
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def _names(dtype: torch.dtype) -> tuple[Any, str]:
    if dtype not in DTYPES:
        raise ShearingError(f"tensors of {dtype} cannot be written; convert to one of {', '.join(map(str, DTYPES))}")
    return DTYPES[dtype]


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], progress: Callable[[], object] | None = None
) -> Path:
    """Write one safetensors file, in safetensors' own order: wide dtypes first (alignment), then by name.

    Raises:
        ShearingError: as :func:`write_torch_file`.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    with new_file(path) as file:
        file.write(_safetensors_header(ordered))
        for data in _made(tensor for _, tensor in ordered):
            file.write(data)
            if progress is not None:
                progress()
    return path


def _safetensors_header(ordered: Iterable[tuple[str, LazyTensor]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _names(tensor.dtype)[1], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
