"""Sparse targets of one position as bytes, and back: ids as they are, probabilities by their logarithm.

    code(p) = round(-2048 log2 p)          value(code) = 2^(-code / 2048)          uint16; 65535 stands for 0

A value is within 2^(1/4096) of its probability, 0.017 %, from 1 down to 2^-32; below it is 0. What is read is divided
by its sum: it sums to 1 to rounding, and each is within 0.034 %. Nothing of the mass is lost.

| tail    | kept of a position                                                       | bytes at k = 32 |
|---------|--------------------------------------------------------------------------|-----------------|
| sampled | k // 2 ids with codes, k - k // 2 draws: ids alone; the code of the rest | 98, or 130      |
| bucket  | k ids with codes, the code of the rest                                   | 130, or 162     |

Ids take 2 bytes, or 3 where the vocabulary is above 65,536: the second number. With k of the whole vocabulary the
probabilities are kept in float32 by id, and nothing is rounded but that.

Shape legend: N positions, k entries of each, c coded ones, n draws, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.training.sparse import BUCKET, SAMPLED, TAILS, merged
from llmshearing.training.targets import Sparse

STEPS = 2048  # codes to a factor of two
ZERO = 2**16 - 1
NARROW = 2**16  # ids below take two bytes, others three
LARGEST_VOCABULARY = 2**24


@dataclass(frozen=True)
class Codec:
    """How targets with k entries over a vocabulary of V ids are kept.

    Raises:
        ShearingError: k, the tail or the vocabulary is out of range.
    """

    vocab_size: int
    k: int
    tail: str

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ShearingError(f"tail = {self.tail!r}: must be one of {', '.join(TAILS)}")
        if not 1 <= self.vocab_size <= LARGEST_VOCABULARY:
            raise ShearingError(f"a vocabulary of {self.vocab_size}: from 1 to {LARGEST_VOCABULARY:,} ids can be kept")
        if not 1 <= self.k <= self.vocab_size:
            raise ShearingError(f"top_k = {self.k}: must be from 1 to the vocabulary, {self.vocab_size}")

    @property
    def whole(self) -> bool:
        """Whether every id is kept."""
        return self.k == self.vocab_size

    @property
    def draws(self) -> int:
        """Entries that were drawn from the tail and share its mass."""
        return self.k - self.k // 2 if self.tail == SAMPLED and not self.whole else 0

    @property
    def coded(self) -> int:
        """Entries with a probability of their own."""
        return self.k - self.draws

    @cached_property
    def record(self) -> np.dtype[Any]:
        """A position's bytes."""
        if self.whole:
            return np.dtype([("probabilities", "<f4", (self.k,))])
        ids: tuple[Any, ...] = ("<u2", (self.k,)) if self.vocab_size <= NARROW else ("u1", (self.k, 3))
        return np.dtype([("ids", *ids), ("codes", "<u2", (self.coded,)), ("rest", "<u2")])

    def encode(self, targets: Sparse) -> np.ndarray[Any, Any]:
        """Records [N] of the targets of N positions."""
        made = np.zeros(len(targets.ids), self.record)
        if self.whole:
            made["probabilities"] = targets.probs.float().cpu().numpy()  # by id already
            return made
        codes, shared = self._codes(targets)
        likeliest, drawn = targets.ids[:, : self.coded], targets.ids[:, self.coded :]
        if self.draws:
            times = self._counts(targets, shared)
            drawn = torch.repeat_interleave(drawn.flatten(), times.flatten()).view(-1, self.draws)
        ids = torch.cat([likeliest, drawn], 1).cpu().numpy()
        made["ids"] = ids if self.vocab_size <= NARROW else ids.astype("<u4")[..., None].view("u1")[..., :3]
        made["codes"], made["rest"] = codes.cpu().numpy(), shared.cpu().numpy()
        return made

    def decode(self, records: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> Sparse:
        """The targets of records [N], on a device."""
        if self.whole:
            probs = torch.from_numpy(records["probabilities"].astype(np.float32)).to(device)
            rest = torch.zeros(len(records), device=device) if self.tail == BUCKET else None
            return Sparse(torch.arange(self.k, device=device).expand(len(records), -1), probs, rest)
        ids = self._ids(records).to(device).long()
        codes, shared = (torch.from_numpy(records[name].astype(np.int32)).to(device) for name in ("codes", "rest"))
        if not self.draws:
            return self._bucket(ids, codes, shared)
        return self._sampled(ids[:, : self.coded], *merged(ids[:, self.coded :]), codes, shared)

    def rounded(self, targets: Sparse) -> Sparse:
        """What ``decode(encode(targets))`` gives, bit for bit, without leaving the device; [..., k] of any shape."""
        shape = targets.ids.shape[:-1]
        rest = None if targets.rest is None else targets.rest.flatten()
        flat = Sparse(targets.ids.flatten(0, -2), targets.probs.flatten(0, -2), rest)
        if self.whole:
            flat = Sparse(flat.ids, flat.probs.float(), None if rest is None else torch.zeros_like(rest).float())
        else:
            codes, shared = self._codes(flat)
            if self.draws:
                counts = self._counts(flat, shared)
                drawn = flat.ids[:, self.coded :].masked_fill(counts == 0, 0)
                flat = self._sampled(flat.ids[:, : self.coded], drawn, counts, codes, shared)
            else:
                flat = self._bucket(flat.ids, codes, shared)
        return unflattened(flat, shape)

    def _ids(self, records: np.ndarray[Any, Any]) -> Tensor:
        if self.vocab_size <= NARROW:
            return torch.from_numpy(records["ids"].astype(np.int32))
        wide = np.zeros((len(records), self.k, 4), "u1")
        wide[..., :3] = records["ids"]
        return torch.from_numpy(wide.view("<u4")[..., 0].astype(np.int32))

    def _codes(self, targets: Sparse) -> tuple[Tensor, Tensor]:
        """int32 codes [N, c], and of what all others have together [N]."""
        shared = targets.probs[:, self.coded :].sum(-1) if targets.rest is None else targets.rest
        return _code(targets.probs[:, : self.coded]), _code(shared)

    def _counts(self, targets: Sparse, shared: Tensor) -> Tensor:
        """How often each entry was drawn, int64 [N, n], n together. shared: code of their mass."""
        probs = targets.probs[:, self.coded :].double()
        counts = (probs / probs.sum(-1, keepdim=True) * self.draws).round().long()
        first = torch.zeros_like(counts)
        first[:, 0] = self.draws  # of a tail without mass: any id will do
        return torch.where((shared == ZERO)[:, None], first, counts)

    def _bucket(self, ids: Tensor, codes: Tensor, shared: Tensor) -> Sparse:
        own, rest = _values_of(codes, shared)
        return Sparse(ids, own, rest)

    def _sampled(self, likeliest: Tensor, drawn: Tensor, counts: Tensor, codes: Tensor, shared: Tensor) -> Sparse:
        own, mass = _values_of(codes, shared)
        return Sparse(torch.cat([likeliest, drawn], 1), torch.cat([own, counts * (mass / self.draws)[:, None]], 1))


def unflattened(flat: Sparse, shape: tuple[int, ...]) -> Sparse:
    """Targets of N positions as those of a shape."""
    rest = None if flat.rest is None else flat.rest.view(shape)
    return Sparse(flat.ids.reshape(*shape, -1), flat.probs.reshape(*shape, -1), rest)


def _code(values: Tensor) -> Tensor:
    """int32 codes of probabilities."""
    steps = (-STEPS * values.double().log2()).round()  # of 0: infinity
    return steps.clamp(0, ZERO).int()


def _values_of(codes: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities float32 [N, c] and the rest [N], which sum to 1."""
    table = _values(codes.device)
    own, rest = table[codes], table[shared]
    total = own.sum(-1, dtype=torch.float64) + rest
    return (own / total[:, None]).float(), (rest / total).float()


@cache
def _values(device: torch.device) -> Tensor:
    """The probability of each code, float32 [65536]; a table, so that every device reads the same."""
    powers = torch.arange(ZERO + 1, dtype=torch.float64).div_(-STEPS).exp2_().float()
    powers[ZERO] = 0.0
    return powers.to(device)
