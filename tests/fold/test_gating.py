"""Gated forward == folded model == activation-gating oracle, gradients included, over shapes and soft gates."""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from helpers_oracle import (
    hidden_sizes,
    oracle_logits,
    random_gates,
    random_model,
    tiny_config,
    wide_softmax,
    widen_norms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.fold.gating import attach
from llmshearing.fold.selection import Selection, Units
from llmshearing.masks.l0 import selection_from_gates

TOLERANCE = 1e-10
KINDS = ("hidden", "head", "intermediate", "layer", "head_layer", "mlp")
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 8,
    },
}


@dataclass
class Case:
    """A model, gates, and how to run it."""

    config: object
    gates: dict
    head_mode: str = "group"
    seed: int = 0
    round_to: int = 1
    padding: bool = False
    tokens: int = 7
    ids: torch.Tensor = field(init=False)
    mask: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed + 1)
        self.ids = torch.randint(self.config.vocab_size, (2, self.tokens), generator=generator)
        if self.padding:
            self.mask = torch.ones_like(self.ids)
            self.mask[1, -3:] = 0
        shape = (*self.ids.shape, self.config.vocab_size)
        self.weighing = torch.randn(shape, generator=generator, dtype=torch.float64)

    def fresh_gates(self):
        return {kind: gate.clone().requires_grad_() for kind, gate in self.gates.items()}

    def loss(self, logits):
        """A random functional of every log-probability."""
        return (logits.log_softmax(-1) * self.weighing).sum()


def skeleton(config, layers, head_groups):
    """A transformers model of ``layers`` layers to run folded tensors in that may differ in size between layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    model = widen_norms(LlamaForCausalLM(config).double())
    for block, groups in zip(model.model.layers, head_groups, strict=True):
        block.self_attn.num_key_value_groups = groups
    return model


def run_folded(case, model, table, selection):
    """Logits of the folded tensors in transformers' own, unswapped modules; differentiable in weights and gates."""
    folded = fold(dict(model.state_dict(keep_vars=True)), table, selection, zero_closed_blocks=True)
    kept = selection.kept_layers(table.layers)
    groups = []
    for new in range(len(kept)):
        query, key = (len(folded[f"model.layers.{new}.self_attn.{name}_proj.weight"]) for name in "qk")
        groups.append(query // key if key else 1)
    plain = skeleton(case.config, len(kept), groups)
    assert set(folded) == set(plain.state_dict())
    options = {"attention_mask": case.mask, "use_cache": False}
    return functional_call(plain, folded, (case.ids,), options, tie_weights=False).logits


def gradients(loss, model, gates):
    names = [name for name, _ in model.named_parameters()]
    inputs = [*model.parameters(), *gates.values()]
    values = torch.autograd.grad(loss, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, values, strict=True)]
    return dict(zip([*names, *gates], filled, strict=True))


def compare(name, left, right):
    assert torch.isfinite(left).all(), f"{name}: not finite"
    worst = (left - right).abs().max().item() if left.numel() else 0.0
    assert worst <= TOLERANCE * max(1.0, right.abs().max().item() if right.numel() else 1.0), f"{name}: off by {worst}"


def check_agreement(case):
    """The three agree on logits, on gradients of all weights, and on gradients of the gates of open units."""
    model = random_model(case.config, case.seed)
    table = table_for(case.config, case.head_mode)

    gates = case.fresh_gates()
    expected = oracle_logits(model, gates, case.ids, case.mask)
    expected_gradients = gradients(case.loss(expected), model, gates)

    gates = case.fresh_gates()
    folded = run_folded(case, model, table, selection_from_gates(table, gates))
    check_same(case, "folded", folded, gradients(case.loss(folded), model, gates), expected, expected_gradients)

    gating, gates = attach(model, table), case.fresh_gates()
    gating.set(selection_from_gates(table, gates, case.round_to))
    logits = model(case.ids, attention_mask=case.mask, use_cache=False).logits
    case.loss(logits).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"gradients that are None: {missing}"
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {kind: torch.zeros_like(gate) if gate.grad is None else gate.grad for kind, gate in gates.items()}
    check_same(case, "gated", logits, found, expected, expected_gradients)
    return found


def check_same(case, label, logits, found, expected, expected_gradients):
    compare(f"{label} logits", logits, expected)
    for name, value in expected_gradients.items():
        mine = found[name]
        if name in case.gates:  # a closed unit passes no gradient to its gate: the hard concrete's clamp stops it
            is_open = open_gates(case.gates, name)
            mine, value = mine[is_open], value[is_open]
        compare(f"{label} gradient of {name}", mine, value)


def open_gates(gates, kind):
    """Units whose gate's gradient is defined: open themselves, and in a layer that runs.

    A block that another mask closed runs no more; the activation form still differentiates through it.
    """
    is_open = gates[kind] != 0
    if kind in ("layer", "head_layer", "mlp"):
        for other in ("layer", "head_layer", "mlp"):
            is_open = is_open & (gates.get(other, gates[kind]) != 0)
    return is_open


def draw_config(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    return tiny_config(
        vocab_size=draw(st.integers(2, 30)),
        hidden_size=draw(st.sampled_from(hidden_sizes(heads))),  # head_dim is apart from hidden / heads
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def cases(draw):
    config, head_mode = draw_config(draw), draw(st.sampled_from(["group", "query"]))
    kinds = draw(st.lists(st.sampled_from(KINDS), unique=True))
    seed, closed = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.3, 0.6]))
    gates = random_gates(config, kinds, head_mode, seed, closed)
    for kind in kinds:
        if gates[kind].dim() == 2 and draw(st.booleans()):
            gates[kind][draw(st.integers(0, config.num_hidden_layers - 1))] = 0
    return Case(config, gates, head_mode, seed, draw(st.sampled_from([1, 1, 2, 4])), draw(st.booleans()))


@given(cases())
def test_agreement_of_gated_folded_and_oracle(case):
    check_agreement(case)


@given(cases())
def test_agreement_with_eager_attention(case):
    case.config._attn_implementation = "eager"
    with wide_softmax():
        check_agreement(case)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("head_mode", ["group", "query"])
def test_rope_scaling(rope, head_mode):
    config = tiny_config(num_key_value_heads=2, rope_scaling=ROPE[rope], max_position_embeddings=16)
    gates = random_gates(config, ("hidden", "head", "intermediate", "layer"), head_mode, 3)
    gates["layer"] = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    check_agreement(Case(config, gates, head_mode, tokens=20))  # past the positions that the source was made for


def with_all_closed(kind, rows, **changes):
    """Soft gates with whole rows of a kind closed."""
    head_mode = changes.pop("head_mode", "group")
    config = tiny_config(num_key_value_heads=2, attention_bias=True, mlp_bias=True, **changes)
    gates = random_gates(config, ("hidden", "head", "intermediate", "head_layer", "mlp"), head_mode, 5)
    for branch in ("head_layer", "mlp"):
        gates[branch] = torch.tensor([0.6, 0.9, 1.0], dtype=torch.float64)
    gates[kind][rows] = 0
    return config, gates, head_mode


# transformers builds no mask for an attention without a mask function: SDPA is then causal and repeats KV heads itself.
AttentionInterface.register("maskless", sdpa_attention_forward)


@pytest.mark.parametrize(
    ("attention", "padding", "tied"),
    [("sdpa", False, False), ("sdpa", True, True), ("maskless", False, True), ("eager", False, False)],
)
@pytest.mark.parametrize(
    ("kind", "head_mode"),
    [(kind, "group") for kind in ("hidden", "head", "intermediate", "head_layer", "mlp")] + [("head", "query")],
)
@pytest.mark.parametrize("rows", [slice(1, 2), slice(None)], ids=["one", "all"])
def test_whole_rows_closed(kind, head_mode, rows, attention, padding, tied):
    config, gates, head_mode = with_all_closed(
        kind, rows, head_mode=head_mode, tie_word_embeddings=tied, attn_implementation=attention
    )
    with wide_softmax():
        check_agreement(Case(config, gates, head_mode, padding=padding))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("open_layers", [[], [0], [2], [0, 2]])
def test_dropped_layers_have_gradients_of_zeros(open_layers, tied):
    config = tiny_config(tie_word_embeddings=tied, attention_bias=True)
    gates = random_gates(config, ("hidden", "head"), "group", 11)
    gates["layer"] = torch.zeros(3, dtype=torch.float64)
    gates["layer"][open_layers] = 0.7
    found = check_agreement(Case(config, gates))
    for name, gradient in found.items():
        closed = name.startswith("model.layers.") and int(name.split(".")[2]) not in open_layers
        assert not closed or (gradient == 0).all(), name


def test_weights_of_closed_units_get_gradients_of_exactly_zero():
    config = tiny_config()
    gates = random_gates(config, ("hidden", "head", "intermediate"), "group", 2)
    found = check_agreement(Case(config, gates))
    hidden, head = (gates["hidden"] == 0), (gates["head"][1] == 0).repeat_interleave(config.head_dim)
    assert hidden.any() and head.any()
    assert (found["model.embed_tokens.weight"][:, hidden] == 0).all()
    assert (found["model.norm.weight"][hidden] == 0).all()
    assert (found["model.layers.1.self_attn.q_proj.weight"][head] == 0).all()
    assert (found["model.layers.1.self_attn.o_proj.weight"][:, head] == 0).all()


def test_unequal_query_heads_in_groups_of_one_layer():
    """3 + 1 open heads (which would silently mispair), 2 + 0 and 0 + 0, each in a layer of its own."""
    config = tiny_config(num_attention_heads=6, num_key_value_heads=2)
    head = torch.tensor([[0.5, 0.9, 1, 0, 0.4, 0], [0.3, 0.7, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    check_agreement(Case(config, {"head": head}, "query"))


@pytest.mark.parametrize("round_to", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("head_mode", ["group", "query"])
@pytest.mark.parametrize("tied", [False, True])
def test_rounding_up_changes_no_function(round_to, head_mode, tied):
    config = tiny_config(num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    gates = random_gates(config, KINDS[:3], head_mode, 9)
    check_agreement(Case(config, gates, head_mode, round_to=round_to))


def test_a_selection_whose_hidden_units_were_rounded_is_not_folded():
    """The folded norms would divide by the padding too."""
    model, gates = random_model(tiny_config()), random_gates(tiny_config(), KINDS[:3], "group", 9)
    table = table_for(model.config)
    assert int((gates["hidden"] != 0).sum()) % 5
    with pytest.raises(ShearingError, match=r"hidden, row 0: \d of its \d+ units are padding"):
        fold(model.state_dict(), table, selection_from_gates(table, gates, 5))


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("padding", [False, True])
def test_gradient_checkpointing_changes_no_gradient(padding, round_to):
    config = tiny_config(num_key_value_heads=2, attention_bias=True)
    gates = random_gates(config, ("hidden", "head", "intermediate"), "group", 4)
    gates["layer"] = torch.tensor([0.5, 0.0, 0.8], dtype=torch.float64)
    case = Case(config, gates, padding=padding, round_to=round_to)
    plain = check_agreement(case)

    model = random_model(config, case.seed).train()
    gating, gates = attach(model, table_for(config)), case.fresh_gates()
    gating.set(selection_from_gates(gating.table, gates, round_to))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    case.loss(model(case.ids, attention_mask=case.mask).logits).backward()
    for name, parameter in model.named_parameters():
        compare(name, parameter.grad, plain[name])
    for kind, gate in gates.items():
        compare(kind, gate.grad, plain[kind])


def test_attach_changes_no_key_no_tensor_and_no_whole_forward():
    config = tiny_config(tie_word_embeddings=True, num_key_value_heads=2)
    model = widen_norms(random_model(config))
    ids = torch.arange(10)[None]
    before, logits = dict(model.state_dict(keep_vars=True)), model(ids).logits
    for module in model.modules():
        module.__dict__.pop("forward", None)  # the gated norm is as wide by itself
    gating = attach(model, table_for(config))
    after = dict(model.state_dict(keep_vars=True))
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    compare("logits", model(ids).logits, logits)
    gating.set(Selection())
    compare("logits of the empty selection", model(ids).logits, logits)
    gating.set(Selection({"hidden": (Units(torch.tensor([0, 3])),)}))
    assert (model(ids).logits - logits).abs().max() > 1e-3
    gating.set(None)
    compare("logits after the selection", model(ids).logits, logits)


def test_microbatches_add_up():
    """The gates of one step serve several forward passes, as in gradient accumulation."""
    config = tiny_config()
    case = Case(config, random_gates(config, KINDS[:4], "group", 8))
    whole = check_agreement(case)
    model = random_model(config, case.seed)
    gating, gates = attach(model, table_for(config)), case.fresh_gates()
    gating.set(selection_from_gates(gating.table, gates))
    for row in range(len(case.ids)):
        logits = model(case.ids[row : row + 1], use_cache=False).logits
        (logits.log_softmax(-1) * case.weighing[row : row + 1]).sum().backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        compare(name, parameter.grad, whole[name])


def test_vocabulary_is_folded_not_run():
    model = random_model(tiny_config())
    gating = attach(model, table_for(model.config))
    with pytest.raises(ShearingError, match="vocabulary"):
        gating.set(Selection({"vocab": (Units(torch.arange(5)),)}))


def test_attach_refuses_a_table_of_another_model():
    model = random_model(tiny_config())
    with pytest.raises(ShearingError, match="mlp.up_proj.weight: shape"):
        attach(model, table_for(tiny_config(intermediate_size=11)))


def test_attach_refuses_a_module_that_it_cannot_gate():
    model = random_model(tiny_config())
    model.model.norm = torch.nn.LayerNorm(12, bias=False)
    with pytest.raises(ShearingError, match="model.norm: a torch.nn.modules.normalization.LayerNorm"):
        attach(model, table_for(model.config))


def test_attach_twice_is_refused():
    """A second selection would be ignored in silence."""
    model = random_model(tiny_config())
    attach(model, table_for(model.config))
    with pytest.raises(ShearingError, match="already"):
        attach(model, table_for(model.config))


def test_unknown_family():
    with pytest.raises(ShearingError, match="'bert' has no table.*llama"):
        table_for(SimpleNamespace(model_type="bert"))
