"""The layouts of the families that megatron-core's GPTModel can hold. Names as in megatron-core 0.16.1.

There is no permutation for rotary embeddings: both sides turn the first half of a head against its second
(`rotary_interleaved` is off).
"""

from __future__ import annotations

from llmshearing.errors import ShearingError
from llmshearing.families.llama import ATTN, LAYER
from llmshearing.families.megatron.layout import FIRST, GROUP, LAST, RANK, Layout, MegatronTensor
from llmshearing.families.mixtral import MOE
from llmshearing.families.table import Table

DECODER = "decoder.layers.{layer}."
ATTENTION = DECODER + "self_attention."
QKV = ("q_proj", "k_proj", "v_proj")

OUTSIDE = (
    MegatronTensor(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), split=0, stage=FIRST, padded=True
    ),
    MegatronTensor(("decoder.final_layernorm.weight",), ("model.norm.weight",), stage=LAST),
    MegatronTensor(("output_layer.weight",), ("lm_head.weight",), split=0, stage=LAST, padded=True),
)
SELF_ATTENTION = (
    MegatronTensor(
        (DECODER + "input_layernorm.weight", ATTENTION + "linear_qkv.layer_norm_weight"),
        (LAYER + "input_layernorm.weight",),
    ),
    MegatronTensor(
        (ATTENTION + "linear_qkv.weight",), tuple(f"{ATTN}{name}.weight" for name in QKV), runs=GROUP, split=0
    ),
    MegatronTensor((ATTENTION + "linear_proj.weight",), (ATTN + "o_proj.weight",), split=1),
)
QKV_BIAS = (
    MegatronTensor((ATTENTION + "linear_qkv.bias",), tuple(f"{ATTN}{name}.bias" for name in QKV), runs=GROUP, split=0),
)
HEAD_NORMS = tuple(
    MegatronTensor((f"{ATTENTION}{name}_layernorm.weight",), (f"{ATTN}{name}_norm.weight",), partial=True)
    for name in "qk"
)
POST_NORM = LAYER + "post_attention_layernorm.weight"
MLP = (
    MegatronTensor((DECODER + "pre_mlp_layernorm.weight", DECODER + "mlp.linear_fc1.layer_norm_weight"), (POST_NORM,)),
    MegatronTensor(
        (DECODER + "mlp.linear_fc1.weight",),
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        runs=RANK,
        split=0,
    ),
    MegatronTensor((DECODER + "mlp.linear_fc2.weight",), (LAYER + "mlp.down_proj.weight",), split=1),
)
EXPERT = MOE + ".experts.{expert}."


def _expert(name: str) -> tuple[str, ...]:
    """A projection of an expert; as part of Transformer Engine's grouped product its number stands last."""
    alone, grouped = f"mlp.experts.local_experts.{{expert}}.{name}.weight", f"mlp.experts.{name}.weight{{expert}}"
    return tuple(DECODER + each for each in (alone, alone, grouped, alone))


# A layer of experts keeps its norm apart, whoever's modules it has.
EXPERTS = (
    MegatronTensor(
        (*[DECODER + "pre_mlp_layernorm.weight"] * 3, DECODER + "mlp.linear_fc1.layer_norm_weight"), (POST_NORM,)
    ),
    MegatronTensor((DECODER + "mlp.router.weight",), (MOE + ".gate.weight",)),
    MegatronTensor(
        _expert("linear_fc1"),
        (EXPERT + "w1.weight", EXPERT + "w3.weight"),
        runs=RANK,
        split=0,
    ),
    MegatronTensor(
        _expert("linear_fc2"),
        (EXPERT + "w2.weight",),
        split=1,
    ),
)

LAYOUTS = {
    "llama": OUTSIDE + SELF_ATTENTION + MLP,
    "mistral": OUTSIDE + SELF_ATTENTION + MLP,
    "qwen2": OUTSIDE + SELF_ATTENTION + QKV_BIAS + MLP,
    "qwen3": OUTSIDE + SELF_ATTENTION + HEAD_NORMS + MLP,
    "mixtral": OUTSIDE + SELF_ATTENTION + EXPERTS,
}
"""Family -> its tensors in Megatron."""


def layout_of(table: Table) -> Layout:
    """The layout of a model.

    Raises:
        ShearingError: its family has no layout, or some of its tensors no place in one (they are named).
    """
    if table.family not in LAYOUTS or table.of_layer:
        raise ShearingError(
            f"Megatron cannot hold a model of the {table.family} family with layers "
            f"{'of unequal sizes' if table.of_layer else 'of its kind'}: there are layouts for {', '.join(LAYOUTS)}"
        )
    tensors = LAYOUTS[table.family]
    placed = {row for tensor in tensors for row in tensor.rows}
    if homeless := sorted({spec.name for spec in table.tensors} - placed):
        raise ShearingError(
            f"Megatron cannot hold {', '.join(homeless)}: its layout of the {table.family} family has no such tensor"
        )
    return Layout(tensors, "lm_head.weight")
