"""Tables by `model_type` of the model's config. A new family is a file beside this one and a line in UNIFORM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llmshearing.axes import Selection, Table, folded_sizes
from llmshearing.errors import ShearingError
from llmshearing.families.llama import llama_table
from llmshearing.families.mistral import mistral_table
from llmshearing.families.nonuniform import nonuniform_table
from llmshearing.families.qwen2 import qwen2_table
from llmshearing.families.qwen3 import qwen3_table
from llmshearing.nonuniform.config import TYPE, config_with_sizes

UNIFORM: dict[str, Callable[..., Table]] = {
    "llama": llama_table,
    "mistral": mistral_table,
    "qwen2": qwen2_table,
    "qwen3": qwen3_table,
}
FAMILIES = UNIFORM | {TYPE + name: partial(nonuniform_table, table) for name, table in UNIFORM.items()}
# Keys of a config that hold a list with an entry per layer.
PER_LAYER_KEYS = ("layer_types",)


def table_for(config: Any, head_mode: str = "group") -> Table:
    """The table of a model.

    Args:
        config: a transformers config. head_mode: see :func:`llmshearing.families.llama.llama_table`.

    Raises:
        ShearingError: the model type has no table.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ShearingError(
            f"model_type {family!r} has no table; there are tables for {', '.join(sorted(UNIFORM))}. A table names "
            "every tensor, the axes of its dimensions, the gates multiplied in and its block: see "
            "llmshearing/families/llama.py"
        )
    return FAMILIES[family](config, head_mode)


def folded_config(config: Mapping[str, Any], table: Table, selection: Selection) -> dict[str, Any]:
    """The folded model's config, of the source's: its shape, head_dim (never cut), and the kept layers' entries.

    Layers that differ in size make it a non-uniform one (`llmshearing.nonuniform`), layers that agree a plain one.
    """
    kept = selection.kept_layers(table.layers)
    head_dim = table.config_axes["num_attention_heads"][1]  # no longer hidden / heads: written out
    values = {**config, **kept_entries(config, kept), "head_dim": head_dim, table.layers_key: len(kept)}
    return config_with_sizes(values, list(folded_sizes(table, selection).values()))


def kept_entries(config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Those keys of a config that list something for each layer, for the kept layers."""
    return {key: [config[key][layer] for layer in kept] for key in PER_LAYER_KEYS if config.get(key)}
