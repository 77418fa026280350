"""The Qwen2 family's table (Qwen2ForCausalLM of transformers): LLaMA's, with biases on queries, keys, values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.families.llama import LAYER, llama_table
from llmshearing.families.table import Table, TensorSpec


def qwen2_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Qwen2; arguments as of :func:`llmshearing.families.llama.llama_table`."""
    base = llama_table(config, head_mode)
    biases = tuple(
        TensorSpec(f"{LAYER}self_attn.{name}_proj.bias", (axis,), (), "attention", counted=True)
        for name, axis in (("q", "query"), ("k", "kv"), ("v", "kv"))
    )
    return replace(base, family="qwen2", tensors=base.tensors + biases)
