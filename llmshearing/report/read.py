"""A record read again: checked line by line, without what a resumed run took back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.report.record import FORMAT, RUN_FILE

NUMBER = (int, float, type(None))
FIELDS: dict[str, dict[str, Any]] = {
    "start": {"kind": str, "title": str, "batch": int, "about": dict, "history": list, "versions": dict},
    "step": {"batch": int, "tokens": int, "seconds": NUMBER, "values": dict},
    "evaluation": {"batch": int, "tokens": int, "loss": NUMBER, "domains": dict, "mixture": dict},
    "maps": {"batch": int, "maps": dict},
    "table": {"title": str, "columns": list, "rows": list},
    "points": {"x": str, "y": str, "points": list},
    "note": {"text": str},
    "end": {"batch": int, "state": str},
}
"""Event -> its fields, and what they must be."""


@dataclass
class Run:
    """What a record tells. Lists are in the order of batches."""

    path: Path
    name: str
    """What it is called beside others."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    maps: dict[int, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, bool] = field(default_factory=dict)
    """Sentences, and whether they warn."""
    end: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """train, prune, finetune, evaluate."""
        return str(self.starts[-1]["kind"])

    @property
    def last_batch(self) -> int:
        """Of all that is told."""
        return max([*self.steps, *self.evaluations, self.starts[-1]["batch"]])

    def take(self, line: dict[str, Any]) -> None:
        """Add a line of the record."""
        event = line["event"]
        if event == "start":
            self._go_on(line["batch"])
            self.starts.append(line)
        elif event in ("step", "evaluation", "maps"):
            where = {"step": self.steps, "evaluation": self.evaluations, "maps": self.maps}[event]
            where[line["batch"]] = line
        elif event == "table":
            self.tables[line["title"]] = line
        elif event == "points":
            self.points.append(line)
        elif event == "note":
            self.notes[line["text"]] = bool(line.get("warning"))
        elif event == "end":
            self.end = line

    def _go_on(self, batch: int) -> None:
        """Forget what came after ``batch``."""
        self.end = None
        for told in (self.steps, self.evaluations, self.maps):
            for later in [at for at in told if at > batch]:
                del told[later]


def read_run(path: Path | str) -> Run:
    """The record of a folder, or the file itself.

    Raises:
        ShearingError: there is none, it is of another format, or a line is damaged (which one is said).
    """
    path = Path(path)
    file = path / RUN_FILE if path.is_dir() else path
    if not path.exists():
        raise ShearingError(f"{path}: there is no such folder")
    if not file.is_file():
        raise ShearingError(
            f"{path} is no run: it has no {RUN_FILE}. Give the save_folder of train, or the output of prune, evaluate "
            "or finetune; what was made before version 0.2.0 has no record"
        )
    try:
        texts = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ShearingError(f"{file} cannot be read: {error.strerror}") from error
    run = Run(file.parent, file.parent.resolve().name)
    lines = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    begun = False
    for place, (number, text) in enumerate(lines):
        line = _parsed(text)
        if line is None and begun and _was_cut_off(lines[place + 1 :]):
            continue
        if not begun and not (isinstance(line, dict) and line.get("format") == FORMAT):
            found = line.get("format") if isinstance(line, dict) else None
            raise ShearingError(f"{file} is no record of a run: its first line has format {found!r}, not {FORMAT!r}")
        if problem := _problem(line):
            raise ShearingError(
                f"{file}, line {number} is damaged: {problem}. Remove that line to see the rest of the run"
            )
        begun = True
        if line is not None:
            run.take(line)
    if not begun:
        raise ShearingError(f"{file} is empty: the run has recorded nothing")
    for told in (run.steps, run.evaluations, run.maps):
        for batch in sorted(told):
            told[batch] = told.pop(batch)
    return run


def _parsed(text: bytes) -> Any:
    """What a line says; None: nothing that can be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _was_cut_off(rest: list[tuple[int, bytes]]) -> bool:
    """Whether a line that cannot be read is one that a killed run was writing."""
    if not rest:
        return True
    following = _parsed(rest[0][1])
    return isinstance(following, dict) and following.get("event") == "start"


def _problem(line: Any) -> str | None:
    """What is wrong with a line, or None. Events of later versions are none of ours, and pass."""
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return "it is no JSON object with an event"
    for name, kind in FIELDS.get(line["event"], {}).items():
        value = line.get(name, ...)
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join({"NoneType": "null"}.get(each.__name__, each.__name__) for each in kinds)
            return f"{name} of its {line['event']} is {'absent' if value is ... else repr(value)[:40]}, not {wanted}"
    for name in {"step": ["values"], "evaluation": ["domains", "mixture"]}.get(line["event"], []):
        if wrong := [key for key, value in line[name].items() if not isinstance(value, NUMBER)]:
            return f"{name} {wrong[0]!r} is {line[name][wrong[0]]!r:.40}, no number"
    return _inside(line)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _inside(line: dict[str, Any]) -> str | None:
    """What is wrong further inside of a line, or None."""
    event = line["event"]
    if event == "table" and not all(isinstance(row, list) and row for row in line["rows"]):
        return "rows of its table must be lists with a name first"
    if event == "points" and not all(
        isinstance(each, dict) and {"name", "x", "y"} <= set(each) for each in line["points"]
    ):
        return "its points need a name, x and y"
    if event == "maps":
        if not all(isinstance(view, dict) for view in line["maps"].values()):
            return "its maps need kinds of units"
        for found in (found for view in line["maps"].values() for found in view.values()):
            whole = (
                isinstance(found, dict) and isinstance(found.get("units"), int) and isinstance(found.get("rows"), list)
            )
            if not whole or not found["rows"] or not all(isinstance(row, str) for row in found["rows"]):
                return "its maps need units and rows of text for each kind"
            sums = found.get("sums")
            if not isinstance(sums, list) or len(sums) != len(found["rows"]) or not all(map(_is_number, sums)):
                return "its maps need a sum for each row"
    return None
