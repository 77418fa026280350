"""Decoders without a table: what their configs say of single layers, for those that stay. Plain data, no torch.

    a list with an entry a layer          the entries of the layers that stay       layer_types, no_rope_layers, ...
    a list of layers' numbers             the numbers that these have now           mlp_only_layers, moe_layers, ...
    a number of leading layers            how many of these stay                    first_k_dense_replace, ...

What else counts layers (every n-th, say) cannot be followed. Whether a model of the followed config has the layers that
stay is looked at before the work (`llmshearing.prune.layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

LEADING = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "num_hash_layers")
"""Keys that say of how many leading layers something holds."""
COUNTING = ("layer", "pattern", "interval", "sparse_step", "freq", "period", "every", "stride")
"""Words in the names of keys that may count layers."""


def kept_entries(config: Mapping[str, Any], kept: list[int], key: str) -> dict[str, Any]:
    """The keys that describe layers, for the kept ones; ``key``: of the number of layers."""
    layers = config[key]
    followed: dict[str, Any] = {key: len(kept)}
    for name, value in config.items():
        if isinstance(value, (list, tuple)) and value and name != key:
            if _numbers(name, value, layers):
                followed[name] = [new for new, layer in enumerate(kept) if layer in value]
            elif len(value) == layers and _of_layers(name, value):
                followed[name] = [value[layer] for layer in kept]
        elif name in LEADING and isinstance(value, int) and not isinstance(value, bool):
            followed[name] = sum(layer < value for layer in kept)
    return followed


def suspects(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Keys that may describe single layers, for messages."""
    return {
        name: value
        for name, value in config.items()
        if (name in LEADING or any(word in name for word in COUNTING))
        and name != key
        and value not in (None, [], 0)
        and not isinstance(value, (bool, str, float))
    }


def _numbers(name: str, value: Any, layers: int) -> bool:
    """Whether a list holds numbers of layers: they rise, and are below the number of layers."""
    whole = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < layers for item in value)
    return "layer" in name and whole and all(one < other for one, other in pairwise(value))


def _of_layers(name: str, value: Any) -> bool:
    """Whether a list as long as there are layers is about layers, not ids or factors that are as many by chance."""
    return any(word in name for word in ("layer", "block", "window", "type", "rope", "pattern"))
