"""Tables by `model_type` of the model's config. A new family is a file beside this one and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmshearing.axes import Table
from llmshearing.errors import ShearingError
from llmshearing.families.llama import llama_table

FAMILIES: dict[str, Callable[..., Table]] = {"llama": llama_table}


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
            f"model_type {family!r} has no table; there are tables for {', '.join(sorted(FAMILIES))}. A table names "
            "every tensor, the axes of its dimensions, the gates multiplied in and its block: see "
            "llmshearing/families/llama.py"
        )
    return FAMILIES[family](config, head_mode)
