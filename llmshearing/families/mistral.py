"""The Mistral family's table (MistralForCausalLM of transformers): LLaMA's; its sliding window stays in the config."""

from __future__ import annotations

from typing import Any

from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import like_llama, llama_table, rms_norm
from llmshearing.families.table import Table

NORM = rms_norm("mistral.modeling_mistral.MistralRMSNorm")


def mistral_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Mistral."""
    return like_llama(llama_table(config, head_mode, NORM), "mistral")


FAMILY = Family("mistral", mistral_table, KEYS, rope={"rope_scaling": ""})
