"""The bytes of a text file in UTF-8, whatever it is compressed with and however an editor encoded it.

The content decides, not the name: downloads keep `.gz` after they were unpacked, and packed files lose it.
"""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

PIECE = 1 << 16  # bytes read at once
PACKED_PIECE = 1 << 12  # of a Zstandard file, which can be 32,000 times that once unpacked
WINDOW = 1 << 31  # bytes, the longest that a Zstandard frame may look back (`zstd --long=31`)
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"ARROW1": "Arrow"}
# The longer marks first: that of UTF-16 is the beginning of that of UTF-32.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
MARK = 4  # bytes of the longest
DAMAGE = (EOFError, OSError, UnicodeError, zlib.error, zstandard.ZstdError)


def utf8_pieces(path: Path, raw: BinaryIO, skip: int) -> Iterator[bytes]:
    """A file's text in UTF-8 from byte `skip` on, in pieces. A mark (BOM) of UTF-8 itself stays.

    Raises one of DAMAGE where it cannot be read any further.
    """
    head = raw.read(64)
    raw.seek(0)
    unpack = _unpacker(path, head)
    if unpack is None and not _encoding(head):
        raw.seek(skip)
        yield from iter(lambda: raw.read(PIECE), b"")
        return
    for piece in _in_utf8(unpack(raw) if unpack else iter(lambda: raw.read(PIECE), b"")):
        if len(piece) > skip:
            yield piece[skip:]
        skip = max(0, skip - len(piece))


def _unpacker(path: Path, head: bytes) -> Callable[[BinaryIO], Iterator[bytes]] | None:
    if head.startswith(GZIP):
        return _gzip
    if head.startswith(ZSTANDARD) or (head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] >> 4 == 5):  # to be skipped
        return _zstandard
    for magic, name in OTHERS.items():
        if head.startswith(magic):
            raise OSError(f"it is a file of {name}; plain text, gzip and Zstandard can be read")
    named = {".gz": _gzip, ".zst": _zstandard}.get(path.suffix)
    plain = head.replace(codecs.BOM_UTF8, b"").strip()[:1] in (b"", b"{") or _encoding(head)
    return None if plain else named  # which then says what is wrong


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    file = gzip.GzipFile(fileobj=raw)
    yield from iter(lambda: file.read1(PIECE), b"")  # unlike read, it gives what comes before damage


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame; zstandard's own reader takes a file that ends inside one for whole."""
    frame = None
    while data := raw.read(PACKED_PIECE):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _encoding(head: bytes) -> str | None:
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def _in_utf8(pieces: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    while len(first) < MARK and (piece := next(pieces, None)) is not None:  # a frame may be shorter, or empty
        first += piece
    encoding = _encoding(first)
    if encoding is None:
        yield first
        yield from pieces
        return
    # Half a surrogate pair passes here, and is named with its line there.
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    yield decoder.decode(first)[1:].encode("utf-8", "surrogatepass")
    for piece in pieces:
        yield decoder.decode(piece).encode("utf-8", "surrogatepass")
    decoder.decode(b"", final=True)
