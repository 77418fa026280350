"""How often a tokenizer uses each token on a corpus, and whether two tokenizers agree on it; in several processes.

Importing this needs neither torch nor transformers, so that the processes start fast.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing import files as durable
from llmshearing.data.json_file import read_json
from llmshearing.data.text.codec import Codec
from llmshearing.errors import ShearingError
from llmshearing.lookahead import in_order
from llmshearing.progress import tqdm

BATCH = 1 << 20  # characters that a process gets at once
SMALL = 4 * BATCH  # a corpus below this is not worth the start of processes


@dataclass(frozen=True)
class Frequencies:
    """counts: of every id below the vocabulary's size. tokenizer: its fingerprint."""

    counts: list[int]
    documents: int
    tokenizer: str
    corpus: str

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        durable.write_text(path, json.dumps(asdict(self)) + "\n", alone=False)

    @classmethod
    def load(cls, path: Path, tokenizer: str, size: int) -> "Frequencies":
        """Read what :meth:`save` wrote.

        Raises:
            ShearingError: it cannot be read, or was counted with another tokenizer or for another size.
        """
        found = read_json(path, "token frequencies")
        try:
            read = cls(**found)
        except TypeError as error:
            raise ShearingError(f"token frequencies {path} cannot be read: {error}") from error
        if not isinstance(read.counts, list) or not all(type(n) is int and n >= 0 for n in read.counts):
            raise ShearingError(f"token frequencies {path} cannot be read: counts must be whole numbers from 0")
        if read.tokenizer != tokenizer or len(read.counts) != size:
            raise ShearingError(
                f"token frequencies {path} were counted with another tokenizer ({len(read.counts)} ids)"
            )
        return read


@dataclass(frozen=True)
class Agreement:
    """What a comparison of two tokenizers saw. wrong: documents that do not come back alike, as they begin."""

    documents: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    wrong: tuple[str, ...] = ()

    def plus(self, other: "Agreement") -> "Agreement":
        return Agreement(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def count_tokens(
    directory: Path | str, texts: Iterable[str], size: int, *, corpus: str = "", processes: int | None = None
) -> Frequencies:
    """Count the ids of a tokenizer's directory on a corpus. size: of the vocabulary. processes: None is one a core.

    Raises:
        ShearingError: no tokenizer, an empty corpus, or ids not below ``size``.
    """
    codec, total, number = Codec(directory), np.zeros(size, dtype=np.int64), 0
    for counts, some in _in_processes(_count, (str(directory),), texts, "counting tokens", processes):
        if len(counts) > size:
            raise ShearingError(f"tokenizer {codec.path} gives id {len(counts) - 1}, the vocabulary has {size}")
        total[: len(counts)] += counts
        number += some
    if not total.any():
        raise ShearingError(f"corpus {corpus} has no text")
    return Frequencies(total.tolist(), number, codec.fingerprint, corpus)


def compare(
    old: Path | str, new: Path | str, size: int, texts: Iterable[str], *, processes: int | None = None
) -> Agreement:
    """Whether every text comes back from ``new`` as it does from ``old``, with ids below ``size``."""
    total = Agreement()
    for some in _in_processes(_compare, (str(old), str(new), size), texts, "checking the new tokenizer", processes):
        total = total.plus(some)
    return total


_codecs: dict[str, Codec] = {}


def _codec(directory: str) -> Codec:
    return _codecs[directory] if directory in _codecs else _codecs.setdefault(directory, Codec(directory))


def _count(directory: str, texts: list[str]) -> tuple[np.ndarray, int]:
    ids = [i for encoded in _codec(directory).encode(texts) for i in encoded]
    return np.bincount(np.asarray(ids, dtype=np.int64)), len(texts)


def _compare(old: str, new: str, size: int, texts: list[str]) -> Agreement:
    before, after = _codec(old), _codec(new)
    first, second = before.encode(texts), after.encode(texts)
    wrong = tuple(
        text[:60]
        for text, one, other in zip(texts, first, second, strict=True)
        if max(other, default=0) >= size or before.decode(one) != after.decode(other)
    )
    return Agreement(len(texts), sum(map(len, first)), sum(map(len, second)), wrong[:3])


def _in_processes(
    work: Callable[..., Any], arguments: tuple[Any, ...], texts: Iterable[str], say: str, processes: int | None
) -> Iterator[Any]:
    """``work(*arguments, batch)`` of every batch of texts, in order. A small corpus stays in this process."""
    processes, batches = processes or os.cpu_count() or 1, _batches(texts)
    with tqdm(desc=say, unit="doc") as bar:
        ahead: list[list[str]] = []
        for batch in batches:
            ahead.append(batch)
            if len(ahead) * BATCH >= SMALL:
                break
        if processes == 1 or len(ahead) * BATCH < SMALL:
            _codecs.clear()  # a directory's files may have changed since
            for batch in chain(ahead, batches):
                yield work(*arguments, batch)
                bar.update(len(batch))
            return
        # Started afresh: a copy of this process could inherit locks that its threads hold.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            every = chain(ahead, batches)
            try:
                for batch, result in in_order(every, lambda some: pool.submit(work, *arguments, some), 2 * processes):
                    yield result
                    bar.update(len(batch))
            except BrokenProcessPool as error:
                said = f"{say}: a process was killed, usually for memory; use fewer processes"
                raise ShearingError(said) from error


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
