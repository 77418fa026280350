"""The SmolLM3 family's table (SmolLM3ForCausalLM of transformers): LLaMA's; some layers have no rotary positions."""

from __future__ import annotations

from typing import Any

from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import like_llama, llama_table, rms_norm
from llmshearing.families.table import Table

NORM = rms_norm("smollm3.modeling_smollm3.SmolLM3RMSNorm")


def smollm3_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a SmolLM3."""
    return like_llama(llama_table(config, head_mode, NORM), "smollm3")


FAMILY = Family("smollm3", smollm3_table, KEYS, layer_lists=("layer_types", "no_rope_layers"))
