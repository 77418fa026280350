"""LossMonitor: cross-entropy, perplexity and every domain's loss, in training and in evaluation."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing.model import DomainLoss


def evaluated_losses(state: State) -> list[float]:
    """Each domain's loss in the evaluation that has just ended, over all ranks; NaN without a sample."""
    metric = state.eval_metrics[state.dataloader_label or "eval"]["LanguageCrossEntropy"]
    return metric.by_domain.tolist() if metric.by_domain is not None else []


class LossMonitor(Callback):
    """Reports losses by domain from the vector of per-sample losses; a domain without a sample reports nothing.

    Args:
        set_names: domains, in the order of the data's ``set`` index.
        record: JSON lines file that gets one line per evaluation (step, tokens, losses); None: none.
    """

    def __init__(self, set_names: list[str], record: str | Path | None = None) -> None:
        self.set_names = list(set_names)
        self.record = Path(record) if record is not None else None
        self.metric = DomainLoss(len(set_names))
        self.penalty: torch.Tensor | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Forget the last batch."""
        self.metric = self.metric.to(state.device._device)
        self.metric.reset()

    def after_loss(self, state: State, logger: Logger) -> None:
        """Take a microbatch's losses."""
        self.metric.update(state.outputs["sample_loss"], state.batch["set"])
        self.penalty = state.outputs["penalty"].detach() if "penalty" in state.outputs else None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the batch."""
        mean = self.metric.compute()
        penalty = [] if self.penalty is None else [self.penalty.to(mean)]
        # One transfer from the device.
        cross_entropy, *others = torch.cat([torch.stack([mean, *penalty]), self.metric.by_domain]).tolist()  # type: ignore[list-item]
        metrics = {
            "loss/train/cross_entropy": cross_entropy,
            "loss/train/perplexity": math.exp(min(cross_entropy, 700.0)),
        }
        if penalty:
            metrics["loss/train/lagrangian"] = others.pop(0)
        logger.log_metrics(metrics | self._named(others, "loss/train/{}"))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log and record the evaluation."""
        losses = evaluated_losses(state)
        logger.log_metrics(self._named(losses, "metrics/eval/{}_LanguageCrossEntropy"))
        if self.record is not None and dist.get_global_rank() == 0:
            mean = state.eval_metrics[state.dataloader_label or "eval"]["LanguageCrossEntropy"].compute().item()
            line: dict[str, Any] = {"batch": state.timestamp.batch.value, "tokens": state.timestamp.token.value}
            self._write(line | {"loss": mean, "domains": self._named(losses, "{}")})

    def _write(self, line: dict[str, Any]) -> None:
        """Add a line; those of this batch or later are of work that was lost before a resume."""
        record = self.record or Path()
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        kept = [old for old in lines if json.loads(old)["batch"] < line["batch"]]
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(record.name + ".tmp")
        temporary.write_text("\n".join([*kept, json.dumps(line)]) + "\n", encoding="utf-8")
        os.replace(temporary, record)

    def _named(self, losses: list[float], pattern: str) -> dict[str, float]:
        pairs = zip(self.set_names, losses, strict=True)
        return {pattern.format(name): loss for name, loss in pairs if not math.isnan(loss)}
