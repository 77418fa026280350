"""The Gemma 3 family's table (Gemma3ForCausalLM of transformers, text): Gemma 2's, with norms inside the heads."""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.families.family import KEYS, Family
from llmshearing.families.gemma2 import sandwich_rows
from llmshearing.families.llama import QUERY_GROUPS, rms_norm
from llmshearing.families.parts import decoder_table
from llmshearing.families.qwen3 import query_key_norms, with_head_norms
from llmshearing.families.table import Module, Table

NORM = rms_norm("gemma3.modeling_gemma3.Gemma3RMSNorm", offset=1.0, eps="eps")
SCALED = Module("transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding", "embedding")


def gemma3_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Gemma 3's text model."""
    rows = [*sandwich_rows(config, NORM, SCALED), *query_key_norms(NORM)]
    table = decoder_table("gemma3_text", config, rows, head_mode, attributes=(QUERY_GROUPS,), layer_tuple=LAYER_TUPLES)
    return with_head_norms(table)


FAMILY = Family("gemma3_text", gemma3_table, KEYS)
