"""What a cache says of itself: ``index.json``, written last, and where its parts lie.

    CACHE/request.json          what was asked for; there from the beginning
    CACHE/DOMAIN/00000.bin      parts: `part_samples` samples each, the last one fewer; whole or absent
    CACHE/index.json            the same as the request; a cache without it is unfinished

A sample is its two checksums (of its token ids, of its records) and T - 1 records: nothing follows the last position.
Data that are one folder for all domains are the domain ``.``, whose parts lie in CACHE itself.

Shape legend: T tokens of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing.data.json_file import read_json
from llmshearing.data.mds.index import INDEX as MDS_INDEX
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.files import is_count, is_plain_name, write_text
from llmshearing.training.cache.codec import Codec

INDEX, REQUEST = "index.json", "request.json"
FORMAT = "llmshearing-teacher-cache-1"
ONE_FOLDER = "."
PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Domain:
    """The data of a domain that the targets belong to."""

    samples: int
    fingerprint: str
    """SHA-256 of its MDS index, which lists the shards with sizes and hashes."""


@dataclass(frozen=True)
class CacheIndex:
    """The content of ``index.json``. Caches with equal ones hold the same bytes, where arithmetic is the same."""

    teacher: dict[str, str]
    """``name`` and the SHA-256 of ``config`` and ``weights``; where there is a tokenizer, of ``tokenizer`` too."""
    vocab_size: int
    max_seq_len: int
    """Tokens."""
    top_k: int
    """Entries of a position."""
    tail: str
    temperature: float
    precision: str
    """The teacher's arithmetic."""
    batch: int
    """Sequences that the teacher was given at a time."""
    part_samples: int
    domains: dict[str, Domain]

    @property
    def codec(self) -> Codec:
        return Codec(self.vocab_size, self.top_k, self.tail)

    @property
    def sample(self) -> np.dtype[Any]:
        """The bytes of a sample."""
        return sample_type(self.codec, self.max_seq_len)

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """(domain, number of the part, samples in it) of all parts, in their order."""
        for name, domain in self.domains.items():
            for number, start in enumerate(range(0, domain.samples, self.part_samples)):
                yield name, number, min(self.part_samples, domain.samples - start)

    @property
    def samples(self) -> int:
        return sum(domain.samples for domain in self.domains.values())


def sample_type(codec: Codec, max_seq_len: int) -> np.dtype[Any]:
    """A sample: `tokens` and `targets` are CRC-32 of its ids (as little-endian 32-bit numbers) and of its records."""
    return np.dtype([("tokens", "<u4"), ("targets", "<u4"), ("records", codec.record, (max_seq_len - 1,))])


def part_file(cache: Path, domain: str, number: int) -> Path:
    """Where a part lies."""
    return cache / domain / f"{number:05d}.bin"


def fingerprint(directory: MdsDirectory) -> Domain:
    """Number of samples and hash of the index of a domain's data."""
    return Domain(len(directory), sha256((directory.path / MDS_INDEX).read_bytes()).hexdigest())


def write_index(path: Path, index: CacheIndex) -> None:
    """Write ``index.json`` or ``request.json``, whole."""
    write_text(path, json.dumps({"format": FORMAT, **asdict(index)}, indent=1) + "\n", alone=False)


def read_index(path: Path) -> CacheIndex:
    """What :func:`write_index` wrote.

    Raises:
        ShearingError: it cannot be read, or is not what a cache has.
    """
    found = read_json(path, "teacher cache")
    if problems := list(_problems(found)):
        raise ShearingError("\n".join(f"teacher cache {path}: {problem}" for problem in problems))
    domains = {name: Domain(**values) for name, values in found["domains"].items()}
    index = CacheIndex(**{**{key: found[key] for key in _KEYS - {"format"}}, "domains": domains})
    try:
        index.sample  # noqa: B018
    except ShearingError as error:
        raise ShearingError(f"teacher cache {path}: {error}") from None
    return index


_COUNTS = ("vocab_size", "max_seq_len", "top_k", "batch", "part_samples")
_KEYS = {*_COUNTS, "format", "teacher", "tail", "temperature", "precision", "domains"}


def _problems(found: dict[str, Any]) -> Iterator[str]:
    if found.get("format") != FORMAT:
        yield f"its format is {found.get('format')!r}, not {FORMAT!r}: no cache, or one of another version"
        return
    if set(found) != _KEYS:
        yield f"it needs the keys {', '.join(sorted(_KEYS))} and no others"
        return
    for key in _COUNTS:
        if not is_count(found[key]) or not found[key]:
            yield f"{key} is {found[key]!r}; a whole number above 0 is needed"
    if not isinstance(found["temperature"], float) or not 0 < found["temperature"] < float("inf"):
        yield f"temperature is {found['temperature']!r}; a number above 0 is needed"
    if not all(isinstance(found[key], str) for key in ("tail", "precision")):
        yield "tail and precision must be strings"
    teacher, domains = found["teacher"], found["domains"]
    if not isinstance(teacher, dict) or not all(isinstance(value, str) for value in teacher.values()):
        yield "teacher is no object of strings"
    elif missing := {"name", "config", "weights"} - set(teacher):
        yield f"teacher lacks {', '.join(sorted(missing))}"
    if not isinstance(domains, dict) or not domains:
        yield "domains is no object with at least one domain"
        return
    for name, domain in domains.items():
        if name != ONE_FOLDER and not is_plain_name(name):
            yield f"domain {name!r} is no name of a folder"
        elif not isinstance(domain, dict) or set(domain) != {"samples", "fingerprint"}:
            yield f"domain {name!r} needs samples and fingerprint"
        elif not is_count(domain["samples"]) or not domain["samples"] or not isinstance(domain["fingerprint"], str):
            yield f"domain {name!r}: samples is {domain['samples']!r}, fingerprint {domain['fingerprint']!r}"
