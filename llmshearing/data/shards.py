"""One MDS directory on local disk, opened for random access and checked against its index.

A sample has the columns `tokens` (T ids: an `ndarray` of unsigned integers, or the predecessor's `bytes` of
uint16) and `set` (the domain's name). T = max_seq_len. Streaming's readers do the decoding; there is no
shared memory.
"""

from pathlib import Path
from typing import Any

import numpy as np
from streaming import LocalDataset
from streaming.base.hashing import get_hash

from llmshearing.errors import ShearingError

COLUMNS = ("tokens", "set")
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
        problems = [problem for shard in self._data.shards for problem in _shard_problems(self.path, shard)]
        if problems:
            raise ShearingError("\n".join(dict.fromkeys(problems)))
        if len(self._data) == 0:
            raise ShearingError(f"{self.path} has no sample; prepare it again")
        self[0]  # a wrong sequence length should be said now, not at the first batch

    def __len__(self) -> int:
        return len(self._data)

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
        shard_id, offset = self._data.spanner[index]
        shard = self._data.shards[shard_id]
        file = self.path / shard.raw_data.basename
        try:
            if shard_id not in self._verified:
                _verify_hash(file, shard.raw_data.hashes)
                self._verified.add(shard_id)
            return shard[offset]
        except ShearingError:
            raise
        except Exception as error:  # whatever a damaged file without a hash makes the decoder do
            raise ShearingError(f"{file} cannot be read at sample {offset}: {error!r}; copy it again") from error


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
