"""Hugging Face -> shards of T ranks -> of T' ranks -> Hugging Face, bit by bit, from files; wrong layouts differ."""

from dataclasses import replace

import pytest
import torch
from helpers_megatron import (
    FAMILIES,
    assert_same_model,
    config_of,
    megatron_cuts,
    save_hf,
    save_shards,
    shard,
)
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.checkpoints.hf_read import load_hf_weights
from llmshearing.cli import main
from llmshearing.compat import HEADS_DIVIDE_HIDDEN
from llmshearing.families import table_for
from llmshearing.families.megatron import LAYOUTS, SPECS, Parallel, layout_of, layouts
from llmshearing.families.megatron.layout import GROUP, ONCE, RANK
from llmshearing.families.portable import portable
from llmshearing.megatron.convert import read_megatron
from llmshearing.megatron.split import Spread, place_all

# With 2 KV groups, 4 and 8 ranks share groups.
WAYS = [((1, 1), (2, 1)), ((2, 2), (4, 1)), ((4, 4), (1, 2)), ((8, 1), (2, 4))]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_through_other_numbers_of_ranks_and_back(family, tied, tmp_path):
    hf = save_hf(tmp_path / "hf", family, torch.bfloat16, tie_word_embeddings=tied)
    for number, ((tp, pp), (tp2, pp2)) in enumerate(WAYS):
        here, spec = tmp_path / str(number), SPECS[number % len(SPECS)]
        assert not main(["convert", str(hf), str(here / "a"), "--tp", str(tp), "--pp", str(pp), "--spec", spec])
        assert not main(["convert", str(here / "a"), str(here / "b"), "--tp", str(tp2), "--pp", str(pp2)])
        assert not main(["convert", str(here / "b"), str(here / "hf")])
        assert_same_model(hf, here / "hf")
        config, back = (load_hf_weights(path)[1].to_dict() for path in (hf, here / "hf"))
        for ours in ("dtype", "_name_or_path", "head_dim", "architectures"):
            config.pop(ours, None), back.pop(ours, None)
        assert back == config


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_every_rank_holds_what_megatrons_formulas_say(family, tp, tmp_path):
    hf = save_hf(tmp_path / "hf", family)
    folder = save_shards(hf, tmp_path / "shards", tp)
    expected = megatron_cuts(dict(load_hf_weights(hf)[0]), config_of(family), tp)
    for rank, tensors in enumerate(expected):
        state = shard(folder, rank)
        assert state["checkpoint_version"] == 3.0 and state["args"].tensor_model_parallel_size == tp
        assert state["model"].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(state["model"][name], tensor), name


def test_experts_are_cut_like_an_mlp_and_the_router_is_whole(tmp_path):
    hf = save_hf(tmp_path / "hf", "mixtral")
    source = load_hf_weights(hf)[0]
    folder = save_shards(hf, tmp_path / "shards", 2)
    expert = "model.layers.1.block_sparse_moe.experts.2."
    for rank in range(2):
        model = shard(folder, rank)["model"]
        own = "decoder.layers.1.mlp.experts.local_experts.2."
        joined = torch.cat([source[f"{expert}{name}.weight"].chunk(2)[rank] for name in ("w1", "w3")])
        assert torch.equal(model[own + "linear_fc1.weight"], joined)
        assert torch.equal(model[own + "linear_fc2.weight"], source[expert + "w2.weight"].chunk(2, 1)[rank])
        router = source["model.layers.1.block_sparse_moe.gate.weight"]
        assert torch.equal(model["decoder.layers.1.mlp.router.weight"], router)


def test_a_tied_head_stands_on_a_last_stage_alone(tmp_path):
    hf = save_hf(tmp_path / "hf", tie_word_embeddings=True)
    one, two = save_shards(hf, tmp_path / "one"), save_shards(hf, tmp_path / "two", pp=2)
    assert "output_layer.weight" not in shard(one)["model"] | shard(two, 0, 0)["model"]
    last = shard(two, 0, 1)["model"]
    assert torch.equal(last["output_layer.weight"], shard(one)["model"]["embedding.word_embeddings.weight"])
    assert "decoder.layers.1.input_layernorm.weight" in last and "decoder.layers.2.input_layernorm.weight" not in last


def test_the_vocabulary_is_padded_for_the_ranks_and_its_true_size_told(tmp_path):
    hf = save_hf(tmp_path / "hf")
    for tp, rows in ((1, 384), (2, 512), (4, 512)):
        state = shard(save_shards(hf, tmp_path / str(tp), tp))
        assert len(state["model"]["output_layer.weight"]) * tp == rows == state["args"].padded_vocab_size
        assert state["args"].vocab_size == 300


def test_shards_by_others_say_what_they_are_by_their_arguments_alone(tmp_path):
    """Without our own record, as Megatron saves them after a training; padded to another number of rows."""
    for family in FAMILIES:
        hf = save_hf(tmp_path / family / "hf", family)
        folder = save_shards(hf, tmp_path / family / "shards")
        file = next(folder.glob("*/*/model_optim_rng.pt"))
        state = shard(folder)
        del state["llmshearing"]
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            state["model"][name] = torch.cat([state["model"][name], torch.ones(7, 32)])
        state["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        torch.save(state, file)
        weights, info, _ = read_megatron(folder)
        source, config = load_hf_weights(hf)
        assert info.config.model_type == family
        assert all(torch.equal(weights[name], source[name]) for name in source)
        read, right = portable(info.config.to_dict()), portable(config.to_dict())
        for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "num_key_value_heads", "head_dim"):
            told, known = read.get(key), right.get(key)
            assert known in (None, told), key


def test_a_checkpoint_goes_to_shards_and_shards_to_a_checkpoint(tmp_path):
    hf = save_hf(tmp_path / "hf")
    assert not main(["convert", str(hf), str(tmp_path / "a.pt")])
    assert not main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "shards"), "--tp", "2", "dtype=bfloat16"])
    assert not main(["convert", str(tmp_path / "shards"), str(tmp_path / "b.pt")])
    assert not main(["convert", str(tmp_path / "b.pt"), str(tmp_path / "back")])
    source, back = load_hf_weights(hf)[0], load_hf_weights(tmp_path / "back")[0]
    assert all(torch.equal(source[name].bfloat16(), back[name]) for name in source)


def _changed(family, row, changes):
    """The layouts of a family with other values at the tensor that holds a row."""
    tensors = [replace(each, **changes) if row in each.rows else each for each in LAYOUTS[family]]
    return {**LAYOUTS, family: tuple(tensors)}


QKV, GATE = layouts.ATTN + "q_proj.weight", layouts.LAYER + "mlp.gate_proj.weight"
WRONG = {
    "keys and queries change places": (QKV, {"rows": tuple(layouts.ATTN + f"{n}_proj.weight" for n in "kqv")}),
    "queries of all groups first": (QKV, {"runs": ONCE}),
    "queries, keys, values by rank": (QKV, {"runs": RANK}),
    "up before gate": (GATE, {"rows": tuple(f"{layouts.LAYER}mlp.{name}_proj.weight" for name in ("up", "gate"))}),
    "gates of all ranks first": (GATE, {"runs": ONCE}),
    "gate and up by group": (GATE, {"runs": GROUP}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_layout_is_another_model(wrong, tmp_path, monkeypatch):
    """Controls: the comparisons above would see it. With 4 groups on 2 ranks each of these is another order."""
    hf = save_hf(tmp_path / "hf", num_key_value_heads=4)
    right = save_shards(hf, tmp_path / "right", 2)
    row, changes = WRONG[wrong]
    monkeypatch.setattr(layouts, "LAYOUTS", _changed("llama", row, changes))
    weights, _, _ = read_megatron(right)
    source = load_hf_weights(hf)[0]
    differ = {name for name in source if not torch.equal(weights[name], source[name])}
    assert differ and all(("_proj" in name) for name in differ)


@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 3),
    tp=st.sampled_from([1, 2, 3, 4]),
    f=st.integers(1, 5),
    vocab=st.integers(2, 300),
)
def test_parts_are_equal_and_make_up_the_whole(groups, each, tp, f, vocab):
    """Every element of every tensor stands exactly where a slow search finds it, on exactly one rank or on all."""
    if (groups % tp and tp % groups) or groups * each % tp or groups * (each + 2) * 2 % tp:
        return
    config = config_of(
        "llama", num_key_value_heads=groups, num_attention_heads=groups * each, head_dim=2, intermediate_size=f * tp,
        hidden_size=groups * each if HEADS_DIVIDE_HIDDEN else 4, vocab_size=vocab, num_hidden_layers=1,
    )  # fmt: skip
    table = table_for(config)
    placed = place_all(Spread(layout_of(table), table, tp, "local"), [0], True, True)
    for tensor in placed.values():
        rows, start = {}, 1  # 0 is padding
        for name, shape in zip(tensor.rows, tensor.shapes, strict=True):
            rows[name] = torch.arange(start, start + torch.Size(shape).numel()).view(shape)
            start += rows[name].numel()
        parts = [tensor.gathered(rank, rows.__getitem__) for rank in range(tp)]
        assert {tuple(part.shape) for part in parts} == {tensor.shape}
        for name, row in rows.items():
            assert torch.equal(tensor.scattered(name, parts.__getitem__), row)
        held = torch.cat([part.flatten() for part in parts]).sort().values
        times = 1 if tensor.split is not None else tp
        everything = torch.cat([row.flatten() for row in rows.values()])
        assert torch.equal(held[held > 0], everything.repeat_interleave(times).sort().values)


def test_more_ranks_than_groups_share_a_group_as_megatron_core_has_it(tmp_path):
    """Four ranks, two groups of four queries: each rank has half of its group's [q q q q k v] rows."""
    hf = save_hf(tmp_path / "hf")
    folder = save_shards(hf, tmp_path / "shards", 4)
    source = load_hf_weights(hf)[0]
    q, k, v = (source[f"model.layers.0.self_attn.{name}_proj.weight"].view(2, -1, 32) for name in "qkv")
    halves = [half for group in range(2) for half in torch.cat([q[group], k[group], v[group]]).chunk(2)]
    for rank, half in enumerate(halves):
        assert torch.equal(shard(folder, rank)["model"]["decoder.layers.0.self_attention.linear_qkv.weight"], half)


def test_parallel_defaults_to_one_rank():
    assert Parallel() == Parallel(1, 1, "local")
