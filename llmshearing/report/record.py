"""The record of a run: `run.jsonl` in its folder, format `llmshearing-run-1`. Lines are only ever appended.

A line is a JSON object; `event` says what it is (docs/report.md has all fields):

    start        the first line, and again wherever the run goes on: kind, title, batch, command, versions, ...
    step         batch, tokens, seconds, values {name: number}
    evaluation   batch, tokens, loss, domains {name: nats per token}, mixture {name: share}
    maps         batch, maps {view: {kind of unit: {units, rows, sums}}}      see `report.maps`
    table        title, columns, rows                                   a later one of the same title replaces it
    points       x, y, points [{name, x, y, error, marked}]
    note         text, warning
    end          batch, state

A `start` at batch b takes back what earlier lines tell of later batches: that work was lost. A line that a killed run
left unfinished is followed by the end of the file or by a `start`.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from llmshearing import __version__

log = logging.getLogger(__name__)

FORMAT = "llmshearing-run-1"
RUN_FILE, PAGE_FILE = "run.jsonl", "report.html"
LIBRARIES = ("torch", "transformers", "mosaicml", "mosaicml-streaming", "peft", "trl", "lm_eval", "datasets")
DIGITS = 7  # significant ones of a number, about those of a float32


class Recorder:
    """Appends to the record in ``folder``. Where that fails (a full disk) it warns once and stays silent from then on.

    A run of any kind needs these lines, on its first rank:

        record = Recorder(folder).start("finetune", "what is done", about={"model": path})
        record.step(batch, tokens, seconds, {"loss/train/cross_entropy": loss})       now and then
        record.evaluation(batch, tokens, loss, {"all": loss})
        record.end(batch)
        draw(folder)                                                                  of `report.page`
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._file: TextIO | None = None
        self._failed = False

    def start(
        self,
        kind: str,
        title: str,
        *,
        batch: int = 0,
        fresh: bool = True,
        about: Mapping[str, Any] | None = None,
        history: Sequence[str] = (),
        config: str | None = None,
    ) -> Recorder:
        """Begin, or go on.

        Args:
            kind: train, prune, finetune, evaluate. batch: where it stands. fresh: an earlier record is of another run.
            about: what the page shows as facts. history: how the model was made before. config: as text.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / RUN_FILE
            torn = not fresh and path.is_file() and not path.read_bytes().endswith(b"\n")
            self._file = open(path, "w" if fresh else "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            if torn:
                self._file.write("\n")
        except OSError as error:
            self._give_up(error)
        self._write(
            "start",
            {
                "format": FORMAT,
                "kind": kind,
                "title": title,
                "batch": batch,
                "fresh": fresh,
                "time": now(),
                "command": command(),
                "versions": versions(),
                "about": dict(about or {}),
                "history": list(history),
                "config": config,
            },
        )
        return self

    def step(self, batch: int, tokens: int, seconds: float, values: Mapping[str, float]) -> None:
        """tokens: since the beginning of the run. seconds: of the batches since the line before."""
        self._write("step", {"batch": batch, "tokens": tokens, "seconds": seconds, "values": dict(values)})

    def evaluation(
        self,
        batch: int,
        tokens: int,
        loss: float,
        domains: Mapping[str, float],
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        """loss, domains: nats per token. mixture: share of each domain in training from here on."""
        fields = {"batch": batch, "tokens": tokens, "loss": loss, "domains": dict(domains)}
        self._write("evaluation", {**fields, "mixture": dict(mixture or {})})

    def maps(self, batch: int, maps: Mapping[str, Any]) -> None:
        """maps: view -> kind of unit -> what :func:`llmshearing.report.maps.encoded` gives."""
        self._write("maps", {"batch": batch, "maps": dict(maps)})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """rows: the first cell is what the line is called; None is an empty cell."""
        self._write("table", {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})

    def points(self, x: str, y: str, points: Sequence[Mapping[str, Any]]) -> None:
        """x, y: what the axes are called."""
        self._write("points", {"x": x, "y": y, "points": [dict(point) for point in points]})

    def note(self, text: str, warning: bool = False) -> None:
        """A sentence for the page; a warning stands out."""
        self._write("note", {"text": text, "warning": warning})

    def end(self, batch: int = 0, state: str = "finished") -> None:
        """Close the record."""
        self._write("end", {"batch": batch, "state": state, "time": now()})
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"event": event, **plain(fields)}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._failed:
            log.warning("warning: %s is not written any more: %s", self.folder / RUN_FILE, error)
        self._failed, self._file = True, None


def plain(value: Any) -> Any:
    """As JSON can hold it: numbers rounded, None for those that are not finite, text for what it does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def command() -> str:
    """The command line of this process, as it was typed where that is known."""
    program, *words = sys.argv
    if Path(program).name == "__main__.py":  # python -m llmshearing
        program = "llmshearing" if Path(program).parent.name == "llmshearing" else program
    elif Path(program).name == "llmshearing":
        program = "llmshearing"
    return shlex.join([program, *words])


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the libraries that are installed."""
    found = {"llmshearing": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """This second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
