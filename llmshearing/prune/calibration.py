"""Calibration from files: MDS data of the data command, JSONL, or plain text. Some to choose by, others to report on.

    MDS     sequences as they are; `for_prune` chooses and `eval_merge` reports (other splits by name)
    JSONL   a file or a folder of them; `BOS text EOS`, packed; a document's hash says which part it is in
    text    likewise, in blocks of lines

Shape legend: N sequences to select by, M to report on, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmshearing.data.prepare.packing import EVAL, EVAL_MERGE, FOR_PRUNE, split_of
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.long import LONG, encode_long
from llmshearing.errors import ShearingError

if TYPE_CHECKING:
    from llmshearing.data.mds.shards import MdsDirectory

log = logging.getLogger(__name__)

REPORT_FRACTION = 0.3  # of the documents, where one source serves both parts
DEFAULT_LENGTH = 512
IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Calibration:
    """Token ids of the source's vocabulary, packed and without padding.

    Methods read ``select`` only. ``report`` is what perplexity before and after is measured on; no document is in both.
    A loss mask says which tokens' losses count; activations are those of all tokens.
    """

    select: Tensor
    """int64 [N, T]."""
    report: Tensor
    """int64 [M, T]."""
    select_name: str
    """Where ``select`` is from, for messages and the report."""
    report_name: str
    batch_size: int = 8
    select_mask: Tensor | None = None
    """bool [N, T], whose losses count; None: all."""
    report_mask: Tensor | None = None
    """bool [M, T]."""

    def __post_init__(self) -> None:
        for name, ids in ((self.select_name, self.select), (self.report_name, self.report)):
            if ids.dim() != 2 or not ids.numel():
                raise ShearingError(f"calibration {name} is shorter than one sequence; give more text or a shorter one")
        for name, mask in ((self.select_name, self.select_mask), (self.report_name, self.report_mask)):
            if mask is not None and not mask[:, 1:].any():
                raise ShearingError(f"calibration {name}: its loss mask marks no token; give more sequences")

    def batches(self, part: str = "select") -> Iterator[Tensor]:
        """Batches int64 [at most batch_size, T] of a part."""
        yield from (self.select if part == "select" else self.report).split(self.batch_size)

    def labelled(self, part: str = "select") -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a part, and their labels: the same ids, but IGNORED where the loss does not count."""
        mask = self.select_mask if part == "select" else self.report_mask
        ids = self.select if part == "select" else self.report
        yield from zip(ids.split(self.batch_size), labels_of(ids, mask).split(self.batch_size), strict=True)


def labels_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The ids [N, T], IGNORED where the mask is false; None: as they are."""
    return ids if mask is None else ids.where(mask, IGNORED)


@dataclass(frozen=True)
class SequenceOptions:
    """What to read. Counts are sequences."""

    samples: int = 64
    """To choose by."""
    report_samples: int = 64
    """To measure perplexity on."""
    max_seq_len: int | None = None
    """Tokens; None: what MDS data has, else 512 or the model's longest."""
    batch_size: int = 4
    select_split: str = FOR_PRUNE
    """Of MDS data."""
    report_split: str = EVAL_MERGE
    """Of MDS data."""
    text_field: str = "text"
    """Of JSONL."""


def read_calibration(
    path: Path | str, tokenizer: Path | str, vocab_size: int, longest: int, options: SequenceOptions
) -> Calibration:
    """Read both parts.

    Args:
        path: directory of the data command, or another with MDS directories, JSONL or text file, or folder of such.
        tokenizer: directory of the model. vocab_size, longest: the model's; ``longest`` in tokens.

    Raises:
        ShearingError: there is nothing to read, it is shorter than one sequence, or its ids are of another vocabulary.
    """
    path = Path(path)
    if not path.exists():
        raise ShearingError(f"calibration {path} does not exist")
    counts = {"samples": options.samples, "report_samples": options.report_samples, "batch_size": options.batch_size}
    if wrong := [f"{key} = {value}: must be at least 1" for key, value in counts.items() if value < 1]:
        raise ShearingError("\n".join(wrong))
    if (path / "index.json").is_file() or any(path.glob("*/index.json")) or any(path.glob("*/*/index.json")):
        found = _from_mds(path, vocab_size, options)
    else:
        found = _from_text(path, tokenizer, options.max_seq_len or min(DEFAULT_LENGTH, longest), options)
    for name, ids in ((found.select_name, found.select), (found.report_name, found.report)):
        if int(ids.max()) >= vocab_size:
            raise ShearingError(f"{name} has token id {int(ids.max())}, the model's vocab_size is {vocab_size}")
    log.info(
        "%d sequences of %d tokens to choose by: %s; %d to report on: %s",
        *(*found.select.shape, found.select_name, len(found.report), found.report_name),
    )
    return found


def _from_mds(path: Path, vocab_size: int, options: SequenceOptions) -> Calibration:
    if options.select_split == options.report_split:
        raise ShearingError(f"split {options.select_split!r} cannot both choose and report; name two splits")
    splits = (options.select_split, options.report_split)
    counts = (options.samples, options.report_samples)
    length = options.max_seq_len
    parts: list[tuple[Tensor, Tensor | None]] = []
    for split, number in zip(splits, counts, strict=True):
        parts.append(_spread(_directories(path, split), length, vocab_size, number))
        length = parts[-1][0].shape[1]
    names = [f"{split} of {path}" for split in splits]
    (select, select_mask), (report, report_mask) = parts
    return Calibration(select, report, names[0], names[1], options.batch_size, select_mask, report_mask)


def _directories(path: Path, split: str) -> list[Path]:
    if (path / "index.json").is_file():
        raise ShearingError(
            f"calibration {path} is one MDS directory, which cannot both choose and report; give the folder above it, "
            "with --select_split and --report_split"
        )
    root = path / split
    if (root / "index.json").is_file():
        return [root]
    found = sorted(file.parent for file in root.glob("*/index.json"))
    if not found:
        there = sorted(item.name for item in path.iterdir() if item.is_dir())
        raise ShearingError(f"{path} has no split {split!r}; it has {', '.join(there)}")
    return found


def _spread(
    directories: list[Path], length: int | None, vocab_size: int, number: int
) -> tuple[Tensor, Tensor | None]:
    """``number`` sequences (or all there are), evenly over directories and within each; without a length the data's."""
    from llmshearing.data.mds.shards import MdsDirectory  # brings Streaming, which methods and text do without

    opened = []
    for path in directories:
        opened.append(MdsDirectory(path, length, vocab_size))
        length = opened[-1].max_seq_len
    return spread(opened, number)


def spread(opened: Sequence[MdsDirectory], number: int) -> tuple[Tensor, Tensor | None]:
    """``number`` sequences (or all there are), evenly over directories and within each.

    int64 [N, T], and their loss mask, bool [N, T]; None: none of the directories has one.
    """
    rows, masks = [], []
    for at, directory in enumerate(opened):
        share = number // len(opened) + (at < number % len(opened))
        places = np.unique(np.linspace(0, len(directory) - 1, min(share, len(directory))).round().astype(int))
        for place in places:
            ids, _, mask = directory.read(int(place))
            rows.append(torch.from_numpy(ids))
            masks.append(torch.ones(len(ids), dtype=torch.bool) if mask is None else torch.from_numpy(mask))
    if not rows:
        return torch.empty(0, 0, dtype=torch.int64), None
    return torch.stack(rows), torch.stack(masks) if any(directory.masked for directory in opened) else None


def _from_text(path: Path, tokenizer: Path | str, length: int, options: SequenceOptions) -> Calibration:
    encoder = _tokenizer(tokenizer)
    wanted = {FOR_PRUNE: options.samples * length, EVAL: options.report_samples * length}
    streams: dict[str, list[int]] = {part: [] for part in wanted}
    for text in corpus_texts(path, options.text_field, what="calibration", in_turn=True):
        part = split_of(text, 0, REPORT_FRACTION, 1 - REPORT_FRACTION)
        if len(streams[part]) < wanted[part]:
            ids = _ids(encoder, text)
            streams[part] += [i for i in (encoder.bos_token_id, *ids, encoder.eos_token_id) if i is not None]
        elif all(len(streams[other]) >= wanted[other] for other in wanted):
            break
    if problems := [
        f"calibration {path} is shorter than one sequence of {length} tokens: it has {len(stream)} to {verb} "
        "(give more text, or a smaller --max_seq_len)"
        for stream, verb in ((streams[FOR_PRUNE], "choose by"), (streams[EVAL], "report on"))
        if len(stream) < length
    ]:
        raise ShearingError("\n".join(problems))
    packed = {part: torch.tensor(stream[: len(stream) // length * length]) for part, stream in streams.items()}
    select, report = (packed[part].view(-1, length)[: wanted[part] // length] for part in (FOR_PRUNE, EVAL))
    held_out = f"{REPORT_FRACTION:.0%} of the documents of {path} by hash"
    return Calibration(select, report, f"the other documents of {path}", held_out, options.batch_size)


def _ids(encoder: PreTrainedTokenizerBase, text: str) -> list[int]:
    if encoder.is_fast and len(text) > LONG:
        return encode_long(encoder.backend_tokenizer, text)
    return encoder(text, add_special_tokens=False, verbose=False)["input_ids"]


def _tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=Path(path).exists(), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for broken or absent tokenizers
        raise ShearingError(f"the tokenizer of {path} cannot be loaded, so text cannot be read: {error}") from error
