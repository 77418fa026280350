"""Layers that stay: looked at before the work, in models on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmshearing.errors import ShearingError
from llmshearing.families.layers import suspects

# Attributes that number a layer: these differ, and decide nothing but its place in the cache.
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")


def check_followed(source: PretrainedConfig, followed: PretrainedConfig, path: str, kept: list[int], key: str) -> None:
    """Refuse where a model of the followed config has other layers than the source's that stay.

    Raises:
        ShearingError: naming the keys that may describe layers, and what differs.
    """
    try:
        before, after = (_signatures(config, path) for config in (source, followed))
    except Exception as error:  # a config that no model can be made of
        raise ShearingError(f"no model of the kept layers can be made: {error}; {_keys(source, key)}") from error
    for new, layer in enumerate(kept):
        if new >= len(after) or before[layer] != after[new]:
            differ = [name for name, value in before[layer].items() if after[new].get(name) != value][:3]
            differ += [name for name in after[new] if name not in before[layer]][:3] if not differ else []
            raise ShearingError(
                f"layer {layer} would become another one as layer {new} ({', '.join(differ)}): the config says by "
                f"number what a layer is. {_keys(source, key)}"
            )


def _keys(config: PretrainedConfig, key: str) -> str:
    named = ", ".join(f"{name} = {value}" for name, value in suspects(config.to_dict(), key).items())
    return f"keys that describe layers: {named}. Drop layers that leave these true, or prune widths"


def _signatures(config: PretrainedConfig, path: str) -> list[dict[str, Any]]:
    """For each layer: its modules' classes, shapes and plain attributes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [_signature(layer) for layer in model.get_submodule(path)]  # type: ignore[union-attr]


def _signature(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"{name}: class"] = type(module).__name__
        for attribute, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and attribute not in NUMBERS and not attribute.startswith("_"):
                found[f"{name}.{attribute}".lstrip(".")] = value
    shapes: Mapping[str, Any] = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    return found | {f"{name}: shape": shape for name, shape in shapes.items()}
