"""GGUF files against gguf's own name map, transformers' own GGUF reader, and llama.cpp where it is installed."""

import json

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from helpers_gguf import CASES, GEMMA, HELD, LLAMA3, model_of, needs_llama_cpp, write
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.parity import scores_of, token_ids
from llmshearing.cli import main
from llmshearing.families import table_for
from llmshearing.families.gguf import ARCHITECTURES, layout_of, rope_factors
from llmshearing.gguf.arrange import arranged, ours, plan
from llmshearing.gguf.check import gguf_parity, llama_cpp_scores
from llmshearing.gguf.read import keys_of, read_weights
from llmshearing.gguf.tokenizer import NO_TOKENIZER
from llmshearing.gguf.write import write_gguf
from llmshearing.prune.run import prune
from llmshearing.storage import LazyTensors, lazily

# Of transformers' own reader of GGUF files; that of others leaves out the width of heads or of rotary positions.
READ_BY_TRANSFORMERS = {"llama", "mistral", "qwen2"}


def stored(path):
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in GGUFReader(path).tensors
    }


# Tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_ggufs_own_map(family):
    variant, changes = HELD[family][0]
    config = model_of(family, variant, **changes).config
    table, layout = table_for(config), ARCHITECTURES[family]
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    known = get_tensor_name_map(MODEL_ARCH(arch), table.layers)
    for planned in plan(table, layout):
        source = planned.sources[0].replace(".experts.0.", ".experts.")
        if "block_sparse_moe.experts" in source:  # the name under which llama.cpp's converter stacks Mixtral's
            source = source.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        assert known.get_name(source, (".weight", ".bias")) == planned.name


def permuted(weight, heads):
    """As llama.cpp wants the rows of rotated heads: element i of the first half beside element i of the second."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1)
    return weight[np.stack([rows[:, 0], rows[:, 1]], axis=-1).ravel()]


def test_heads_of_a_llama_are_interleaved_and_the_rest_is_bit_identical(tmp_path):
    model = model_of("llama", "heads apart", head_dim=24)
    found, weights = stored(write(model, tmp_path / "a.gguf")), model.state_dict()
    for layer in range(3):
        own, file = f"model.layers.{layer}.self_attn.", f"blk.{layer}.attn_"
        for name in "qk":
            assert np.array_equal(
                found[f"{file}{name}.weight"], permuted(weights[f"{own}{name}_proj.weight"].numpy(), 4)
            )
        assert np.array_equal(found[f"{file}v.weight"], weights[f"{own}v_proj.weight"].numpy())
        assert np.array_equal(found[f"{file}output.weight"], weights[f"{own}o_proj.weight"].numpy())
    assert np.array_equal(found["token_embd.weight"], weights["model.embed_tokens.weight"].numpy())
    assert "output.weight" not in found  # tied
    assert keys_of(tmp_path / "a.gguf")["llama.attention.key_length"] == 24


def test_other_forms_of_tensors(tmp_path):
    experts = model_of("mixtral")
    found = stored(write(experts, tmp_path / "moe.gguf"))
    wanted = [experts.state_dict()[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"].numpy() for e in range(4)]
    assert np.array_equal(found["blk.1.ffn_down_exps.weight"], np.stack(wanted))
    turned = model_of("gpt2", "tied")
    found = stored(write(turned, tmp_path / "gpt2.gguf"))
    assert np.array_equal(
        found["blk.0.attn_qkv.weight"], turned.state_dict()["transformer.h.0.attn.c_attn.weight"].T.numpy()
    )
    offset = model_of("gemma2", "tied", **GEMMA)
    found = stored(write(offset, tmp_path / "gemma.gguf"))
    assert np.array_equal(found["output_norm.weight"], 1 + offset.state_dict()["model.norm.weight"].numpy())
    by_head = model_of("gpt_neox", "parallel")
    fused = by_head.state_dict()["gpt_neox.layers.2.attention.query_key_value.weight"].unflatten(0, (4, 3, 16))
    found = stored(write(by_head, tmp_path / "neox.gguf"))
    assert np.array_equal(found["blk.2.attn_qkv.weight"], fused.transpose(0, 1).flatten(0, 2).numpy())


SMALLER = [(CASES[at], dtype) for at in (1, 8, 17) for dtype in ("f16", "bf16", "q8_0")]


@pytest.mark.parametrize(("case", "dtype"), [*((case, "f32") for case in CASES), *SMALLER], ids=str)
def test_what_is_read_back_is_what_was_written_within_the_dtype(case, dtype, tmp_path):
    family, variant, changes = case
    model = model_of(family, variant, **changes)
    write(model, tmp_path / "a.gguf", dtype)
    back, weights = read_weights(tmp_path / "a.gguf", model.config), model.state_dict()
    assert set(table_for(model.config).by_name) == back.keys()
    for name, value in back.items():
        error = (value - weights[name]).abs().max().item()
        exact = dtype == "f32" and "norm" not in name
        assert error == 0 if exact else error < 5e-3 * weights[name].abs().max().item() + 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_form_has_its_inverse(case):
    model = model_of(case[0], case[1], **case[2])
    table = table_for(model.config)
    layout = layout_of(table)
    for planned in plan(table, layout):
        for source in planned.sources:
            value = model.state_dict()[table.by_name[source][0].alias or source].double()
            there = arranged(value, planned.row, planned.layer, table, layout)
            assert torch.allclose(ours(there, planned.row, planned.layer, table, layout).double(), value, atol=1e-6)


def test_streaming_asks_for_each_tensor_once_and_in_order(tmp_path):
    model, asked = model_of("mixtral"), []
    entries = {
        name: type(entry)(entry.shape, entry.dtype, lambda name=name, entry=entry: asked.append(name) or entry.make())
        for name, entry in lazily(model.state_dict()).entries.items()
    }
    write_gguf(LazyTensors(entries), model.config, tmp_path / "a.gguf", name="a", tokenizer=NO_TOKENIZER)
    assert asked == [
        source for planned in plan(table_for(model.config), ARCHITECTURES["mixtral"]) for source in planned.sources
    ]


def test_matrices_whose_rows_are_no_blocks_are_float16(tmp_path, caplog):
    model = model_of("llama", intermediate_size=90)
    write(model, tmp_path / "a.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32" and "rows are no multiple of 32" in caplog.text


def test_frequencies_of_llama_3_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model_of("llama", rope_scaling=LLAMA3).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(rope_factors(config, table_for(config))), scaled, rtol=1e-5)


# Logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(READ_BY_TRANSFORMERS))
def test_transformers_own_reader_computes_the_same(family, tmp_path):
    """An independent reader that always runs. It wants a tokenizer's keys, and heads of hidden units / heads."""
    model = model_of(family, **({"sliding_window": None} if family == "mistral" else {}))
    write(model, tmp_path / "a.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", attn_implementation="eager").float()
    ids = token_ids(model.config)
    assert (scores_of(model, ids) - scores_of(read, ids)).abs().max() < 1e-4


class TableOfGelu(torch.nn.Module):
    """GELU as llama.cpp has it on a CPU: of float16 numbers, rounded to float16, in the form with tanh."""

    def forward(self, x):
        rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, rounded))


def with_table_of_gelu(model):
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child).__module__ == "transformers.activations":
                setattr(module, name, TableOfGelu())


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_llama_cpp_computes_the_same(case, tmp_path):
    family, variant, changes = case
    model = model_of(family, variant, **changes)
    write(model, tmp_path / "a.gguf")
    ids = token_ids(model.config)
    found = llama_cpp_scores(tmp_path / "a.gguf", ids)
    if ARCHITECTURES[family].from_a_table:
        assert (scores_of(model, ids) - found).abs().max() < 1e-2
        with_table_of_gelu(model)  # which is the whole of that difference
    assert (scores_of(model, ids) - found).abs().max() < 1e-3


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_the_certificate_of_a_smaller_dtype_is_llama_cpps(dtype, tmp_path):
    model = model_of("qwen3", head_dim=32)
    write(model, tmp_path / "a.gguf", dtype)
    parity = gguf_parity(tmp_path / "a.gguf", lazily(model.state_dict()).entries, model.config)
    assert (parity.reader, parity.compared, parity.passed) == ("llama.cpp", "log-probabilities", True), parity


# Layers of unequal sizes -------------------------------------------------------------------------------------------


def unequal(tmp_path):
    """A model whose layers differ in heads and in intermediate units."""
    model_of("llama").save_pretrained(tmp_path / "source")
    target = {"intermediate_size": [96, 64, 32], "num_attention_heads": [4, 2, 4], "num_key_value_heads": [2, 1, 2]}
    return prune("random", tmp_path / "source", tmp_path / "unequal", target).path


def test_layers_that_differ_in_size_are_the_deci_form(tmp_path):
    out = tmp_path / "a.gguf"
    assert main(["convert", str(unequal(tmp_path)), str(out)]) == 0
    keys = keys_of(out)
    assert keys["general.architecture"] == "deci" and keys["deci.feed_forward_length"] == [96, 64, 32]
    assert keys["deci.attention.head_count"] == [4, 2, 4] and keys["deci.attention.head_count_kv"] == [2, 1, 2]
    assert json.loads((tmp_path / "a.parity.json").read_text())["passed"]


@needs_llama_cpp
def test_llama_cpp_computes_layers_that_differ_in_size(tmp_path):
    folder = unequal(tmp_path)
    main(["convert", str(folder), str(tmp_path / "a.gguf")])
    told = json.loads((tmp_path / "a.parity.json").read_text())
    assert told["reader"] == "llama.cpp" and told["largest_difference"] < 1e-3
