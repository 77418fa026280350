"""The Qwen3-MoE family's table (Qwen3MoeForCausalLM of transformers): Qwen3's attention, and mixtures of experts.

Some layers may have a plain MLP instead, of another width, which is never cut. "Intermediate" means the units of each
expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.family import KEYS, Family, read
from llmshearing.families.llama import LAYER, QUERY_GROUPS, attention, outside, rms_norm, stream_norm
from llmshearing.families.mixtral import expert_rows, with_experts
from llmshearing.families.names import ATTENTION, EXPERTS, INTERMEDIATE, LAYERS, MLP
from llmshearing.families.parts import decoder_table
from llmshearing.families.qwen3 import query_key_norms, with_head_norms
from llmshearing.families.table import EXPERT, Axis, Experts, Table, TensorSpec, linear, of_experts

NORM = rms_norm("qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm")
MLP_PATH = LAYER + "mlp"
QWEN3_MOE_KEYS = KEYS | {EXPERTS: "num_experts", INTERMEDIATE: "moe_intermediate_size"}
ALIASES = {"num_local_experts": "num_experts"}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE_LAYERS, STEP, DENSE_WIDTH = "mlp_only_layers", "decoder_sparse_step", "intermediate_size"


def dense_layers(config: Any) -> tuple[int, ...]:
    """Layers that have a plain MLP."""
    listed, step = read(config, DENSE_LAYERS, []), read(config, STEP, 1)
    return tuple(layer for layer in range(read(config, KEYS[LAYERS])) if layer in listed or (layer + 1) % step)


def follow(config: Any, kept: list[int]) -> dict[str, Any]:
    """The plain layers under their new numbers. The step goes: it counts layers that may be gone."""
    dense = dense_layers(config)
    return {DENSE_LAYERS: [new for new, layer in enumerate(kept) if layer in dense], STEP: 1}


def qwen3_moe_table(config: Any, head_mode: str = "group") -> Table:
    """Table of a Qwen3-MoE.

    Raises:
        ShearingError: no layer has experts.
    """
    number, dense = read(config, QWEN3_MOE_KEYS[EXPERTS]), dense_layers(config)
    sparse = tuple(layer for layer in range(read(config, KEYS[LAYERS])) if layer not in dense)
    if not number or not sparse:
        raise ShearingError("the qwen3_moe family's table needs a layer with experts: this model has none")
    experts = expert_rows(MLP_PATH + ".experts.{expert}.", PROJECTIONS, layers=sparse)
    rows = [
        *outside(config, NORM),
        stream_norm("input_layernorm", NORM, ATTENTION),
        *attention(config),
        *query_key_norms(NORM),
        stream_norm("post_attention_layernorm", NORM, MLP),
        linear(MLP_PATH + ".gate.weight", EXPERT, "hidden", block=MLP, layers=sparse),
        *of_experts(number, experts),
        *(_dense_rows(dense) if dense else ()),
    ]
    table = decoder_table("qwen3_moe", config, rows, head_mode, QWEN3_MOE_KEYS, attributes=(QUERY_GROUPS,))
    table = with_experts(with_head_norms(table), config, QWEN3_MOE_KEYS, Experts(MLP_PATH, layers=sparse))
    return replace(table, axes={**table.axes, "dense": Axis(read(config, DENSE_WIDTH))})


def _dense_rows(layers: tuple[int, ...]) -> list[TensorSpec]:
    row = {"block": MLP, "layers": layers}
    return [
        linear(MLP_PATH + ".gate_proj.weight", "dense", "hidden", **row),
        linear(MLP_PATH + ".up_proj.weight", "dense", "hidden", **row),
        linear(MLP_PATH + ".down_proj.weight", "hidden", "dense", gates=("hidden",), scaled=True, **row),
    ]


FAMILY = Family("qwen3_moe", qwen3_moe_table, QWEN3_MOE_KEYS, follow=follow, projections=PROJECTIONS, aliases=ALIASES)
