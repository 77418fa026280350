"""The LLaMA family's table (LlamaForCausalLM of transformers), and what families built like it share.

    embed_tokens -> [ norm -> q k v -> attention -> o ] -> [ norm -> gate, up -> down ] x layers -> norm -> lm_head
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.names import ATTENTION, MLP
from llmshearing.families.parts import decoder_table, ends, query_groups
from llmshearing.families.table import Module, Table, TensorSpec, bias, embedding, linear, norm

LAYER = "model.layers.{layer}."
ATTN = LAYER + "self_attn."


def rms_norm(cls: str, offset: float = 0.0, eps: str = "variance_epsilon") -> Module:
    """An RMSNorm of transformers; ``cls``: its module below `transformers.models`, and its name."""
    return Module(f"transformers.models.{cls}", "rms_norm", eps, offset)


NORM = rms_norm("llama.modeling_llama.LlamaRMSNorm")
QUERY_GROUPS = query_groups(LAYER + "self_attn")


def llama_table(config: Any, head_mode: str = "group", module: Module = NORM) -> Table:
    """Table of a LLaMA.

    Args:
        config: ``LlamaConfig`` or anything with its attributes. head_mode: see :class:`~.family.Family`.
        module: the class of the norms.
    """
    rows = [
        *outside(config, module),
        stream_norm("input_layernorm", module, ATTENTION),
        *attention(config),
        stream_norm("post_attention_layernorm", module, MLP),
        *gated_mlp(config),
    ]
    return decoder_table("llama", config, rows, head_mode, attributes=(QUERY_GROUPS,))


def stream_norm(name: str, module: Module, block: str, scaled: bool = False) -> TensorSpec:
    """A norm of hidden units in a layer; ``scaled``: the last of its branch, so that the branch's gate acts here."""
    return norm(f"{LAYER}{name}.weight", "hidden", module, gates=("hidden",), block=block, scaled=scaled)


def outside(config: Any, module: Module) -> list[TensorSpec]:
    """What is outside the layers."""
    embed = embedding("model.embed_tokens.weight", "vocab")
    final = [norm("model.norm.weight", "hidden", module)]
    return ends(embed, final, "lm_head.weight", bool(read(config, "tie_word_embeddings", False)))


def attention(config: Any, scaled: bool = True) -> list[TensorSpec]:
    """Projections of the attention; ``scaled``: the branch's gate acts here (not on a norm behind it)."""
    rows = [
        linear(ATTN + "q_proj.weight", "query", "hidden", block=ATTENTION),
        linear(ATTN + "k_proj.weight", "kv", "hidden", block=ATTENTION),
        linear(ATTN + "v_proj.weight", "kv", "hidden", block=ATTENTION),
        linear(
            ATTN + "o_proj.weight", "hidden", "query", gates=("hidden", "query"), block=ATTENTION, scaled=scaled
        ),
    ]
    if read(config, "attention_bias", False):
        rows += query_key_value_biases()
        rows.append(bias(ATTN + "o_proj.bias", "hidden", gates=("hidden",), block=ATTENTION, scaled=scaled))
    return rows


def query_key_value_biases() -> list[TensorSpec]:
    """Biases of queries, keys and values."""
    axes = (("q", "query"), ("k", "kv"), ("v", "kv"))
    return [bias(f"{ATTN}{name}_proj.bias", axis, block=ATTENTION) for name, axis in axes]


def gated_mlp(config: Any, scaled: bool = True) -> list[TensorSpec]:
    """Projections of the MLP; ``scaled`` as of :func:`attention`."""
    mlp, both = LAYER + "mlp.", ("hidden", "intermediate")
    rows = [
        linear(mlp + "gate_proj.weight", "intermediate", "hidden", block=MLP),
        linear(mlp + "up_proj.weight", "intermediate", "hidden", block=MLP),
        linear(mlp + "down_proj.weight", "hidden", "intermediate", gates=both, block=MLP, scaled=scaled),
    ]
    if read(config, "mlp_bias", False):
        rows += [
            bias(mlp + "gate_proj.bias", "intermediate", block=MLP),
            bias(mlp + "up_proj.bias", "intermediate", block=MLP),
            bias(mlp + "down_proj.bias", "hidden", gates=("hidden",), block=MLP, scaled=scaled),
        ]
    return rows


FAMILY = Family("llama", llama_table, KEYS)


def like_llama(table: Table, family: str, *rows: TensorSpec) -> Table:
    """A table of another family that has some rows more."""
    return replace(table, family=family, tensors=table.tensors + rows)
