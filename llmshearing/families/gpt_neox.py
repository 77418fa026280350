"""The GPT-NeoX family's table (GPTNeoXForCausalLM of transformers), to which Pythia belongs.

    embed_in -> [ norm -> q k v by head -> attention -> dense ] + [ norm -> up -> down ] x layers -> norm -> embed_out

The branches run beside or after one another, as the config says. Multi-head attention: a head is always as wide as
hidden units / heads.
"""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.names import ATTENTION, GROUPS, HEAD_DIM, HEADS, MLP
from llmshearing.families.parts import HEAD_WIDTH, decoder_table, ends, layer_norm, projection
from llmshearing.families.table import Segments, Table, embedding

LAYER = "gpt_neox.layers.{layer}."
GPT_NEOX_KEYS = {size: key for size, key in KEYS.items() if size not in (GROUPS, HEAD_DIM)}


def gpt_neox_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a GPT-NeoX. Only whole heads can be cut, whatever the head mode."""
    heads, biased = read(config, GPT_NEOX_KEYS[HEADS]), read(config, "attention_bias", True)
    tied, both = bool(read(config, "tie_word_embeddings", False)), ("hidden", "intermediate")
    embed, final = embedding("gpt_neox.embed_in.weight", "vocab"), layer_norm("gpt_neox.final_layer_norm")
    attention, mlp = LAYER + "attention.", LAYER + "mlp."
    written = {"gates": ("hidden", "query"), "block": ATTENTION, "scaled": True}
    rows = [
        *ends(embed, final, "embed_out.weight", tied),
        *layer_norm(LAYER + "input_layernorm", gates=("hidden",), block=ATTENTION),
        *projection(
            attention + "query_key_value", Segments(("query", "kv", "kv"), heads), "hidden", biased, block=ATTENTION
        ),
        *projection(attention + "dense", "hidden", "query", biased, **written),
        *layer_norm(LAYER + "post_attention_layernorm", gates=("hidden",), block=MLP),
        *projection(mlp + "dense_h_to_4h", "intermediate", "hidden", True, block=MLP),
        *projection(mlp + "dense_4h_to_h", "hidden", "intermediate", True, gates=both, block=MLP, scaled=True),
    ]
    return decoder_table(
        "gpt_neox", config, rows, "group", GPT_NEOX_KEYS, couplings=(HEAD_WIDTH,), layer_tuple=LAYER_TUPLES
    )


ROPE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
FAMILY = Family("gpt_neox", gpt_neox_table, GPT_NEOX_KEYS, renamed={"embed_out": "lm_head"}, rope=ROPE)
