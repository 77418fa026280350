"""LossMonitor: cross-entropy, perplexity and every domain's loss, in training and in evaluation."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing import files as durable
from llmshearing.training.model import DomainLoss

log = logging.getLogger(__name__)

FOLLOWED = ("divergence", "hidden")
"""What of a teacher the objective holds, by name in the model's outputs."""


def evaluated_losses(state: State) -> list[float]:
    """Each domain's loss in the evaluation that has just ended, over all ranks; NaN without a sample."""
    metric = state.eval_metrics[state.dataloader_label or "eval"]["LanguageCrossEntropy"]
    return metric.by_domain.tolist() if metric.by_domain is not None else []


def named(set_names: list[str], losses: list[float]) -> dict[str, float]:
    """Loss by domain, without those that have none."""
    return {name: loss for name, loss in zip(set_names, losses, strict=True) if not math.isnan(loss)}


def evaluation_record(state: State, set_names: list[str]) -> dict[str, Any]:
    """The evaluation that has just ended: ``batch``, ``tokens``, ``loss`` and ``domains``, nats per token."""
    mean = state.eval_metrics[state.dataloader_label or "eval"]["LanguageCrossEntropy"].compute().item()
    now = {"batch": state.timestamp.batch.value, "tokens": state.timestamp.token.value}
    return {**now, "loss": mean, "domains": named(set_names, evaluated_losses(state))}


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
        self.followed = {name: DomainLoss(1) for name in FOLLOWED}
        self.seen: set[str] = set()
        self.penalty: torch.Tensor | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Forget the last batch."""
        for metric in (self.metric, *self.followed.values()):
            metric.to(state.device._device).reset()
        self.seen.clear()

    def after_loss(self, state: State, logger: Logger) -> None:
        """Take a microbatch's losses."""
        counts = state.outputs.get("counts")
        self.metric.update(state.outputs["sample_loss"], state.batch["set"], counts)
        self.penalty = state.outputs["penalty"].detach() if "penalty" in state.outputs else None
        for name in FOLLOWED:
            if name in state.outputs:
                self.followed[name].update(state.outputs[name], torch.zeros_like(state.batch["set"]), counts)
                self.seen.add(name)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the batch."""
        mean = self.metric.compute()
        extra = {} if self.penalty is None else {"loss/train/lagrangian": self.penalty.to(mean)}
        # Means over microbatches and ranks, as of the cross-entropy. The names' order is the same on all ranks.
        extra |= {f"loss/train/{name}": self.followed[name].compute() for name in FOLLOWED if name in self.seen}
        # One transfer from the device.
        cross_entropy, *others = torch.cat([torch.stack([mean, *extra.values()]), self.metric.by_domain]).tolist()  # type: ignore[list-item]
        metrics = {
            "loss/train/cross_entropy": cross_entropy,
            "loss/train/perplexity": math.exp(min(cross_entropy, 700.0)),
        }
        metrics |= {name: others.pop(0) for name in extra}
        metrics |= {f"loss/train/{name}": loss for name, loss in named(self.set_names, others).items()}
        logger.log_metrics(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the evaluations of work that was lost before a resume."""
        if self.record is not None and self.record.is_file() and dist.get_global_rank() == 0:
            self._write(self._lines(before=state.timestamp.batch.value + 1))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log and record the evaluation."""
        losses = named(self.set_names, evaluated_losses(state))
        logger.log_metrics({f"metrics/eval/{name}_LanguageCrossEntropy": loss for name, loss in losses.items()})
        line = evaluation_record(state, self.set_names)  # on all ranks: they compute it together
        if self.record is not None and dist.get_global_rank() == 0:
            self._write([*self._lines(before=line["batch"]), json.dumps(line)])

    def _lines(self, before: int) -> list[str]:
        """The recorded evaluations of earlier batches."""
        record = self.record or Path()
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
        return [line for line in lines if json.loads(line)["batch"] < before]

    def _write(self, lines: list[str]) -> None:
        try:
            durable.write_text(self.record or Path(), "".join(f"{line}\n" for line in lines))
        except OSError as error:  # a full disk must not end training
            log.error("%s was not written: %s", self.record, error)
