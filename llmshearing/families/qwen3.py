"""The Qwen3 family's table (Qwen3ForCausalLM of transformers): LLaMA's, with a norm inside every query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.families.llama import LAYER, llama_table
from llmshearing.families.table import Axis, Table, TensorSpec


def qwen3_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Qwen3; arguments as of :func:`llmshearing.families.llama.llama_table`."""
    base = llama_table(config, head_mode)
    norms = tuple(TensorSpec(f"{LAYER}self_attn.{name}_norm.weight", ("head_dim",), (), "attention") for name in "qk")
    axes = {**base.axes, "head_dim": Axis(config.head_dim)}  # one norm for all heads: never cut
    return replace(base, family="qwen3", axes=axes, tensors=base.tensors + norms)
