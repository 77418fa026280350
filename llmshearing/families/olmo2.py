"""The OLMo-2 family's table (Olmo2ForCausalLM of transformers): LLaMA's, with the norms behind the branches.

    embed_tokens -> [ q k v -> norms of q and k -> attention -> o -> norm ] -> [ MLP -> norm ] x layers -> norm -> head

The norms of queries and keys run over all heads of a layer: they count the heads that stay.
"""

from __future__ import annotations

from typing import Any

from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import ATTN, QUERY_GROUPS, attention, gated_mlp, outside, rms_norm, stream_norm
from llmshearing.families.names import ATTENTION, MLP
from llmshearing.families.parts import decoder_table
from llmshearing.families.table import Table, norm

NORM = rms_norm("olmo2.modeling_olmo2.Olmo2RMSNorm")


def olmo2_table(config: Any, head_mode: str = "group") -> Table:
    """Table of an OLMo-2."""
    rows = [
        *outside(config, NORM),
        *attention(config, scaled=False),
        norm(ATTN + "q_norm.weight", "query", NORM, block=ATTENTION),
        norm(ATTN + "k_norm.weight", "kv", NORM, block=ATTENTION),
        stream_norm("post_attention_layernorm", NORM, ATTENTION, scaled=True),
        *gated_mlp(config, scaled=False),
        stream_norm("post_feedforward_layernorm", NORM, MLP, scaled=True),
    ]
    return decoder_table("olmo2", config, rows, head_mode, attributes=(QUERY_GROUPS,))


FAMILY = Family("olmo2", olmo2_table, KEYS)
