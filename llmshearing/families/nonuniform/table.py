"""Tables of models whose layers differ in size: the family's own table, asked for once by each layer's own config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmshearing.families.table import Table


def nonuniform_table(family: Callable[..., Table], config: Any, head_mode: str = "group") -> Table:
    """Table of a non-uniform model.

    Args:
        family: the family's table function.
        config: one of `llmshearing.families.nonuniform`. head_mode: as of the family.
    """
    layers = tuple(family(config.of_layer(layer), head_mode) for layer in range(config.num_hidden_layers))
    return replace(family(config, head_mode), family=config.model_type, of_layer=layers)
