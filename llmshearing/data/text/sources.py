"""Reads the documents of a domain's files, in chunks that another process can parse, from any chunk on.

    .jsonl, .ndjson    each line an object with a string in the text field
    .parquet           a string column of that name (needs pyarrow)
    .txt               blocks of lines, where plain text is asked for

The first and the last may be compressed with gzip (`.gz`) or Zstandard (`.zst`). Problems are collected, not raised, so
that one run reports them together. Where chunks end depends on the files alone.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmshearing.data.text.lines import FILE, LINE, REST, ROW, NoText, Problem, text_of
from llmshearing.data.text.streams import DAMAGE, utf8_pieces
from llmshearing.errors import ShearingError

SUFFIXES = (".jsonl", ".ndjson", ".gz", ".zst", ".parquet")
MAX_PROBLEMS = 20
CHUNK = 1 << 20  # bytes of lines in a chunk; longer where a line is
BLOCK = 1 << 12  # bytes of plain text that stay together, or one line
ROWS = 1024  # of a Parquet file in a chunk
Advance = Callable[[int], object]


class Place(NamedTuple):
    """Where reading goes on: in which file of the domain, after how many bytes (decompressed) or rows, and lines."""

    file: int = 0
    offset: int = 0
    lines: int = 0


BEGINNING = Place()


def is_plain_text(path: Path) -> bool:
    """Whether a file is text as it stands, by its name."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix == ".txt"


def has_documents(path: Path) -> bool:
    """Whether a file holds documents, by its name."""
    return path.suffix in SUFFIXES and not is_plain_text(path)


@dataclass(frozen=True)
class Lines:
    """Whole lines of a JSONL file; the first of them is number `first`, from 1."""

    path: str
    first: int
    data: bytes

    def numbered(self) -> Iterator[tuple[int, bytes]]:
        """Each line with its number."""
        yield from enumerate(_split(self.data), self.first)

    def texts(self, name: str, problems: list[Problem]) -> Iterator[str]:
        """The non-empty texts in the field `name`; `problems` grows by what is wrong, naming file:line."""
        for number, line in self.numbered():
            try:
                text = text_of(line, name)
            except NoText as error:
                problems.append(Problem(f"{self.path}:{number} {error}", LINE))
                continue
            if text:
                yield text


@dataclass(frozen=True)
class PlainLines:
    """Whole lines of a text file; the first of them is number `first`, from 1."""

    path: str
    first: int
    data: bytes

    def texts(self, name: str, problems: list[Problem]) -> Iterator[str]:
        """Blocks of lines that end in a newline, with CR LF and CR as such; `problems` grows by what is no UTF-8."""
        start, end = 0, 0
        if self.first == 1 and self.data.startswith(codecs.BOM_UTF8):
            start = len(codecs.BOM_UTF8)
        while start < len(self.data):
            end = self.data.find(b"\n", min(start + BLOCK, len(self.data)) - 1) + 1 or len(self.data)
            try:
                text = self.data[start:end].decode("utf-8")
            except UnicodeDecodeError as error:
                number = self.first + self.data.count(b"\n", 0, start + error.start)
                said = f"{self.path}:{number} is not UTF-8: {error.reason} at byte {error.start}"
                problems.append(Problem(said, LINE))
            else:
                yield text.replace("\r\n", "\n").replace("\r", "\n")
            start = end


@dataclass(frozen=True)
class Rows:
    """Rows of a Parquet file's text column, as an Arrow array; the first of them is number `first`, from 1."""

    path: str
    first: int
    column: Any

    def texts(self, name: str, problems: list[Problem]) -> Iterator[str]:
        """The non-empty texts; `problems` grows by what is wrong, naming file:row."""
        for number, value in enumerate(self.column, self.first):
            try:
                text = value.as_py()
                text = text.decode("utf-8") if isinstance(text, bytes) else text  # some writers do not say it is text
            except UnicodeDecodeError as error:
                said = f"{self.path}:{number} is not UTF-8: {error.reason} at byte {error.start}"
                problems.append(Problem(said, ROW))
                continue
            if not isinstance(text, str):
                said = f"{self.path}:{number} has no string in column {name!r} but {type(text).__name__}"
                problems.append(Problem(said, ROW))
            elif text:
                yield text


@dataclass(frozen=True)
class Chunk:
    """A piece of a file, of `size` bytes; `problems` met in reading it, after its content; where the next begins."""

    content: Lines | PlainLines | Rows | None
    size: int
    following: Place
    problems: list[Problem] = field(default_factory=list)

    def texts(self, name: str, problems: list[Problem]) -> Iterator[str]:
        """The non-empty texts of the field or column `name`; `problems` grows by what is wrong."""
        if self.content is not None:
            yield from self.content.texts(name, problems)
        problems += self.problems


def read_chunks(
    files: Sequence[Path], name: str, advance: Advance, start: Place = BEGINNING, *, plain_text: bool = False
) -> Iterator[Chunk]:
    """The chunks of all files in their order, from `start` on, which must be where an earlier one ended.

    plain_text: the files are text as they stand, whatever their names say.
    """
    for number in range(start.file, len(files)):
        place = start if number == start.file else Place(number)
        if files[number].suffix == ".parquet" and not plain_text:
            yield from _row_chunks(files[number], name, place, advance)
        else:
            yield from _line_chunks(files[number], place, advance, PlainLines if plain_text else Lines)


def _line_chunks(path: Path, place: Place, advance: Advance, kind: type[Lines | PlainLines]) -> Iterator[Chunk]:
    with path.open("rb") as raw:
        told = 0
        blocks = _whole_lines(utf8_pieces(path, raw, place.offset))
        while True:
            try:
                data = next(blocks, b"")
            except DAMAGE as error:
                how = "decompressed" if path.suffix in (".gz", ".zst") else "read"
                said = f"{path} cannot be {how} after line {place.lines}: {error}"
                yield Chunk(None, 0, Place(place.file + 1), [Problem(said, REST if place.lines else FILE)])
                return
            if not data:
                break
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            following = Place(place.file, place.offset + len(data), place.lines + lines)
            yield Chunk(kind(str(path), place.lines + 1, data), len(data), following)
            advance(raw.tell() - told)
            told, place = raw.tell(), following
    if place.lines == 0:
        yield Chunk(None, 0, Place(place.file + 1), [Problem(f"{path} is empty once decompressed", FILE)])


def _split(data: bytes) -> Iterator[bytes]:
    """The lines, one after another: a list of them would hold a long one twice."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start:end]
        start = end + 1
    yield data[start:]


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
        yield Chunk(None, 0, Place(place.file + 1), [Problem(problem, REST if row else FILE)])
