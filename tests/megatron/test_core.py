"""Shards in megatron-core's own GPTModel: strict loading, equal logits, ten steps; and what it saves is read here.

Never skipped: megatron-core is part of the extra `dev`. One launch of ranks goes through many models.
"""

import shutil

import pytest
import torch
from helpers_megatron import FAMILIES, assert_same_model, in_megatron_core, save_hf, save_shards, shard
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.hf_read import load_hf_weights
from llmshearing.cli import main
from llmshearing.megatron.convert import read_megatron

IDS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
STEPS = 10
TOLERANCE = 1e-4  # of logits of about 10, in float32, in another order of additions
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> Hugging Face directory, and its shards by number of ranks; the pruned ones too."""
    root = tmp_path_factory.mktemp("core")
    made = {}
    for family in FAMILIES:
        made[family] = save_hf(root / family / "hf", family), {}
    made["tied"] = save_hf(root / "tied" / "hf", tie_word_embeddings=True, rope_scaling=LLAMA3), {}
    for name, (hf, shards) in list(made.items()):
        for tp in (1, 2):
            shards[tp] = save_shards(hf, root / name / f"tp{tp}", tp)
    made["llama"][1][4] = save_shards(made["llama"][0], root / "llama" / "tp4", 4)  # more ranks than groups
    for name in ("llama", "qwen3"):
        pruned = {}
        target = ["hidden_size=24", "num_attention_heads=4", "intermediate_size=32", "num_hidden_layers=3"]
        words = ["--megatron", str(made[name][1][2]), "--output", str(root / f"{name}-pruned"), "--target", *target]
        assert not main(["prune", "random", *words])
        pruned[2] = root / f"{name}-pruned"
        for words in ([str(root / f"{name}-tp1"), "--tp", "1"], [str(root / f"{name}-hf")]):
            assert not main(["convert", str(pruned[2]), *words])
        pruned[1] = root / f"{name}-tp1"
        made[f"{name} pruned"] = root / f"{name}-hf", pruned
    return root, made


def _logits(hf):
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    with torch.no_grad():
        return model(IDS).logits


def _check(found, models, names, tp):
    for name, result in zip(names, found, strict=True):
        expected, logits = _logits(models[name][0]), torch.tensor(result["logits"])
        assert (logits - expected).abs().max() < TOLERANCE, (name, tp)
        losses = result["losses"]
        assert not losses or (len(losses) == STEPS and losses[-1] < 0.9 * losses[0]), (name, losses)


def _jobs(models, names, tp):
    steps = {name: 0 if name == "mixtral" and tp > 1 else STEPS for name in names}
    return [{"shards": str(models[name][1][tp]), "ids": IDS.tolist(), "steps": steps[name]} for name in names]


def test_one_rank(models):
    root, made = models
    _check(in_megatron_core(root / "jobs", 1, _jobs(made, list(made), 1)), made, list(made), 1)


def test_two_ranks_and_their_distributed_checkpoints(models, tmp_path):
    root, made = models
    saved = {name: root / f"{name}-dist" for name in ("llama", "mixtral", "tied")}
    jobs = [{"shards": str(made[name][1][2]), "save": str(folder)} for name, folder in saved.items()]
    found = in_megatron_core(root / "jobs", 2, [*jobs, *_jobs(made, list(made), 2)])
    _check(found[len(jobs) :], made, list(made), 2)
    for name, folder in saved.items():
        source = load_hf_weights(made[name][0])[0]
        weights, info, _ = read_megatron(folder)
        assert weights.keys() == source.keys() and info.config.vocab_size == 300
        assert all(torch.equal(weights[key], source[key]) for key in source)
        assert not main(["convert", str(folder), str(tmp_path / name), "--tp", "4", "--pp", "2"])
        again = read_megatron(tmp_path / name)[0]
        assert all(torch.equal(again[key], source[key]) for key in source)


def test_arguments_with_megatrons_own_objects_are_read(models, tmp_path):
    """As Megatron-LM saves them: enumerations of its own modules, for which stand-ins are made here."""
    from megatron.core.transformer.enums import AttnBackend

    folder = shutil.copytree(models[1]["llama"][1][1], tmp_path / "shards")
    state = shard(folder)
    state["args"].attention_backend, state["args"].rank = AttnBackend.auto, 0
    torch.save(state, folder / "release" / "mp_rank_00" / "model_optim_rng.pt")
    assert not main(["convert", str(folder), str(tmp_path / "out")])
    assert_same_model(tmp_path / "out", models[1]["llama"][0])


@pytest.mark.slow
def test_four_ranks_share_two_groups(models):
    root, made = models
    _check(in_megatron_core(root / "jobs", 4, _jobs(made, ["llama"], 4)), made, ["llama"], 4)
