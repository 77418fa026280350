"""The two data sets of training, as torch IterableDatasets that Composer can resume.

Shapes: R ranks, B samples a rank and batch, G = B R samples a global batch, T = max_seq_len, K domains. A
sample is `input_ids` int64 [T], `set` (index into set_names, int) and `sample` (id inside its MDS directory,
int), and `loss_mask` bool [T] where the data have one.

Every rank computes the same global sequence of positions and yields its own slice, so nothing is communicated
and the sequence does not depend on R: rank r yields positions [bG + rB, bG + (r+1)B) of global batch b.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from llmshearing.data.mds.masks import COLUMN
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.mixture import Draw, Mixture
from llmshearing.data.mixture.reading import ReadAhead, Reads, Row, Sample
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

PADDING = -1  # `set` and `sample` of a row that only keeps ranks in step; it must count for nothing


def as_sample(tokens: np.ndarray, domain: int, sample: int, mask: np.ndarray | None = None) -> Sample:
    """One row of a batch; torch's default collation makes the ints int64 [B]. mask: bool [T]; None: no row has one."""
    row = {"input_ids": torch.from_numpy(tokens), "set": domain, "sample": sample}
    return row if mask is None else {**row, COLUMN: torch.from_numpy(mask)}


class MixtureDataset(IterableDataset):
    """Mixes domains by proportions that may change between any two batches; endless, domains wrap when
    exhausted.

    One iteration is one epoch: as many samples as all domains hold together, in whole global batches (at
    least one). The next iteration goes on where the last one stopped. `len()` is this rank's samples an
    epoch.

    With `plain` there is a single stream whose domains are read from the column `set`; proportions then have
    no meaning, and setting them is an error.

    It runs in the training process, where proportions change; `workers` processes of its own read ahead for it,
    `prefetch_factor` batches each (see `reading.ReadAhead`), and end with the iteration, that is, with an epoch.
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
        workers: int = 0,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        context: str | None = None,
    ) -> None:
        super().__init__()
        self.streams = list(streams)
        self.set_names = list(set_names)
        self.mixture = mixture
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.plain = plain
        self.max_seq_len = self.streams[0].max_seq_len  # Composer counts tokens with it
        self.masked = any(stream.masked for stream in self.streams)
        self._resume_at = 0  # samples of the running epoch that were consumed before a resume
        self._reads = Reads(streams, set_names, plain)
        self._ahead: ReadAhead | None = None
        if workers:
            self._ahead = ReadAhead(
                self._reads, mixture, self._plan,
                workers=workers, prefetch_factor=prefetch_factor, timeout=timeout, context=context,
            )  # fmt: skip

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

    @property
    def epochs(self) -> np.ndarray:
        """How often each domain has been gone through, [K] float64."""
        sizes = [order.size for order in self.mixture.orders]
        return np.array(self.mixture.drawn, np.float64) / np.array(sizes, np.float64)

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            raise ShearingError("MixtureDataset runs in the training process; give the workers to the data set")
        start, self._resume_at = self._resume_at, 0
        try:
            for _ in range(start, self.epoch_size, self.global_batch_size):
                drawn = list(self.mixture.drawn)
                plan = self._plan(self.mixture)
                self._log_passes(drawn)
                if self._ahead is None:
                    rows = self._reads.rows([(draw[0], self.mixture.sample(draw)) for draw in plan])
                else:
                    rows = self._ahead.take(plan)
                for i in range(self.batch_size):
                    yield Row(rows, i)
        finally:
            if self._ahead is not None:
                self._ahead.close()

    def _plan(self, mixture: Mixture) -> list[Draw]:
        """This rank's draws of the next global batch, by which `mixture` advances.

        A whole global batch is planned at once: no change of proportions splits a batch.
        """
        plan = [mixture.next() for _ in range(self.global_batch_size)]
        first = self.rank * self.batch_size
        return plan[first : first + self.batch_size]

    def _log_passes(self, before: list[int]) -> None:
        """Say which domains the last batch has begun anew."""
        mixture = self.mixture  # whose names are those of its streams: a plain stream has one, whatever is in it
        for name, order, old, new in zip(mixture.set_names, mixture.orders, before, mixture.drawn, strict=True):
            if new > old and (new - 1) // order.size > (old - 1) // order.size >= 0:
                log.info("domain %s: epoch %d of its %d samples begins", name, (new - 1) // order.size + 1, order.size)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position to resume at, in plain numbers, the same on every rank; Composer calls it at
        checkpoints.

        `num_samples`: samples of this epoch that all ranks together have trained on (Composer's
        `sample_in_epoch`). The plan is made in this process, one batch at a time, so the mixture stands exactly
        there, whatever the workers have read ahead. `from_beginning` is part of Composer's protocol, always True.
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
        self.max_seq_len, self.masked = directory.max_seq_len, directory.masked
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
        """All rows of this rank; in a DataLoader's worker w of W, the rows of batches w, w + W, w + 2W, ..."""
        rows, worker = self._rows().tolist(), get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for start in range(first * self.batch_size, len(rows), step * self.batch_size):
            yield from map(self._read, rows[start : start + self.batch_size])

    def _read(self, row: int) -> Sample:
        padding = row == PADDING
        # Of padding the first row's tokens, so that nothing in the forward pass meets an odd value.
        ids, _, mask = self.directory.read(0 if padding else row)
        if mask is None and self.masked:
            mask = np.ones(len(ids), bool)
        return as_sample(ids, PADDING if padding else int(self.sets[row]), row, mask)


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
