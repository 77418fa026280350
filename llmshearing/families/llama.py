"""The LLaMA family's table (LlamaForCausalLM of transformers), nothing else.

    embed_tokens -> [ norm -> q k v -> attention -> o ] -> [ norm -> gate, up -> down ] x layers -> norm -> lm_head

Axes: hidden; intermediate; query (query heads x head_dim); kv (KV groups x head_dim); vocab.
The hidden gate acts on what a module reads from or writes to the residual stream: embeddings, norm weights, the rows
of o_proj and down_proj. The head gate acts on o_proj's columns, the intermediate gate on down_proj's columns. Between
the final norm and the logits the hidden gate acts once: untied on the final norm, tied on the shared embedding.
"""

from __future__ import annotations

from typing import Any

from llmshearing.families.table import Axis, Kind, Table, TensorSpec

LAYER = "model.layers.{layer}."


def llama_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a LLaMA.

    Args:
        config: ``LlamaConfig`` or anything with its attributes.
        head_mode: "group" cuts whole KV groups with their query heads (with multi-head attention: heads); "query" cuts
            the same number of query heads inside every KV group.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    repeat = config.num_attention_heads // groups
    whole = head_mode == "group"
    head = Kind("head", groups, 1) if whole else Kind("head", repeat, groups)
    kinds = (
        Kind("hidden", config.hidden_size, None),
        head,
        Kind("intermediate", config.intermediate_size, 1),
        Kind("vocab", config.vocab_size, None),
    )
    axes = {
        "hidden": Axis(config.hidden_size, "hidden"),
        "intermediate": Axis(config.intermediate_size, "intermediate"),
        "query": Axis(groups * repeat * head_dim, "head", head_dim * (repeat if whole else 1)),
        "kv": Axis(groups * head_dim, "head" if whole else None, head_dim),
        "vocab": Axis(config.vocab_size, "vocab"),
    }
    return Table(
        family="llama",
        layers=config.num_hidden_layers,
        kinds={kind.name: kind for kind in kinds},
        axes=axes,
        tensors=tuple(_outside(config.tie_word_embeddings) + _attention(config) + _mlp(config)),
        config_axes={
            "hidden_size": ("hidden", 1),
            "intermediate_size": ("intermediate", 1),
            "num_attention_heads": ("query", head_dim),
            "num_key_value_heads": ("kv", head_dim),
            "vocab_size": ("vocab", 1),
        },
    )


def _outside(tied: bool) -> list[TensorSpec]:
    embedding = TensorSpec("model.embed_tokens.weight", ("vocab", "hidden"), gates=("hidden",))
    if tied:
        head = TensorSpec("lm_head.weight", ("vocab", "hidden"), gates=("hidden",), alias=embedding.name)
        return [embedding, TensorSpec("model.norm.weight", ("hidden",)), head]
    return [
        embedding,
        TensorSpec("model.norm.weight", ("hidden",), gates=("hidden",)),
        TensorSpec("lm_head.weight", ("vocab", "hidden")),
    ]


def _attention(config: Any) -> list[TensorSpec]:
    at, block, out = LAYER + "self_attn.", "attention", ("hidden", "query")
    rows = [
        TensorSpec(LAYER + "input_layernorm.weight", ("hidden",), ("hidden",), block),
        TensorSpec(at + "q_proj.weight", ("query", "hidden"), (), block, counted=True),
        TensorSpec(at + "k_proj.weight", ("kv", "hidden"), (), block, counted=True),
        TensorSpec(at + "v_proj.weight", ("kv", "hidden"), (), block, counted=True),
        TensorSpec(at + "o_proj.weight", out, out, block, scaled=True, counted=True),
    ]
    if getattr(config, "attention_bias", False):
        rows += [
            TensorSpec(at + "q_proj.bias", ("query",), (), block, counted=True),
            TensorSpec(at + "k_proj.bias", ("kv",), (), block, counted=True),
            TensorSpec(at + "v_proj.bias", ("kv",), (), block, counted=True),
            TensorSpec(at + "o_proj.bias", ("hidden",), ("hidden",), block, scaled=True, counted=True),
        ]
    return rows


def _mlp(config: Any) -> list[TensorSpec]:
    mlp, block, down = LAYER + "mlp.", "mlp", ("hidden", "intermediate")
    rows = [
        TensorSpec(LAYER + "post_attention_layernorm.weight", ("hidden",), ("hidden",), block),
        TensorSpec(mlp + "gate_proj.weight", ("intermediate", "hidden"), (), block, counted=True),
        TensorSpec(mlp + "up_proj.weight", ("intermediate", "hidden"), (), block, counted=True),
        TensorSpec(mlp + "down_proj.weight", down, down, block, scaled=True, counted=True),
    ]
    if getattr(config, "mlp_bias", False):
        rows += [
            TensorSpec(mlp + "gate_proj.bias", ("intermediate",), (), block, counted=True),
            TensorSpec(mlp + "up_proj.bias", ("intermediate",), (), block, counted=True),
            TensorSpec(mlp + "down_proj.bias", ("hidden",), ("hidden",), block, scaled=True, counted=True),
        ]
    return rows
