"""The Granite family's table (GraniteForCausalLM of transformers): LLaMA's.

Its multipliers of embeddings, branches, attention and logits stay in the config: none depends on a size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.compat import LAYER_TUPLES
from llmshearing.families.family import KEYS, Family
from llmshearing.families.llama import like_llama, llama_table, rms_norm
from llmshearing.families.table import Table

NORM = rms_norm("granite.modeling_granite.GraniteRMSNorm")


def granite_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Granite."""
    return replace(like_llama(llama_table(config, head_mode, NORM), "granite"), layer_tuple=LAYER_TUPLES)


FAMILY = Family("granite", granite_table, KEYS)
