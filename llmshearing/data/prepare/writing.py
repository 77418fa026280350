"""Writes MDS directories in parts that survive a kill.

Each part of a domain is written by Streaming's writer into a hidden folder of its own; when it is whole, its shards
move beside the earlier ones, numbered on. `index.json` comes last, so what is not finished cannot be read. A part's
last shard is as short as it comes out.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from llmshearing import files as durable
from llmshearing.data.mds.masks import COLUMN, encoding, packed

HASHES = ["xxh64"]  # recorded in index.json, checked when a shard is first read
Shard = dict[str, Any]  # an entry of index.json
Transfer = Callable[[Path, Path], object]


@dataclass(frozen=True)
class Layout:
    """How sequences are stored: T ids of `dtype` each, files of at most `shard_size`, compressed or not.

    `masked`: each with a loss mask.
    """

    max_seq_len: int
    dtype: str
    shard_size: str
    compression: str | None
    masked: bool = False

    def open(self, folder: Path) -> MDSWriter:
        """Streaming's writer to an absent or empty folder."""
        columns = {"tokens": f"ndarray:{self.dtype}:{self.max_seq_len}", "set": "str"}
        columns |= {COLUMN: encoding(self.max_seq_len)} if self.masked else {}
        return MDSWriter(
            out=str(folder), columns=columns, hashes=HASHES, size_limit=self.shard_size, compression=self.compression
        )


class PartWriter:
    """One domain's MDS directory; `shards` are those of the parts that are done."""

    def __init__(self, folder: Path, domain: str, layout: Layout, shards: Sequence[Shard]) -> None:
        self.folder, self.domain, self.layout = folder, domain, layout
        self.shards = list(shards)
        self._part = folder / ".part"
        self._writer: MDSWriter | None = None

    def write(self, sequence: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append a sequence [T] to the running part, with its loss mask, bool [T], if the layout has one."""
        if self._writer is None:
            shutil.rmtree(self._part, ignore_errors=True)  # what a killed run left
            self._writer = self.layout.open(self._part)
        sample = {"tokens": sequence, "set": self.domain}
        self._writer.write(sample if mask is None else {**sample, COLUMN: packed(mask)})

    def end_part(self) -> list[Path]:
        """Make the running part's shards the directory's; returns their files."""
        if self._writer is None:
            return []
        self._writer.finish()
        self._writer = None
        moved = bring(self._part, read_shards(self._part), self.folder, len(self.shards), durable.publish)
        shutil.rmtree(self._part)
        self.shards += moved
        return shard_files(self.folder, moved)

    def finish(self) -> Path:
        """Write `index.json` and return it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return write_index(self.folder, self.shards)


def merge(folders: Sequence[Path], target: Path) -> list[Path]:
    """One MDS directory of all shards of several, in their order, without reading a sample; returns its files."""
    target.mkdir()
    shards: list[Shard] = []
    for folder in folders:
        shards += bring(folder, read_shards(folder), target, len(shards), _link)
    return [*shard_files(target, shards), write_index(target, shards)]


def bring(source: Path, shards: Sequence[Shard], target: Path, first: int, transfer: Transfer) -> list[Shard]:
    """Transfer shards to another directory, numbered from `first`; returns their entries there."""
    found = []
    for number, shard in enumerate(shards, first):
        renamed = dict(shard)
        for kind in ("raw_data", "zip_data"):
            if (data := shard[kind]) is not None:
                _, _, rest = data["basename"].split(".", 2)  # shard.00000.mds, shard.00000.mds.zstd
                renamed[kind] = {**data, "basename": f"shard.{number:05}.{rest}"}
        (old,), (new,) = shard_files(source, [shard]), shard_files(target, [renamed])
        transfer(old, new)
        found.append(renamed)
    return found


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)


def shard_files(folder: Path, shards: Sequence[Shard]) -> list[Path]:
    """The file of each shard as it is stored."""
    return [folder / (shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]


def read_shards(folder: Path) -> list[Shard]:
    """The entries of a directory's index that this program wrote."""
    return json.loads((folder / "index.json").read_text())["shards"]


def write_index(folder: Path, shards: Sequence[Shard]) -> Path:
    """The directory's `index.json`."""
    path = folder / "index.json"
    durable.write_text(path, json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True))
    return path
