"""Reads the targets of a batch's samples, wherever they lie; nothing of a cache stays in memory.

Each sample is compared with its checksums as it is read: of the token ids, which are those of the batch or the cache is
of other data, and of the bytes themselves.

Shape legend: B samples, T tokens, k entries of a position.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from zlib import crc32

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from llmshearing.errors import ShearingError
from llmshearing.training.cache.index import INDEX, REQUEST, CacheIndex, part_file, read_index
from llmshearing.training.cache.write import ids_checksum, is_whole
from llmshearing.training.targets import Sparse

OPEN_FILES = 64


class TeacherCache:
    """A finished cache.

    Raises:
        ShearingError: it is absent, unfinished or damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            unfinished = (self.path / REQUEST).is_file()
            said = "is unfinished: run the command that writes it again" if unfinished else f"has no {INDEX}"
            raise ShearingError(f"teacher cache {self.path} {said}")
        self.index: CacheIndex = read_index(self.path / INDEX)
        self._open: dict[tuple[str, int], FileIO] = {}
        wrong = [part_file(self.path, *part[:2]) for part in self.index.parts() if not self._whole(part)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ShearingError(
                f"teacher cache: {wrong[0]}{more} is missing or cut short; run the command that writes it again, which "
                "makes these parts anew"
            )

    def _whole(self, part: tuple[str, int, int]) -> bool:
        return is_whole(self.path, self.index, *part)

    def targets(self, domains: Sequence[str], samples: Sequence[int], input_ids: Tensor) -> Sparse:
        """Targets [B, T, k] of each row, on the ids' device; nothing at the last position.

        Args:
            domains, samples: of each row. input_ids: int64 [B, T], as the data have them.

        Raises:
            ShearingError: the cache has no such sample, or other token ids or damaged bytes for it.
        """
        rows = input_ids.cpu().numpy()
        wanted = zip(domains, samples, rows, strict=True)
        read = np.stack([self._sample(domain, sample, row) for domain, sample, row in wanted])
        found = self.index.codec.decode(read.reshape(-1), input_ids.device)
        rest = None if found.rest is None else pad(found.rest.view(read.shape), (0, 1))
        ids, probs = (values.reshape(*read.shape, -1) for values in (found.ids, found.probs))
        return Sparse(pad(ids, (0, 0, 0, 1)), pad(probs, (0, 0, 0, 1)), rest)

    def _sample(self, domain: str, sample: int, ids: np.ndarray) -> np.ndarray:
        """Records [T-1] of a sample."""
        index = self.index
        if domain not in index.domains or not 0 <= sample < index.domains[domain].samples:
            raise ShearingError(f"teacher cache {self.path} has no sample {sample} of domain {domain!r}")
        number, place = divmod(sample, index.part_samples)
        size = index.sample.itemsize
        data = os.pread(self._file(domain, number).fileno(), size, place * size)
        found = np.frombuffer(data, index.sample) if len(data) == size else None
        where = f"{part_file(self.path, domain, number)}: sample {sample}"
        if found is None or crc32(found["records"].tobytes()) != found["targets"][0]:
            raise ShearingError(f"{where} is damaged; delete this file and run the command that writes it again")
        if ids.size != index.max_seq_len or ids_checksum(ids) != found["tokens"][0]:
            raise ShearingError(f"{where} is of other tokens than the data's: the cache was written for other data")
        return found["records"][0]

    def _file(self, domain: str, number: int) -> FileIO:
        key = (domain, number)
        if key not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[key] = part_file(self.path, domain, number).open("rb", buffering=0)
        return self._open[key]
