"""Muon on two ranks, as replicas and as shards whose matrices are gathered whole, does what it does on one rank."""

import pytest
import torch
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import make_model, settings, write_yaml

STEPS, SAVED = 4, 2
MUON = ["optimizer.name=muon", "optimizer.muon_lr=0.05", "optimizer.lr=1e-3", "optimizer.eps=1e-3"]
TIMES = [f"max_duration={STEPS}ba", f"save_interval={SAVED}ba", "eval_interval=4ba"]
SHARDS = "fsdp_config={mixed_precision: FULL}"
FOLDERS = "fsdp_config={mixed_precision: FULL, state_dict_type: sharded}"


@pytest.mark.slow
def test_two_ranks_as_one(lab, tmp_path):
    make_model(tie_word_embeddings=True, initializer_range=0.1, intermediate_size=45).save_pretrained(tmp_path / "tied")
    files = {
        "masks": write_yaml(tmp_path / "masks.yaml", settings(lab, None)),
        # 45 rows do not halve
        "plain": write_yaml(
            tmp_path / "plain.yaml", {**settings(lab, None), "model": {"path": str(tmp_path / "tied")}}
        ),
    }

    def begin(stage, name, *more):
        folder = f"save_folder={tmp_path / stage / name}"
        return Job(str(files[stage]), [*MUON, *TIMES, folder, *more], double=True, gradients=[0])

    def go_on(stage, name, *more):
        path = tmp_path / stage / name / (f"ep0-ba{SAVED}" if FOLDERS in more else f"ep0-ba{SAVED}-rank0.pt")
        return Job(str(files[stage]), [*MUON, *TIMES, f"load_path={path}", "trust_checkpoint=true", *more], double=True)

    alone = {stage: execute(begin(stage, "alone")) for stage in files}
    jobs = {}
    for stage in files:
        jobs |= {f"{stage} replicas": begin(stage, "replicas"), f"{stage} shards": begin(stage, "shards", SHARDS)}
        jobs[f"{stage} shards <- alone"] = go_on(stage, "alone", SHARDS)
        jobs[f"{stage} replicas <- shards"] = go_on(stage, "shards")
    jobs["masks folders"] = begin("masks", "folders", FOLDERS)
    jobs["masks folders <- folders"] = go_on("masks", "folders", FOLDERS)
    for name, ranks in on_ranks(2, jobs, tmp_path / "two").items():
        one = alone[name.split()[0]]
        for rank in ranks:
            assert (rank["sharded"] > 0) == (" shards" in name.split("<-")[0] or " folders" in name), name
            for tensor, value in one["final"].items():
                torch.testing.assert_close(rank["final"][tensor], value, rtol=1e-7, atol=1e-9, msg=f"{name}: {tensor}")
