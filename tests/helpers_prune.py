"""Small models of several families, and their sequences, for the tests of the pruners."""

import torch
from helpers_oracle import random_model, tiny_config
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmshearing.compat import EAGER_EXPERTS
from llmshearing.prune.methods import Calibration

VARIANTS = {
    "MHA": {},
    "GQA": {"num_key_value_heads": 2},
    "MHA tied": {"tie_word_embeddings": True},
    "GQA tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def config_of(family, **changes):
    sizes = {**SIZES, **changes}
    if family == "llama":
        return tiny_config(**{"num_hidden_layers": 4, **changes})
    if family == "qwen2":
        # The upper layers slide, so that the layers' kinds have to follow the layers that stay.
        return Qwen2Config(**{"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, **sizes})
    if family == "qwen3":
        return Qwen3Config(**{"head_dim": 6, **sizes})
    if family == "mistral":
        return MistralConfig(**{"sliding_window": 5, **sizes})
    if family == "mixtral":
        return MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    del sizes["intermediate_size"], sizes["num_key_value_heads"]
    if family == "bloom":  # has no table
        layers, heads = sizes.pop("num_hidden_layers"), sizes.pop("num_attention_heads")
        return BloomConfig(n_layer=layers, n_head=heads, **{**sizes, "pad_token_id": 0})
    return OPTConfig(ffn_dim=10, word_embed_proj_dim=16, **{**sizes, "pad_token_id": 0})


def model_of(family, dtype=torch.float32, seed=0, **changes):
    """Random weights, large enough that every unit matters."""
    if family == "llama":
        return random_model(config_of(family, **changes), seed).to(dtype).eval()
    torch.manual_seed(seed)
    experts = EAGER_EXPERTS if family == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), **experts).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name and "weight" in name else 0.5 * values)
    return model.eval()


def calibration_of(number=6, length=12, vocab_size=23, batch_size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (2 * number, length), generator=generator)
    return Calibration(ids[:number], ids[number:], "some", "others", batch_size)
