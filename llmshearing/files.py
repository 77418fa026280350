"""Files and folders that are whole or absent, whatever happens: another name first, flush, rename, flush the folder.

A crash of the process leaves the old file; so does a crash of the machine, since a name is moved only after its content
is on disk. This is the package's one way to write a result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from llmshearing.errors import ShearingError


def is_plain_name(name: object) -> bool:
    """Whether what others call a file or folder is a name, and not a path that could lead elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def is_count(value: object, below: int | None = None) -> bool:
    """Whether what a file says is a whole number from 0 on (and below ``below``); true and false are none."""
    return type(value) is int and value >= 0 and (below is None or value < below)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Give `source`, whose content is on disk, the name `target` (same file system), in one step."""
    os.replace(source, target)
    sync(target.parent)


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` lead to `target`, in one step: it exists at every moment, if it did before."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    move(temporary, link)


def publish(source: Path, target: Path) -> None:
    """Put what was written to `source` on disk, then give it the name `target` (same file system)."""
    sync(source)
    move(source, target)


@contextmanager
def whole(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yields the name to write to; it becomes `path` if the block ends well, else nothing of it stays.

    alone: no other process writes this file at the same time, on this machine or another; what a killed one left is
        written over then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, alone: bool = True) -> None:
    """Write a text file, in UTF-8; see :func:`whole`."""
    with whole(path, alone=alone) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """:func:`whole`, opened for bytes.

    Raises:
        ShearingError: it cannot be written (the disk is full, ...); what was there before is untouched.
    """
    try:
        with whole(path) as temporary, open(temporary, "wb") as file:
            yield file
    except OSError as error:
        raise ShearingError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, in place of one that is there; that one comes back if the new one cannot get its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        if path.exists():
            move(path, old)
        move(temporary, path)
    finally:
        if old.exists() and not path.exists():
            move(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
