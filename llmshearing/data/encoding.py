"""Tokenizes batches of texts in worker processes and hands the results back in order.

What comes out does not depend on the number of processes: batches are made and consumed in the parent, in order.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmshearing.data.tokenizer import TextTokenizer, load_tokenizer
from llmshearing.errors import ShearingError

Batch = TypeVar("Batch")
Texts = Callable[[Batch], list[str]]
AHEAD = 3  # batches in flight for each process: bounds memory
_encode: Callable[[list[str]], list[list[int]]]


class WorkerDied(ShearingError):
    """A process ended that should not have; the input is not to blame."""


def encode_in_order(
    batches: Iterable[Batch], texts: Texts, encoder: TextTokenizer, arguments: tuple[Any, ...], processes: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Yield each batch with the ids (uint32) of its texts, without BOS and EOS.

    `arguments` load the tokenizer again in another process. With one process everything runs in this one. Raises
    WorkerDied if a process is killed.
    """
    if processes == 1:
        for batch in batches:
            yield batch, [np.array(ids, np.uint32) for ids in encoder.encode(texts(batch))]
        return
    waiting: deque[tuple[Batch, Future]] = deque()
    context = multiprocessing.get_context("spawn")  # tokenizers' threads do not survive a fork
    with ProcessPoolExecutor(processes, context, _start, arguments) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_work, texts(batch))))
                if len(waiting) >= AHEAD * processes:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise WorkerDied("a tokenization process was killed, usually for memory; use fewer --processes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(batch: Batch, future: Future) -> tuple[Batch, list[np.ndarray]]:
    ids, ends = future.result()
    return batch, np.split(ids, ends)


def _start(path: Path | str, bos_token: str | None, eos_token: str | None) -> None:
    global _encode
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # one core a process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = load_tokenizer(path, bos_token, eos_token).encode


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed parent leaves no process behind


def _work(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = _encode(texts)
    flat = [token for ids in encoded for token in ids]
    return np.array(flat, np.uint32), np.cumsum([len(ids) for ids in encoded])[:-1]
