"""Runs that tell what they trained on: in this process, or on ranks that Composer's launcher starts.

As a program (`helpers_layouts.py JOBS.json`) it is one rank, which goes through a list of jobs with the others, since
starting a rank takes longer than a tiny run.
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from composer import Callback
from composer.utils import dist
from helpers_runs import free_port, run
from torch.distributed.tensor import DTensor

from llmshearing.config import load_config
from llmshearing.train import train
from llmshearing.training import build


@dataclass
class Job:
    """A configuration file with overrides. double: all in float64. autocast: bfloat16 inside the forward pass, as where
    the processor has it. gradients: batches to keep the gradients of."""

    config: str
    overrides: list[str] = field(default_factory=list)
    double: bool = False
    autocast: bool = False
    gradients: list[int] = field(default_factory=list)


class Record(Callback):
    """Samples and losses of batches, gradients as the optimizer gets them, evaluations, calls of the first layer."""

    def __init__(self, wanted):
        self.wanted, self.layer_calls = wanted, 0
        self.batches, self.penalties, self.gradients, self.evaluations = {}, {}, {}, {}

    def fit_start(self, state, logger):
        model = getattr(state.model, "module", state.model).model.model
        # before, not after: recomputing ends within the layer, as soon as all that was dropped is there again
        model.layers[0].mlp.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.layer_calls += module.training

    def after_loss(self, state, logger):
        columns = (state.batch["set"], state.batch["sample"], state.outputs["sample_loss"])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self.batches.setdefault(state.timestamp.batch.value, []).extend(rows)
        if "penalty" in state.outputs:
            self.penalties[state.timestamp.batch.value] = state.outputs["penalty"].item()

    def after_train_batch(self, state, logger):
        if state.timestamp.batch.value in self.wanted:
            named = {name.removeprefix("module."): p.grad for name, p in state.model.named_parameters()}
            self.gradients[state.timestamp.batch.value] = {name: _whole(value) for name, value in named.items()}

    def eval_end(self, state, logger):
        metric = state.eval_metrics["eval"]["LanguageCrossEntropy"]
        self.evaluations[state.timestamp.batch.value] = metric.compute().item()


def _whole(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def execute(job: Job) -> dict:
    """Train as `train.py` does; what this rank recorded, and the final weights and masks."""
    cfg, record = load_config(job.config, job.overrides), Record(job.gradients)
    load_model, build_masks, build_callbacks = build.load_model, build.build_masks, build.build_callbacks

    def masks(*args):
        built = build_masks(*args)
        return None if built is None else built.double()

    with contextlib.ExitStack() as changes:
        change = lambda name, value: changes.enter_context(patch.object(build, name, value))  # noqa: E731
        change("build_callbacks", lambda *args: [*build_callbacks(*args), record])
        if job.double:
            change("load_model", lambda *args: load_model(*args).double())
            change("build_masks", masks)
        if job.autocast:
            change("cpu_autocast", lambda *args: torch.bfloat16)
        state = train(cfg).state
    result = {
        name: getattr(record, name) for name in ("batches", "penalties", "evaluations", "gradients", "layer_calls")
    }
    result["sharded"] = sum(isinstance(parameter, DTensor) for parameter in state.model.parameters())
    teacher = getattr(getattr(state.model, "module", state.model), "teacher", None)
    told = teacher.model.parameters() if hasattr(teacher, "model") else ()
    result["teacher_sharded"] = sum(isinstance(parameter, DTensor) for parameter in told)
    result["final"] = {key.removeprefix("module."): _whole(value) for key, value in state.model.state_dict().items()}
    return result


def on_ranks(ranks: int, jobs: dict[str, Job], folder: Path) -> dict[str, list[dict]]:
    """What each rank recorded of each job, all jobs in one launch."""
    folder.mkdir(parents=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs.values()]))
    command = ["composer", "-n", ranks, "--master_port", free_port(), "--stdout", folder / "rank{rank}.txt"]
    result = run(*command, Path(__file__).resolve(), path, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return {
        name: [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(ranks)]
        for number, name in enumerate(jobs)
    }


def main(path: Path) -> None:
    for number, job in enumerate(json.loads(path.read_text())):
        result = execute(Job(**job))
        torch.save(result, path.with_name(f"{number}-{dist.get_global_rank()}.pt"))
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
