"""A file appears whole or not at all, and what stands against it is one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmshearing import files as durable
from llmshearing.errors import ShearingError


def is_plain_name(name: object) -> bool:
    """Whether what a checkpoint calls a file is a name, and not a path that could lead elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name, which is synced and takes the name ``path`` when all went well.

    Raises:
        ShearingError: it cannot be written (the disk is full, ...); what was there before is untouched.
    """
    try:
        with durable.whole(path) as temporary, open(temporary, "wb") as file:
            yield file
    except OSError as error:
        raise ShearingError(f"{path} cannot be written: {error.strerror or error}") from error
