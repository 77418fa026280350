"""Families of models by the `model_type` of their configs. A new family is a file beside this one and a line below."""

from __future__ import annotations

from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)
from llmshearing.families.family import Family, size_problems
from llmshearing.families.nonuniform.table import TYPE, nonuniform_family
from llmshearing.families.table import Table

_MODULES = (
    llama, mistral, qwen2, qwen3, gpt_neox, opt, gpt2, phi3, gemma2, gemma3, olmo2, smollm3, granite,
    mixtral, qwen3_moe, stablelm,
)  # fmt: skip
UNIFORM: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
FAMILIES = UNIFORM | {TYPE + name: nonuniform_family(family) for name, family in UNIFORM.items()}
DEFAULT = llama.FAMILY
"""The family of a model of which nothing but its sizes is known."""


def family_of(model_type: Any) -> Family:
    """The family of a model type.

    Raises:
        ShearingError: there is no table for it.
    """
    if model_type not in FAMILIES:
        raise ShearingError(
            f"model_type {model_type!r} has no table; there are tables for {', '.join(sorted(UNIFORM))}. A table names "
            "every tensor, the axes of its dimensions, the gates multiplied in and its block: see docs/families.md"
        )
    return FAMILIES[model_type]


def table_for(config: Any, head_mode: str = "group") -> Table:
    """The table of a model.

    Args:
        config: a transformers config. head_mode: see :class:`llmshearing.families.family.Family`.

    Raises:
        ShearingError: the model type has no table, or a size is no whole number above 0.
    """
    family = family_of(getattr(config, "model_type", None))
    if problems := size_problems(config, family.keys, family.mlp_factor):
        raise ShearingError(f"no model of type {family.name} can have this config: {'; '.join(problems)}")
    return family.table(config, head_mode)
