"""A family: its table, the names of its sizes, and what of its config describes layers. Plain data, no torch.

A family is one file beside this one, with a FAMILY in it, and a line in the registry (`llmshearing.families`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmshearing.families.names import EXPERTS, GROUPS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.families.table import Table

# The keys that most configs of transformers have.
KEYS = {
    HIDDEN: "hidden_size",
    HEADS: "num_attention_heads",
    GROUPS: "num_key_value_heads",
    HEAD_DIM: "head_dim",
    INTERMEDIATE: "intermediate_size",
    LAYERS: "num_hidden_layers",
    VOCAB: "vocab_size",
}

COMMON_LAYERS = KEYS[LAYERS]
"""What the number of layers is called in a model of which nothing else is known."""
EXAMPLE = {KEYS[HIDDEN]: 192, KEYS[HEADS]: 6, KEYS[INTERMEDIATE]: 512}
"""A target, for help texts."""


def read(config: Any, key: str, default: Any = None) -> Any:
    """A value of a config, which may be an object of transformers or a mapping from its JSON; None counts as absent."""
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


def sizes_of(config: Any, keys: Mapping[str, str], mlp_factor: int | None = None) -> dict[str, Any]:
    """A model's sizes, None where the config lacks one; KV groups and head_dim by transformers' own defaults.

    mlp_factor: intermediate units for each hidden unit, where the config does not say their number.
    """
    sizes = {size: read(config, key) for size, key in keys.items()}
    if sizes.get(GROUPS) is None:
        sizes[GROUPS] = sizes[HEADS]
    if sizes.get(HEAD_DIM) is None and sizes[HIDDEN] and sizes[HEADS]:
        sizes[HEAD_DIM] = sizes[HIDDEN] // sizes[HEADS]
    if sizes.get(INTERMEDIATE) is None and mlp_factor is not None and sizes[HIDDEN]:
        sizes[INTERMEDIATE] = mlp_factor * sizes[HIDDEN]
    return sizes


NEEDED = (HIDDEN, HEADS, LAYERS, VOCAB)
"""Sizes without which there is no model."""


def size_problems(config: Any, keys: Mapping[str, str], mlp_factor: int | None = None) -> list[str]:
    """What is wrong with the sizes that a config states: none where one is needed, or no whole number above 0.

    mlp_factor: see :func:`sizes_of`.
    """
    needed = (*NEEDED, *([INTERMEDIATE] if mlp_factor is None else []))
    problems = []
    for size, key in keys.items():
        value, least = read(config, key), 0 if size == EXPERTS else 1
        if value is None and size not in needed:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{key} = {value!r}: must be a whole number from {least}")
    heads, groups = (read(config, keys[size]) if size in keys else None for size in (HEADS, GROUPS))
    if not problems and heads and groups and heads % groups:
        problems.append(f"{keys[HEADS]} = {heads}: must be a multiple of {keys[GROUPS]} = {groups}")
    return problems


def _nothing(config: Any, kept: list[int]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """What the package knows of a family of models."""

    name: str
    """``model_type`` of its configs."""
    table: Callable[[Any, str], Table]
    """(config, head mode) -> table. Head mode "group" cuts whole KV groups with their query heads (with multi-head
    attention: heads); "query" cuts the same number of query heads inside every KV group."""
    keys: Mapping[str, str]
    """Size (`families.names`) -> key of the config."""
    layer_lists: tuple[str, ...] = ("layer_types",)
    """Keys of the config that list something for each layer."""
    follow: Callable[[Any, list[int]], dict[str, Any]] = _nothing
    """(config, kept layers) -> keys that say something of layers otherwise, for the kept ones under new numbers."""

    mlp_factor: int | None = None
    """Intermediate units for each hidden unit, where a config does not say their number."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path of a module in checkpoints -> its path in transformers 5, where that differs (`families.stored`)."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Key that transformers 5 writes to configs -> the key that both versions read (`families.portable`)."""
    rope: Mapping[str, str] = field(default_factory=dict)
    """Rotary parameter -> its key in configs of 4.57, where that is another; empty: it has none."""
    projections: tuple[str, str, str] | None = None
    """Names of an expert's gate, up and down projection."""

    def sizes(self, config: Any) -> dict[str, int | None]:
        """See :func:`sizes_of`."""
        return sizes_of(config, self.keys, self.mlp_factor)

    def kept_config(self, config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
        """The config's keys that describe layers, for the kept ones; their number too."""
        lists = {key: [config[key][layer] for layer in kept] for key in self.layer_lists if config.get(key)}
        return {**lists, **self.follow(config, kept), self.keys[LAYERS]: len(kept)}
