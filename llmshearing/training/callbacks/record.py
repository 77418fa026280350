"""RunRecord: what `report.html` is drawn from, written while the run goes on (`llmshearing.report`).

It listens to what the other callbacks log, and computes nothing of its own but the mask maps of an evaluation. So it
needs no transfer from a device and has no part in the run's state. Whatever fails in here ends the record, not the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from llmshearing.masks import hard_concrete
from llmshearing.masks.l0 import L0Masks
from llmshearing.report.images import curve_image, map_image
from llmshearing.report.maps import encoded
from llmshearing.report.page import leave
from llmshearing.report.record import Recorder
from llmshearing.training.callbacks.losses import evaluation_record

log = logging.getLogger(__name__)

RECORDED = ("loss/train/", "pruning/", "mixture/")
"""What metrics begin with that are recorded ..."""
LEFT_OUT = ("/perplexity", "/epoch", "/excess", "/loss", "loss/train/total")
"""... and what they end with that others tell already."""
AT_MOST = 2000  # lines of steps, where the run's length is known in batches
DRAWN = 100  # the time between two drawings, in those that the first of them took
Method = TypeVar("Method", bound=Callable[..., None])


def guarded(method: Method) -> Method:
    """On the first rank, and never at the cost of the run: the first error is told, and is the end of the record."""

    @wraps(method)
    def call(self: RunRecord, *given: Any, **options: Any) -> None:
        if self.silent or dist.get_global_rank() != 0:
            return
        try:
            method(self, *given, **options)
        except Exception:
            self.silent = True
            log.warning("warning: the record for report.html ends here, training goes on", exc_info=True)

    return call  # type: ignore[return-value]


def mask_maps(masks: L0Masks, to_target: bool) -> dict[str, dict[str, Any]]:
    """``kept``: units whose gate, without noise, is open; ``open``: P(gate > 0). By kind; see `report.maps`."""
    gates = masks.deterministic(to_target)
    with torch.no_grad():
        chance = {kind: hard_concrete.probability_open(a) for kind, a in masks.log_alpha.items()}
    views = {"kept": {kind: gate.ne(0) for kind, gate in gates.items()}, "open": chance}
    return {
        view: {kind: encoded(_layers(masks, kind, value)) for kind, value in values.items()}
        for view, values in views.items()
    }


def _layers(masks: L0Masks, kind: str, value: torch.Tensor) -> np.ndarray:
    """Rows of a map: one a layer, or the one that all layers share."""
    whole = value.detach().double().cpu().numpy()
    if whole.ndim == 2:
        return whole
    return whole[:, None] if kind not in masks.table.kinds else whole[None]


class RunRecord(LoggerDestination):
    """Writes `run.jsonl`, draws `report.html` at evaluations and at the end, and logs its figures as images.

    Args:
        folder: of the run. opening: of :meth:`Recorder.start`, what it does not find out itself. masks, to_target: as
            of `PruningCallback`. table: makes the rows of the table of sizes. set_names: domains of the evaluations.
        goes_on: the record in the folder is this run's, even at batch 0.
    """

    def __init__(
        self,
        folder: Path,
        opening: Mapping[str, Any],
        table: Callable[[], tuple[list[str], list[list[Any]]]],
        set_names: list[str],
        masks: L0Masks | None = None,
        to_target: bool = False,
        goes_on: bool = False,
    ) -> None:
        self.recorder, self.opening, self.table = Recorder(folder), dict(opening), table
        self.set_names, self.masks, self.to_target, self.goes_on = list(set_names), masks, to_target, goes_on
        self.silent = False
        self.values: dict[str, float] = {}
        self.seconds, self.mark = 0.0, time.perf_counter()
        self.begun = self.ended = False
        self.drawn_from = 0.0  # on the clock of perf_counter
        self.waiting: list[Callable[[], None]] = []
        """What an evaluation before the first batch has told."""
        self.curves: dict[str, list[tuple[float, float]]] = {}
        """Kind -> (expected, wanted) part that is open, line by line, for the images."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take what is recorded."""
        for name, value in metrics.items():
            if name.startswith(RECORDED) and not name.endswith(LEFT_OUT) and isinstance(value, (int, float)):
                self.values[name] = float(value)

    @guarded
    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin the record at the run's first batch, or go on with it there: nothing stands against the run then."""
        if self.begun:
            return
        self.begun, batch = True, state.timestamp.batch.value
        self.recorder.start("train", batch=batch, fresh=not (batch or self.goes_on), **self.opening)
        self.recorder.table("Sizes", *self.table())
        for write in self.waiting:
            write()
        self.waiting.clear()

    @guarded
    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A batch begins: neither saves nor evaluations count as its time."""
        self.mark = time.perf_counter()

    @guarded
    def batch_end(self, state: State, logger: Logger) -> None:
        """Record the batch, or one of several in a long run."""
        self.seconds += time.perf_counter() - self.mark
        batch = state.timestamp.batch.value
        if batch % self._every(state) == 0 or batch == 1:
            values = {name: value for name, value in self.values.items() if not name.startswith("mixture/")}
            self.recorder.step(batch, state.timestamp.token.value, self.seconds, self._renamed(values))
            self.seconds = 0.0
        self.values.clear()

    def _renamed(self, values: dict[str, float]) -> dict[str, float]:
        """The same with sparsities as the units that they leave open."""
        values = {name: value for name, value in values.items() if not name.startswith("pruning/expected_sparsity/")}
        for kind in self.masks.kinds if self.masks is not None else ():
            size = self.masks.row_size(kind)  # type: ignore[union-attr]
            gone = values.pop(f"pruning/target_sparsity/{kind}", None)
            if gone is not None:
                values[f"pruning/wanted_units/{kind}"] = (1 - gone) * size
            pair = [values.get(f"pruning/{what}/{kind}") for what in ("open_units", "wanted_units")]
            if pair[0] is not None:
                wanted = pair[0] if pair[1] is None else pair[1]
                self.curves.setdefault(kind, []).append((pair[0] / size, wanted / size))
        return values

    def _every(self, state: State) -> int:
        """A line for so many batches."""
        end = state.max_duration
        known = end is not None and end.unit == TimeUnit.BATCH
        return max(1, -(-end.value // AT_MOST)) if known and end is not None else 1

    def eval_end(self, state: State, logger: Logger) -> None:
        """Record the evaluation and its maps, and draw."""
        told = evaluation_record(state, self.set_names)  # all ranks compute it together
        self._evaluated(told, logger)

    @guarded
    def _evaluated(self, told: Mapping[str, Any], logger: Logger) -> None:
        mixture = {name.split("/")[1]: value for name, value in self.values.items() if name.startswith("mixture/")}
        maps = mask_maps(self.masks, self.to_target) if self.masks is not None else {}

        def write() -> None:
            self.recorder.evaluation(told["batch"], told["tokens"], told["loss"], told["domains"], mixture)
            if maps:
                self.recorder.maps(told["batch"], maps)

        if self.begun:
            write()
            self._draw()
        else:
            self.waiting.append(write)
        self._log_images(maps, logger)

    def _draw(self) -> None:
        """Draw the page, unless that would come to more than a hundredth of the time."""
        began = time.perf_counter()
        if began >= self.drawn_from:
            leave(self.recorder.folder)
            self.drawn_from = began + DRAWN * (time.perf_counter() - began)

    def _log_images(self, maps: Mapping[str, Mapping[str, Any]], logger: Logger) -> None:
        """To those loggers that take images (W&B, TensorBoard)."""
        ours = LoggerDestination.log_images
        if not maps or all(type(each).log_images is ours for each in logger.destinations):
            return
        for view, kinds in maps.items():
            for kind, found in kinds.items():
                logger.log_images(map_image(found), f"masks/{view}/{kind}", channels_last=True, use_table=False)
        for kind, pairs in self.curves.items():
            expected, wanted = zip(*pairs, strict=True)
            logger.log_images(curve_image(wanted, expected), f"shape/{kind}", channels_last=True, use_table=False)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The run has come to its end."""
        self._end(state, "finished")

    def close(self, state: State, logger: Logger) -> None:
        """It was stopped, if it has not come to its end."""
        self._end(state, "stopped")

    @guarded
    def _end(self, state: State, how: str) -> None:
        if self.ended or not self.begun:
            return
        self.ended = True
        self.recorder.table("Sizes", *self.table())
        self.recorder.end(state.timestamp.batch.value, how)
        leave(self.recorder.folder)
