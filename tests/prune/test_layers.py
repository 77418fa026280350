"""What configs of decoders without a table say of single layers; other layers than those that stay are refused."""

import pytest
import torch
from helpers_prune import calibration_of
from helpers_tokenizers import save_word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families.layers import kept_entries
from llmshearing.prune import prune
from llmshearing.prune.methods.decoder import find_decoder

SIZES = {
    "vocab_size": 23, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


@given(st.sets(st.integers(0, 7), min_size=1).map(sorted), st.data())
def test_lists_numbers_and_leading_layers_follow(kept, data):
    """Whatever a key's form, asking the followed config about a kept layer gives the source's answer."""
    dense = data.draw(st.sets(st.integers(0, 7), max_size=7))
    leading = data.draw(st.integers(0, 8))
    types = data.draw(st.lists(st.sampled_from(["full", "sliding"]), min_size=8, max_size=8))
    rope = data.draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))
    config = {
        "num_hidden_layers": 8, "layer_types": types, "no_rope_layers": rope, "mlp_only_layers": sorted(dense),
        "first_k_dense_replace": leading, "eos_token_id": [5, 6, 7, 1, 2, 3, 4, 9], "hidden_size": 16,
    }  # fmt: skip
    new = {**config, **kept_entries(config, kept, "num_hidden_layers")}
    assert new["num_hidden_layers"] == len(kept) and new["eos_token_id"] == config["eos_token_id"]
    for number, layer in enumerate(kept):
        assert new["layer_types"][number] == types[layer] and new["no_rope_layers"][number] == rope[layer]
        assert (number in new["mlp_only_layers"]) == (layer in dense)
        assert (number < new["first_k_dense_replace"]) == (layer < leading)


FOLLOWED = {
    "llama4_text": {
        "num_hidden_layers": 8, "head_dim": 4, "num_local_experts": 2, "intermediate_size_mlp": 10,
        "no_rope_layer_interval": 4, "attention_chunk_size": 8,
    },
    "qwen2_moe": {"num_hidden_layers": 6, "mlp_only_layers": [0, 4], **MOE},
}  # fmt: skip


@pytest.mark.parametrize("family", FOLLOWED)
def test_the_directory_is_the_decoder_without_the_layers(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FOLLOWED[family]})).eval()
    model.save_pretrained(tmp_path / "source")
    save_word_tokenizer(tmp_path / "source")
    out = prune("depth", tmp_path / "source", tmp_path / "out", {"drop_layers": [1, 2]})
    decoder, ids = find_decoder(model), calibration_of(2).select
    with torch.no_grad(), decoder.without([1, 2]):
        wanted = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out.path).eval()(input_ids=ids, use_cache=False).logits
    assert (found.log_softmax(-1) - wanted).abs().max() < 1e-4


def test_layers_that_the_config_counts_are_refused_before_the_work(tmp_path):
    config = AutoConfig.for_model("qwen2_moe", **{**SIZES, "num_hidden_layers": 6, "decoder_sparse_step": 2, **MOE})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ShearingError, match="layer 2 would become another one as layer 1.*decoder_sparse_step = 2"):
        prune("depth", tmp_path / "source", tmp_path / "out", {"drop_layers": [1]})
    assert not (tmp_path / "out").exists()
