"""The Qwen3 family's table (Qwen3ForCausalLM of transformers): LLaMA's, with a norm inside every query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import ATTN, like_llama, llama_table, rms_norm
from llmshearing.families.names import ATTENTION
from llmshearing.families.table import Axis, Module, Table, TensorSpec, norm

NORM = rms_norm("qwen3.modeling_qwen3.Qwen3RMSNorm")


def query_key_norms(module: Module) -> list[TensorSpec]:
    """Norms inside the heads of queries and keys: one for all heads, so that it is never cut."""
    return [norm(f"{ATTN}{name}_norm.weight", "head_dim", module, block=ATTENTION) for name in "qk"]


def with_head_norms(table: Table) -> Table:
    """The table with the axis of :func:`query_key_norms`."""
    return replace(table, axes={**table.axes, "head_dim": Axis(table.head_dim)})


def qwen3_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Qwen3."""
    return with_head_norms(like_llama(llama_table(config, head_mode, NORM), "qwen3", *query_key_norms(NORM)))


FAMILY = Family("qwen3", qwen3_table, KEYS)
