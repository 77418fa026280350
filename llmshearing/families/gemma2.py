"""The Gemma 2 family's table (Gemma2ForCausalLM of transformers).

    embed x sqrt(hidden) -> [ norm -> attention -> norm ] -> [ norm -> MLP -> norm ] x layers -> norm -> lm_head

Norms multiply by 1 + weight. Each branch ends in a norm, on which its gate acts. The model multiplies embeddings by the
square root of the config's hidden size: the fold makes up for the smaller one.
"""

from __future__ import annotations

from typing import Any

from llmshearing.compat import LAYER_TUPLES, SCALED_GEMMA2_EMBEDDING
from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.llama import QUERY_GROUPS, attention, gated_mlp, rms_norm, stream_norm
from llmshearing.families.names import ATTENTION, MLP
from llmshearing.families.parts import decoder_table, ends
from llmshearing.families.table import EMBEDDING, Module, Table, TensorSpec, embedding, norm

NORM = rms_norm("gemma2.modeling_gemma2.Gemma2RMSNorm", offset=1.0, eps="eps")
SCALED = Module("transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding", "embedding")


def gemma2_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Gemma 2."""
    rows = sandwich_rows(config, NORM, SCALED if SCALED_GEMMA2_EMBEDDING else EMBEDDING)
    return decoder_table("gemma2", config, rows, head_mode, attributes=(QUERY_GROUPS,), layer_tuple=LAYER_TUPLES)


def sandwich_rows(config: Any, module: Module, embed_module: Module) -> list[TensorSpec]:
    """Rows of a Gemma with a norm before and behind each branch.

    Embeddings are rescaled by the square root of hidden units before / after. Where the head is the embedding, the
    final norm takes that back.
    """
    embed = embedding("model.embed_tokens.weight", "vocab", module=embed_module, rescale=0.5)
    final = [norm("model.norm.weight", "hidden", module, rescale=-0.5)]
    return [
        *ends(embed, final, "lm_head.weight", bool(read(config, "tie_word_embeddings", True))),
        stream_norm("input_layernorm", module, ATTENTION),
        *attention(config, scaled=False),
        stream_norm("post_attention_layernorm", module, ATTENTION, scaled=True),
        stream_norm("pre_feedforward_layernorm", module, MLP),
        *gated_mlp(config, scaled=False),
        stream_norm("post_feedforward_layernorm", module, MLP, scaled=True),
    ]


FAMILY = Family("gemma2", gemma2_table, KEYS, rope={"rope_scaling": ""})
