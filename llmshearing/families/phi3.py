"""The Phi-3 family's table (Phi3ForCausalLM of transformers): LLaMA's, with fused projections.

Queries, keys and values are one tensor, gate and up projection another: segments of one dimension.
"""

from __future__ import annotations

from typing import Any

from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.llama import ATTN, LAYER, QUERY_GROUPS, outside, rms_norm, stream_norm
from llmshearing.families.names import ATTENTION, GROUPS, HEADS, MLP
from llmshearing.families.parts import decoder_table, with_axes
from llmshearing.families.table import Attribute, Coupling, Segments, Table, linear

NORM = rms_norm("phi3.modeling_phi3.Phi3RMSNorm")
LONGROPE = Coupling("hidden", "query", "the lengths of rope_scaling's factors are checked against hidden units / heads")


def phi3_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Phi-3."""
    query_key_value, gate_up = Segments(("query", "kv", "kv")), Segments(("intermediate", "intermediate"))
    query, both = ("hidden", "query"), ("hidden", "intermediate")
    rows = [
        *outside(config, NORM),
        stream_norm("input_layernorm", NORM, ATTENTION),
        linear(ATTN + "qkv_proj.weight", query_key_value, "hidden", block=ATTENTION),
        linear(ATTN + "o_proj.weight", "hidden", "query", gates=query, block=ATTENTION, scaled=True),
        stream_norm("post_attention_layernorm", NORM, MLP),
        linear(LAYER + "mlp.gate_up_proj.weight", gate_up, "hidden", block=MLP),
        linear(LAYER + "mlp.down_proj.weight", "hidden", "intermediate", gates=both, block=MLP, scaled=True),
    ]
    couplings = (LONGROPE,) if read(config, "rope_scaling") else ()
    table = decoder_table("phi3", config, rows, head_mode, couplings=couplings)
    attention = LAYER + "self_attn"
    attributes = (
        QUERY_GROUPS,
        Attribute(attention, f"config.{KEYS[HEADS]}", "query", table.head_dim),
        Attribute(attention, KEYS[GROUPS], "kv", table.head_dim),
    )
    return with_axes(table, {}, attributes=attributes)


FAMILY = Family("phi3", phi3_table, KEYS, rope={"rope_type": "type"})
