"""Finds the files of each domain and reads their documents, one at a time.

A file is `.jsonl`, or that compressed with gzip (`.gz`) or Zstandard (`.zst`), each line an object with a
string in the text field; or it is `.parquet` with a string column of that name (needs pyarrow).
Problems are collected, not raised, so that one run reports them together.
"""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import xxhash
import zstandard

from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".gz", ".zst", ".parquet")
MAX_PROBLEMS = 20
CHUNK = 1 << 22  # bytes read at once


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
    files = [p for p in everything if p.suffix in SUFFIXES]
    for path in sorted(set(everything) - set(files)):
        log.warning("ignored %s: it does not end in %s", path, ", ".join(SUFFIXES))
    return files, [p for p in files if p.stat().st_size == 0]


def describe_file(path: Path, advance: Callable[[int], object]) -> dict[str, int | str]:
    """Size and xxh64 of a file, by which `prepare` knows the same input again."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}


def read_documents(path: Path, field: str, problems: list[str], advance: Callable[[int], object]) -> Iterator[str]:
    """Yield the non-empty texts of one file; append to `problems` what is wrong, naming file:line.

    `advance(n)` is told the bytes of the file as they are consumed. Who consumes the texts decides when there are
    problems enough; a file that cannot be read any further ends there.
    """
    if path.suffix == ".parquet":
        yield from _parquet_documents(path, field, problems)
        advance(path.stat().st_size)
        return
    lines = 0
    with path.open("rb") as raw:
        seen = 0
        try:
            for lines, line in enumerate(_decompressed(path, raw), 1):
                text = _text_of(line, field, f"{path}:{lines}", problems)
                if raw.tell() != seen:
                    advance(raw.tell() - seen)
                    seen = raw.tell()
                if text:
                    yield text
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            problems.append(f"{path} cannot be decompressed after line {lines}: {error}")
            return
    if lines == 0:
        problems.append(f"{path} is empty once decompressed")


def _parquet_documents(path: Path, field: str, problems: list[str]) -> Iterator[str]:
    """Texts of a Parquet file, a few thousand rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ShearingError(f"{path} needs pyarrow: pip install 'llmshearing[parquet]'") from None
    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            problems.append(f"{path} has no column {field!r}; it has {file.schema_arrow.names}")
            return
        if file.metadata.num_rows == 0:
            problems.append(f"{path} has no row")
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    problems.append(f"{path}:{row} has no string in column {field!r} but {type(text).__name__}")
                elif text:
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} cannot be read after row {row}: {error}")


def _decompressed(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(stream, CHUNK)
    return raw


def _text_of(line: bytes, field: str, where: str, problems: list[str]) -> str | None:
    """The text in one line; None for a blank line or a problem, "" for an empty document."""
    if not line.strip():
        return None
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problems.append(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
        return None
    except json.JSONDecodeError as error:
        problems.append(f"{where} is not JSON: {error.msg} at column {error.colno}")
        return None
    text = document.get(field) if isinstance(document, dict) else None
    if not isinstance(text, str):
        keys = sorted(document) if isinstance(document, dict) else type(document).__name__
        problems.append(f"{where} has no string in field {field!r}; it has {keys}")
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        problems.append(f"{where} has a lone surrogate in field {field!r}, which is no text")
        return None
    return text
