"""Tiny configs of every family of the registry: name of a variant -> keyword arguments of its config.

A family of the registry that is missing here fails the conformance suite by name. Options that change which tensors
there are, or how they are used, each want a variant: ties, biases, grouped queries, kinds of layers.
"""

import re

from transformers import CONFIG_MAPPING

LIKE_LLAMA = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MHA = {"num_key_value_heads": 4}
WITHOUT_GROUPS = {key: value for key, value in LIKE_LLAMA.items() if key != "num_key_value_heads"}
GEMMA = {**LIKE_LLAMA, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 4}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
OPT = {**WITHOUT_GROUPS, "ffn_dim": 10, "word_embed_proj_dim": 16, "dropout": 0.0}
OPT.pop("intermediate_size")
GPT2 = {
    "vocab_size": 23,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2}
QWEN3_MOE = {
    **LIKE_LLAMA,
    **MOE,
    "head_dim": 6,
    "num_experts": 4,
    "moe_intermediate_size": 10,
    "intermediate_size": 9,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


def _variants(base, **variants):
    return {name.replace("_", " "): {**base, **changes} for name, changes in variants.items()}


VARIANTS = {
    "llama": _variants(
        LIKE_LLAMA,
        grouped=UNTIED,
        heads_apart={**TIED, **MHA, "head_dim": 6},
        biases={**UNTIED, "attention_bias": True, "mlp_bias": True},
        yarn={**TIED, "rope_scaling": YARN},
    ),
    "mistral": _variants(
        LIKE_LLAMA, grouped={**UNTIED, "sliding_window": 4}, tied={**TIED, **MHA, "sliding_window": None, "head_dim": 6}
    ),
    "qwen2": _variants(
        LIKE_LLAMA,
        grouped=UNTIED,
        slides_above={**TIED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        heads=MHA,
    ),
    "qwen3": _variants(
        LIKE_LLAMA, grouped={**UNTIED, "head_dim": 6}, biases={**TIED, "head_dim": 4, "attention_bias": True}
    ),
    "gpt_neox": _variants(
        WITHOUT_GROUPS,
        parallel={**UNTIED, "use_parallel_residual": True, "rotary_pct": 0.5},
        serial={**TIED, "use_parallel_residual": False, "rotary_pct": 1.0},
        without_biases={**UNTIED, "attention_bias": False},
    ),
    "opt": _variants(OPT, tied=TIED, untied=UNTIED, without_biases={**TIED, "enable_bias": False}),
    "gpt2": _variants(
        GPT2,
        tied={"n_inner": 10},
        untied={"n_inner": 10, **UNTIED},
        by_factor={"activation_function": "relu"},
        by_number={"n_inner": 10, "scale_attn_by_inverse_layer_idx": True},
    ),
    "phi3": _variants(
        LIKE_LLAMA,
        grouped={**UNTIED, "sliding_window": 4},
        tied={**TIED, **MHA},
        longrope={**UNTIED, **MHA, "rope_scaling": LONG, "original_max_position_embeddings": 8},
    ),
    "gemma2": _variants(
        GEMMA,
        tied={**TIED, **LAYER_TYPES},
        untied={**UNTIED, **MHA, "final_logit_softcapping": None, "attn_logit_softcapping": None},
        biases={**TIED, "attention_bias": True},
    ),
    "gemma3_text": _variants(
        GEMMA, tied={**TIED, **LAYER_TYPES}, untied={**UNTIED, **MHA}, biases={**TIED, "attention_bias": True}
    ),
    "olmo2": _variants(LIKE_LLAMA, grouped=UNTIED, tied={**TIED, **MHA}, biases={**UNTIED, "attention_bias": True}),
    "smollm3": _variants(
        LIKE_LLAMA,
        tied={**TIED, "no_rope_layers": [1, 0, 1]},
        untied={**UNTIED, **MHA, "no_rope_layers": [1, 1, 0], "mlp_bias": True},
        biases={**UNTIED, "attention_bias": True, "no_rope_layers": [0, 1, 1]},
    ),
    "stablelm": _variants(
        {**LIKE_LLAMA, "attention_dropout": 0.0, "hidden_dropout": 0.0, "partial_rotary_factor": 0.5},
        untied=UNTIED,
        tied_MHA={**TIED, **MHA},
        biases_beside={**UNTIED, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    "granite": _variants(
        {
            **LIKE_LLAMA,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        tied=TIED,
        untied={**UNTIED, **MHA},
        biases={**UNTIED, "attention_bias": True, "mlp_bias": True},
    ),
    "mixtral": _variants({**LIKE_LLAMA, **MOE, "num_local_experts": 4}, grouped=UNTIED, tied={**TIED, **MHA}),
    "qwen3_moe": _variants(
        QWEN3_MOE,
        grouped=UNTIED,
        tied={**TIED, "norm_topk_prob": False},
        one_dense={**UNTIED, "mlp_only_layers": [2]},
        every_second={**TIED, "num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ),
}


def config_of(family, variant, **changes):
    """transformers' own config of a variant."""
    return CONFIG_MAPPING[family](**{**VARIANTS[family][variant], **changes})


def inert(config, name):
    """Whether no value of a tensor changes the output: a bias of all keys shifts all scores of a query alike.

    Rotary positions turn the bias by the position, so that it matters.
    """
    if not name.endswith("k_proj.bias"):
        return False
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    rotary = getattr(config, "no_rope_layers", None)
    return config.model_type == "opt" or (rotary is not None and not rotary[layer])
