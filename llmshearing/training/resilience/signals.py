"""SIGTERM and SIGUSR1 (SLURM's preemption): a wish to stop, heard at once and followed at the next boundary of a batch.

Composer's own handler ends the process where it stands; ours is put in its place for the time of a run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmshearing.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedEarly(BaseException):
    """A signal before training, wherever the program is: no `except Exception` there may take it for a bad file."""


class StopRequest:
    """The first signal that arrived, 0 for none. While ``deferred`` it is only noted; before that it ends the run."""

    def __init__(self) -> None:
        self.number, self.deferred = 0, False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.number = self.number or number
        if not self.deferred:
            name = signal.Signals(number).name
            raise StoppedEarly(f"stopped by {name} before training began: there was nothing to save")


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Hear the signals within the block. Outside of the main thread, where Python hears none, the request stays 0.

    Raises:
        Stopped: one came before training.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    except StoppedEarly as early:
        raise Stopped(str(early)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
