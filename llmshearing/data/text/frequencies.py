"""How often a tokenizer uses each token on a corpus, and whether two tokenizers agree on it; in several processes.

Importing this needs neither torch nor transformers, so that the processes start fast.
"""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmshearing.data.text.codec import Codec
from llmshearing.data.text.sources import SUFFIXES, read_documents
from llmshearing.errors import ShearingError

BATCH = 1 << 20  # characters that a process gets at once
SMALL = 4 * BATCH  # a corpus below this is not worth the start of processes
BLOCK = 1 << 14  # characters of plain text that stay together


@dataclass(frozen=True)
class Frequencies:
    """counts: of every id below the vocabulary's size. tokenizer: its fingerprint."""

    counts: list[int]
    documents: int
    tokenizer: str
    corpus: str

    def save(self, path: Path) -> None:
        """Write JSON under a temporary name, then rename."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(self)) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, tokenizer: str, size: int) -> "Frequencies":
        """Read what :meth:`save` wrote.

        Raises:
            ShearingError: it cannot be read, or was counted with another tokenizer or for another size.
        """
        try:
            read = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ShearingError(f"token frequencies {path} cannot be read: {error}") from error
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


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """Texts of a JSONL file (plain, .gz, .zst), of a text file in blocks of lines, or of a folder of such files.

    Raises:
        ShearingError: there is no such file, or a file is damaged.
    """
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in inside if file == path or file.suffix in (*SUFFIXES, ".txt")]
    if not files or not path.exists():
        raise ShearingError(f"corpus {path} has no file ending in .txt or {', '.join(SUFFIXES)}")
    problems: list[str] = []
    for file in files:
        texts = read_documents(file, field, problems, lambda size: None) if file.suffix in SUFFIXES else _blocks(file)
        yield from (text for text in texts if text)
        if problems:
            raise ShearingError("\n".join(problems))


def _blocks(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while lines := file.readlines(BLOCK):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ShearingError(f"corpus {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


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
            for batch in (*ahead, *batches):
                yield work(*arguments, batch)
                bar.update(len(batch))
            return
        waiting: deque[tuple[Future[Any], int]] = deque()
        # Started afresh: a copy of this process could inherit locks that its threads hold.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for batch in (*ahead, *batches):
                waiting.append((pool.submit(work, *arguments, batch), len(batch)))
                while len(waiting) > 2 * processes:
                    future, number = waiting.popleft()
                    yield future.result()
                    bar.update(number)
            for future, number in waiting:
                yield future.result()
                bar.update(number)


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
