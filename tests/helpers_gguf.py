"""Tiny models that llama.cpp can hold, and files of them."""

import pytest
import torch
from tiny import config_of
from transformers import AutoModelForCausalLM

from llmshearing.gguf.check import has_llama_cpp
from llmshearing.gguf.tokenizer import NO_TOKENIZER
from llmshearing.gguf.write import write_gguf

LARGER = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
# family -> variant of the tiny models, and what changes so that llama.cpp can hold it
HELD = {
    "llama": [("grouped", {}), ("heads apart", {"head_dim": 24}), ("biases", {}), ("yarn", {}),
              ("grouped", {"rope_scaling": LLAMA3}), ("grouped", {"rope_scaling": LINEAR})],
    "mistral": [("grouped", {"sliding_window": 32}), ("tied", {"head_dim": 24})],
    "mixtral": [("grouped", {}), ("tied", {})],
    "granite": [("tied", {}), ("biases", {})],
    "smollm3": [("tied", {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4})],
    "qwen2": [("grouped", {}), ("heads", {})],
    "qwen3": [("grouped", {"head_dim": 24})],
    "qwen3_moe": [("grouped", {"moe_intermediate_size": 32})],
    "phi3": [("grouped", {"sliding_window": None}), ("tied", {})],
    "gemma2": [("tied", GEMMA)],
    "gemma3_text": [("tied", GEMMA), ("untied", GEMMA)],
    "olmo2": [("grouped", {}), ("tied", {})],
    "stablelm": [("untied", {}), ("tied MHA", {}), ("biases beside", {})],
    "gpt_neox": [("parallel", {}), ("serial", {})],
    "gpt2": [("tied", {}), ("untied", {})],
}  # fmt: skip
CASES = [(family, *case) for family, cases in HELD.items() for case in cases]


def model_of(family, variant="grouped", **changes):
    changes = {**LARGER, **changes}
    if family == "gpt2":
        changes = {"vocab_size": 64, "n_embd": 64, "n_positions": 64}
    config = config_of(family, variant, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # so that norms, biases and routers matter, and logits are no noise
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def write(model, path, dtype="f32", tokenizer=NO_TOKENIZER):
    write_gguf(model.state_dict(), model.config, path, name="tiny", dtype=dtype, tokenizer=tokenizer)
    return path


needs_llama_cpp = pytest.mark.skipif(
    not has_llama_cpp(),
    reason="llama-cpp-python is not installed (its build takes minutes): pip install llama-cpp-python",
)
