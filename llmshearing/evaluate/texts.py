"""What loss is measured on: documents of text, or sequences of token ids (MDS), by domain.

    MDS        a directory of the data command (a split of it), or one MDS directory: its `set` names the domain, and
               its `loss_mask`, if it has one, which tokens are scored
    text       one file: .jsonl, .ndjson, .parquet or .txt, also compressed; the domain is the file's name
    folder     each file in it and each folder in it is a domain

A JSONL line or a Parquet row is one document; a plain text file is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.sources import SUFFIXES, has_documents, is_plain_text
from llmshearing.errors import ShearingError

EVAL_SPLITS = ("eval_merge", "eval")
"""Of prepared data, the first that is there."""


@dataclass(frozen=True)
class TextDomain:
    """Documents of one domain."""

    name: str
    paths: tuple[Path, ...]
    field: str

    def documents(self, limit: int | None = None) -> Iterator[str]:
        """The texts; at most ``limit``."""
        yield from islice(self._all(), limit)

    def _all(self) -> Iterator[str]:
        for path in self.paths:
            texts = corpus_texts(path, self.field, what="data")
            if is_plain_text(path):
                if whole := "".join(texts):
                    yield whole
            else:
                yield from texts


class Tokens(NamedTuple):
    """A sequence of ids. counts: which of them are scored, by the data's loss mask; None: all."""

    ids: list[int]
    counts: list[bool] | None = None

    def scored(self) -> list[int]:
        """The ids that are scored: never the first, which nothing predicts."""
        counts = self.counts or [True] * len(self.ids)
        return [token for token, own in zip(self.ids[1:], counts[1:], strict=True) if own]


@dataclass(frozen=True)
class TokenDomains:
    """Sequences of token ids, each of a domain; of the tokenizer that the data was prepared with."""

    path: Path
    folders: tuple[Path, ...]
    recorded: Path | None
    """The folder with the manifest, which knows the tokenizer."""

    def sequences(self, vocab_size: int, limit: int | None = None) -> dict[str, list[Tokens]]:
        """Domain -> its sequences, at most ``limit`` of each.

        Raises:
            ShearingError: the data is damaged, or of another vocabulary.
        """
        from llmshearing.data.mds.shards import MdsDirectory  # brings Streaming, which text does without

        found: dict[str, list[Tokens]] = {}
        for folder in self.folders:
            directory = MdsDirectory(folder, None, vocab_size)
            for index in range(len(directory)):
                ids, name, mask = directory.read(index)
                rows = found.setdefault(name, [])
                if limit is None or len(rows) < limit:
                    rows.append(Tokens(ids.tolist(), None if mask is None else mask.tolist()))
        return found


Data = Sequence[TextDomain] | TokenDomains


def open_data(paths: Sequence[str], field: str = "text", split: str | None = None) -> Data:
    """What the paths hold.

    Args:
        field: of JSONL and Parquet. split: of prepared data; None: its evaluation split.

    Raises:
        ShearingError: a path is absent, of no known form, or two domains have one name.
    """
    found = [Path(path) for path in paths]
    if absent := [path for path in found if not path.exists()]:
        raise ShearingError(f"data {', '.join(map(str, absent))} does not exist")
    tokens = [path for path in found if path.is_dir() and _has_index(path)]
    if tokens and len(found) > 1:
        raise ShearingError(f"data {tokens[0]} is MDS, which is evaluated alone; give one MDS directory, or text")
    if tokens:
        return _token_domains(tokens[0], split)
    domains: dict[str, TextDomain] = {}
    for path in found:
        for domain in _text_domains(path, field):
            if domain.name in domains:
                raise ShearingError(f"data {path}: there is another domain of the name {domain.name!r}; rename one")
            domains[domain.name] = domain
    return list(domains.values())


def _has_index(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in ("index.json", "*/index.json", "*/*/index.json"))


def _token_domains(path: Path, split: str | None) -> TokenDomains:
    if (path / "index.json").is_file():
        return TokenDomains(path, (path,), None)
    there = sorted(each.name for each in path.iterdir() if each.is_dir())
    chosen = split or next((name for name in EVAL_SPLITS if name in there), None)
    if chosen is None or chosen not in there:
        raise ShearingError(f"data {path} has no split {chosen or EVAL_SPLITS[0]!r}; name one of {', '.join(there)}")
    root = path / chosen
    folders = [root] if (root / "index.json").is_file() else sorted(file.parent for file in root.glob("*/index.json"))
    if not folders:
        raise ShearingError(f"data {root} holds no MDS directory (no index.json)")
    return TokenDomains(root, tuple(folders), path if (path / "manifest.json").is_file() else None)


def _is_text(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and (has_documents(path) or is_plain_text(path))


def _text_domains(path: Path, field: str) -> list[TextDomain]:
    known = f".txt or {', '.join(SUFFIXES)}"
    if path.is_file():
        if not _is_text(path):
            raise ShearingError(f"data {path} is of no known form: it must end in {known}, or be an MDS directory")
        return [TextDomain(_stem(path), (path,), field)]
    domains: dict[str, tuple[Path, ...]] = {}
    for each in sorted(path.iterdir()):
        files = [each] if _is_text(each) else sorted(file for file in each.rglob("*") if _is_text(file))
        if files:
            name = _stem(each) if each.is_file() else each.name
            domains[name] = (*domains.get(name, ()), *files)
    if not domains:
        raise ShearingError(
            f"data {path} is of no known form: no file in it ends in {known}, and it is no MDS directory"
        )
    return [TextDomain(name, files, field) for name, files in domains.items()]


def _stem(path: Path) -> str:
    """The file's name without its endings."""
    name = path.name
    for ending in (".gz", ".zst", *SUFFIXES, ".txt"):
        name = name.removesuffix(ending)
    return name


def counts_of(texts: Sequence[str]) -> Mapping[str, int]:
    """Words (what white space parts) and UTF-8 bytes."""
    return {
        "words": sum(len(text.split()) for text in texts),
        "bytes": sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
    }
