"""Tables by `model_type` of the model's config. A new family is a file beside this one and a line in UNIFORM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.llama import llama_table
from llmshearing.families.mistral import mistral_table
from llmshearing.families.nonuniform.config import TYPE
from llmshearing.families.nonuniform.table import nonuniform_table
from llmshearing.families.qwen2 import qwen2_table
from llmshearing.families.qwen3 import qwen3_table
from llmshearing.families.table import Table

UNIFORM: dict[str, Callable[..., Table]] = {
    "llama": llama_table,
    "mistral": mistral_table,
    "qwen2": qwen2_table,
    "qwen3": qwen3_table,
}
FAMILIES = UNIFORM | {TYPE + name: partial(nonuniform_table, table) for name, table in UNIFORM.items()}


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
