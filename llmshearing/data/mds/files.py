"""Brings the shard files of an MDS directory to local disk: from remote storage, and out of their compression.

A file under its own name is whole and is what `index.json` says: it is made under another one, checked and renamed. One
process of a machine at a time brings a shard; the others wait for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from llmshearing import files as durable
from llmshearing.data.mds.format import Shard, StoredFile, digest
from llmshearing.data.mds.index import INDEX, broken_json
from llmshearing.errors import ShearingError

if TYPE_CHECKING:
    from llmshearing.data.mds.remote import Remote

log = logging.getLogger(__name__)


class ShardFiles:
    """The files in `folder`; what is missing there comes from `remote`, if that is given.

    The index comes at once. A `folder` that holds another one's index than the remote is refused.
    """

    def __init__(self, folder: Path, remote: Remote | None) -> None:
        self.folder, self.remote = folder, remote
        if remote is not None:
            remote.fetch(INDEX, folder / INDEX, self._index_problem)

    def _index_problem(self, downloaded: Path) -> str | None:
        if problem := broken_json(downloaded):
            return problem
        here = self.folder / INDEX
        if here.is_file() and here.read_bytes() != downloaded.read_bytes():
            raise ShearingError(
                f"{here} is of other data than {self.remote.url if self.remote else ''}; give an empty folder as "
                "data_local, or the address that it was filled from"
            )
        return None

    def problem(self, shard: Shard) -> str | None:
        """What can be told at once to be wrong with a shard: it is absent, or has the wrong size."""
        if self.remote is not None:
            return None
        raw, stored = self.folder / shard.raw_data.basename, shard.zip_data
        if not raw.is_file() and stored is not None and (self.folder / stored.basename).is_file():
            return _wrong_size(self.folder / stored.basename, stored)
        return _wrong_size(raw, shard.raw_data)

    def bring(self, shard: Shard) -> Path:
        """The shard's file, uncompressed and checked; raises ShearingError where that cannot be had."""
        raw = self.folder / shard.raw_data.basename
        problem = damage(raw, shard.raw_data)
        if problem and self.remote is None and not self._stored_here(shard):
            raise ShearingError(f"shard {problem}; copy it again")
        if problem:
            try:
                with self._alone(raw):
                    if damage(raw, shard.raw_data):  # nobody brought it in the meantime
                        self._make(shard, raw)
            except OSError as error:
                raise ShearingError(f"shard {raw} cannot be written: {error}") from error
        return raw

    def _stored_here(self, shard: Shard) -> bool:
        return shard.zip_data is not None and (self.folder / shard.zip_data.basename).is_file()

    def _make(self, shard: Shard, raw: Path) -> None:
        if shard.zip_data is None:
            self._download(raw, shard.raw_data)
            return
        stored = self.folder / shard.zip_data.basename
        if problem := damage(stored, shard.zip_data):
            if self.remote is None:
                raise ShearingError(f"shard {problem}; copy it again")
            self._download(stored, shard.zip_data)
        with durable.whole(raw, alone=False) as temporary:  # the lock is this machine's, the folder may not be
            temporary.write_bytes(shard.decompressed(stored.read_bytes()))
            if problem := damage(temporary, shard.raw_data):
                raise ShearingError(f"shard {stored}, decompressed, is not what {INDEX} says: {problem}; copy it again")
        if self.remote is not None:  # it can be had again
            stored.unlink()

    def _download(self, target: Path, info: StoredFile) -> None:
        if self.remote is None:
            raise ShearingError(f"shard {target} is missing; copy it again")
        self.remote.fetch(info.basename, target, lambda path: damage(path, info))

    @contextlib.contextmanager
    def _alone(self, raw: Path) -> Iterator[None]:
        """While no other process of this machine brings this file; a killed one holds nobody up."""
        patience = 600.0 if self.remote is None else self.remote.longest + 60
        raw.parent.mkdir(parents=True, exist_ok=True)
        lock = raw.with_name(f".{raw.name}.lock")
        try:
            with FileLock(lock, timeout=patience):
                yield
        except Timeout:
            said = f"shard {raw}: another process has been bringing it for {patience:g} seconds"
            raise ShearingError(said) from None


def damage(file: Path, info: StoredFile) -> str | None:
    """What is wrong with a file by its entry in the index, size and first hash; or None."""
    if problem := _wrong_size(file, info):
        return problem
    for algorithm, expected in list(info.hashes.items())[:1]:
        if (found := digest(algorithm, file.read_bytes())) != expected:
            return f"{file} is damaged: {algorithm} is {found}, {INDEX} says {expected}"
    return None


def _wrong_size(file: Path, info: StoredFile) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != info.bytes:
        return f"{file} is damaged: {size} bytes, {INDEX} says {info.bytes}"
    return None
