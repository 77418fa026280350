"""Splits documents by their text's hash, packs them into sequences, and writes these as MDS.

Shapes: T = max_seq_len; documents are `BOS text EOS`; sequences [T] follow one another without padding, and
the last incomplete one of a domain and split is dropped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from streaming import MDSWriter

EVAL, FOR_PRUNE, FOR_FT = "eval", "for_prune", "for_ft"
EVAL_MERGE = "eval_merge"
HASHES = ["xxh64"]  # recorded in index.json, checked when a shard is first read


def split_of(text: str, seed: int, eval_fraction: float, for_prune_fraction: float) -> str:
    """The split of a document: a function of its text and the seed alone, so equal documents share a
    split."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    point = int.from_bytes(digest, "little") / 2**64
    if point < eval_fraction:
        return EVAL
    return FOR_PRUNE if point < eval_fraction + for_prune_fraction else FOR_FT


def open_writer(path: Path, max_seq_len: int, dtype: str, shard_size: str) -> MDSWriter:
    """A writer of sequences [T] of `dtype` to the directory `path`; files of at most `shard_size`."""
    columns = {"tokens": f"ndarray:{dtype}:{max_seq_len}", "set": "str"}
    return MDSWriter(out=str(path), columns=columns, hashes=HASHES, size_limit=shard_size)


@dataclass
class Packer:
    """Packs the documents of one domain and split; `writers` each get every sequence."""

    domain: str
    writers: list[MDSWriter]
    max_seq_len: int
    dtype: str
    bos_id: int
    eos_id: int
    limit: int | None
    """Most sequences to write; None: all."""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    sequences: int = 0
    max_token_id: int = 0
    _rest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def full(self) -> bool:
        return self.limit is not None and self.sequences >= self.limit

    def add(self, texts: list[str], encoded: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Append documents; `encoded` are their ids without BOS and EOS."""
        pieces = [self._rest]
        for text, ids in zip(texts, encoded, strict=True):
            pieces += [np.array([self.bos_id]), np.asarray(ids, np.int64), np.array([self.eos_id])]
            self.documents += 1
            self.tokens += len(ids) + 2
            self.bytes += len(text.encode("utf-8"))
        stream = np.concatenate(pieces)
        self.max_token_id = max(self.max_token_id, int(stream.max(initial=0)))
        whole = len(stream) // self.max_seq_len * self.max_seq_len
        for sequence in stream[:whole].astype(self.dtype).reshape(-1, self.max_seq_len):
            self._write(sequence)
        self._rest = stream[whole:]

    def _write(self, sequence: np.ndarray) -> None:
        if self.full:
            return
        for writer in self.writers:
            writer.write({"tokens": sequence, "set": self.domain})
        self.sequences += 1

    def counts(self) -> dict[str, int]:
        """What the manifest records; tokens include BOS, EOS and the dropped rest."""
        return {name: getattr(self, name) for name in ("documents", "tokens", "sequences", "bytes")}
