"""Finds the files of each domain and knows them again by size and hash."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from llmshearing.data.text.sources import SUFFIXES, has_documents
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

CHUNK = 1 << 22  # bytes hashed at once


def find_sources(root: Path, domains: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """Domain -> its files, sorted: the folders of `root`, or those named. Raises ShearingError listing all
    problems."""
    if not root.is_dir():
        raise ShearingError(f"input {root} is no folder; give one that has a folder of .jsonl files for each domain")
    existing = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    chosen = list(dict.fromkeys(domains)) if domains else existing
    if not chosen:
        raise ShearingError(f"input {root} has no domain folder; put each domain's .jsonl files in a folder of its own")
    files, problems = {}, []
    for domain in chosen:
        if domain not in existing:
            problems.append(f"domain {domain!r} is not a folder of {root}, which has {existing}")
            continue
        files[domain], empty = _files_of(root / domain)
        problems += [f"{path} is empty" for path in empty]
        if not files[domain]:
            problems.append(f"domain folder {root / domain} has no file ending in {', '.join(SUFFIXES)}")
    if problems:
        raise ShearingError("\n".join(problems))
    return files


def _files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """(data files, those of them with no byte), sorted by path."""
    everything = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [p for p in everything if has_documents(p)]
    for path in sorted(set(everything) - set(files)):
        log.warning("ignored %s: it is plain text, or does not end in %s", path, ", ".join(SUFFIXES))
    return files, [p for p in files if p.stat().st_size == 0]


def describe_file(path: Path, advance: Callable[[int], object]) -> dict[str, int | str]:
    """Size and xxh64 of a file, by which `prepare` knows the same input again."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}
