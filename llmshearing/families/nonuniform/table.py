"""Families of models whose layers differ in size: the family's own, asked for once by each layer's own config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmshearing.families.family import Family
from llmshearing.families.names import LAYERS
from llmshearing.families.table import Table

TYPE = "nonuniform_"
"""Before the family's model_type."""
CLASS = "NonUniform"
"""Before the name of the family's class."""
SIZES = "layer_sizes"
"""Key of the config: key that differs -> its value in each layer."""
PER_LAYER = "per_layer_config"
"""Key of the config that tells the same in transformers 5's form: number of the layer -> key that differs -> value."""


def without_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values without what tells the sizes of each layer, in either form."""
    return {key: value for key, value in config.items() if key not in (SIZES, PER_LAYER)}


def per_layer(sizes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int]]:
    """The value of PER_LAYER of what SIZES tells. Numbers have leading zeros, so that they sort."""
    layers = len(next(iter(sizes.values()), ()))
    width = len(str(layers - 1))
    return {str(at).zfill(width): {key: of[at] for key, of in sizes.items()} for at in range(layers)}


def nonuniform_family(family: Family) -> Family:
    """The family of models like ``family``'s in layers of different sizes."""

    def table(config: Any, head_mode: str = "group") -> Table:
        layers = tuple(family.table(config.of_layer(at), head_mode) for at in range(getattr(config, key)))
        return replace(family.table(config, head_mode), family=config.model_type, of_layer=layers)

    key = family.keys[LAYERS]
    return replace(family, name=TYPE + family.name, table=table)


def config_with_sizes(config: Mapping[str, Any], sizes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """A config of any form with the sizes of every layer: the family's own where they agree, else the non-uniform one.

    Args:
        sizes: of each layer, key of the config -> value; the same keys for all.
    """
    plain = without_sizes(config)
    differ = {key: [size[key] for size in sizes] for key in sizes[0] if len({size[key] for size in sizes}) > 1}
    plain["model_type"] = (TYPE if differ else "") + config["model_type"].removeprefix(TYPE)
    plain["architectures"] = [
        (CLASS if differ else "") + name.removeprefix(CLASS) for name in config.get("architectures") or ()
    ] or None
    largest = {key: max(size[key] for size in sizes) for key in sizes[0]}
    return {**plain, **largest, **({SIZES: differ, PER_LAYER: per_layer(differ)} if differ else {})}
