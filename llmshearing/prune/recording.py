"""What a pruned directory shows of itself: `report.html`, with the units that stay layer by layer."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, Units
from llmshearing.prune.method import Choice
from llmshearing.prune.report import CONTEXT
from llmshearing.report.maps import encoded
from llmshearing.report.page import leave
from llmshearing.report.record import Recorder

log = logging.getLogger(__name__)

MOST = 80
"""Lines of the table of what a method tells."""


def record_prune(folder: Path, name: str, table: Table, choice: Choice, record: Mapping[str, Any]) -> None:
    """Write the record and the page of a pruned model; what fails in that is a warning.

    Args:
        folder: where it is written. name: what it will be called. table: of the source; without tensors for a decoder
            that has none. record: as in `prune.json`.
    """
    try:
        recorder = Recorder(folder).start(
            "prune",
            f"{record['method']}, from {record['source']}",
            about={key: record[key] for key in ("method", "source", "target", "options")},
            history=record["history"],
        )
        recorder.table("Before and after", ["before", "after", "change"], list(_measures(record)))
        if record["after"]["perplexity"] is None:
            recorder.note("Perplexity was not measured: there was no --calibration to report on.", warning=True)
        else:
            recorder.note(f"Perplexity is on {record['split']}, which the choice has not seen.")
        if maps := selection_maps(table, choice.selection):
            recorder.maps(0, {"kept": maps})
        if told := list(_told(choice.about))[:MOST]:
            recorder.table("What the method tells", ["value"], told)
        recorder.end()
        leave(folder, name)
    except Exception:  # the model is what was asked for
        log.warning("warning: the pruned model has no report", exc_info=True)


def _measures(record: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Rows: name, before, after, change."""
    before, after = record["before"], record["after"]
    for key in before:
        old, new = before[key], after[key]
        if old is not None and new is not None:
            name = f"FLOPs/token at {CONTEXT}" if key == "flops_per_token" else key
            yield [name, old, new, f"{new / old - 1:+.1%}"]


def selection_maps(table: Table, selection: Selection) -> dict[str, Any]:
    """Kind of unit, or branch -> which are kept, as `report.maps` has it. A layer that goes keeps nothing."""
    maps = {}
    for kind, rows in selection.units.items():
        shared = table.kinds[kind].rows is None
        found = []
        for number, units in enumerate(rows):
            own = table.at_layer(None if shared else number).kinds[kind]
            closed = not shared and not selection.layer_is_open(number)
            found.append(np.zeros(own.size * (own.rows or 1)) if closed else _kept(units, own.size * (own.rows or 1)))
        maps[kind] = encoded(found)
    for block, gate in selection.blocks.items():
        maps[block] = encoded(gate.detach().ne(0).double().cpu().numpy()[:, None])
    return maps


def _kept(units: Units, size: int) -> np.ndarray:
    row = np.zeros(size)
    is_open = np.ones(len(units.index)) if units.gate is None else units.gate.detach().ne(0).double().cpu().numpy()
    row[units.index.cpu().numpy()] = is_open
    return row


def _told(about: Any, name: str = "") -> Iterator[list[Any]]:
    """Rows of what a method tells: values, and of many numbers how they are spread."""
    if isinstance(about, Mapping):
        for key, value in about.items():
            yield from _told(value, f"{name} / {key}" if name else str(key))
        return
    numbers = list(_numbers(about)) if isinstance(about, (list, tuple)) else []
    if len(numbers) > 4:
        low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
        yield [name, f"{len(numbers):,} numbers from {low:.4g} to {high:.4g}, median {middle:.4g}"]
    elif about is not None:
        yield [name, about if isinstance(about, (int, float, list, tuple)) else str(about)[:200]]


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
