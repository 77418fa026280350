"""The GPT-2 family's table (GPT2LMHeadModel of transformers).

    wte + wpe -> [ norm -> q k v in one -> attention -> c_proj ] -> [ norm -> c_fc -> c_proj ] x layers -> norm -> head

Its projections are [in, out]. Multi-head attention; heads are as wide as hidden units / heads, always. Positions are
learned and never cut.
"""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.errors import ShearingError
from llmshearing.families.family import Family, read
from llmshearing.families.names import ATTENTION, HEADS, HIDDEN, INTERMEDIATE, LAYERS, MLP, VOCAB
from llmshearing.families.parts import HEAD_WIDTH, bias_row, decoder_table, ends, layer_norm, with_axes
from llmshearing.families.table import (
    CONV1D,
    Attribute,
    Axis,
    Dimension,
    Segments,
    Table,
    TensorSpec,
    bias,
    conv1d,
    embedding,
)

LAYER = "transformer.h.{layer}."
GPT2_KEYS = {HIDDEN: "n_embd", HEADS: "n_head", INTERMEDIATE: "n_inner", LAYERS: "n_layer", VOCAB: "vocab_size"}
MLP_FACTOR = 4


def gpt2_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a GPT-2. Only whole heads can be cut, whatever the head mode.

    Raises:
        ShearingError: the model has cross-attention.
    """
    if read(config, "add_cross_attention", False):
        raise ShearingError("the gpt2 family's table knows no model with add_cross_attention = true")
    embed = embedding("transformer.wte.weight", "vocab")
    tied = bool(read(config, "tie_word_embeddings", True))
    query_key_value, both = Segments(("query", "kv", "kv")), ("hidden", "intermediate")
    written = {"gates": ("hidden", "query"), "block": ATTENTION, "scaled": True}
    rows = [
        *ends(embed, layer_norm("transformer.ln_f"), "lm_head.weight", tied),
        embedding("transformer.wpe.weight", "positions"),
        *layer_norm(LAYER + "ln_1", gates=("hidden",), block=ATTENTION),
        *_projection(LAYER + "attn.c_attn", "hidden", query_key_value, block=ATTENTION),
        *_projection(LAYER + "attn.c_proj", "query", "hidden", **written),
        *layer_norm(LAYER + "ln_2", gates=("hidden",), block=MLP),
        *_projection(LAYER + "mlp.c_fc", "hidden", "intermediate", block=MLP),
        *_projection(LAYER + "mlp.c_proj", "intermediate", "hidden", gates=both, block=MLP, scaled=True),
    ]
    table = decoder_table(
        "gpt2", config, rows, "group", GPT2_KEYS, minimum=1, mlp_factor=MLP_FACTOR, couplings=(HEAD_WIDTH,),
        layer_tuple=LAYER_TUPLES,
    )  # fmt: skip
    attention = LAYER + "attn"
    heads = Attribute(attention, "num_heads", "query", table.head_dim)
    by_number = read(config, "scale_attn_by_inverse_layer_idx", False)
    fixed = {LAYERS: "since scale_attn_by_inverse_layer_idx scales attention by a layer's number"} if by_number else {}
    split, positions = Attribute(attention, "split_size", "query"), Axis(read(config, "n_positions"))
    return with_axes(table, {"positions": positions}, attributes=(split, heads), fixed=fixed)


def _projection(name: str, read_axis: Dimension, out: Dimension, **row: Any) -> list[TensorSpec]:
    own_bias = bias(f"{name}.bias", out, **{**bias_row(out, row), "module": CONV1D})
    return [conv1d(f"{name}.weight", read_axis, out, **row), own_bias]


FAMILY = Family("gpt2", gpt2_table, GPT2_KEYS, mlp_factor=MLP_FACTOR)
