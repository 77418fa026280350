"""Reads the documents of a domain's files, in chunks that another process can parse, from any chunk on.

A file is `.jsonl`, or that compressed with gzip (`.gz`) or Zstandard (`.zst`), each line an object with a
string in the text field; or it is `.parquet` with a string column of that name (needs pyarrow).
Problems are collected, not raised, so that one run reports them together. Where chunks end depends on the files
alone.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from llmshearing.errors import ShearingError

SUFFIXES = (".jsonl", ".gz", ".zst", ".parquet")
MAX_PROBLEMS = 20
CHUNK = 1 << 20  # bytes of lines in a chunk; longer where a line is
PIECE = 1 << 16  # bytes of a file read at once
ROWS = 1024  # of a Parquet file in a chunk
DAMAGE = (EOFError, OSError, zlib.error, zstandard.ZstdError)
Advance = Callable[[int], object]


class Place(NamedTuple):
    """Where reading goes on: in which file of the domain, after how many bytes (decompressed) or rows, and lines."""

    file: int = 0
    offset: int = 0
    lines: int = 0


BEGINNING = Place()


@dataclass(frozen=True)
class Lines:
    """Whole lines of a JSONL file; the first of them is number `first`, from 1."""

    path: str
    first: int
    data: bytes

    def texts(self, name: str, problems: list[str]) -> Iterator[str]:
        """The non-empty texts in the field `name`; `problems` grows by what is wrong, naming file:line."""
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if text := _text_of(line, name, f"{self.path}:{number}", problems):
                yield text


@dataclass(frozen=True)
class Rows:
    """Rows of a Parquet file's text column, as an Arrow array; the first of them is number `first`, from 1."""

    path: str
    first: int
    column: Any

    def texts(self, name: str, problems: list[str]) -> Iterator[str]:
        """The non-empty texts; `problems` grows by what is wrong, naming file:row."""
        for number, value in enumerate(self.column, self.first):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                problems.append(f"{self.path}:{number} is not UTF-8: {error.reason} at byte {error.start}")
                continue
            if not isinstance(text, str):
                problems.append(f"{self.path}:{number} has no string in column {name!r} but {type(text).__name__}")
            elif text:
                yield text


@dataclass(frozen=True)
class Chunk:
    """A piece of a file, of `size` bytes; `problems` met in reading it, after its content; where the next begins."""

    content: Lines | Rows | None
    size: int
    following: Place
    problems: list[str] = field(default_factory=list)

    def texts(self, name: str, problems: list[str]) -> Iterator[str]:
        """The non-empty texts of the field or column `name`; `problems` grows by what is wrong."""
        if self.content is not None:
            yield from self.content.texts(name, problems)
        problems += self.problems


def read_documents(path: Path, name: str, problems: list[str], advance: Advance) -> Iterator[str]:
    """Yield the non-empty texts of one file; append to `problems` what is wrong, naming file:line.

    `advance(n)` is told the bytes of the file as they are consumed. A file that cannot be read any further ends there.
    """
    for chunk in read_chunks([path], name, advance):
        yield from chunk.texts(name, problems)


def read_chunks(files: Sequence[Path], name: str, advance: Advance, start: Place = BEGINNING) -> Iterator[Chunk]:
    """The chunks of all files in their order, from `start` on, which must be where an earlier one ended."""
    for number in range(start.file, len(files)):
        place = start if number == start.file else Place(number)
        if files[number].suffix == ".parquet":
            yield from _row_chunks(files[number], name, place, advance)
        else:
            yield from _line_chunks(files[number], place, advance)


def _line_chunks(path: Path, place: Place, advance: Advance) -> Iterator[Chunk]:
    with path.open("rb") as raw:
        told = 0
        blocks = _whole_lines(_pieces(path, raw, place.offset))
        while True:
            try:
                data = next(blocks, b"")
            except DAMAGE as error:
                problem = f"{path} cannot be decompressed after line {place.lines}: {error}"
                yield Chunk(None, 0, Place(place.file + 1), [problem])
                return
            if not data:
                break
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            following = Place(place.file, place.offset + len(data), place.lines + lines)
            yield Chunk(Lines(str(path), place.lines + 1, data), len(data), following)
            advance(raw.tell() - told)
            told, place = raw.tell(), following
    if place.lines == 0:
        yield Chunk(None, 0, Place(place.file + 1), [f"{path} is empty once decompressed"])


def _whole_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines until at least CHUNK bytes, again and again, however the pieces are cut.

    What can be read before damage comes before its error.
    """
    waiting, searched = bytearray(), CHUNK - 1
    try:
        for piece in pieces:
            waiting += piece
            while end := waiting.find(b"\n", searched) + 1:
                yield bytes(waiting[:end])
                del waiting[:end]
                searched = CHUNK - 1
            searched = max(CHUNK - 1, len(waiting))
    except DAMAGE:
        if end := waiting.rfind(b"\n") + 1:
            yield bytes(waiting[:end])
        raise
    if waiting:
        yield bytes(waiting)


def _pieces(path: Path, raw: BinaryIO, skip: int) -> Iterator[bytes]:
    """The decompressed bytes of a file from byte `skip` on."""
    if path.suffix == ".gz":
        file = gzip.GzipFile(fileobj=raw)
        pieces = iter(lambda: file.read(PIECE), b"")
    elif path.suffix == ".zst":
        pieces = _zstandard(raw)
    else:
        raw.seek(skip)
        skip, pieces = 0, iter(lambda: raw.read(PIECE), b"")
    for piece in pieces:
        if len(piece) > skip:
            yield piece[skip:]
        skip = max(0, skip - len(piece))


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame; zstandard's own reader takes a file that ends inside one for whole."""
    frame = None
    while data := raw.read(PIECE):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _row_chunks(path: Path, name: str, place: Place, advance: Advance) -> Iterator[Chunk]:
    """Group by group, so that reading can begin at any of them without what lies before."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ShearingError(f"{path} needs pyarrow: pip install 'llmshearing[parquet]'") from None
    row, problem = 0, None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if name not in file.schema_arrow.names:
            problem = f"{path} has no column {name!r}; it has {file.schema_arrow.names}"
        elif file.metadata.num_rows == 0:
            problem = f"{path} has no row"
        for group in range(0 if problem else file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= place.offset:
                row += rows
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[name]):
                if (begin := row) >= place.offset:
                    content = Rows(str(path), begin + 1, batch.column(0))
                    yield Chunk(content, batch.nbytes, Place(place.file, begin + len(batch)))
                row += len(batch)
            advance(path.stat().st_size // file.num_row_groups)
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"{path} cannot be read after row {row}: {error}"
    if problem:
        yield Chunk(None, 0, Place(place.file + 1), [problem])


def _text_of(line: bytes, name: str, where: str, problems: list[str]) -> str | None:
    """The text in one line; None for a blank line or a problem, "" for an empty document."""
    if not line or line.isspace():
        return None
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problems.append(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
        return None
    except json.JSONDecodeError as error:
        problems.append(f"{where} is not JSON: {error.msg} at column {error.colno}")
        return None
    except RecursionError:
        problems.append(f"{where} is not JSON that can be read: nested too deeply")
        return None
    text = document.get(name) if isinstance(document, dict) else None
    if not isinstance(text, str):
        keys = sorted(document) if isinstance(document, dict) else type(document).__name__
        problems.append(f"{where} has no string in field {name!r}; it has {keys}")
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        problems.append(f"{where} has a lone surrogate in field {name!r}, which is no text")
        return None
    return text
