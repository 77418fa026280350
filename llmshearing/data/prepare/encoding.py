"""Turns chunks of files into token arrays: parsing, splitting, tokenizing, in worker processes.

What comes out does not depend on the number of processes: chunks are cut and results consumed in the parent, in order.
Workers hand back one compact array a split, so the parent has little to do for each document. They import neither
Streaming nor torch.
"""

import hashlib
import multiprocessing
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from llmshearing.data.prepare.forms import TEXT, Conversations, Forms, Record, records
from llmshearing.data.prepare.packing import Documents, split_of
from llmshearing.data.text.conversations import Encoded as Answers
from llmshearing.data.text.lines import Problem
from llmshearing.data.text.sources import MAX_PROBLEMS, Chunk, Lines
from llmshearing.data.text.tokenizer import TextTokenizer
from llmshearing.errors import ShearingError
from llmshearing.lookahead import in_order

AHEAD = 3  # chunks in flight for each process: bounds memory
TYPECODES = {"uint16": "H", "uint32": "I"}
Wanted = frozenset[str]


class WorkerDied(ShearingError):
    """A process ended that should not have; the input is not to blame."""


@dataclass
class Encoded:
    """What a chunk held: documents by split, the first of its problems, and how many there were of which kind."""

    splits: dict[str, Documents]
    problems: list[str]
    left_out: Counter[str]


@dataclass(frozen=True)
class Recipe:
    """All that decides how a chunk is encoded; travels to the worker processes."""

    tokenizer: TextTokenizer
    text_field: str
    dtype: str
    seed: int
    eval_fraction: float
    for_prune_fraction: float
    dedup: bool
    forms: Forms = field(default_factory=dict)
    """Of files whose records are no texts."""
    conversations: Conversations | None = None
    """Encodes these records."""

    def encode(self, chunk: Chunk, wanted: Wanted) -> Encoded:
        """Parse a chunk and tokenize what belongs to the `wanted` splits."""
        problems: list[Problem] = []
        form = TEXT if chunk.content is None else self.forms.get(chunk.content.path, TEXT)
        if form != TEXT and isinstance(chunk.content, Lines) and self.conversations is not None:
            splits = self._records(chunk.content, form, wanted, self.conversations, problems)
            problems += chunk.problems
        else:
            splits = self._texts(chunk, wanted, problems)
        said = [problem.said for problem in problems[:MAX_PROBLEMS]]
        return Encoded(splits, said, Counter(problem.what for problem in problems))

    def _texts(self, chunk: Chunk, wanted: Wanted, problems: list[Problem]) -> dict[str, Documents]:
        texts: dict[str, list[str]] = {split: [] for split in wanted}
        utf8: dict[str, list[bytes]] = {split: [] for split in wanted}
        for text in chunk.texts(self.text_field, problems):
            data = text.encode("utf-8")
            split = self._split(data)
            if split in wanted:
                texts[split].append(text)
                utf8[split].append(data)
        return {split: self._documents(texts[split], utf8[split]) for split in sorted(wanted) if texts[split]}

    def _split(self, data: bytes) -> str:
        return split_of(data, self.seed, self.eval_fraction, self.for_prune_fraction)

    def _records(
        self, content: Lines, form: str, wanted: Wanted, by: Conversations, problems: list[Problem]
    ) -> dict[str, Documents]:
        """All are encoded, wanted or not: what is wrong with one must not depend on how fast splits fill."""
        found: dict[str, list[tuple[Record, Answers]]] = {split: [] for split in wanted}
        for record in records(content, form, problems):
            encoded = by.encode(record, problems)
            if encoded is not None and (split := self._split(record.key)) in wanted:
                found[split].append((record, encoded))
        return {split: self._conversations(found[split]) for split in sorted(wanted) if found[split]}

    def _conversations(self, pairs: list[tuple[Record, Answers]]) -> Documents:
        """As they are: their own tokenizer or template has put BOS and EOS."""
        tokens = np.concatenate([np.array(encoded.ids, self.dtype) for _, encoded in pairs])
        mask = np.concatenate([np.array(encoded.answers, bool) for _, encoded in pairs])
        lengths = np.array([len(encoded.ids) for _, encoded in pairs], np.int64)
        sizes = np.array([record.size for record, _ in pairs], np.int64)
        return Documents(tokens, lengths, sizes, self._digests(record.key for record, _ in pairs), mask)

    def _digests(self, keys: Iterable[bytes]) -> list[bytes]:
        return [hashlib.blake2b(key, digest_size=16).digest() for key in keys] if self.dedup else []

    def _documents(self, texts: list[str], utf8: list[bytes]) -> Documents:
        encoded = self.tokenizer.encode(texts)
        stream = array(TYPECODES[self.dtype])
        for ids in encoded:
            stream.append(self.tokenizer.bos_id)
            stream.fromlist(ids)
            stream.append(self.tokenizer.eos_id)
        lengths = np.array([len(ids) + 2 for ids in encoded], np.int64)
        sizes = np.array([len(data) for data in utf8], np.int64)
        return Documents(np.frombuffer(stream, self.dtype), lengths, sizes, self._digests(utf8))


class Encoders:
    """`processes` worker processes that follow one recipe; with one, everything runs in this process.

    A context manager. Raises WorkerDied if a process is killed.
    """

    def __init__(self, recipe: Recipe, processes: int) -> None:
        self._recipe, self._processes = recipe, processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")  # tokenizers' threads do not survive a fork
            self._pool = ProcessPoolExecutor(processes, context, _start, (recipe,))

    def in_order(self, chunks: Iterable[Chunk], wanted: Callable[[], Wanted]) -> Iterator[tuple[Chunk, Encoded]]:
        """Each chunk with what it held, in order. `wanted()` is asked when a chunk is handed to a worker."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, self._recipe.encode(chunk, wanted())
            return
        pool = self._pool
        try:
            yield from in_order(chunks, lambda chunk: pool.submit(_work, chunk, wanted()), AHEAD * self._processes - 1)
        except BrokenProcessPool as error:
            raise WorkerDied("a tokenization process was killed, usually for memory; use fewer --processes") from error

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)


_recipe: Recipe  # of a worker process


def _start(recipe: Recipe) -> None:
    global _recipe
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # one core a process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _recipe = recipe


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed parent leaves no process behind


def _work(chunk: Chunk, wanted: Wanted) -> Encoded:
    return _recipe.encode(chunk, wanted)
