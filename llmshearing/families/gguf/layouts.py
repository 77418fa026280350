"""What each family's tensors are called in a GGUF file, and what llama.cpp cannot compute. Names as of llama.cpp b9000.

    row of the table                                  tensor of the file
    model.layers.{layer}.self_attn.q_proj.weight      blk.{layer}.attn_q.weight
    ....block_sparse_moe.experts.{expert}.w1.weight   blk.{layer}.ffn_gate_exps.weight      all experts, stacked

The rest of a tensor's form follows from its row. A projection that is [in, out] is turned to [out, in], a norm that
multiplies by 1 + weight is written as what it multiplies by, and segments that alternate by group become one run. One
thing more depends on the architecture: llama.cpp rotates neighbouring elements of a head where transformers rotates
its two halves (:attr:`Layout.interleaved`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families import gpt2, gpt_neox
from llmshearing.families.family import read
from llmshearing.families.gguf.metadata import context_problems, rope_problems
from llmshearing.families.llama import ATTN, LAYER
from llmshearing.families.mixtral import MOE
from llmshearing.families.names import HEAD_DIM, HEADS, HIDDEN
from llmshearing.families.nonuniform.table import TYPE
from llmshearing.families.qwen3_moe import MLP_PATH, dense_layers
from llmshearing.families.table import Table

BLOCK = "blk.{layer}."
BOTH = ("weight", "bias")
UNEQUAL = "deci"
"""The architecture whose layers may each have their own sizes."""
PRECISE = ("ffn_gate_inp.weight", "position_embd.weight")
"""Ends of names of matrices that stay in float32, as llama.cpp expects routers and positions."""


def _rows(names: Mapping[str, str], parts: tuple[str, ...] = ("weight",)) -> dict[str, str]:
    return {f"{row}.{part}": f"{name}.{part}" for row, name in names.items() for part in parts}


OUTSIDE = _rows({"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"})
NORMS = _rows({LAYER + "input_layernorm": BLOCK + "attn_norm", LAYER + "post_attention_layernorm": BLOCK + "ffn_norm"})
QUERY_KEY = {f"{ATTN}{name}_proj": f"{BLOCK}attn_{name}" for name in "qk"}
QUERY_KEY_VALUE = {f"{ATTN}{name}_proj": f"{BLOCK}attn_{name}" for name in "qkv"}
OUT = {ATTN + "o_proj": BLOCK + "attn_output"}
GATED = {f"{LAYER}mlp.{name}_proj": f"{BLOCK}ffn_{name}" for name in ("gate", "up", "down")}
HEAD_NORMS = _rows({f"{ATTN}{name}_norm": f"{BLOCK}attn_{name}_norm" for name in "qk"})
ROTATED = frozenset(f"{name}.{part}" for name in QUERY_KEY for part in BOTH)

ATTENTION = _rows(QUERY_KEY_VALUE, BOTH) | _rows(OUT)
BIASED = _rows({**QUERY_KEY_VALUE, **OUT, **GATED}, BOTH)
LLAMA = OUTSIDE | NORMS | BIASED
QWEN = OUTSIDE | NORMS | ATTENTION | _rows(GATED)
SANDWICH = _rows(
    {
        LAYER + "input_layernorm": BLOCK + "attn_norm",
        LAYER + "post_attention_layernorm": BLOCK + "post_attention_norm",
        LAYER + "pre_feedforward_layernorm": BLOCK + "ffn_norm",
        LAYER + "post_feedforward_layernorm": BLOCK + "post_ffw_norm",
    }
)
GEMMA = OUTSIDE | SANDWICH | ATTENTION | _rows(GATED)
NORMED = GEMMA | HEAD_NORMS
FUSED = _rows({ATTN + "qkv_proj": BLOCK + "attn_qkv", **OUT, LAYER + "mlp.gate_up_proj": BLOCK + "ffn_up"}) | _rows(
    {LAYER + "mlp.down_proj": BLOCK + "ffn_down"}
)


def _experts(path: str, names: tuple[str, str, str]) -> dict[str, str]:
    """Router and experts. names: of gate, up and down projection."""
    parts = zip(names, ("gate", "up", "down"), strict=True)
    rows = {f"{path}.experts.{{expert}}.{name}": f"{BLOCK}ffn_{part}_exps" for name, part in parts}
    return _rows({f"{path}.gate": BLOCK + "ffn_gate_inp", **rows})


MIXTRAL = OUTSIDE | NORMS | _rows({**QUERY_KEY_VALUE, **OUT}, BOTH) | _experts(MOE, ("w1", "w3", "w2"))
QWEN_MOE = OUTSIDE | NORMS | ATTENTION | HEAD_NORMS | _experts(MLP_PATH, ("gate_proj", "up_proj", "down_proj"))
STABLE = _rows({"model.embed_tokens": "token_embd", "lm_head": "output"}) | ATTENTION | _rows(GATED)
STABLE |= _rows(
    {
        "model.norm": "output_norm",
        LAYER + "input_layernorm": BLOCK + "attn_norm",
        LAYER + "post_attention_layernorm": BLOCK + "ffn_norm",
    },
    BOTH,
)
NEOX = _rows({"gpt_neox.embed_in": "token_embd", "embed_out": "output"}) | _rows(
    {
        "gpt_neox.final_layer_norm": "output_norm",
        gpt_neox.LAYER + "input_layernorm": BLOCK + "attn_norm",
        gpt_neox.LAYER + "post_attention_layernorm": BLOCK + "ffn_norm",
        gpt_neox.LAYER + "attention.query_key_value": BLOCK + "attn_qkv",
        gpt_neox.LAYER + "attention.dense": BLOCK + "attn_output",
        gpt_neox.LAYER + "mlp.dense_h_to_4h": BLOCK + "ffn_up",
        gpt_neox.LAYER + "mlp.dense_4h_to_h": BLOCK + "ffn_down",
    },
    BOTH,
)
GPT2 = _rows({"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "lm_head": "output"}) | _rows(
    {
        "transformer.ln_f": "output_norm",
        gpt2.LAYER + "ln_1": BLOCK + "attn_norm",
        gpt2.LAYER + "ln_2": BLOCK + "ffn_norm",
        gpt2.LAYER + "attn.c_attn": BLOCK + "attn_qkv",
        gpt2.LAYER + "attn.c_proj": BLOCK + "attn_output",
        gpt2.LAYER + "mlp.c_fc": BLOCK + "ffn_up",
        gpt2.LAYER + "mlp.c_proj": BLOCK + "ffn_down",
    },
    BOTH,
)


# What llama.cpp cannot compute ---------------------------------------------------------------------------------------


def _square(config: Any, table: Table) -> Iterator[str]:
    """Architectures whose heads are always as wide as hidden units / heads."""
    sizes, keys = table.sizes(), table.keys
    if sizes[HEADS] * sizes[HEAD_DIM] != sizes[HIDDEN]:
        yield (
            f"{keys[HIDDEN]} = {sizes[HIDDEN]} with {keys[HEADS]} = {sizes[HEADS]} of {sizes[HEAD_DIM]} each: it needs "
            f"{sizes[HEADS] * sizes[HEAD_DIM]} hidden units"
        )


def _only(key: str, *values: Any) -> Callable[[Any, Table], Iterator[str]]:
    """A key that has one of these values; None: it may be absent."""

    def check(config: Any, table: Table) -> Iterator[str]:
        if (value := read(config, key)) not in values:
            yield f"{key} = {value}: it can have {' or '.join(map(str, values))}"

    return check


def _present(*keys: str) -> Callable[[Any, Table], Iterator[str]]:
    def check(config: Any, table: Table) -> Iterator[str]:
        yield from (f"{key} is not set: it always has one" for key in keys if not read(config, key))

    return check


def _score_scale(config: Any, table: Table) -> Iterator[str]:
    scalar, width = read(config, "query_pre_attn_scalar"), table.head_dim
    if scalar != width:
        yield f"query_pre_attn_scalar = {scalar}: it scales scores by the width of heads, {width}"


def _tied(config: Any, table: Table) -> Iterator[str]:
    if not any(spec.alias for spec in table.tensors):
        yield "tie_word_embeddings = False: its output head is always the embedding"


def _every_fourth(config: Any, table: Table) -> Iterator[str]:
    rotary = list(read(config, "no_rope_layers", []))
    needed = [int((layer + 1) % 4 != 0) for layer in range(table.layers)]
    if rotary and rotary != needed:
        yield f"no_rope_layers = {rotary}: it has {needed}, every fourth layer without rotary positions"


def _all_sparse(config: Any, table: Table) -> Iterator[str]:
    if dense := dense_layers(config):
        yield f"layers {', '.join(map(str, dense))} have a plain MLP: every layer of it has experts"


SILU, TANH = _only("hidden_act", "silu"), ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
SOFTCAP, BY_LAYER = "attn_logit_softcapping", "scale_attn_by_inverse_layer_idx"
GEMMA_ACT, GELU = _only("hidden_activation", None, *TANH), _only("hidden_act", "gelu", *TANH)
GELU_NEW, BIASED_ALL = _only("activation_function", *TANH), _only("attention_bias", None, True)
CAPPED, UNCAPPED = _present(SOFTCAP, "final_logit_softcapping"), _only(SOFTCAP, None)
Check = Callable[[Any, Table], Iterator[str]]


@dataclass(frozen=True)
class Layout:
    """The tensors of a GGUF file."""

    architecture: str
    """``general.architecture``."""
    names: Mapping[str, str]
    """Row of the table -> tensor of the file; ``{layer}`` and ``{expert}`` stand for their numbers."""
    interleaved: bool = False
    """Whether the two halves of each query and key head alternate, element by element."""
    head_apart: bool = False
    """Whether the output head is written even where it is the embedding."""
    from_a_table: bool = False
    """Whether llama.cpp takes the activation (GELU) from a table of float16: to 1e-3 of a number, and no closer."""
    checks: tuple[Check, ...] = field(default=(), repr=False)

    def name(self, row: str) -> str:
        """The tensor of a row."""
        return self.names[row]

    def rotated(self, row: str) -> bool:
        """Whether the halves of the row's heads alternate."""
        return self.interleaved and row in ROTATED

    def precise(self, row: str) -> bool:
        """Whether the tensor stays in float32, besides all of one dimension."""
        return self.names[row].endswith(PRECISE)


ARCHITECTURES = {
    "llama": Layout("llama", LLAMA, True, checks=(SILU,)),
    "mistral": Layout("llama", LLAMA, True, checks=(SILU,)),
    "mixtral": Layout("llama", MIXTRAL, True, checks=(SILU,)),
    "granite": Layout("granite", LLAMA, True, checks=(SILU,)),
    "smollm3": Layout("smollm3", QWEN, True, checks=(SILU, _every_fourth)),
    "qwen2": Layout("qwen2", QWEN, checks=(SILU, _square)),
    "qwen3": Layout("qwen3", QWEN | HEAD_NORMS, checks=(SILU,)),
    "qwen3_moe": Layout("qwen3moe", QWEN_MOE, checks=(SILU, _all_sparse, _only("norm_topk_prob", True))),
    "phi3": Layout("phi3", OUTSIDE | NORMS | FUSED, checks=(SILU, _square)),
    "gemma2": Layout("gemma2", GEMMA, from_a_table=True, checks=(GEMMA_ACT, _score_scale, _tied, CAPPED)),
    "gemma3_text": Layout("gemma3", NORMED, from_a_table=True, checks=(GEMMA_ACT, _score_scale, UNCAPPED)),
    "olmo2": Layout("olmo2", NORMED, head_apart=True, checks=(SILU, _square)),
    "stablelm": Layout("stablelm", STABLE, head_apart=True, checks=(SILU, _square)),
    "gpt_neox": Layout("gptneox", NEOX, head_apart=True, from_a_table=True, checks=(GELU, BIASED_ALL)),
    "gpt2": Layout("gpt2", GPT2, from_a_table=True, checks=(GELU_NEW, _only(BY_LAYER, None, False))),
}  # fmt: skip
"""Family -> its tensors in a GGUF file. OPT is missing: llama.cpp has no such architecture."""
IN_LAYERS = {"llama": "llama", "mistral": "llama"}
"""Families whose layers may differ in size, as the architecture UNEQUAL."""


def layout_of(table: Table) -> Layout:
    """The layout of a model.

    Raises:
        ShearingError: llama.cpp has no architecture for its family, or for layers that differ in size.
    """
    family = table.family.removeprefix(TYPE)
    if family not in ARCHITECTURES:
        raise ShearingError(
            f"llama.cpp has no architecture for the {family} family; it has one for {', '.join(ARCHITECTURES)}"
        )
    if not table.of_layer:
        return ARCHITECTURES[family]
    if family not in IN_LAYERS:
        raise ShearingError(
            f"llama.cpp has no architecture for a model of the {family} family whose layers differ in size; it has one "
            f"for {', '.join(IN_LAYERS)}. Pad the layers to one size (--pad), or prune to one"
        )
    known = ARCHITECTURES[IN_LAYERS[family]]
    return Layout(UNEQUAL, known.names, known.interleaved, checks=known.checks)


def problems_of(config: Any, table: Table) -> list[str]:
    """Why llama.cpp cannot compute a model, or not as this config says; none where it can."""
    try:
        layout = layout_of(table)
    except ShearingError as error:
        return [str(error)]
    homeless = sorted({spec.name for spec in table.tensors} - layout.names.keys())
    problems = [f"it has no place for {', '.join(homeless)}"] if homeless else []
    problems += [problem for check in layout.checks for problem in check(config, table)]
    return [*problems, *rope_problems(config), *context_problems(config, table)]
