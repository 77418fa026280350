"""Files of records -> examples of token ids and labels, held out ones apart; what is too long is said.

    .jsonl, .ndjson (also .gz, .zst)    a record a line
    .json                               a list of records, or a record a line
    .txt (also .gz, .zst)               one text

Forms of a record: see `llmshearing.data.text.conversations`. A text that is too long becomes several examples. Of
another record the end is cut off; where its answers begin later it is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmshearing.data.json_file import read_json
from llmshearing.data.text.conversations import BadRecord, encode_record
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.lines import NoText, record_of
from llmshearing.data.text.sources import Lines, has_documents, is_plain_text, read_chunks
from llmshearing.errors import ShearingError
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import IGNORED

log = logging.getLogger(__name__)

JSON = ".json"


class Example(NamedTuple):
    """ids int32 [n], labels int64 [n]: ids to be learned, else IGNORED (-100); the first is predicted from nothing."""

    ids: np.ndarray
    labels: np.ndarray


@dataclass
class Lengths:
    """What met the longest length."""

    records: int = 0
    split: int = 0
    cut: int = 0
    left_out: int = 0
    longest: int = 0
    empty: int = 0

    def told(self, max_length: int) -> str | None:
        """One line on what was too long; None where nothing was."""
        said = {
            "text(s) became several sequences": self.split,
            "record(s) lost their end": self.cut,
            "record(s) are left out, since their answers begin later": self.left_out,
        }
        parts = [f"{number} {what}" for what, number in said.items() if number]
        if not parts:
            return None
        return (
            f"of {self.records} records some are longer than {max_length} tokens (the longest: {self.longest}): "
            f"{'; '.join(parts)}. --max_length sets another length"
        )


@dataclass(frozen=True)
class Data:
    """What to learn from, and what to measure on."""

    train: list[Example]
    held_out: list[Example]
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and labels."""
        found = hashlib.sha256()
        for example in (*self.train, Example(np.zeros(0), np.zeros(0)), *self.held_out):
            found.update(np.array([len(example.ids)], np.int64).tobytes())
            found.update(example.ids.tobytes() + example.labels.tobytes())
        return found.hexdigest()

    def told(self) -> dict[str, int]:
        """Counts, for logs and files."""
        return {
            "sequences": len(self.train),
            "tokens": sum(len(example.ids) for example in self.train),
            "answer_tokens": sum(int((example.labels != IGNORED).sum()) for example in self.train),
            "held_out_sequences": len(self.held_out),
            "held_out_answer_tokens": sum(int((example.labels != IGNORED).sum()) for example in self.held_out),
        }


def read_data(
    paths: Sequence[Path | str],
    held_out: Sequence[Path | str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    fraction: float = 0.0,
    seed: int = 0,
) -> Data:
    """Read and encode all records.

    Args:
        held_out: files of what loss is measured on. fraction: in place of them, part of the records, drawn by `seed`.

    Raises:
        ShearingError: a file is absent or of an unknown kind, a record of no known form, or nothing can be learned.
    """
    lengths = Lengths()
    by_record = _encoded(paths, tokenizer, max_length, lengths)
    if not any(by_record):
        raise ShearingError(f"data {', '.join(map(str, paths))} holds nothing to learn ({lengths.records} records)")
    if held_out:
        apart = _encoded(held_out, tokenizer, max_length, Lengths())
        if not any(apart):
            raise ShearingError(f"eval {', '.join(map(str, held_out))} holds nothing to measure on")
    else:
        by_record, apart = _parted(by_record, fraction, seed)
    if told := lengths.told(max_length):
        log.warning("warning: %s", told)
    if lengths.empty:
        log.warning("warning: %d records are empty texts and are left out", lengths.empty)
    return Data([each for found in by_record for each in found], [each for found in apart for each in found], lengths)


def _parted(
    by_record: list[list[Example]], fraction: float, seed: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Whole records go to one side or the other: pieces of one text must not meet."""
    number = max(1, round(fraction * len(by_record))) if fraction else 0
    if number >= len(by_record):
        raise ShearingError(f"eval_fraction = {fraction} of {len(by_record)} record(s) leaves none to learn from")
    apart = set(np.random.default_rng(seed).permutation(len(by_record))[:number].tolist())
    return (
        [found for at, found in enumerate(by_record) if at not in apart],
        [found for at, found in enumerate(by_record) if at in apart],
    )


def _encoded(
    paths: Sequence[Path | str], tokenizer: PreTrainedTokenizerBase, max_length: int, lengths: Lengths
) -> list[list[Example]]:
    """The examples of each record that has some."""
    found = []
    with tqdm(desc="tokenizing", unit=" records") as bar:
        for where, record in read_records(paths):
            ids, answers = encode_record(record, tokenizer, where)
            lengths.records += 1
            lengths.longest = max(lengths.longest, len(ids))
            lengths.empty += not ids
            labels = np.where(answers, np.array(ids, np.int64), IGNORED)
            pieces = _pieces(np.array(ids, np.int32), labels, max_length, all(answers), lengths)
            if pieces:
                found.append(pieces)
            bar.update()
    return found


def _pieces(ids: np.ndarray, labels: np.ndarray, length: int, is_text: bool, lengths: Lengths) -> list[Example]:
    """Examples of at most `length` tokens, each with something to learn after its first token."""
    too_long = len(ids) > length
    ends = range(0, len(ids) if is_text else min(1, len(ids)), length)
    pieces = []
    for begin in ends:
        own = labels[begin : begin + length].copy()
        own[:1] = IGNORED
        if (own != IGNORED).any():
            pieces.append(Example(ids[begin : begin + length], own))
    if too_long:
        lengths.split += is_text
        lengths.cut += not is_text and bool(pieces)
        lengths.left_out += not is_text and not pieces
    return pieces


# Files -------------------------------------------------------------------------------------------------------------


def read_records(paths: Sequence[Path | str]) -> Iterator[tuple[str, Any]]:
    """(`file:line`, record) of every file, and of the files of every folder.

    Raises:
        ShearingError: a file is absent, of an unknown kind, or no JSON; the message names file and line.
    """
    for path in _files(paths):
        if is_plain_text(path):
            yield f"{path}:1", {"text": "".join(corpus_texts(path, what="data"))}
        elif path.suffix == JSON and path.read_bytes().lstrip()[:1] == b"[":
            for number, record in enumerate(read_json(path, "data", list), 1):
                yield _spelled(f"{path}, record {number}", record)
        else:
            for where, record in _lines(path):
                yield _spelled(where, record)


def _files(paths: Sequence[Path | str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise ShearingError(f"data {path} does not exist")
        if not path.is_dir():
            if not _is_known(path):
                raise ShearingError(f"data {path} is of no known kind: its name must end in .jsonl, .json or .txt")
            yield path
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_known(file)]
        if not inside:
            raise ShearingError(f"data {path} has no file ending in .jsonl, .json or .txt")
        yield from inside


def _is_known(path: Path) -> bool:
    parquet = path.suffix == ".parquet"
    return not parquet and (has_documents(path) or is_plain_text(path) or path.suffix == JSON)


def _spelled(where: str, record: Any) -> tuple[str, Any]:
    """Refuse what no tokenizer takes: JSON can spell half a surrogate pair, and a file can hold other bytes."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where} has a lone surrogate or a byte that is no UTF-8") from error
    return where, record


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a file, also of a compressed one."""
    for chunk in read_chunks([path], "", lambda size: None):
        for number, line in chunk.content.numbered() if isinstance(chunk.content, Lines) else ():
            try:
                record = record_of(line)
            except NoText as error:
                raise BadRecord(f"{path}:{number} {error}") from error
            if record is not None:
                yield f"{path}:{number}", record
        if chunk.problems:
            raise ShearingError("\n".join(problem.said for problem in chunk.problems))


# Batches -----------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """Examples as a data set of torch."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass(frozen=True)
class Padding:
    """Examples -> a batch [B, T], filled at its right end to a multiple of tokens, which are not attended to."""

    pad_id: int
    multiple: int = 8
    longest: int | None = None
    """Positions that the model has."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        most = max(len(example.ids) for example in examples)
        length = -(-most // self.multiple) * self.multiple
        length = max(most, min(length, self.longest or length))
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for row, (ids, labels) in enumerate(examples):
            batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.from_numpy(labels)
        return batch
