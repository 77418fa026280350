"""Training on answers alone on two ranks, replicas and shards: the mean over all answers of the global batch.

Ranks have very different numbers of answers, and one of them none in some batches.
"""

import pytest
import torch
from helpers_answers import run_settings, write_answers
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import TARGET, write_yaml

pytestmark = pytest.mark.slow

MASKS = {"lagrangian_warmup_steps": "3ba", "eval_target_model": True, "target_model": dict(TARGET)}
SHARDS = "fsdp_config={mixed_precision: FULL}"


def test_two_ranks_do_what_one_does(lab, tmp_path):
    data = write_answers(tmp_path / "data")
    file = write_yaml(tmp_path / "run.yaml", run_settings(data, lab.source, None, MASKS))
    job = lambda *more: Job(str(file), ["max_duration=3ba", *more], double=True, gradients=[0, 2])  # noqa: E731
    alone = execute(job())
    layouts = {"replicas": job("device_train_microbatch_size=1"), "shards": job(SHARDS)}
    ranks = on_ranks(2, layouts, tmp_path / "ranks")
    for name, (first, second) in ranks.items():
        assert bool(first["sharded"]) == (name == "shards")
        for number, batch in alone["batches"].items():
            rows = sorted(first["batches"][number] + second["batches"][number])
            assert [row[:2] for row in rows] == [row[:2] for row in sorted(batch)]
        counts = [sum(loss > 0 for _, _, loss in rank["batches"][0]) for rank in (first, second)]
        for rank in (first, second):
            for number, gradients in alone["gradients"].items():
                for key, gradient in gradients.items():
                    torch.testing.assert_close(rank["gradients"][number][key], gradient, rtol=1e-5, atol=1e-8)
            assert rank["evaluations"] == pytest.approx(alone["evaluations"], rel=1e-6)
        assert sum(counts) < 4  # some sequences of the batch have no answer
