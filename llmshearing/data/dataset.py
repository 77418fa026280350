"""The two data sets of training, as torch IterableDatasets that Composer can resume.

Shapes: R ranks, B samples a rank and batch, G = B R samples a global batch, T = max_seq_len, K domains. A
sample is `input_ids` int64 [T], `set` (index into set_names, int) and `sample` (id inside its MDS directory,
int).

Every rank computes the same global sequence of positions and yields its own slice, so nothing is communicated
and the sequence does not depend on R: rank r yields positions [bG + rB, bG + (r+1)B) of global batch b.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llmshearing.data.mixture import Mixture
from llmshearing.data.shards import MdsDirectory
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

PADDING = -1  # `set` and `sample` of a row that only keeps ranks in step; it must count for nothing

Sample = dict[str, Any]


class SetIndex:
    """Name in the `set` column -> index into set_names; an empty list of names maps everything to 0."""

    def __init__(self, set_names: Sequence[str]) -> None:
        self._index = {name: i for i, name in enumerate(set_names)}

    def __call__(self, name: str, where: object) -> int:
        if not self._index:
            return 0
        if name not in self._index:
            raise ShearingError(f"{where} has a sample of domain {name!r}; set_names has {sorted(self._index)}")
        return self._index[name]


def as_sample(tokens: np.ndarray, domain: int, sample: int) -> Sample:
    """One row of a batch; torch's default collation makes the ints int64 [B]."""
    return {"input_ids": torch.from_numpy(tokens), "set": domain, "sample": sample}


class MixtureDataset(IterableDataset):
    """Mixes domains by proportions that may change between any two batches; endless, domains wrap when
    exhausted.

    One iteration is one epoch: as many samples as all domains hold together, in whole global batches (at
    least one). The next iteration goes on where the last one stopped. `len()` is this rank's samples an
    epoch.

    With `plain` there is a single stream whose domains are read from the column `set`; proportions then have
    no meaning, and setting them is an error.
    """

    def __init__(
        self,
        streams: Sequence[MdsDirectory],
        set_names: Sequence[str],
        mixture: Mixture,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.streams = list(streams)
        self.set_names = list(set_names)
        self.mixture = mixture
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.plain = plain
        self.max_seq_len = self.streams[0].max_seq_len  # Composer counts tokens with it
        self._set_index = SetIndex(set_names)
        self._resume_at = 0  # samples of the running epoch that were consumed before a resume

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch over all ranks."""
        total = sum(len(stream) for stream in self.streams)
        return max(1, total // self.global_batch_size) * self.global_batch_size

    @property
    def proportion(self) -> np.ndarray:
        """Proportions [K] that hold for the next batch, float64; [1] for a plain stream."""
        return self.mixture.proportion

    def set_proportion(self, proportion: Sequence[float] | np.ndarray) -> None:
        """Let `proportion` [K] hold from the very next batch. All ranks must be given the same values."""
        if self.plain:
            raise ShearingError("this split is one plain stream; its proportions cannot be set")
        self.mixture.set_proportion(proportion)

    def __len__(self) -> int:
        return self.epoch_size // self.world_size

    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            raise ShearingError("MixtureDataset runs in the training process; set num_workers to 0")
        start, self._resume_at = self._resume_at, 0
        for _ in range(start, self.epoch_size, self.global_batch_size):
            # a whole global batch is planned at once: no change of proportions splits a batch
            plan = [self.mixture.next() for _ in range(self.global_batch_size)]
            first = self.rank * self.batch_size
            for stream, sample in plan[first : first + self.batch_size]:
                yield self._read(stream, sample)

    def _read(self, stream: int, sample: int) -> Sample:
        directory = self.streams[stream]
        tokens, name = directory[sample]
        named = self._set_index(name, directory.path)
        if not self.plain and self.set_names[stream] != name:
            raise ShearingError(
                f"{directory.path}: sample {sample} is of domain {name!r}, not {self.set_names[stream]!r}"
            )
        return as_sample(tokens, named, sample)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position to resume at, in plain numbers, the same on every rank; Composer calls it at
        checkpoints.

        `num_samples`: samples of this epoch that all ranks together have trained on (Composer's
        `sample_in_epoch`). The loader runs in this process and draws one batch at a time, so the mixture
        stands exactly there. `from_beginning` is part of Composer's protocol and is always True there.
        """
        return {**self.mixture.state_dict(), "sample_in_epoch": int(num_samples)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue where `state` was taken, on any number of ranks; raises ShearingError if the data
        differs."""
        if state is None:
            log.warning("The checkpoint has no data position: the data starts from its beginning.")
            return
        self.mixture.load_state_dict(state)
        self._resume_at = int(state["sample_in_epoch"])


class EvalDataset(IterableDataset):
    """Every sample of a merged split exactly once over all ranks together, in the same order each time.

    All ranks yield equally many samples, so that they meet in every collective: where samples run out, the
    rest is padding, rows with `set` == `sample` == -1, which must count for nothing in losses and metrics.

    With `subset_num_batches` only that many global batches are read, drawn from the domains in turn.
    """

    def __init__(
        self,
        directory: MdsDirectory,
        set_names: Sequence[str],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        subset_num_batches: int | None = None,
    ) -> None:
        super().__init__()
        self.directory, self.set_names = directory, list(set_names)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.max_seq_len = directory.max_seq_len
        self.sets = self._read_sets()
        self.order = np.arange(len(directory))
        if subset_num_batches is not None and subset_num_batches >= 0:
            self.order = fair_subset(self.sets, subset_num_batches * batch_size * world_size)

    def _read_sets(self) -> np.ndarray:
        """The domain of every sample, [N]; raises ShearingError for unknown and for absent domains."""
        names, known = self.directory.names(), set(self.set_names)
        found = set(names)
        if not self.set_names:
            return np.zeros(len(names), np.int64)
        if found - known:
            raise ShearingError(
                f"{self.directory.path} has samples of {sorted(found - known)}, which set_names {self.set_names} lacks"
            )
        if known - found:
            raise ShearingError(
                f"{self.directory.path} has no sample of {sorted(known - found)}; it has {sorted(found)}"
            )
        index = {name: i for i, name in enumerate(self.set_names)}
        return np.array([index[name] for name in names])

    def __len__(self) -> int:
        return len(self._rows())

    def _rows(self) -> np.ndarray:
        """This rank's sample ids, PADDING where there is none: as many on every rank."""
        global_batch = self.batch_size * self.world_size
        full = len(self.order) // global_batch * global_batch
        rows = self.order[:full].reshape(-1, self.world_size, self.batch_size)[:, self.rank].ravel()
        rest = self.order[full:]
        each = -(-len(rest) // self.world_size)
        last = np.full(each * self.world_size, PADDING)
        last[: len(rest)] = rest
        return np.concatenate([rows, last.reshape(self.world_size, each)[self.rank]])

    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            raise ShearingError("EvalDataset runs in the training process; set num_workers to 0")
        for row in self._rows().tolist():
            if row == PADDING:  # real tokens, so that nothing in the forward pass meets an odd value
                yield as_sample(self.directory[0][0], PADDING, PADDING)
            else:
                yield as_sample(self.directory[row][0], int(self.sets[row]), row)


def fair_subset(sets: np.ndarray, size: int) -> np.ndarray:
    """Ids of at most `size` samples, taken from the domains in turn until each runs out; `sets` [N] -> [<=
    size].

    The result is ordered by turn, so that every batch mixes the domains.
    """
    turn = np.zeros(len(sets), np.int64)  # how many samples of its domain come before each sample
    for domain in np.unique(sets):
        mine = np.flatnonzero(sets == domain)
        turn[mine] = np.arange(len(mine))
    return np.lexsort((sets, turn))[:size]
