"""`llmshearing convert ... out.gguf`: what it writes, what it refuses, and what it does when the check fails."""

import json
import re

import pytest
from helpers_gguf import GEMMA, LARGER, model_of
from helpers_tokenizers import train_byte_level
from tiny import VARIANTS, config_of

from llmshearing.cli import main
from llmshearing.families import table_for
from llmshearing.families.gguf import problems_of
from llmshearing.gguf import package
from llmshearing.gguf import write as writing
from llmshearing.gguf.check import has_llama_cpp
from llmshearing.gguf.read import keys_of


def test_the_command_writes_a_file_and_its_certificate(tmp_path):
    model_of("qwen2", vocab_size=500).save_pretrained(tmp_path / "source")
    train_byte_level(tmp_path / "source")
    words = ["convert", str(tmp_path / "source"), str(tmp_path / "a.gguf"), "--dtype", "q8_0"]
    assert main(words) == 0
    told = json.loads((tmp_path / "a.parity.json").read_text())
    assert told["passed"] and told["reader"] == ("llama.cpp" if has_llama_cpp() else "gguf")
    keys = keys_of(tmp_path / "a.gguf")
    assert keys["general.file_type"] == 7 and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert main(words) == 1  # it exists
    assert main([*words, "--overwrite", "--no-check"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "a.gguf", "a.parity.json"}


def test_a_checkpoint_is_a_source_too(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "a.pt")]) == 0
    for name in ("source", "a.pt"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / f"{name}.gguf"), "_name_or_path=same"]) == 0
    assert (tmp_path / "source.gguf").read_bytes() == (tmp_path / "a.pt.gguf").read_bytes()


def test_a_family_that_llama_cpp_lacks_is_refused_by_name(tmp_path, caplog):
    model_of("opt", "tied", word_embed_proj_dim=64).save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "a.gguf")]) == 1
    assert "llama.cpp has no architecture for the opt family; it has one for llama, mistral" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen2", {**LARGER, "head_dim": 24}, "hidden_size = 64 with num_attention_heads = 4 of 24 each: it needs 96"),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "attn_logit_softcapping is not set"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 5}, "query_pre_attn_scalar = 5: it scales scores by the width"),
        ("smollm3", {}, r"no_rope_layers = \[1, 0, 1\]: it has \[1, 1, 1\]"),
        ("qwen3", {"attention_bias": True}, "it has no place for model.layers.{layer}.self_attn.o_proj.bias"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False: it can have True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = relu: it can have gelu_new"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias = False"),
        ("llama", {"rope_scaling": DYNAMIC}, "rotary scaling of the kind dynamic"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu: it can have silu"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_its_key(family, changes, said):
    config = config_of(family, next(iter(VARIANTS[family])), **changes)
    problems = "; ".join(problems_of(config, table_for(config)))
    assert re.search(said, problems), problems


def test_a_window_bounds_the_context(tmp_path, caplog):
    model_of("mistral", sliding_window=24).save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "a.gguf")]) == 0
    assert keys_of(tmp_path / "a.gguf")["llama.context_length"] == 24 and "24 tokens" in caplog.text


def test_a_file_of_other_values_is_kept_under_another_name(tmp_path, monkeypatch, caplog):
    model_of("llama").save_pretrained(tmp_path / "source")
    right = writing.encoded
    monkeypatch.setattr(writing, "encoded", lambda name, tensor, kind: right(name, tensor + ("ffn_up" in name), kind))
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "a.gguf")]) == 1
    assert "tensors differ" in caplog.text and "kept as" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"source", "a.gguf.failed", "a.parity.json.failed"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.gguf", "--tp", "2"], "one file: leave out --tp"),
        (["a.gguf", "dtype=bfloat16"], "say --dtype f32"),
        (["a.pt", "--dtype", "f16"], "--dtype and --pre are of files in .gguf"),
        (["a.gguf", "tokenizer=nowhere/at/all"], "tokenizer nowhere/at/all does not exist"),
        (["a.gguf", "vocab_size=3"], "vocab_size=3 was given"),
    ],
)
def test_options_that_do_not_fit(words, said, tmp_path, caplog):
    model_of("llama").save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / words[0]), *words[1:]]) == 1
    assert said in caplog.text and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, caplog):
    def missing(name):
        raise ImportError("No module named 'gguf'")

    monkeypatch.setattr(package, "import_module", missing)
    model_of("llama").save_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "a.gguf")]) == 1
    assert "pip install 'llmshearing[gguf]'" in caplog.text
