"""How planned draws become tokens: in this process, or read ahead by worker processes.

Workers never decide what comes next. They read what the plan says if the proportions stay; the consumer compares
each batch with the plan that really holds, and after a change of proportions throws away what was read for the old
one (at most workers x prefetch_factor batches) and starts reading ahead again. So what is trained on does not
depend on workers or prefetch, and a change holds from the very next batch.

Shapes: B draws of one rank and batch, T = max_seq_len.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llmshearing.data.mds.masks import COLUMN
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.mixture import Draw, Mixture
from llmshearing.errors import ShearingError

Sample = dict[str, Any]
Rows = dict[str, torch.Tensor]
Plan = Callable[[Mixture], list[Draw]]


class Row:
    """One sample of a batch that was read as a whole; `join` gives that batch back without copying it."""

    __slots__ = ("rows", "index")

    def __init__(self, rows: Rows, index: int) -> None:
        self.rows, self.index = rows, index

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows[name][self.index]


def join(samples: list[Row]) -> Rows:
    """Collates rows: for a DataLoader's `collate_fn`."""
    rows = samples[0].rows
    whole = all(row.rows is rows and row.index == i for i, row in enumerate(samples))
    if whole and len(samples) == len(rows["sample"]):
        return rows
    return {name: torch.stack([row[name] for row in samples]) for name in rows}


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


class Reads(Dataset):
    """Reads samples by (stream, sample id), in whatever process it is asked; `plain`: domains are in the column."""

    def __init__(self, streams: Sequence[MdsDirectory], set_names: Sequence[str], plain: bool) -> None:
        self.streams, self.set_names, self.plain = list(streams), list(set_names), plain
        self._set_index = SetIndex(set_names)
        self.masked = any(stream.masked for stream in self.streams)

    def rows(self, wanted: Sequence[tuple[int, int]]) -> Rows:
        """`input_ids` int64 [B, T], `set` int64 [B], `sample` int64 [B]; raises ShearingError for bad data.

        With `loss_mask` bool [B, T] if any stream has one; in the others every token counts.
        """
        tokens, sets, masks = [], [], []
        for stream, sample in wanted:
            directory = self.streams[stream]
            ids, name, mask = directory.read(sample)
            sets.append(self._set_index(name, directory.path))
            if not self.plain and self.set_names[stream] != name:
                raise ShearingError(
                    f"{directory.path}: sample {sample} is of domain {name!r}, not {self.set_names[stream]!r}"
                )
            tokens.append(ids)
            masks.append(np.ones(len(ids), bool) if mask is None else mask)
        rows = {
            "input_ids": torch.from_numpy(np.stack(tokens)),
            "set": torch.tensor(sets),
            "sample": torch.tensor([sample for _, sample in wanted]),
        }
        return {**rows, COLUMN: torch.from_numpy(np.stack(masks))} if self.masked else rows

    def __getitems__(self, wanted: list[tuple[int, int]]) -> dict[str, np.ndarray] | str:
        """`rows` for torch's workers, which would wrap an error in a traceback: its message is handed over instead.

        As arrays, which travel by value: a tensor would have to be fetched from the worker's shared memory, and from a
        worker that has stopped that waits for ever, whatever the timeout.
        """
        try:
            return {name: rows.numpy() for name, rows in self.rows(wanted).items()}
        except ShearingError as error:
            return str(error)


class ReadAhead:
    """Worker processes (torch's DataLoader's) that read the coming batches of this rank.

    Args:
        reads: what they read with. mixture: the real one; only looked at. plan: advances a mixture by one global
        batch and returns this rank's draws. workers, prefetch_factor, timeout (s, 0: none), context (fork, spawn,
        forkserver; None: the platform's): as in DataLoader.
    """

    def __init__(
        self,
        reads: Reads,
        mixture: Mixture,
        plan: Plan,
        *,
        workers: int,
        prefetch_factor: int | None,
        timeout: float = 0,
        context: str | None = None,
    ) -> None:
        self._mixture, self._plan, self.workers = mixture, plan, workers
        self._loader = DataLoader(
            reads,
            batch_sampler=self._requests(),  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch_factor,
            timeout=timeout,
            multiprocessing_context=context,
            generator=torch.Generator(),  # the global one would advance by as many draws as there are epochs
        )
        self._iterator: Any = None
        self._planned: deque[list[Draw]] = deque()  # asked for and not yet received
        self._restart: list[Draw] | None = None
        self._ahead = mixture

    def _requests(self) -> Iterator[list[tuple[int, int]]]:
        """What DataLoader asks workers for, whenever it has room: the future if the proportions stay."""
        while True:
            if self._restart is not None:
                plan, self._restart = self._restart, None
                self._ahead = self._mixture.fork()
            else:
                plan = self._plan(self._ahead)
            self._planned.append(plan)
            yield [(draw[0], self._ahead.sample(draw)) for draw in plan]

    def take(self, wanted: list[Draw]) -> Rows:
        """The rows of `wanted`, the plan that the mixture has just made."""
        if self._iterator is None:
            self._restart = wanted
            self._iterator = self._guarded(iter, self._loader)
        elif self._planned[0] != wanted:  # read for proportions that no longer hold, or before a jump
            self._restart = wanted
            for _ in range(len(self._planned)):
                self._receive()
        return self._receive()

    def _receive(self) -> Rows:
        self._planned.popleft()
        rows = self._guarded(next, self._iterator)
        if isinstance(rows, str):
            raise ShearingError(rows)
        return {name: torch.from_numpy(values) for name, values in rows.items()}

    def _guarded(self, step: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return step(argument)
        except RuntimeError as error:  # torch watches its workers: a dead one or a timeout ends here
            self.close()
            raise ShearingError(
                f"reading data in {self.workers} worker processes failed: {error}. A worker that was killed has "
                "usually met the memory limit or a full /dev/shm: lower num_workers or prefetch_factor"
            ) from error

    def close(self) -> None:
        """End the worker processes; the next `take` starts new ones."""
        self._iterator = None
        self._planned.clear()


def _as_it_is(rows: Any) -> Any:
    return rows
