"""Files that are whole or absent, whatever happens: write under another name, flush, rename, flush the folder.

A crash of the process leaves the old file; so does a crash of the machine, since a name is moved only after its content
is on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields the name to write to; it becomes `path` if the block ends well, else nothing of it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
