"""One MDS directory on local disk, opened for random access and checked against its index.

A sample has the columns `tokens` (T ids: an `ndarray` of unsigned integers, or the predecessor's `bytes` of
uint16) and `set` (the domain's name). T = max_seq_len. There is no shared memory.
"""

import os
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from streaming import LocalDataset
from streaming.base.hashing import get_hash

from llmshearing.errors import ShearingError

COLUMNS = ("tokens", "set")
OPEN_FILES = 64  # a directory; a pass reads from 17 shards at a time
BYTES_DTYPE = np.dtype("<u2")  # what the predecessor packed into its `bytes` column


class MdsDirectory:
    """`directory[i]` -> (token ids int64 [T], domain name); `len(directory)` samples.

    `vocab_size` is the model's: an id beyond it is an error when its sample is read. Sizes of all shard files
    are checked here, the hash of a shard when its first sample is read. Raises ShearingError, naming the
    file.
    """

    def __init__(self, path: Path | str, max_seq_len: int, vocab_size: int) -> None:
        self.path = Path(path)
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self._data = _open(self.path)
        self._verified: set[int] = set()
        self._files: dict[int, FileIO] = {}
        self._ends = np.cumsum([shard.samples for shard in self._data.shards])
        problems = [problem for shard in self._data.shards for problem in _shard_problems(self.path, shard)]
        if problems:
            raise ShearingError("\n".join(dict.fromkeys(problems)))
        if len(self._data) == 0:
            raise ShearingError(f"{self.path} has no sample; prepare it again")
        self[0]  # a wrong sequence length should be said now, not at the first batch

    def __len__(self) -> int:
        return len(self._data)

    @property
    def block(self) -> int:
        """Samples of its largest shard."""
        return max(shard.samples for shard in self._data.shards)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        sample = self._sample(index)
        tokens = sample["tokens"]
        if isinstance(tokens, bytes):
            tokens = np.frombuffer(tokens[: len(tokens) // 2 * 2], BYTES_DTYPE)
        if tokens.size != self.max_seq_len:
            raise ShearingError(
                f"{self.path}: sequences are {tokens.size} tokens long, max_seq_len is {self.max_seq_len}; "
                "set max_seq_len to that or prepare the data again"
            )
        if int(tokens.max()) >= self.vocab_size:
            raise ShearingError(
                f"{self.path}: sample {index} has token id {int(tokens.max())}, the model's vocab_size is "
                f"{self.vocab_size}; the data was prepared with another tokenizer"
            )
        return tokens.astype(np.int64), sample["set"]

    def names(self) -> list[str]:
        """The `set` column, one name a sample (reads every sample once)."""
        return [self._sample(index)["set"] for index in range(len(self))]

    def _sample(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} samples, not one numbered {index}")
        shard_id = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._data.shards[shard_id]
        offset = index - int(self._ends[shard_id]) + shard.samples
        file = self.path / shard.raw_data.basename
        try:
            if shard_id not in self._verified:
                _verify_hash(file, shard.raw_data.hashes)
                self._verified.add(shard_id)
            return _decode(shard, self._bytes(shard_id, file, offset))
        except ShearingError:
            raise
        except Exception as error:  # whatever a damaged file without a hash makes the decoder do
            raise ShearingError(f"{file} cannot be read at sample {offset}: {error!r}; copy it again") from error

    def _bytes(self, shard_id: int, path: Path, offset: int) -> bytes:
        """One encoded sample. MDS: u32 count, u32 offsets [count + 1], index, samples; files stay open for a while."""
        file = self._files.get(shard_id)
        if file is None:
            while len(self._files) >= OPEN_FILES:
                del self._files[next(iter(self._files))]
            file = self._files[shard_id] = path.open("rb", buffering=0)
        begin, end = struct.unpack("<II", os.pread(file.fileno(), 8, 4 * (1 + offset)))
        return os.pread(file.fileno(), end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to another process


def _decode(shard: Any, data: bytes) -> dict[str, Any]:
    """The columns of a sample. Arrays of fixed shape directly, as Streaming parses their type anew each time."""
    if shard.column_names != ["set", "tokens"] or not (size := shard.column_sizes[1]):
        return shard.decode_sample(data)
    _, kind, *_ = shard.column_encodings[1].split(":")
    (name,) = struct.unpack_from("<I", data)
    if len(data) != 4 + name + size:
        raise ValueError(f"a sample of {len(data)} bytes, not {4 + name + size}")
    return {"set": data[4 : 4 + name].decode(), "tokens": np.frombuffer(data, kind, offset=4 + name)}


def _open(path: Path) -> LocalDataset:
    index = path / "index.json"
    if not index.is_file():
        raise ShearingError(f"{index} does not exist, so {path} is no MDS directory")
    try:
        return LocalDataset(str(path))
    except Exception as error:  # json, key and value errors of a damaged index
        raise ShearingError(f"{index} cannot be read: {error!r}; copy it again or prepare the data again") from error


def _shard_problems(path: Path, shard: Any) -> list[str]:
    file = path / shard.raw_data.basename
    try:
        shard.validate(allow_unsafe_types=False)  # a pickled column would run code
    except ValueError as error:
        return [f"{path}: {error}"]
    missing = [name for name in COLUMNS if name not in shard.column_names]
    if missing:
        return [f"{path} has the columns {shard.column_names}; {missing} is missing"]
    encoding = shard.column_encodings[shard.column_names.index("tokens")]
    if encoding != "bytes" and not encoding.startswith("ndarray"):
        return [f"{path}: column tokens is {encoding!r}; known are 'ndarray:...' and 'bytes' (of uint16)"]
    if not file.is_file():
        hint = " (only compressed; decompress it first)" if shard.compression else ""
        return [f"shard {file} is missing{hint}; copy it again"]
    if file.stat().st_size != shard.raw_data.bytes:
        size, expected = file.stat().st_size, shard.raw_data.bytes
        return [f"shard {file} is damaged: {size} bytes, index.json says {expected}; copy it again"]
    return []


def _verify_hash(file: Path, hashes: dict[str, str]) -> None:
    for algorithm, expected in list(hashes.items())[:1]:
        found = get_hash(algorithm, file.read_bytes())
        if found != expected:
            raise ShearingError(
                f"shard {file} is damaged: {algorithm} is {found}, index.json says {expected}; copy it again"
            )
