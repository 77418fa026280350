"""What a finetuned directory shows of itself: `report.html`, from what the Trainer has logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmshearing.finetune.training import HELD_OUT
from llmshearing.report.page import leave
from llmshearing.report.record import Recorder

log = logging.getLogger(__name__)

NAMES = {"loss": "loss/train/cross_entropy", "grad_norm": "norm of the gradient", "learning_rate": "learning rate"}
"""What the Trainer calls it -> what the record does."""


def record_finetune(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the record and the page of a finetuned model; what fails in that is a warning.

    Args:
        folder: where it is written. name: what it will be called. record: what is kept beside the model.
    """
    try:
        told = {
            key: value for key, value in record.items() if key in ("source", "method", "options", "data", "seconds")
        }
        title = f"{record['method']} of {record['source']}"
        recorder = Recorder(folder).start("finetune", title, about=told, history=record["history"])
        losses = record.get("held_out_loss") or {}
        before, after, last = losses.get("before"), losses.get("after"), record.get("steps", 0)
        rows = [["held-out loss", before, after]] if after is not None else []
        if "train_loss" in record:
            rows.append(["loss in training, mean of all steps", None, record["train_loss"]])
        if rows:
            recorder.table("Losses, nats per answer token", ["before", "after"], rows)
        if before is not None:
            recorder.evaluation(0, 0, before, {"held out": before})
        for entry in record.get("log", ()):
            values = {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
            if values:
                recorder.step(entry["step"], 0, 0.0, values)
            if HELD_OUT in entry and entry["step"]:
                recorder.evaluation(entry["step"], 0, entry[HELD_OUT], {"held out": entry[HELD_OUT]})
        if after is not None:
            recorder.evaluation(last, 0, after, {"held out": after})
        recorder.end(last)
        leave(folder, name)
    except Exception:  # the model is what was asked for
        log.warning("warning: the finetuned model has no report", exc_info=True)
