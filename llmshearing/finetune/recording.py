"""What a finetuned directory shows of itself: `report.html`, with losses by step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmshearing.finetune.training import HELD_OUT
from llmshearing.report.page import leave
from llmshearing.report.record import Recorder

log = logging.getLogger(__name__)


def record_finetuning(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the record and the page; what fails in that is a warning.

    Args:
        folder: where it is written. name: what it will be called. record: as in `finetune.json`.
    """
    try:
        recorder = Recorder(folder).start(
            "finetune",
            f"{record['method']}, from {record['source']}",
            about={key: record[key] for key in ("method", "source", "options", "data") if key in record},
            history=record["history"],
        )
        _tell(recorder, record)
        recorder.end(record.get("steps", 0))
        leave(folder, name)
    except Exception:  # the model is what was asked for
        log.warning("warning: the finetuned model has no report", exc_info=True)


def _tell(recorder: Recorder, record: Mapping[str, Any]) -> None:
    """Losses, step by step, and before and after."""
    if "steps" not in record:
        recorder.note("Nothing was trained.")
        return
    tokens, history = record["data"]["tokens"], record["log"]
    seconds = next((each["train_runtime"] for each in history if "train_runtime" in each), 0.0) / record["steps"]
    last = 0
    for each in history:
        step, seen = each["step"], round(each.get("epoch", 0.0) * tokens)
        if "loss" in each:
            values = {"loss/train/cross_entropy": each["loss"], "learning_rate": each["learning_rate"]}
            recorder.step(step, seen, seconds * (step - last), values)
            last = step
        if HELD_OUT in each:
            recorder.evaluation(step, seen, each[HELD_OUT], {"held out": each[HELD_OUT]})
    found = record["held_out_loss"]
    if found["after"] is None:
        recorder.note("Loss was measured on training data alone: there was no --eval or --eval_fraction.", warning=True)
    else:
        recorder.table("Loss on what is held out", ["before", "after"], [["all", found["before"], found["after"]]])
