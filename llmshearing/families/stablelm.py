"""The StableLM family's table (StableLmForCausalLM of transformers): LLaMA's projections behind LayerNorms.

    embed_tokens -> [ norm -> q k v -> attention -> o ] + [ norm -> gate, up -> down ] x layers -> norm -> lm_head

Beside one another, the branches read one norm. A head is always as wide as hidden units / heads.
"""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.errors import ShearingError
from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.llama import ATTN, LAYER, QUERY_GROUPS, gated_mlp
from llmshearing.families.names import ATTENTION, GROUPS, HEAD_DIM, HIDDEN, MLP
from llmshearing.families.parts import HEAD_WIDTH, decoder_table, ends, layer_norm, projection, with_axes
from llmshearing.families.table import Attribute, Table, embedding

STABLELM_KEYS = {size: key for size, key in KEYS.items() if size != HEAD_DIM}


def stablelm_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a StableLM.

    Raises:
        ShearingError: the model has a norm of its own in every head.
    """
    if read(config, "qk_layernorm", False):
        raise ShearingError("the stablelm family's table knows no model with qk_layernorm = true")
    biased, beside = bool(read(config, "use_qkv_bias", False)), bool(read(config, "use_parallel_residual", False))
    embed, final = embedding("model.embed_tokens.weight", "vocab"), layer_norm("model.norm")
    rows = [
        *ends(embed, final, "lm_head.weight", bool(read(config, "tie_word_embeddings", False))),
        *layer_norm(LAYER + "input_layernorm", gates=("hidden",), block=ATTENTION),
        *projection(ATTN + "q_proj", "query", "hidden", biased, block=ATTENTION),
        *projection(ATTN + "k_proj", "kv", "hidden", biased, block=ATTENTION),
        *projection(ATTN + "v_proj", "kv", "hidden", biased, block=ATTENTION),
        *projection(
            ATTN + "o_proj", "hidden", "query", False, gates=("hidden", "query"), block=ATTENTION, scaled=True
        ),
        *(() if beside else layer_norm(LAYER + "post_attention_layernorm", gates=("hidden",), block=MLP)),
        *gated_mlp(config),
    ]
    table = decoder_table(
        "stablelm", config, rows, head_mode, STABLELM_KEYS, minimum=1, couplings=(HEAD_WIDTH,), layer_tuple=LAYER_TUPLES
    )
    attention = LAYER + "self_attn"
    attributes = (
        QUERY_GROUPS,
        Attribute(attention, "num_heads", "query", table.head_dim),
        Attribute(attention, KEYS[GROUPS], "kv", table.head_dim),
        Attribute(attention, KEYS[HIDDEN], "query"),
    )
    return with_axes(table, {}, attributes=attributes)


FAMILY = Family("stablelm", stablelm_table, STABLELM_KEYS)
