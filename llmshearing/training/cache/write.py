"""Writes a teacher's targets for every sample of a split, part by part.

A part is whole or absent, so a killed run goes on after its last one and ends with the same bytes. Processes that are
given the same command at the same time share the work: each takes the parts that no other is at. Memory is that of the
teacher and one batch, whatever the size of the data.

Shape legend: B sequences of a batch, T tokens, k entries of a position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.files import new_file
from llmshearing.progress import tqdm
from llmshearing.training.cache.index import INDEX, REQUEST, CacheIndex, part_file, read_index, write_index
from llmshearing.training.targets import Sparse

log = logging.getLogger(__name__)

Asked = Callable[[Tensor], Sparse]
"""input_ids int64 [B, T] -> targets of all positions."""


def write_cache(output: Path, index: CacheIndex, streams: dict[str, MdsDirectory], ask: Callable[[], Asked]) -> bool:
    """Write what is missing; whether the cache is complete now (else other processes are at the rest).

    Args:
        index: what is to be there. streams: the data, by domain. ask: makes the function that gives a batch's targets,
            and is called only where there is something to do.

    Raises:
        ShearingError: the output is something else, or cannot be written.
    """
    check_output(output, index)
    parts = [*index.parts()]
    missing = [part for part in parts if not is_whole(output, index, *part)]
    if missing:
        give = ask()  # before anything is written: the teacher may turn out to be none
        output.mkdir(parents=True, exist_ok=True)
        write_index(output / REQUEST, index)
        done = index.samples - sum(size for *_, size in missing)
        if done:
            log.info("going on: %s of %s samples are there", f"{done:,}", f"{index.samples:,}")
        with tqdm(total=index.samples, initial=done, desc="teacher", unit="sample") as bar:
            for part in missing:
                _take(output, index, streams[part[0]], part, give, bar)
    if not all(is_whole(output, index, *part) for part in parts):
        return False
    write_index(output / INDEX, index)
    _tidy(output)
    return True


def is_whole(cache: Path, index: CacheIndex, domain: str, number: int, samples: int) -> bool:
    """Whether a part is there and has its size."""
    file = part_file(cache, domain, number)
    return file.is_file() and file.stat().st_size == samples * index.sample.itemsize


def check_output(output: Path, index: CacheIndex) -> None:
    """Refuse a folder that holds anything but what the same request has begun."""
    if output.exists() and not output.is_dir():
        raise ShearingError(f"output {output} is a file; give the name of a directory")
    if (output / REQUEST).is_file():
        there = read_index(output / REQUEST)
        if differing := differences(there, index):
            said = "\n  ".join(differing)
            raise ShearingError(f"output {output} holds another cache; give another name, or delete it:\n  {said}")
    elif output.is_dir() and any(not item.name.startswith(".") for item in output.iterdir()):
        raise ShearingError(f"output {output} exists with something else in it; give another name")


def differences(there: CacheIndex, wanted: CacheIndex) -> list[str]:
    """What differs, a line each. Where the teacher lies counts for nothing."""
    one, other = ({**asdict(index), "teacher": {**index.teacher, "name": ""}} for index in (there, wanted))
    return [f"{key}: {one[key]} there, {other[key]} asked for" for key in one if one[key] != other[key]]


def _take(
    output: Path, index: CacheIndex, stream: MdsDirectory, part: tuple[str, int, int], give: Asked, bar: tqdm
) -> None:
    """Write a part, unless another process is at it or has written it."""
    file = part_file(output, *part[:2])
    file.parent.mkdir(exist_ok=True)
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    try:
        if not is_whole(output, index, *part):
            _write_part(file, index, stream, part, give, bar)
    finally:
        lock.release()


def _write_part(
    file: Path, index: CacheIndex, stream: MdsDirectory, part: tuple[str, int, int], give: Asked, bar: tqdm
) -> None:
    _, number, size = part
    first = number * index.part_samples
    with new_file(file) as written:
        for start in range(first, first + size, index.batch):
            samples = range(start, min(start + index.batch, first + size))
            written.write(_batch(index, stream, samples, give).tobytes())
            bar.update(len(samples))


def _batch(index: CacheIndex, stream: MdsDirectory, samples: Sequence[int], give: Asked) -> np.ndarray[Any, Any]:
    """The bytes of some samples, [B]. The teacher is always given whole batches: their size can change a last bit."""
    rows = [stream[sample][0] for sample in samples]
    filled = np.stack(rows + [rows[-1]] * (index.batch - len(rows)))
    targets = _before_last(give(torch.from_numpy(filled)))
    if not targets.probs.isfinite().all():
        raise ShearingError(
            f"the teacher's logits for samples {samples[0]} to {samples[-1]} of {stream.path} are no numbers"
        )
    records = index.codec.encode(targets).reshape(len(filled), -1)[: len(rows)]
    made = np.zeros(len(rows), index.sample)
    made["records"] = records
    for i, row in enumerate(rows):
        made["tokens"][i], made["targets"][i] = ids_checksum(row), crc32(records[i].tobytes())
    return made


def _before_last(targets: Sparse) -> Sparse:
    """Of all positions but each sequence's last, which nothing follows; [B (T - 1), k]."""
    rest = None if targets.rest is None else targets.rest[:, :-1].flatten()
    return Sparse(targets.ids[:, :-1].flatten(0, 1), targets.probs[:, :-1].flatten(0, 1), rest)


def ids_checksum(ids: np.ndarray[Any, Any]) -> int:
    """CRC-32 of token ids as little-endian 32-bit numbers."""
    return crc32(ids.astype("<u4").tobytes())


def _tidy(output: Path) -> None:
    """Remove the locks of parts, and what killed processes left of parts; others may be finishing at this moment."""
    for pattern in (".*.bin.lock", ".*.bin.tmp"):
        for file in [*output.glob(pattern), *output.glob(f"*/{pattern}")]:
            file.unlink(missing_ok=True)
