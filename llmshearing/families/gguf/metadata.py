"""A model's config as the keys of a GGUF file, as llama.cpp reads them, and what they cannot say.

Numbers are written as what they are: whole numbers, float32, lists with a value for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from llmshearing.families.family import read
from llmshearing.families.names import EXPERTS, GROUPS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.families.table import Table

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN, LINEAR, YARN, LLAMA3 = "default", "linear", "yarn", "llama3"
HELD = (PLAIN, LINEAR, YARN, LLAMA3)
"""Kinds of rotary scaling that a file can say."""
WINDOWED = ("gemma2", "gemma3_text")
"""Families whose windows llama.cpp knows."""
# Key of the file, below the architecture's name -> key of the config, and what it is where the config leaves it out.
NORM_EPS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
}
SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}  # fmt: skip


def metadata_of(config: Any, table: Table, architecture: str) -> dict[str, Any]:
    """Key of the file -> value, for everything but the tokenizer and the dtype."""
    sizes = table.sizes()
    longest = context(config, table)
    values: dict[str, Any] = {
        "vocab_size": sizes[VOCAB],
        "context_length": longest,
        "embedding_length": sizes[HIDDEN],
        "block_count": sizes[LAYERS],
        "feed_forward_length": _by_layer(table, INTERMEDIATE),
        "attention.head_count": _by_layer(table, HEADS),
        "attention.head_count_kv": _by_layer(table, GROUPS),
        "attention.key_length": sizes[HEAD_DIM],
        "attention.value_length": sizes[HEAD_DIM],
        **_norms(config),
        **{name: value for name, key in SCALES.items() if (value := read(config, key)) is not None},
        **(_rotary(config, table) if rope(config) else {}),
        **_windows(config, table),
    }
    if EXPERTS in sizes:
        values |= {"expert_count": sizes[EXPERTS], "expert_used_count": read(config, "num_experts_per_tok")}
        values |= {"expert_feed_forward_length": sizes[INTERMEDIATE]} if table.family == "qwen3_moe" else {}
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _by_layer(table: Table, size: str) -> int | list[int]:
    """A size; of layers that differ, each layer's."""
    each = [own.sizes()[size] for own in table.of_layer] or [table.sizes()[size]]
    return each if table.of_layer else each[0]


def _norms(config: Any) -> dict[str, float]:
    found = {name: [read(config, key) for key in keys] for name, keys in NORM_EPS.items()}
    return {name: float(eps) for name, given in found.items() for eps in given if eps is not None}


# Rotary positions ----------------------------------------------------------------------------------------------------


def rope(config: Any, kind: str = FULL) -> dict[str, Any]:
    """What a config says of rotary positions: base, kind and its numbers; empty without them.

    transformers 4 has the base in a key of its own, transformers 5 all in one; both may speak of each kind of layer.
    """
    said = dict(read(config, "rope_parameters") or read(config, "rope_scaling") or {})
    if isinstance(said.get(kind), Mapping):
        said = dict(said[kind])
    base = said.get("rope_theta") or read(config, "rope_theta") or read(config, "rotary_emb_base")
    if base is None:
        return {}
    said["rope_type"] = said.get("rope_type") or said.get("type") or PLAIN
    return {**said, "rope_theta": float(base)}


def rope_problems(config: Any) -> Iterator[str]:
    """Rotary scaling that a file cannot say."""
    said = rope(config)
    if (kind := said.get("rope_type", PLAIN)) not in HELD:
        yield f"rotary scaling of the kind {kind}: it has {', '.join(HELD)} here"
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if kind == YARN and said.get(key) is not None:
            yield f"{key} = {said[key]} of yarn: only its default is written"


def _rotary(config: Any, table: Table) -> dict[str, Any]:
    said = rope(config)
    part = said.get("partial_rotary_factor") or read(config, "partial_rotary_factor") or read(config, "rotary_pct") or 1
    values = {"rope.freq_base": said["rope_theta"], "rope.dimension_count": int(table.head_dim * part)}
    if said["rope_type"] in (LINEAR, YARN):
        values |= {"rope.scaling.type": said["rope_type"], "rope.scaling.factor": float(said["factor"])}
    if said["rope_type"] == YARN:
        length = said.get("original_max_position_embeddings") or read(config, "max_position_embeddings")
        values["rope.scaling.original_context_length"] = length
        for key in ("beta_fast", "beta_slow"):
            values |= {f"rope.scaling.yarn_{key}": float(said[key])} if said.get(key) is not None else {}
    return values


def rope_factors(config: Any, table: Table) -> list[float] | None:
    """By what each frequency is divided, [head_dim / 2], in the scaling of LLaMA 3; None in any other.

    Wavelengths up to length / high stay, those from length / low on are divided by the factor, and between them the
    inverse of the divisor goes over linearly in length / wavelength (Grattafiori et al. 2024, and transformers).
    """
    said = rope(config)
    if said.get("rope_type") != LLAMA3:
        return None
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    length, factor = said["original_max_position_embeddings"], said["factor"]
    divisors = []
    for pair in range(0, table.head_dim, 2):
        turns = length * said["rope_theta"] ** (-pair / table.head_dim) / (2 * math.pi)  # in the original length
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return divisors


# Windows -------------------------------------------------------------------------------------------------------------


def sliding_layers(config: Any, table: Table) -> list[bool]:
    """For each layer, whether its attention looks no further back than a window."""
    window = read(config, "sliding_window")
    types = read(config, "layer_types")
    if window is None or read(config, "use_sliding_window", True) is False:
        return [False] * table.layers
    return [kind == SLIDING for kind in types] if types else [True] * table.layers


def context(config: Any, table: Table) -> int:
    """Tokens up to which llama.cpp computes the same function: no more than a window that it does not know."""
    longest = read(config, "max_position_embeddings") or read(config, "n_positions")
    if table.family not in WINDOWED and any(sliding_layers(config, table)):
        return min(longest, read(config, "sliding_window"))
    return longest


def context_problems(config: Any, table: Table) -> Iterator[str]:
    """Nothing a model of ours cannot do at all; kept apart so that a new family finds where to say it."""
    if table.family in WINDOWED and (types := read(config, "layer_types")):
        unknown = sorted(set(types) - {FULL, SLIDING})
        yield from (f"layer_types has {kind}: it knows {FULL} and {SLIDING}" for kind in unknown)


def _windows(config: Any, table: Table) -> dict[str, Any]:
    slides = sliding_layers(config, table)
    if table.family not in WINDOWED or not any(slides):
        return {}
    values = {"attention.sliding_window": read(config, "sliding_window"), "attention.sliding_window_pattern": slides}
    local = rope(config, SLIDING).get("rope_theta") if read(config, "rope_parameters") else None
    local = read(config, "rope_local_base_freq", local)
    return {**values, **({"rope.freq_base_swa": float(local)} if local is not None else {})}
