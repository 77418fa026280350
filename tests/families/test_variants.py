"""The tables of families like LLaMA have every tensor of transformers' own models, and count them right."""

import pytest
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from llmshearing.families import table_for

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, MistralConfig])
def test_table_and_state_dict_agree(config, tied, groups):
    model = AutoModelForCausalLM.from_config(config(**SIZES, num_key_value_heads=groups, tie_word_embeddings=tied))
    table = table_for(model.config)
    table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    assert table.count() == sum(parameter.numel() for parameter in model.parameters())
    inside = [p.numel() for name, p in model.model.layers.named_parameters() if "norm" not in name]
    assert table.count(counted_only=True) == sum(inside)
