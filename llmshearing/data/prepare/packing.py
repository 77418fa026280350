"""Splits documents by their text's hash and packs them into sequences. Needs neither Streaming nor torch.

Shapes: T = max_seq_len; n documents of a chunk; documents are `BOS text EOS`, or conversations; sequences [T] follow
one another without padding, and the last incomplete one of a domain and split is dropped.

A loss mask goes the same way beside the tokens, if the domain has conversations: 1 where a token is an answer. A
document of text counts wholly.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EVAL, FOR_PRUNE, FOR_FT = "eval", "for_prune", "for_ft"
EVAL_MERGE = "eval_merge"
FirstTime = Callable[[bytes], bool]  # of a document's digest
COUNTS = ("documents", "tokens", "sequences", "bytes")
ANSWERS = ("answer_tokens", "split_documents", "longer_documents", "unanswered_sequences")  # where there is a loss mask


def split_of(text: str | bytes, seed: int, eval_fraction: float, for_prune_fraction: float) -> str:
    """The split of a document: a function of its text (or that in UTF-8) and the seed alone, so equal documents share a
    split."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    point = int.from_bytes(digest, "little") / 2**64
    if point < eval_fraction:
        return EVAL
    return FOR_PRUNE if point < eval_fraction + for_prune_fraction else FOR_FT


@dataclass
class Documents:
    """Documents of one split in their order.

    tokens: of all, BOS and EOS included. lengths [n]: tokens of each. sizes [n]: UTF-8 bytes of each text. digests [n]:
    of the texts, by which equal ones are known; empty where nobody asks for them. mask: bool, which of the tokens are
    answers; None: all of them count.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    digests: list[bytes] = field(default_factory=list)
    mask: np.ndarray | None = None

    def only(self, keep: np.ndarray) -> "Documents":
        """Those where `keep` [n] is true; without their digests."""
        if keep.all():
            return self
        kept = np.repeat(keep, self.lengths)
        mask = None if self.mask is None else self.mask[kept]
        return Documents(self.tokens[kept], self.lengths[keep], self.sizes[keep], mask=mask)


@dataclass
class Packer:
    """Packs the documents of one domain and split; each sequence [T] goes to `write`, with its loss mask if `masked`.

    Counts are of what was packed: a document that a full packer no longer needed counts for nothing. `tokens` include
    BOS, EOS and the dropped rest. Those of ANSWERS are of a masked packer: tokens that count in the loss of the
    sequences written (never a sequence's first, which nothing predicts), documents that lie in more than one sequence,
    those of them that are longer than one, and sequences without a token that counts.
    """

    write: Callable[..., None]
    max_seq_len: int
    dtype: str
    limit: int | None
    """Most sequences to write; None: all."""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    sequences: int = 0
    duplicates: int = 0
    max_token_id: int = 0
    rest: list[int] = field(default_factory=list)
    """Tokens [< T] that wait for the next document."""
    masked: bool = False
    rest_mask: list[int] = field(default_factory=list)
    """Of the tokens in `rest`: 1 where one is an answer."""
    answer_tokens: int = 0
    split_documents: int = 0
    longer_documents: int = 0
    unanswered_sequences: int = 0

    @property
    def full(self) -> bool:
        return self.limit is not None and self.sequences >= self.limit

    def add(self, documents: Documents, first_time: FirstTime | None = None) -> None:
        """Append documents until the packer is full; those whose digest is not `first_time` are duplicates."""
        chosen = documents.only(self._wanted(documents, first_time))
        self.documents += len(chosen.lengths)
        self.bytes += int(chosen.sizes.sum())
        self.tokens += len(chosen.tokens)
        self.max_token_id = max(self.max_token_id, int(chosen.tokens.max(initial=0)))
        stream = np.concatenate([np.array(self.rest, self.dtype), chosen.tokens.astype(self.dtype, copy=False)])
        masks = self._masks(chosen) if self.masked else None
        for start in range(0, len(stream) - self.max_seq_len + 1, self.max_seq_len):
            if self.full:
                break
            place = slice(start, start + self.max_seq_len)
            self._write(stream[place], None if masks is None else masks[place])
        whole = len(stream) // self.max_seq_len * self.max_seq_len
        self.rest = stream[whole:].tolist()
        self.rest_mask = [] if masks is None else masks[whole:].astype(int).tolist()

    def _write(self, sequence: np.ndarray, mask: np.ndarray | None) -> None:
        self.sequences += 1
        if mask is None:
            self.write(sequence)
        else:
            self.write(sequence, mask)
            answers = int(mask[1:].sum())
            self.answer_tokens += answers
            self.unanswered_sequences += not answers

    def _masks(self, chosen: Documents) -> np.ndarray:
        """The loss mask of what waits and of the chosen documents, whose splits are counted."""
        ends = len(self.rest) + np.cumsum(chosen.lengths)
        first, last = (ends - chosen.lengths) // self.max_seq_len, (ends - 1) // self.max_seq_len
        self.split_documents += int((last > first).sum())
        self.longer_documents += int((chosen.lengths > self.max_seq_len).sum())
        mask = np.ones(len(chosen.tokens), bool) if chosen.mask is None else chosen.mask
        return np.concatenate([np.array(self.rest_mask, bool), mask])

    def _wanted(self, documents: Documents, first_time: FirstTime | None) -> np.ndarray:
        """Which documents to take, [n] bool: what is no duplicate, up to the one that fills the last sequence."""
        wanted = np.zeros(len(documents.lengths), bool)
        room = np.inf if self.limit is None else (self.limit - self.sequences) * self.max_seq_len - len(self.rest)
        for i, length in enumerate(documents.lengths.tolist()):
            if room <= 0:
                break
            if first_time is None or first_time(documents.digests[i]):
                wanted[i] = True
                room -= length
            else:
                self.duplicates += 1
        return wanted

    def counts(self) -> dict[str, int]:
        """What the manifest records."""
        return {name: getattr(self, name) for name in self._counted()}

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        kept = (*self._counted(), "duplicates", "max_token_id", "rest", *(["rest_mask"] if self.masked else []))
        return {name: getattr(self, name) for name in kept}

    def _counted(self) -> tuple[str, ...]:
        return (*COUNTS, *ANSWERS) if self.masked else COUNTS

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name, value in state.items():
            setattr(self, name, value)
