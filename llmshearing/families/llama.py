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


def llama_table(config: Any, head_mode: str = "group", module: Module = NORM) -> Table:
    """Table of a LLaMA.

    Args:
        config: ``LlamaConfig`` or anything with its attributes. head_mode: see :class:`~.family.Family`.
        module: the class of the norms.
    """
    rows = (
        outside(config, module)
        + [norm(LAYER + "input_layernorm.weight", "hidden", module, gates=("hidden",), block=ATTENTION)]
        + attention(config)
        + [norm(LAYER + "post_attention_layernorm.weight", "hidden", module, gates=("hidden",), block=MLP)]
        + gated_mlp(config)
    )
    return decoder_table("llama", config, rows, head_mode, attributes=(query_groups(LAYER + "self_attn"),))


def outside(config: Any, module: Module) -> list[TensorSpec]:
    """What is outside the layers."""
    embed = embedding("model.embed_tokens.weight", "vocab")
    final = [norm("model.norm.weight", "hidden", module)]
    return ends(embed, final, "lm_head.weight", bool(read(config, "tie_word_embeddings", False)))


def attention(config: Any, written: bool = True) -> list[TensorSpec]:
    """Projections of the attention; ``written``: its output goes to the residual stream as it is (no norm behind)."""
    out = {"gates": ("hidden", "query"), "scaled": True} if written else {"gates": ("query",)}
    rows = [
        linear(ATTN + "q_proj.weight", "query", "hidden", block=ATTENTION),
        linear(ATTN + "k_proj.weight", "kv", "hidden", block=ATTENTION),
        linear(ATTN + "v_proj.weight", "kv", "hidden", block=ATTENTION),
        linear(ATTN + "o_proj.weight", "hidden", "query", block=ATTENTION, **out),
    ]
    if read(config, "attention_bias", False):
        rows += query_key_value_biases()
        rows.append(bias(ATTN + "o_proj.bias", "hidden", block=ATTENTION, **_of_bias(written)))
    return rows


def query_key_value_biases() -> list[TensorSpec]:
    """Biases of queries, keys and values."""
    axes = (("q", "query"), ("k", "kv"), ("v", "kv"))
    return [bias(f"{ATTN}{name}_proj.bias", axis, block=ATTENTION) for name, axis in axes]


def gated_mlp(config: Any, written: bool = True) -> list[TensorSpec]:
    """Projections of the MLP; ``written`` as of :func:`attention`."""
    mlp = LAYER + "mlp."
    out = {"gates": ("hidden", "intermediate"), "scaled": True} if written else {"gates": ("intermediate",)}
    rows = [
        linear(mlp + "gate_proj.weight", "intermediate", "hidden", block=MLP),
        linear(mlp + "up_proj.weight", "intermediate", "hidden", block=MLP),
        linear(mlp + "down_proj.weight", "hidden", "intermediate", block=MLP, **out),
    ]
    if read(config, "mlp_bias", False):
        rows += [
            bias(mlp + "gate_proj.bias", "intermediate", block=MLP),
            bias(mlp + "up_proj.bias", "intermediate", block=MLP),
            bias(mlp + "down_proj.bias", "hidden", block=MLP, **_of_bias(written)),
        ]
    return rows


def _of_bias(written: bool) -> dict[str, Any]:
    return {"gates": ("hidden",), "scaled": True} if written else {}


FAMILY = Family("llama", llama_table, KEYS)


def like_llama(table: Table, family: str, *rows: TensorSpec) -> Table:
    """A table of another family that has some rows more."""
    return replace(table, family=family, tensors=table.tensors + rows)
