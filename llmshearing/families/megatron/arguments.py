"""A model's config as Megatron's arguments, and back. What Megatron cannot compute is refused by its key.

Megatron keeps its arguments in every checkpoint. They tell the shape and most of what decides the function; what they
do not tell (ids of special tokens, names) comes from the config that our own files carry along, or is left to defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.family import KEYS, read
from llmshearing.families.megatron.layout import SPECS
from llmshearing.families.mixtral import MIXTRAL_KEYS
from llmshearing.families.names import EXPERTS, GROUPS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.families.portable import portable
from llmshearing.families.table import Table

# Size -> Megatron's argument.
SIZES = {
    HIDDEN: "hidden_size",
    HEADS: "num_attention_heads",
    GROUPS: "num_query_groups",
    HEAD_DIM: "kv_channels",
    INTERMEDIATE: "ffn_hidden_size",
    LAYERS: "num_layers",
    VOCAB: "vocab_size",
    EXPERTS: "num_experts",
}
TP, PP, EP, VPP = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)  # fmt: skip
IMPLEMENTATION = {"local": "local", "te": "transformer_engine", "te_grouped": "transformer_engine"}
# What megatron-core's scaled rotary embedding has built in.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE, WINDOW, TIED, TOPK = "rope_scaling", "sliding_window", "tie_word_embeddings", "num_experts_per_tok"
# Argument -> what it must be for a model of ours; absent: it is.
EXPECTED = {
    "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "rotary_percent": 1.0,
    "rotary_interleaved": False, "add_bias_linear": False, "apply_layernorm_1p": False, "multi_latent_attention": False,
    "moe_shared_expert_intermediate_size": None, "moe_router_pre_softmax": False, "qk_l2_norm": False,
    "moe_layer_freq": 1, "window_attn_skip_freq": None, "softmax_type": "vanilla", "attention_output_gate": False,
    "no_rope_freq": None, "mtp_num_layers": None, EP: 1, VPP: None,
}  # fmt: skip

FUNCTION = (
    *SIZES.values(), "untie_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "norm_epsilon",
    "rotary_base", "use_rope_scaling", "rotary_seq_len_interpolation_factor", "window_size", "moe_router_topk",
)  # fmt: skip
"""The arguments that decide which function the model is."""
DECISIVE = (*FUNCTION, TP, PP)
"""Those that every rank's file must tell alike."""


@dataclass(frozen=True)
class Parallel:
    """How a model is spread. tp, pp: tensor-parallel ranks and pipeline stages. spec: of the modules, one of SPECS."""

    tp: int = 1
    pp: int = 1
    spec: str = SPECS[0]


def arguments_of(config: Any, table: Table, parallel: Parallel) -> dict[str, Any]:
    """Megatron's arguments for a model, without the dtype and the padded vocabulary.

    Raises:
        ShearingError: listing everything that Megatron cannot hold, and every size that does not divide by the ranks.
    """
    sizes = table.sizes()
    config = portable(config.to_dict() if hasattr(config, "to_dict") else vars(config))  # rotary keys of 4.57
    if problems := [*_unheld(config), *_uneven(sizes, table, parallel)]:
        raise ShearingError("Megatron cannot hold this model so: " + "; ".join(problems))
    scaling, window = read(config, ROPE, {}), _window(config)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    values = {SIZES[size]: number for size, number in sizes.items() if size in SIZES}
    return {
        **EXPECTED,
        **values,
        "encoder_num_layers": sizes[LAYERS],
        "group_query_attention": sizes[GROUPS] != sizes[HEADS],
        "untie_embeddings_and_output_weights": not read(config, TIED, False),
        "add_qkv_bias": table.family == "qwen2",
        "qk_layernorm": table.family == "qwen3",
        "norm_epsilon": read(config, "rms_norm_eps"),
        "rotary_base": int(base) if float(base := read(config, "rope_theta", 10000.0)).is_integer() else base,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": float(scaling["factor"]) if kind == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": float(scaling["factor"]) if kind == "linear" else None,
        "window_size": None if window is None else (window - 1, 0),
        "max_position_embeddings": read(config, "max_position_embeddings"),
        "seq_length": read(config, "max_position_embeddings"),
        "init_method_std": read(config, "initializer_range", 0.02),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **({"moe_router_topk": read(config, TOPK), "moe_ffn_hidden_size": None} if EXPERTS in sizes else {}),
        TP: parallel.tp,
        PP: parallel.pp,
        "transformer_impl": IMPLEMENTATION[parallel.spec],
        "moe_grouped_gemm": parallel.spec == "te_grouped",
        "use_mcore_models": True,
        "ckpt_format": "torch",
    }


def _unheld(config: Any) -> Iterator[str]:
    """What of the function has no argument."""
    if (act := read(config, "hidden_act", "silu")) not in ("silu", "swish"):
        yield f"hidden_act = {act} (only silu)"
    scaling = read(config, ROPE, {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        if off := {key: scaling[key] for key, value in LLAMA3.items() if scaling.get(key) != value}:
            yield f"{ROPE} with {off} (only {LLAMA3})"
    elif kind not in ("default", "linear"):
        yield f"{ROPE} of type {kind} (only linear and llama3)"
    types = set(read(config, "layer_types", []))
    if len(types) > 1:
        yield f"layer_types = {sorted(types)} in one model (only one type for all layers)"


def _uneven(sizes: Mapping[str, int], table: Table, parallel: Parallel) -> Iterator[str]:
    """Sizes that ranks or stages cannot share equally."""
    if min(parallel.tp, parallel.pp) < 1:
        yield f"{parallel.tp} tensor-parallel ranks and {parallel.pp} pipeline stages (at least 1 of each)"
        return
    for size in (HEADS, INTERMEDIATE):
        if sizes[size] % parallel.tp:
            yield f"{table.keys[size]} = {sizes[size]} does not divide by {parallel.tp} tensor-parallel ranks"
    if sizes[GROUPS] % parallel.tp and parallel.tp % sizes[GROUPS]:
        yield (
            f"{table.keys.get(GROUPS, GROUPS)} = {sizes[GROUPS]}: neither a multiple nor a divisor of {parallel.tp} "
            "tensor-parallel ranks"
        )
    if sizes[LAYERS] % parallel.pp:
        yield f"{table.keys[LAYERS]} = {sizes[LAYERS]} does not divide by {parallel.pp} pipeline stages"


def _window(config: Any) -> int | None:
    """Tokens that a token attends to, itself included; None: all before it."""
    types = set(read(config, "layer_types", ["sliding_attention"]))
    slides = read(config, "use_sliding_window", True) and types == {"sliding_attention"}
    return read(config, WINDOW) if slides else None


def family_of_arguments(arguments: Mapping[str, Any]) -> str:
    """The family that the arguments of a Megatron model mean."""
    if arguments.get("num_experts"):
        return "mixtral"
    if arguments.get("qk_layernorm"):
        return "qwen3"
    if arguments.get("add_qkv_bias"):
        return "qwen2"
    return "mistral" if arguments.get("window_size") else "llama"


def config_of_arguments(arguments: Mapping[str, Any], vocabulary: int | None = None) -> dict[str, Any]:
    """The config that Megatron's arguments mean.

    Args:
        vocabulary: number of tokens, where the arguments do not tell it.

    Raises:
        ShearingError: listing the arguments that are missing, or that make it no model of ours.
    """
    problems = [
        f"{name} = {arguments[name]} (only {value})"
        for name, value in EXPECTED.items()
        if name in arguments and (arguments[name] or None) != (value or None)
    ]
    family = family_of_arguments(arguments)
    keys = MIXTRAL_KEYS if family == "mixtral" else KEYS
    told: dict[str, Any] = {size: arguments.get(SIZES[size]) for size in keys}
    if told[GROUPS] is None or not arguments.get("group_query_attention", True):
        told[GROUPS] = told[HEADS]
    if told[HEAD_DIM] is None and told[HEADS] and told[HIDDEN]:
        told[HEAD_DIM] = told[HIDDEN] // told[HEADS]
    told[VOCAB] = vocabulary or told[VOCAB]
    missing = [SIZES[size] for size, number in told.items() if not isinstance(number, int)]
    problems += [f"{name} is not told" + (_VOCABULARY if name == SIZES[VOCAB] else "") for name in missing]
    if problems:
        raise ShearingError("the arguments are not those of a model that can be read: " + "; ".join(problems))
    return {
        "model_type": family,
        **{keys[size]: number for size, number in told.items()},
        **_function(arguments, family),
    }


def disagreements(arguments: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Where the arguments of a file tell another model than those of a config do (:func:`arguments_of`)."""
    grouped = arguments.get("group_query_attention", True)
    told = {name: arguments[name] for name in FUNCTION if arguments.get(name) is not None}
    told |= {} if grouped else {SIZES[GROUPS]: told.get(SIZES[HEADS])}
    return [
        f"{name} = {value}, the config means {expected.get(name)}"
        for name, value in told.items()
        if _differ(value, expected.get(name))
    ]


_VOCABULARY = " (the number of tokens without padding: give vocab_size=)"


def _function(arguments: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What the arguments say of the function, beside the shape. Arguments that are not there are not spoken of."""
    values: dict[str, Any] = {TIED: not arguments.get("untie_embeddings_and_output_weights", False)}
    names = {
        "norm_epsilon": "rms_norm_eps", "rotary_base": "rope_theta", "init_method_std": "initializer_range",
        "max_position_embeddings": "max_position_embeddings",
    }  # fmt: skip
    values |= {key: arguments[name] for name, key in names.items() if arguments.get(name) is not None}
    if "rope_theta" in values:
        values["rope_theta"] = float(values["rope_theta"])
    if arguments.get("use_rope_scaling"):
        values[ROPE] = {"rope_type": "llama3", "factor": arguments.get("rope_scaling_factor", 8.0), **LLAMA3}
    elif (factor := arguments.get("rotary_seq_len_interpolation_factor")) not in (None, 1):
        values[ROPE] = {"rope_type": "linear", "factor": float(factor)}
    window = arguments.get("window_size")
    if window or family in ("mistral", "mixtral"):
        values[WINDOW] = window[0] + 1 if window else None
    if window and family in ("qwen2", "qwen3"):
        values |= {"use_sliding_window": True, "max_window_layers": 0}
    if family == "mixtral":
        values[TOPK] = arguments.get("moe_router_topk", 2)
    return values


def _differ(told: Any, expected: Any) -> bool:
    if isinstance(told, (list, tuple)):
        return tuple(told) != tuple(expected or ())
    if isinstance(told, float) or isinstance(expected, float):
        return not math.isclose(told, 1 if expected is None else expected, rel_tol=1e-6)
    return bool(told != expected) and bool(told or expected)


# Field of megatron-core's TransformerConfig -> argument.
_CORE = {
    "num_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups", "kv_channels": "kv_channels", "ffn_hidden_size": "ffn_hidden_size",
    "normalization": "normalization", "layernorm_epsilon": "norm_epsilon", "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm", "window_size": "window_size", "num_moe_experts": "num_experts",
    "moe_router_topk": "moe_router_topk", TP: TP, PP: PP,
}  # fmt: skip


def core_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig for a model of ours, without activation, dtype and device."""
    fields = {field: arguments[name] for field, name in _CORE.items() if arguments.get(name) is not None}
    constant = {"gated_linear_unit": True, "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    return {**fields, **constant}


def core_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron-core's GPTModel for a model of ours."""
    return {
        "vocab_size": arguments["padded_vocab_size"],
        "max_sequence_length": arguments["max_position_embeddings"],
        "share_embeddings_and_output_weights": not arguments["untie_embeddings_and_output_weights"],
        "position_embedding_type": "rope",
        "rotary_base": arguments["rotary_base"],
        "rope_scaling": arguments["use_rope_scaling"],
        "rope_scaling_factor": arguments["rope_scaling_factor"],
        "seq_len_interpolation_factor": arguments["rotary_seq_len_interpolation_factor"],
    }


def core_layer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron-core's spec of a layer of its own modules."""
    return {
        "num_experts": arguments.get("num_experts"),
        "qk_layernorm": arguments["qk_layernorm"],
        "normalization": arguments["normalization"],
    }
