"""Runs that tell what they trained on: in this process, or on several ranks started by Composer's launcher.

As a program (`layouts.py JOBS.json`) it is one rank, which goes through a list of jobs with the others: starting a rank
costs more than a tiny run does.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from composer import Callback
from composer.utils import dist
from torch.distributed.tensor import DTensor

import llmshearing.train as training
from llmshearing.config import load_config


@dataclass
class Job:
    """A configuration file with overrides. double: everything in float64. gradients: batches to keep gradients of."""

    config: str
    overrides: list[str] = field(default_factory=list)
    double: bool = False
    gradients: list[int] = field(default_factory=list)


class Record(Callback):
    """Samples and losses of every batch, gradients as the optimizer gets them, and where weights are."""

    def __init__(self, gradients):
        self.wanted, self.gradients = gradients, {}
        self.batches, self.penalties, self.evaluations = {}, {}, {}

    def after_loss(self, state, logger):
        rows = zip(
            state.batch["set"].tolist(),
            state.batch["sample"].tolist(),
            state.outputs["sample_loss"].tolist(),
            strict=True,
        )
        self.batches.setdefault(state.timestamp.batch.value, []).extend(rows)
        if "penalty" in state.outputs:
            self.penalties[state.timestamp.batch.value] = state.outputs["penalty"].item()

    def after_train_batch(self, state, logger):
        if state.timestamp.batch.value in self.wanted:
            named = {name.removeprefix("module."): p.grad for name, p in state.model.named_parameters()}
            self.gradients[state.timestamp.batch.value] = {name: whole(gradient) for name, gradient in named.items()}

    def eval_end(self, state, logger):
        metric = state.eval_metrics["eval"]["LanguageCrossEntropy"]
        self.evaluations[state.timestamp.batch.value] = metric.compute().item()


def whole(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone()


def execute(job: Job) -> dict:
    """Train; what was recorded, on this rank."""
    cfg = load_config(job.config, job.overrides)
    load_model, build_masks = training.load_model, training.build_masks

    def masks(source, cfg):
        built = build_masks(source, cfg)
        return built.double() if built is not None else None

    double = contextlib.ExitStack()
    if job.double:
        double.enter_context(patch.object(training, "load_model", lambda *args: load_model(*args).double()))
        double.enter_context(patch.object(training, "build_masks", masks))
    record = Record(job.gradients)
    with double, patch.object(training, "build_callbacks", _with(record, training.build_callbacks)):
        trainer = training.train(cfg)
    parameters = list(trainer.state.model.parameters())
    state = trainer.state.model.state_dict()
    result = {name: getattr(record, name) for name in ("batches", "penalties", "evaluations", "gradients")}
    result["sharded"] = sum(isinstance(parameter, DTensor) for parameter in parameters)
    result["final"] = {name.removeprefix("module."): whole(value) for name, value in state.items()}
    return result


def _with(record, build):
    return lambda *args: [*build(*args), record]


def main(path: Path) -> None:
    for number, job in enumerate(json.loads(path.read_text())):
        result = execute(Job(**job))
        torch.save(result, path.with_name(f"result-{number}-rank{dist.get_global_rank()}.pt"))
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))
    main(Path(sys.argv[1]))
