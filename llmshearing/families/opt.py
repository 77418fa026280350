"""The OPT family's table (OPTForCausalLM of transformers).

    tokens + positions -> [ norm -> q k v -> attention -> out ] -> [ norm -> fc1 -> fc2 ] x layers -> norm -> lm_head

Multi-head attention; heads are as wide as hidden units / heads, always. Positions are learned and never cut.
"""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.errors import ShearingError
from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.names import ATTENTION, GROUPS, HEAD_DIM, HIDDEN, INTERMEDIATE, MLP
from llmshearing.families.parts import HEAD_WIDTH, decoder_table, ends, layer_norm, projection, with_axes
from llmshearing.families.table import Attribute, Axis, Module, Table, embedding

LAYER = "model.decoder.layers.{layer}."
OPT_KEYS = {size: key for size, key in KEYS.items() if size not in (GROUPS, HEAD_DIM)} | {INTERMEDIATE: "ffn_dim"}
POSITIONS = Module("transformers.models.opt.modeling_opt.OPTLearnedPositionalEmbedding", "embedding")
OFFSET = 2  # rows before the first position


def opt_table(config: Any, head_mode: str = "group") -> Table:
    """Table of an OPT. Only whole heads can be cut, whatever the head mode.

    Raises:
        ShearingError: the model is one of the few of another form (OPT-350m).
    """
    _check(config)
    biased, both = read(config, "enable_bias", True), ("hidden", "intermediate")
    tied = bool(read(config, "tie_word_embeddings", True))
    embed, final = embedding("model.decoder.embed_tokens.weight", "vocab"), layer_norm("model.decoder.final_layer_norm")
    attention, written = LAYER + "self_attn.", {"gates": ("hidden", "query"), "block": ATTENTION, "scaled": True}
    rows = [
        *ends(embed, final, "lm_head.weight", tied),
        embedding("model.decoder.embed_positions.weight", "positions", module=POSITIONS),
        *layer_norm(LAYER + "self_attn_layer_norm", gates=("hidden",), block=ATTENTION),
        *projection(attention + "q_proj", "query", "hidden", biased, block=ATTENTION),
        *projection(attention + "k_proj", "kv", "hidden", biased, block=ATTENTION),
        *projection(attention + "v_proj", "kv", "hidden", biased, block=ATTENTION),
        *projection(attention + "out_proj", "hidden", "query", biased, **written),
        *layer_norm(LAYER + "final_layer_norm", gates=("hidden",), block=MLP),
        *projection(LAYER + "fc1", "intermediate", "hidden", biased, block=MLP),
        *projection(LAYER + "fc2", "hidden", "intermediate", biased, gates=both, block=MLP, scaled=True),
    ]
    more: dict[str, Any] = {"couplings": (HEAD_WIDTH,), "layer_tuple": LAYER_TUPLES}
    table = decoder_table("opt", config, rows, "group", OPT_KEYS, minimum=1, **more)
    heads = Attribute(LAYER + "self_attn", "num_heads", "query", table.head_dim)
    positions = Axis(read(config, "max_position_embeddings") + OFFSET)
    mirrors = {"word_embed_proj_dim": OPT_KEYS[HIDDEN]}
    return with_axes(table, {"positions": positions}, attributes=(heads,), mirrors=mirrors)


def _check(config: Any) -> None:
    hidden, width = read(config, OPT_KEYS[HIDDEN]), read(config, "word_embed_proj_dim")
    problems = []
    if width is not None and width != hidden:
        problems.append(f"word_embed_proj_dim = {width} beside hidden_size = {hidden}")
    if not read(config, "do_layer_norm_before", True):
        problems.append("do_layer_norm_before = false")
    if not read(config, "layer_norm_elementwise_affine", True):
        problems.append("layer_norm_elementwise_affine = false")
    if read(config, "_remove_final_layer_norm", False):
        problems.append("_remove_final_layer_norm = true")
    if problems:
        raise ShearingError(f"the opt family's table knows no model with {', '.join(problems)}")


FAMILY = Family("opt", opt_table, OPT_KEYS)
