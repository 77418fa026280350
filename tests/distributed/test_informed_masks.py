"""Informed masks under the exact constraint: two ranks, as replicas and as shards, train what one rank trains."""

import pytest
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import settings, write_yaml

SHARDS = "fsdp_config={}"
OPTIONS = [
    "model.l0_module.start=activation",
    "model.l0_module.start_samples=6",
    "model.l0_module.start_spread=1.0",
    "model.l0_module.constraint=exact",
    "model.l0_module.noise=0.3",
    "model.l0_module.lagrangian_warmup_steps=null",
    "optimizer.lag_lr=auto",
    "max_duration=3ba",
]


@pytest.mark.slow
def test_two_ranks_as_one(lab, tmp_path):
    file = str(write_yaml(tmp_path / "run.yaml", settings(lab, None)))
    jobs = {name: Job(file, [*OPTIONS, *more], double=True) for name, more in (("ddp", []), ("fsdp", [SHARDS]))}
    alone = execute(jobs["ddp"])
    masks = [name for name in alone["final"] if name.startswith("masks.") and name != "masks.energy"]
    assert len(masks) == 4 and all(".log_alpha." in name for name in masks)  # no multipliers
    assert not alone["penalties"]
    for layout, ranks in on_ranks(2, jobs, tmp_path / "two").items():
        for rank in ranks:
            for name, value in alone["final"].items():
                assert (rank["final"][name] - value).abs().max() < 1e-5, (layout, name)
        assert all((ranks[0]["final"][name] == ranks[1]["final"][name]).all() for name in masks), layout
