"""Watching over the other ranks: who has died, and who keeps the others waiting.

Each rank's thread tells a store of rank 0 every few seconds that it lives and what its training does:

    process killed, frozen or cut off   its beats stop; the rank that watches it says so to all, and all end
    process alive, its training stuck   the others wait; after dist_timeout the rank that is furthest behind is named

Collectives have a timeout of their own, but say neither which rank kept them waiting nor at which step.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as torch_dist
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, get_device

from llmshearing.errors import RankLost

log = logging.getLogger(__name__)

BEATS_IN_TIMEOUT = 20
LONGEST_INTERVAL = 5.0  # seconds
SILENT = 0.75  # of dist_timeout: a rank whose beats stopped is given up before the collectives give up
STUCK = 0.95  # of dist_timeout: as long without any event of training, only a collective can be waiting
GONE = 3  # beats missed by a rank whose connections broke


class Watch:
    """This rank's thread and what it knows. ``progress`` is written by training, read by the thread.

    Args:
        timeout: dist_timeout, seconds. store: a TCPStore of rank 0, for this use alone.
    """

    def __init__(self, timeout: float, store: Any, rank: int, ranks: int) -> None:
        self.timeout, self.store, self.rank, self.ranks = timeout, store, rank, ranks
        self.interval = min(LONGEST_INTERVAL, timeout / BEATS_IN_TIMEOUT)
        self.progress: dict[str, Any] = {"events": 0, "batch": 0, "doing": "start-up"}
        self.moved = time.monotonic()
        self._beats = 0
        self._seen: tuple[Any, float] = (None, time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._beat()
        dist.barrier()  # every rank has a first beat to be watched by
        self._thread.start()

    def stop(self) -> None:
        """End; ranks may finish at different moments from here on."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, doing: str, batch: int) -> None:
        """Training moved on."""
        self.progress = {"events": self.progress["events"] + 1, "batch": batch, "doing": doing}
        self.moved = time.monotonic()

    def explain(self, error: Exception) -> RankLost | None:
        """Which rank a failed collective waited for; None where all live and are equally far."""
        if self._ended.is_set():
            return RankLost(f"a rank was lost after training had ended: {_first_line(error)}")
        for _ in range(2 * GONE):
            if (lost := self._lost(GONE * self.interval)) is not None:
                return RankLost(lost)
            time.sleep(self.interval)
        behind = self._furthest_behind()
        return RankLost(f"{behind}: {_first_line(error)}") if behind is not None else None

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            lost = self._lost(SILENT * self.timeout)
            if lost is None and time.monotonic() - self.moved > STUCK * self.timeout:
                lost = self._furthest_behind()
            if lost is not None and not self._ended.is_set():
                self._end(lost)

    def _end(self, lost: str) -> None:
        """Say it to the other ranks and end this one, whose training may be waiting where no exception reaches it."""
        with suppress(RuntimeError):  # where it is rank 0 that is lost
            self.store.set("lost", lost)
        log.error("%s. This rank (%d) ends; start again to go on from the newest checkpoint", lost, self.rank)
        logging.shutdown()
        os._exit(RankLost.exit_code)

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(f"beat{self.rank}", json.dumps({"beats": self._beats, **self.progress}))

    def _lost(self, silence: float) -> str | None:
        """A rank that is lost, in words: found by another rank, or by this one, which watches the next."""
        watched = (self.rank + 1) % self.ranks
        try:
            self._beat()
            if self.store.check(["lost"]):
                return self.store.get("lost").decode()
            beat = self.store.get(f"beat{watched}")
        except RuntimeError:  # DistStoreError and its kin
            return f"rank 0 is gone: it does not answer; rank {self.rank} is at {_place(self.progress)}"
        now = time.monotonic()
        if beat != self._seen[0]:
            self._seen = (beat, now)
        quiet = now - self._seen[1]
        if quiet <= silence:
            return None
        return (
            f"rank {watched} is gone: nothing heard from it for {quiet:.0f} s, last at {_place(json.loads(beat))}; "
            f"rank {self.rank} is at {_place(self.progress)}"
        )

    def _furthest_behind(self) -> str | None:
        try:
            places = [json.loads(self.store.get(f"beat{rank}")) for rank in range(self.ranks)]
        except RuntimeError:
            return None
        least = min(places, key=lambda place: place["events"])
        if all(place["events"] == least["events"] for place in places):
            return None
        waited = time.monotonic() - self.moved
        return (
            f"rank {places.index(least)} keeps the others waiting at {_place(least)}, for {waited:.0f} s (dist_timeout "
            f"= {self.timeout:g} s: raise it if a step may take so long)"
        )


def _place(progress: dict[str, Any]) -> str:
    return f"batch {progress['batch']} ({progress['doing']})"


class TrainingProgress(Callback):
    """Tells this rank's watch where training is, at every event."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Mark."""
        self.watch.mark(event.value, state.timestamp.batch.value)


def meet(device: str, timeout: float) -> None:
    """Let all ranks find one another.

    Raises:
        RankLost: not all came within ``timeout`` seconds.
    """
    try:
        dist.initialize_dist(get_device(device), timeout=timeout)
    except RuntimeError as error:
        raise RankLost(
            f"not all {dist.get_world_size()} ranks came within dist_timeout = {timeout:g} s: {_first_line(error)}"
        ) from error


@contextmanager
def watching(timeout: float) -> Iterator[Watch | None]:
    """Watch the other ranks within the block; None on one rank, which has none.

    Raises:
        RankLost: a collective failed because of a rank that is lost, in place of the collective's error.
    """
    if dist.get_world_size() == 1:
        yield None
        return
    try:
        watch = Watch(timeout, _connect(timeout), dist.get_global_rank(), dist.get_world_size())
        watch.start()
    except RuntimeError as error:
        raise RankLost(f"a rank was lost while the run started: {_first_line(error)}") from error
    try:
        yield watch
    except RuntimeError as error:
        lost = watch.explain(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        watch.stop()


def _connect(timeout: float) -> Any:
    """A store on a free port of rank 0."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    wait = datetime.timedelta(seconds=min(timeout, 30.0))
    first = dist.get_global_rank() == 0
    own = torch_dist.TCPStore(host, 0, None, True, timeout=wait, wait_for_workers=False) if first else None
    port = [own.port if own is not None else None]
    dist.broadcast_object_list(port, src=0)
    return own or torch_dist.TCPStore(host, port[0], None, False, timeout=wait, wait_for_workers=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
