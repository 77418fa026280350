"""A teacher that is sharded over two ranks with its student gives what a whole one gives."""

import pytest
import torch
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import settings, write_yaml


@pytest.mark.slow
def test_shards_give_the_losses_of_one_rank(lab, tmp_path):
    made = settings(lab, None)
    made["distill"] = {"ce": 0.3, "hidden": 2.0}
    path = str(write_yaml(tmp_path / "run.yaml", made))

    def job(name, *more):
        return Job(path, ["max_duration=4ba", f"save_folder={tmp_path / name}", *more], gradients=[0])

    alone = execute(job("alone"))
    gradients = alone["gradients"][0]
    assert gradients and not alone["teacher_sharded"]
    jobs = {"replicas": job("replicas"), "shards": job("shards", "fsdp_config={mixed_precision: FULL}")}
    for name, ranks in on_ranks(2, jobs, tmp_path / "two").items():
        for rank in ranks:
            assert [rank[whose] > 0 for whose in ("sharded", "teacher_sharded")] == [name == "shards"] * 2
            assert rank["gradients"][0].keys() == gradients.keys()
            for tensor, value in gradients.items():
                torch.testing.assert_close(
                    rank["gradients"][0][tensor], value, rtol=1e-3, atol=1e-5, msg=f"{name} {tensor}"
                )
            for tensor, value in alone["final"].items():
                torch.testing.assert_close(rank["final"][tensor], value, rtol=1e-3, atol=2e-4, msg=f"{name} {tensor}")
