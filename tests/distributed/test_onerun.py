"""A run that turns its source and folds itself: two ranks, as replicas and as shards, do what one rank does."""

import pytest
import torch
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import settings, write_yaml

from llmshearing.checkpoints.checkpoint import read_checkpoint

OPTIONS = [
    "model.turn={samples: 9}",
    "model.l0_module.start=fisher",
    "model.l0_module.start_samples=6",
    "model.l0_module.constraint=exact",
    "model.l0_module.lagrangian_warmup_steps=0ba",
    "model.l0_module.fold_at=2ba",
    "distill={hidden: 0.5}",
    "max_duration=4ba",
]


@pytest.mark.slow
def test_two_ranks_as_one(lab, tmp_path):
    file = str(write_yaml(tmp_path / "run.yaml", settings(lab, None)))
    layouts = {"ddp": [], "fsdp": ["fsdp_config={}"]}
    jobs = {name: Job(file, [*OPTIONS, *more, f"save_folder={tmp_path / name}"]) for name, more in layouts.items()}
    execute(Job(file, [*OPTIONS, f"save_folder={tmp_path / 'one'}"]))
    on_ranks(2, jobs, tmp_path / "two")
    alone = read_checkpoint(tmp_path / "one")
    for name in layouts:
        end = read_checkpoint(tmp_path / name)
        assert end.info.masks is None and end.weights.keys() == alone.weights.keys()
        for tensor, value in alone.weights.items():
            torch.testing.assert_close(end.weights[tensor], value, rtol=1e-3, atol=1e-4)
