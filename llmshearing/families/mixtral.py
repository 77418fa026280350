"""The Mixtral family's table (MixtralForCausalLM of transformers): LLaMA's attention, and a mixture of experts.

    router: hidden -> experts        expert: hidden -> w1, w3 -> w2

Experts are units that can be cut; the router's rows go with them, and it renormalises over those that stay. Every token
goes to a fixed number of experts, so that as many stay. The intermediate units of each expert are a row of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmshearing.families.family import KEYS, Family, read, sizes_of
from llmshearing.families.llama import LAYER, QUERY_GROUPS, attention, outside, rms_norm, stream_norm
from llmshearing.families.names import ATTENTION, EXPERTS, INTERMEDIATE, MLP
from llmshearing.families.parts import decoder_table
from llmshearing.families.table import (
    EXPERT,
    Attribute,
    Axis,
    Experts,
    Kind,
    Table,
    TensorSpec,
    linear,
    of_experts,
)

NORM = rms_norm("mixtral.modeling_mixtral.MixtralRMSNorm")
MOE = LAYER + "block_sparse_moe"
PROJECTIONS = ("w1", "w3", "w2")
MIXTRAL_KEYS = KEYS | {EXPERTS: "num_local_experts"}


def mixtral_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Mixtral."""
    number = read(config, MIXTRAL_KEYS[EXPERTS])
    rows = [
        *outside(config, NORM),
        stream_norm("input_layernorm", NORM, ATTENTION),
        *attention(config),
        stream_norm("post_attention_layernorm", NORM, MLP),
        linear(MOE + ".gate.weight", EXPERT, "hidden", block=MLP),
        *of_experts(number, expert_rows(MOE + ".experts.{expert}.", PROJECTIONS)),
    ]
    table = decoder_table("mixtral", config, rows, head_mode, MIXTRAL_KEYS, attributes=(QUERY_GROUPS,))
    return with_experts(table, config, MIXTRAL_KEYS, Experts(MOE))


def expert_rows(path: str, names: tuple[str, str, str], **row: Any) -> list[TensorSpec]:
    """Projections of one expert. names: of gate, up and down projection."""
    gate, up, down = names
    gates = ("hidden", "intermediate", EXPERT)
    return [
        linear(f"{path}{gate}.weight", "intermediate", "hidden", block=MLP, **row),
        linear(f"{path}{up}.weight", "intermediate", "hidden", block=MLP, **row),
        linear(f"{path}{down}.weight", "hidden", "intermediate", gates=gates, block=MLP, scaled=True, **row),
    ]


def with_experts(table: Table, config: Any, keys: Mapping[str, str], experts: Experts) -> Table:
    """The table with experts as units, and with intermediate units of each."""
    sizes, chosen = sizes_of(config, keys), read(config, "num_experts_per_tok")
    number, width = sizes[EXPERTS], sizes[INTERMEDIATE]
    kinds = {EXPERT: Kind(EXPERT, number, 1, minimum=chosen), "intermediate": Kind("intermediate", width, number)}
    axes = {EXPERT: Axis(number, EXPERT), "intermediate": Axis(width, "intermediate", of_expert=True)}
    return replace(
        table,
        kinds={**table.kinds, **kinds},
        axes={**table.axes, **axes},
        config_axes={**table.config_axes, keys[EXPERTS]: (EXPERT, 1)},
        attributes=(*table.attributes, Attribute(experts.module, "num_experts", EXPERT)),
        experts=replace(experts, chosen=chosen),
    )


FAMILY = Family(
    "mixtral",
    mixtral_table,
    MIXTRAL_KEYS,
    renamed={MOE: LAYER + "mlp"},
    projections=PROJECTIONS,
    rope={"rope_scaling": ""},
)
