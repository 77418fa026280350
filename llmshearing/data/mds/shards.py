"""One MDS directory, opened for random access and checked against its index.

A sample has the columns `tokens` (T ids: an `ndarray` of unsigned integers, or the predecessor's `bytes` of
uint16) and `set` (the domain's name). T = max_seq_len. There is no shared memory.
"""

import os
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing.data.mds.files import ShardFiles
from llmshearing.data.mds.index import read_index
from llmshearing.data.mds.remote import Remote
from llmshearing.errors import ShearingError

OPEN_FILES = 64  # a directory; a pass reads from 17 shards at a time
BYTES_DTYPE = np.dtype("<u2")  # what the predecessor packed into its `bytes` column


class MdsDirectory:
    """`directory[i]` -> (token ids int64 [T], domain name); `len(directory)` samples.

    `vocab_size` is the model's: an id beyond it is an error when its sample is read. Sizes of all shard files
    are checked here, the hash of a shard when its first sample is read; that is also when it is decompressed, or
    downloaded from `remote`. Raises ShearingError, naming the file.
    """

    def __init__(self, path: Path | str, max_seq_len: int, vocab_size: int, remote: Remote | None = None) -> None:
        self.path = Path(path)
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self._shardfiles = ShardFiles(self.path, remote)
        self._shards = read_index(self.path)
        self._checked: dict[int, Path] = {}
        self._open: dict[int, FileIO] = {}
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        if problems := [problem for shard in self._shards if (problem := self._shardfiles.problem(shard))]:
            raise ShearingError("\n".join(f"shard {problem}; copy it again" for problem in problems[:20]))
        self[0]  # a wrong sequence length should be said now, not at the first batch

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def block(self) -> int:
        """Samples of its largest shard."""
        return max(shard.samples for shard in self._shards)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        sample = self._sample(index)
        tokens = sample["tokens"]
        if isinstance(tokens, bytes):
            tokens = np.frombuffer(tokens[: len(tokens) // 2 * 2], BYTES_DTYPE)
        if tokens.dtype.kind != "u" and (tokens.dtype.kind != "i" or int(tokens.min(initial=0)) < 0):
            raise ShearingError(f"{self.path}: sample {index} has tokens of {tokens.dtype}, or below 0: no token ids")
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
        shard = self._shards[shard_id]
        offset = index - int(self._ends[shard_id]) + shard.samples
        try:
            return _decode(shard, self._bytes(shard_id, offset))
        except ShearingError:
            raise
        except Exception as error:  # whatever a damaged file without a hash makes the decoder do
            file = self.path / shard.raw_data.basename
            raise ShearingError(f"{file} cannot be read at sample {offset}: {error!r}; copy it again") from error

    def _bytes(self, shard_id: int, offset: int) -> bytes:
        """One encoded sample. MDS: u32 count, u32 offsets [count + 1], index, samples; files stay open for a while."""
        file = self._open.get(shard_id)
        if file is None:
            if shard_id not in self._checked:
                self._checked[shard_id] = self._shardfiles.bring(self._shards[shard_id])
            while len(self._open) >= OPEN_FILES:
                del self._open[next(iter(self._open))]
            file = self._open[shard_id] = self._checked[shard_id].open("rb", buffering=0)
        begin, end = struct.unpack("<II", os.pread(file.fileno(), 8, 4 * (1 + offset)))
        if not begin < end <= self._shards[shard_id].raw_data.bytes:
            raise ValueError(f"a sample from byte {begin} to {end}")
        return os.pread(file.fileno(), end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to another process


def _decode(shard: Any, data: bytes) -> dict[str, Any]:
    """The columns of a sample. Arrays of fixed shape directly, as Streaming parses their type anew each time."""
    if shard.column_names != ["set", "tokens"] or not (size := shard.column_sizes[1]):
        return shard.decode_sample(data)
    _, kind, *_ = shard.column_encodings[1].split(":")
    (name,) = struct.unpack_from("<I", data)
    if len(data) != 4 + name + size:
        raise ValueError(f"a sample of {len(data)} bytes, not {4 + name + size}")
    return {"set": data[4 : 4 + name].decode(), "tokens": np.frombuffer(data, kind, offset=4 + name)}
