"""The Mistral family's table (MistralForCausalLM of transformers): LLaMA's; its sliding window stays in the config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.families.llama import llama_table
from llmshearing.families.table import Table


def mistral_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Mistral; arguments as of :func:`llmshearing.families.llama.llama_table`."""
    return replace(llama_table(config, head_mode), family="mistral")
