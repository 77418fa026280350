"""A part of a file as a file of its own, read with `pread`: for zipfile, for torch, and straight into memory."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Window(io.RawIOBase):
    """``length`` bytes of a file from ``start`` on, for reading; None: to its end. Closes with its last user."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._start, self._at = start, 0
        self.length = os.fstat(self._descriptor).st_size - start if length is None else length

    def fill(self, buffer: memoryview, at: int) -> None:
        """Read exactly as much as the buffer holds.

        Raises:
            EOFError: there is less.
        """
        if at + len(buffer) > self.length or os.preadv(self._descriptor, [buffer], self._start + at) != len(buffer):
            raise EOFError(f"cut off: {len(buffer):,} bytes from {at:,} on are not there")

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self.length - self._at))
        read = os.preadv(self._descriptor, [memoryview(buffer)[:size]], self._start + self._at)
        self._at += read
        return read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
