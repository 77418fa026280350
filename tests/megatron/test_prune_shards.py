"""Pruned shards: the fold of the model they hold, cut rank by rank; seeds' option names; replayed selections."""

import json

import pytest
import torch
from helpers_megatron import config_of, megatron_cuts, save_hf, save_shards, shard

from llmshearing.checkpoints.hf_read import load_hf_weights
from llmshearing.cli import main
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.fold.selection import load_selection
from llmshearing.megatron.convert import read_megatron

REMAIN = [
    "--hidden_size_remain", "24", "--num_attention_heads_remain", "4", "--ffn_hidden_size_remain", "32",
    "--drop_layers", "1", "--prune_type", "balance",
]  # fmt: skip
TARGET = ["--target", "hidden_size=24", "num_attention_heads=4", "intermediate_size=32", "--drop_layers", "1"]
TEXT = "".join(json.dumps({"text": " ".join(f"w{(i * k) % 20}" for k in range(30))}) + "\n" for i in range(40))


def _prune(*words):
    assert not main(["prune", *map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Hugging Face directory with as many groups as heads, its shards of 2 ranks, and text."""
    from helpers_runs import save_tokenizer

    root = tmp_path_factory.mktemp("made")
    hf = save_hf(root / "hf", num_key_value_heads=8, tie_word_embeddings=True, vocab_size=512)
    save_tokenizer(hf)
    (root / "text.jsonl").write_text(TEXT)
    return hf, save_shards(hf, root / "shards", 2), root / "text.jsonl"


def test_every_rank_is_cut_from_its_own_part(made, tmp_path):
    """The oracle cuts each rank's file with plain indexing, as LLaMA-Pruner does, and sees no other rank's."""
    _prune("random", "--load", made[1], "--save", tmp_path / "out", *REMAIN, "--seed", 3)
    selection, _ = load_selection(tmp_path / "out" / "selection.safetensors")
    hidden = selection.units["hidden"][0].index
    for rank in range(2):
        before, after = shard(made[1], rank)["model"], shard(tmp_path / "out", rank)
        assert after["args"].ffn_hidden_size == 32 and after["args"].num_attention_heads == 4
        assert (after["args"].num_layers, after["args"].hidden_size) == (3, 24)
        for new, layer in enumerate((0, 2, 3)):
            heads = selection.units["head"][layer].index
            own = heads[heads // 4 == rank] - 4 * rank
            assert len(own) == 2
            units = selection.units["intermediate"][layer].index
            mine = units[units // 24 == rank] - 24 * rank
            assert len(mine) == 16
            old, now = f"decoder.layers.{layer}.", f"decoder.layers.{new}."
            qkv = before[old + "self_attention.linear_qkv.weight"].view(4, 3 * 4, 32)[own].flatten(0, 1)[:, hidden]
            assert torch.equal(after["model"][now + "self_attention.linear_qkv.weight"], qkv)
            proj = before[old + "self_attention.linear_proj.weight"].view(32, 4, 4)[:, own].flatten(1)[hidden]
            assert torch.equal(after["model"][now + "self_attention.linear_proj.weight"], proj)
            fc1 = before[old + "mlp.linear_fc1.weight"].view(2, 24, 32)[:, mine].flatten(0, 1)[:, hidden]
            assert torch.equal(after["model"][now + "mlp.linear_fc1.weight"], fc1)
            fc2 = before[old + "mlp.linear_fc2.weight"][hidden][:, mine]
            assert torch.equal(after["model"][now + "mlp.linear_fc2.weight"], fc2)
            norm = before[old + "input_layernorm.weight"][hidden]
            assert torch.equal(after["model"][now + "input_layernorm.weight"], norm)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),  # query heads inside groups
        ("qwen2", {"num_key_value_heads": 2, "num_attention_heads": 4}),
        ("mixtral", {"num_attention_heads": 4, "num_local_experts": 2}),
    ],
)
def test_pruned_shards_are_the_fold_of_the_model(family, target, tmp_path):
    groups = 4 if family == "qwen2" else 2
    hf = save_hf(tmp_path / "hf", family, torch.bfloat16, num_key_value_heads=groups)
    shards = save_shards(hf, tmp_path / "shards", 2, 2)
    words = [f"{key}={value}" for key, value in {**target, "intermediate_size": 32, "num_hidden_layers": 2}.items()]
    _prune("random", "--megatron", shards, "--output", tmp_path / "out", "--target", *words)
    selection, about = load_selection(tmp_path / "out" / "selection.safetensors")
    assert about["method"] == "random" and about["tp"] == 2
    source, config = load_hf_weights(hf)
    table = table_for(config, "query" if family != "qwen2" else "group")
    expected = fold(source, table, selection)
    weights, info, parallel = read_megatron(tmp_path / "out")
    assert (parallel.tp, parallel.pp) == (2, 2) and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert info.config.num_hidden_layers == 2 and len(info.history) >= 2


@pytest.mark.parametrize("method", ["activation", "fisher"])
def test_a_method_that_looks_chooses_as_for_the_same_model_in_a_directory(method, made, tmp_path):
    hf, shards, text = made
    looks = ["--calibration", text, "--samples", 4, "--report_samples", 2, "--max_seq_len", 16]
    _prune(method, "--model", hf, "--output", tmp_path / "hf", *TARGET, *looks, "--tp", 2)
    _prune(method, "--megatron", shards, "--output", tmp_path / "out", *REMAIN, *looks)
    expected, _ = load_hf_weights(tmp_path / "hf")
    weights, _, parallel = read_megatron(tmp_path / "out")
    assert parallel.tp == 2
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name
    heads = load_selection(tmp_path / "out" / "selection.safetensors")[0].units["head"]
    assert all(sorted((units.index // 4).tolist()) == [0, 0, 1, 1] for units in heads)


def test_a_free_choice_is_written_for_one_rank(made, tmp_path):
    looks = ["--calibration", made[2], "--samples", 4, "--report_samples", 2, "--max_seq_len", 16]
    words = [*TARGET[:-2], "num_hidden_layers=3", "--prune_type", "unbalance", *looks]
    _prune("fisher", "--megatron", made[1], "--output", tmp_path / "out", *words)
    weights, _, parallel = read_megatron(tmp_path / "out")
    _prune("fisher", "--model", made[0], "--output", tmp_path / "hf", *TARGET[:-2], "num_hidden_layers=3", *looks)
    expected, _ = load_hf_weights(tmp_path / "hf")
    assert parallel.tp == 1 and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_saved_selection_is_replayed(made, tmp_path):
    """One that was chosen on the Hugging Face model, on shards of any number of ranks."""
    _prune("random", "--model", made[0], "--output", tmp_path / "hf", *TARGET, "--tp", 2)
    expected, _ = load_hf_weights(tmp_path / "hf")
    chosen = tmp_path / "hf" / "selection.safetensors"
    for tp in (1, 2):
        shards = save_shards(made[0], tmp_path / f"source{tp}", tp)
        _prune("replay", "--load", shards, "--save", tmp_path / f"out{tp}", "--selection", chosen)
        weights, _, parallel = read_megatron(tmp_path / f"out{tp}")
        assert parallel.tp == tp and all(torch.equal(weights[name], expected[name]) for name in expected)
    ranks = megatron_cuts(dict(expected), config_of("llama", **load_hf_weights(tmp_path / "hf")[1].to_diff_dict()), 2)
    for rank, tensors in enumerate(ranks):
        held = shard(tmp_path / "out2", rank)["model"]
        assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


BAD = {
    "no source": (["random", "--output", "out", *TARGET], "give one source: --model DIR or --megatron DIR"),
    "two sources": (["random", "--model", "hf", "--load", "shards", "--output", "out", *TARGET], "give one source"),
    "a target twice": (
        ["random", "--load", "shards", "--save", "out", *TARGET, "--hidden_size_remain", "24"], "is given twice"
    ),
    "no target": (["random", "--load", "shards", "--save", "out"], "nothing to prune"),
    "unbalanced": (
        ["random", "--load", "shards", "--save", "out", "--num_attention_heads_remain", "3"], "head: 3 of 8 units"
    ),
    "no calibration": (["fisher", "--load", "shards", "--save", "out", *REMAIN], "give --calibration"),
    "an option of models": (["random", "--load", "shards", "--save", "out", *REMAIN, "--pad"], "--pad: not for shards"),
    "a method of models": (["obs", "--output", "out", "--ratio", "0.5"], "give one source: --model DIR"),
    "another model's selection": (
        ["replay", "--load", "shards", "--save", "out", "--selection", "other.safetensors"], "does not fit the model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_wishes_are_one_error_and_nothing_is_written(case, made, tmp_path, monkeypatch, caplog):
    from llmshearing.fold.selection import Selection, Units, save_selection

    words, say = BAD[case]
    (tmp_path / "hf").symlink_to(made[0])
    (tmp_path / "shards").symlink_to(made[1])
    save_selection(tmp_path / "other.safetensors", Selection({"hidden": (Units(torch.arange(64)),)}))
    monkeypatch.chdir(tmp_path)
    assert main(["prune", *words]) == 1
    assert say in caplog.records[-1].getMessage() and not (tmp_path / "out").exists()
