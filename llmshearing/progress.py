"""Progress of long work: in a terminal one line that rewrites itself, elsewhere plain lines now and then.

It is tqdm, and is used as tqdm is. A file, a pipe or a scheduler's log gets no cursor codes: a line at most every
``SECONDS``, and nothing of work that is done before the first. `LLMSHEARING_PROGRESS_SECONDS` sets another interval.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from tqdm import tqdm as _tqdm

SECONDS = 30.0
VARIABLE = "LLMSHEARING_PROGRESS_SECONDS"


def interval() -> float:
    """Seconds between two plain lines; what is no number above 0 counts as not given."""
    try:
        given = float(os.environ.get(VARIABLE, SECONDS))
    except ValueError:
        return SECONDS
    return given if given > 0 else SECONDS


class tqdm(_tqdm):
    """tqdm's bar in a terminal; plain lines where the output is none."""

    def __init__(self, *given: Any, **options: Any) -> None:
        file = options.get("file") or sys.stderr
        self.plain = not (hasattr(file, "isatty") and file.isatty())
        self.told = 0
        """Plain lines so far."""
        self.interval, self.last = interval(), time.monotonic()
        if self.plain:
            # ncols 0: numbers without a drawn bar. miniters 1: the time is looked at after each item, else lines lag.
            options |= {"ncols": 0, "dynamic_ncols": False, "mininterval": self.interval, "maxinterval": self.interval}
            options["miniters"] = 1
        super().__init__(*given, **options)

    def refresh(self, *given: Any, **options: Any) -> Any:
        """Show the state: at once in a terminal, where it is time for a line elsewhere."""
        if not self.plain:
            return super().refresh(*given, **options)
        if not self.disable and time.monotonic() - self.last >= self.interval:
            self._tell()
        return None

    def display(self, *given: Any, **options: Any) -> Any:
        """Of tqdm: it draws. Plain lines come from :meth:`refresh` alone."""
        return None if self.plain else super().display(*given, **options)

    def clear(self, *given: Any, **options: Any) -> Any:
        """Of tqdm: it wipes the line; a plain one stays."""
        return None if self.plain else super().clear(*given, **options)

    def close(self) -> None:
        """End it; a last plain line follows others."""
        if not getattr(self, "plain", False) or self.disable:
            return super().close()
        if self.told:
            self._tell()
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]
        return None

    def _tell(self) -> None:
        self.last, self.told = time.monotonic(), self.told + 1
        self.fp.write(f"{str(self).strip()}\n")
        self.fp.flush()


def trange(*given: int, **options: Any) -> tqdm:
    """``tqdm(range(...))``."""
    return tqdm(range(*given), **options)


class AboveTheLine(logging.StreamHandler):
    """A log whose records stand above the line that rewrites itself, not in its middle."""

    def emit(self, record: logging.LogRecord) -> None:
        """Wipe the line, write the record, draw the line again."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
