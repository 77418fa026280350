"""The Qwen2 family's table (Qwen2ForCausalLM of transformers): LLaMA's, with biases on queries, keys, values."""

from __future__ import annotations

from typing import Any

from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import like_llama, llama_table, query_key_value_biases, rms_norm
from llmshearing.families.table import Table

NORM = rms_norm("qwen2.modeling_qwen2.Qwen2RMSNorm")


def qwen2_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Qwen2."""
    return like_llama(llama_table(config, head_mode, NORM), "qwen2", *query_key_value_biases())


FAMILY = Family("qwen2", qwen2_table, KEYS)
