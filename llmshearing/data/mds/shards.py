"""One MDS directory, opened for random access and checked against its index.

A sample has the columns `tokens` (T ids: an `ndarray` of whole numbers, or `bytes` of ids whose width is recognised,
see `tokens.py`) and `set` (the domain's name), and may have `loss_mask` (see `masks.py`). T = max_seq_len. There is no
shared memory.
"""

from __future__ import annotations

import os
import struct
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmshearing.data.mds.files import ShardFiles
from llmshearing.data.mds.format import Shard
from llmshearing.data.mds.index import read_index
from llmshearing.data.mds.masks import COLUMN, unpacked
from llmshearing.data.mds.tokens import LARGEST_VOCABULARY, as_ids, recognise
from llmshearing.errors import ShearingError

if TYPE_CHECKING:
    from llmshearing.data.mds.remote import Remote

OPEN_FILES = 64  # a directory; a pass reads from 17 shards at a time
LOOKED_AT = 64  # first samples by which the width of ids in a `bytes` column is recognised


class MdsDirectory:
    """`directory[i]` -> (token ids int64 [T], domain name); `len(directory)` samples.

    `vocab_size` is the model's: an id beyond it is an error when its sample is read. Without `max_seq_len` it is what
    the first sample has; without `vocab_size` any id below a million is one.
    Sizes of all shard files are checked here, the hash of a shard when its first sample is read; that is also when it
    is decompressed, or downloaded from `remote`. Raises ShearingError, naming the file.
    """

    def __init__(
        self, path: Path | str, max_seq_len: int | None, vocab_size: int | None, remote: Remote | None = None
    ) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size or LARGEST_VOCABULARY
        self._shardfiles = ShardFiles(self.path, remote)
        self._shards = read_index(self.path)
        self._checked: dict[int, Path] = {}
        self._open: dict[int, FileIO] = {}
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        if problems := [problem for shard in self._shards if (problem := self._shardfiles.problem(shard))]:
            raise ShearingError("\n".join(f"shard {problem}; copy it again" for problem in problems[:20]))
        self._width = self._recognised(max_seq_len)
        self.max_seq_len: int = max_seq_len or self._ids(0, self._sample(0)).size
        self[0]  # a wrong sequence length should be said now, not at the first batch

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def block(self) -> int:
        """Samples of its largest shard."""
        return max(shard.samples for shard in self._shards)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        ids, name, _ = self.read(index)
        return ids, name

    def read(self, index: int) -> tuple[np.ndarray, str, np.ndarray | None]:
        """Ids int64 [T], domain, and loss mask bool [T]; None: the sample has none, and every token counts."""
        sample = self._sample(index)
        tokens = self._ids(index, sample)
        if tokens.size != self.max_seq_len:
            raise ShearingError(
                f"{self.path}: sequences are {tokens.size} tokens long{self._stored()}, max_seq_len is "
                f"{self.max_seq_len}; they must be equal: change it, or prepare the data again"
            )
        if int(tokens.max()) >= self.vocab_size:
            raise ShearingError(
                f"{self.path}: sample {index} has token id {int(tokens.max())}, the model's vocab_size is "
                f"{self.vocab_size}; the data was prepared with another tokenizer"
            )
        return tokens.astype(np.int64), sample["set"], self._mask(index, sample)

    @property
    def masked(self) -> bool:
        """Whether any of its samples has a loss mask."""
        return any(COLUMN in shard.column_names for shard in self._shards)

    @property
    def kind(self) -> str:
        """How ids are stored: the column's encoding, and the width that was recognised in `bytes`."""
        column = self._shards[0].column_names.index("tokens")
        return self._shards[0].column_encodings[column] + self._stored()

    @property
    def shards(self) -> int:
        return len(self._shards)

    @property
    def size(self) -> int:
        """Bytes of all shards, uncompressed."""
        return sum(shard.raw_data.bytes for shard in self._shards)

    def names(self) -> list[str]:
        """The `set` column, one name a sample (reads every sample once)."""
        return [self._sample(index)["set"] for index in range(len(self))]

    def _recognised(self, max_seq_len: int | None) -> np.dtype | None:
        """The width of ids in a `bytes` column, by the first samples of the first shard; None for arrays."""
        if not isinstance(self._sample(0)["tokens"], bytes):
            return None
        first = range(min(LOOKED_AT, self._shards[0].samples))
        try:
            return recognise([self._sample(index)["tokens"] for index in first], max_seq_len, self.vocab_size)
        except ValueError as error:
            raise ShearingError(f"{self.path}: {error}") from None

    def _stored(self) -> str:
        return "" if self._width is None else f" (bytes of {8 * self._width.itemsize}-bit ids)"

    def _ids(self, index: int, sample: dict[str, Any]) -> np.ndarray:
        try:
            return as_ids(sample["tokens"], self._width, self.vocab_size)
        except ValueError as error:
            raise ShearingError(f"{self.path}: sample {index}: {error}; prepare the data again") from None

    def _mask(self, index: int, sample: dict[str, Any]) -> np.ndarray | None:
        if COLUMN not in sample:
            return None
        try:
            return unpacked(sample[COLUMN], self.max_seq_len)
        except ValueError as error:
            raise ShearingError(f"{self.path}: sample {index}: {error}; prepare the data again") from None

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


def _decode(shard: Shard, data: bytes) -> dict[str, Any]:
    """The columns of a sample. Arrays of fixed shape directly: their type is parsed anew each time otherwise."""
    if shard.column_names != ["set", "tokens"] or not (size := shard.column_sizes[1]):
        return shard.decode(data)
    _, kind, *shape = shard.column_encodings[1].split(":")
    if shape and "," in shape[0]:
        return shard.decode(data)
    (name,) = struct.unpack_from("<I", data)
    if len(data) != 4 + name + size:
        raise ValueError(f"a sample of {len(data)} bytes, not {4 + name + size}")
    return {"set": data[4 : 4 + name].decode(), "tokens": np.frombuffer(data, kind, offset=4 + name)}
