"""Counts, checks and the fold: closed form against `numel`, round trips through transformers, errors by name."""

import pytest
import torch
from helpers_oracle import hidden_sizes, oracle_logits, random_gates, random_model, tiny_config, widen_norms
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, fold_lazily, folded_shape
from llmshearing.fold.selection import Selection, Units
from llmshearing.masks.l0 import expected_parameters, selection_from_gates


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters())


@st.composite
def configs(draw):
    groups, repeat = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    return tiny_config(
        vocab_size=draw(st.integers(2, 30)),
        hidden_size=draw(st.sampled_from(hidden_sizes(groups * repeat))),
        num_attention_heads=groups * repeat,
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def uniform_cases(draw):
    """(config, head mode, full-size soft gates that keep as many units in every row, the shape that must come out)."""
    config, head_mode = draw(configs()), draw(st.sampled_from(["group", "query"]))
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    repeat = config.num_attention_heads // groups
    rows, per_row, other = (1, groups, repeat) if head_mode == "group" else (groups, repeat, groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def gates(rows_, size, keep):
        order = torch.rand(rows_, size, generator=generator).argsort(-1)
        soft = 0.2 + 0.8 * torch.rand(rows_, size, generator=generator, dtype=torch.float64)
        return torch.where(order < keep, soft, 0.0)

    keep = {
        "head": (kept := draw(st.integers(1, per_row))),
        "hidden": draw(st.sampled_from(hidden_sizes(kept * other, config.hidden_size))),
        "intermediate": draw(st.integers(1, config.intermediate_size)),
        "layer": draw(st.integers(1, layers)),
    }
    drawn = {
        "hidden": gates(1, config.hidden_size, keep["hidden"])[0],
        "head": gates(layers * rows, per_row, keep["head"]).view(layers, -1),
        "intermediate": gates(layers, config.intermediate_size, keep["intermediate"]),
        "layer": gates(1, layers, keep["layer"])[0],
    }
    shape = {
        "hidden_size": keep["hidden"],
        "intermediate_size": keep["intermediate"],
        "num_attention_heads": keep["head"] * other,
        "num_key_value_heads": keep["head"] if head_mode == "group" else groups,
        "num_hidden_layers": keep["layer"],
        "vocab_size": config.vocab_size,
    }
    return config, head_mode, drawn, shape


def fresh(config, shape, weights):
    """A plain transformers model of the shape, loaded strictly, with wide norms."""
    model = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **shape})).double()
    model.load_state_dict(weights, strict=True)
    return widen_norms(model)


@given(configs())
def test_count_equals_numel_and_table_equals_state_dict(config):
    model = LlamaForCausalLM(config)
    for head_mode in ("group", "query"):
        table = table_for(config, head_mode)
        assert table.count() == numel(model)
        table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
        shape = table.shape()
        assert shape == {key: getattr(config, key) for key in shape}
        inside = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
        assert table.count(counted_only=True) == inside


@given(uniform_cases())
def test_folded_model_is_a_plain_transformers_model_of_the_shape(case):
    config, head_mode, gates, shape = case
    source, table = random_model(config), table_for(config, head_mode)
    selection = selection_from_gates(table, gates)
    assert folded_shape(table, selection) == shape
    folded = fold(dict(source.state_dict()), table, selection)
    model = fresh(config, shape, folded)
    ids = torch.arange(6)[None] % config.vocab_size
    torch.testing.assert_close(model(ids).logits, oracle_logits(source, gates, ids), rtol=1e-10, atol=1e-10)

    compact = table_for(model.config, head_mode)
    assert compact.count() == numel(model)
    assert compact.count(counted_only=True) == expected_with_hard_gates(table, gates)

    again = fold(folded, compact, Selection())
    ones = {kind: torch.ones(compact.kinds[kind].shape(compact.layers)) for kind in ("hidden", "head", "intermediate")}
    ones["layer"] = torch.ones(compact.layers)
    once_more = fold(folded, compact, selection_from_gates(compact, ones))
    assert list(again) == list(once_more) == list(folded)
    assert all(torch.equal(again[n], folded[n]) and torch.equal(once_more[n], folded[n]) for n in folded)


def expected_with_hard_gates(table, gates):
    """Expected size where every probability is 0 or 1."""
    hard = {kind: (gate != 0).double() for kind, gate in gates.items()}
    return expected_parameters(table, hard).item()


def test_fold_with_gates_of_one_copies_bit_for_bit():
    config = tiny_config(num_key_value_heads=2, tie_word_embeddings=True)
    weights = dict(random_model(config).state_dict())
    selection = Selection({"hidden": (Units(torch.arange(0, 12, 2)),)}, {"mlp": torch.tensor([1.0, 0.0, 1.0])})
    with pytest.raises(ShearingError, match="layer 1: its mlp block is closed"):
        fold(weights, table_for(config), selection)
    both = Selection(selection.units, {**selection.blocks, "attention": torch.tensor([1.0, 0.0, 1.0])})
    folded = fold(weights, table_for(config), both)
    old = weights["model.layers.2.mlp.up_proj.weight"][:, ::2]
    assert torch.equal(folded["model.layers.1.mlp.up_proj.weight"], old)
    assert not any(name.startswith("model.layers.2") for name in folded)
    assert folded["lm_head.weight"] is folded["model.embed_tokens.weight"]


def test_fold_reads_each_tensor_once_and_lazily():
    config = tiny_config(tie_word_embeddings=True)
    weights, read = dict(random_model(config).state_dict()), []

    class Reader(dict):
        def __getitem__(self, name):
            read.append(name)
            return weights[name]

    steps = fold_lazily(Reader(weights), table_for(config), Selection())
    made = [name for name, _ in steps]
    assert not read and made[-1] == "lm_head.weight"
    for _, make in fold_lazily(Reader(weights), table_for(config), Selection()):
        make()
    assert sorted(read) == sorted(name for name in weights if name != "lm_head.weight")


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_fold_keeps_the_logits_of_kept_tokens(tied):
    config = tiny_config(tie_word_embeddings=tied)
    source, kept = widen_norms(random_model(config)), torch.tensor([0, 3, 4, 9, 22])
    selection = Selection({"vocab": (Units(kept),)})
    table = table_for(config)
    model = fresh(config, folded_shape(table, selection), fold(dict(source.state_dict()), table, selection))
    new = torch.tensor([[4, 0, 1, 3, 3]])
    torch.testing.assert_close(model(new).logits, source(kept[new]).logits[..., kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_saved_folded_model_loads_strictly_with_the_same_log_probabilities(tmp_path, tied, rope_scaling):
    config = tiny_config(
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, rope_scaling=rope_scaling
    )
    source, table = random_model(config), table_for(config)
    gates = {"hidden": torch.tensor([0.5, 0, 1.0] * 4).double(), "layer": torch.tensor([0.5, 0, 1.0]).double()}
    gates["head"] = torch.tensor([[0.7, 0.0], [1.0, 1.0], [0.0, 0.3]]).double()
    selection = selection_from_gates(table, gates)
    model = fresh(config, folded_shape(table, selection), fold(dict(source.state_dict()), table, selection))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.head_dim == config.head_dim and loaded.config.num_hidden_layers == 2
    ids = torch.arange(12)[None]
    expected = oracle_logits(source, gates, ids).log_softmax(-1)
    torch.testing.assert_close(widen_norms(loaded)(ids).logits.log_softmax(-1), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_check_names_every_missing_unknown_and_misshaped_tensor():
    config = tiny_config()
    shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    del shapes["model.layers.1.mlp.up_proj.weight"]
    shapes["model.layers.0.self_attn.q_proj.bias"] = (16,)
    shapes["lm_head.weight"] = (23, 13)
    with pytest.raises(ShearingError) as error:
        table_for(config).check(shapes)
    for line in (
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.layers.0.self_attn.q_proj.bias: has no row in the table of the llama family",
        "lm_head.weight: shape [23, 13], the table says [23, 12]",
    ):
        assert line in str(error.value)


def test_a_tied_head_that_is_missing_is_an_error():
    config = tiny_config(tie_word_embeddings=True)
    shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    with pytest.raises(ShearingError, match="lm_head.weight: missing"):
        table_for(config).check(shapes)


def test_sizes_that_differ_between_layers_are_named():
    table = table_for(tiny_config())
    gates = {"intermediate": torch.ones(3, 10), "head": torch.ones(3, 4)}
    gates["intermediate"][1, :4] = 0
    gates["head"][2, 0] = 0
    with pytest.raises(ShearingError) as error:
        folded_shape(table, selection_from_gates(table, gates))
    assert "intermediate_size differs between layers (layer 0: 10, layer 1: 6, layer 2: 10)" in str(error.value)
    assert "num_attention_heads differs between layers (layer 0: 4, layer 1: 4, layer 2: 3)" in str(error.value)
    gates["layer"] = torch.tensor([1.0, 0.0, 0.0])
    assert folded_shape(table, selection_from_gates(table, gates))["intermediate_size"] == 10  # dropped layers are free


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"layer": [0, 0, 0]}, "every layer is closed"),
        ({"head_layer": [1, 0, 1], "mlp": [1, 1, 0]}, "layer 1: its attention block.*layer 2: its mlp block"),
    ],
)
def test_fold_refuses_what_no_uniform_model_can_hold(gates, message):
    config = tiny_config()
    table, weights = table_for(config), dict(random_model(config).state_dict())
    selection = selection_from_gates(table, {kind: torch.tensor(gate).double() for kind, gate in gates.items()})
    with pytest.raises(ShearingError, match=message):
        fold(weights, table, selection)


def test_closed_blocks_as_zeros_keep_the_function():
    config = tiny_config(attention_bias=True, mlp_bias=True)
    source, table = random_model(config), table_for(config)
    gates = random_gates(config, ["head_layer", "mlp"], "group", 0)
    gates["head_layer"], gates["mlp"] = torch.tensor([[0.5, 0, 0], [1, 0.7, 0]]).double()
    selection = selection_from_gates(table, gates)
    folded = fold(dict(source.state_dict()), table, selection, zero_closed_blocks=True)
    assert folded_shape(table, selection)["num_hidden_layers"] == 2
    ids = torch.arange(8)[None]
    model = fresh(config, {"num_hidden_layers": 2}, folded)
    torch.testing.assert_close(model(ids).logits, oracle_logits(source, gates, ids), rtol=1e-10, atol=1e-10)
    assert (folded["model.layers.1.self_attn.o_proj.weight"] == 0).all()


def test_units_of_a_shape_are_the_targets_of_its_masks():
    config = tiny_config(num_attention_heads=6, num_key_value_heads=3, hidden_size=18)
    shape = {"hidden_size": 8, "intermediate_size": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    grouped = table_for(config).units({**shape, "vocab_size": 23})
    assert grouped == {"hidden": 8, "intermediate": 5, "head": 2, "vocab": 23}
    inside = table_for(config, "query").units(
        {**shape, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 23}
    )
    assert inside["head"] == 1


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection({"heads": (Units(torch.arange(2)),)}), "'heads' is no kind of the llama family .*hidden, head"),
        (Selection({"head": (Units(torch.arange(2)),)}), "head: units of 1 layers, the model needs 3"),
        (Selection({"hidden": (Units(torch.tensor([3, 1])),)}), "hidden, row 0: its units must ascend"),
        (Selection({"hidden": (Units(torch.tensor([1, 1])),)}), "must ascend, each once"),
        (Selection({"hidden": (Units(torch.tensor([1, 12])),)}), "within 0 to 11"),
        (Selection({"hidden": (Units(torch.arange(3), torch.ones(2)),)}), "2 gates for 3 units"),
        (Selection({"head": (Units(torch.tensor([0, 1, 2])),) * 3}), "row 2: its 2 groups of 2 keep unequal numbers"),
        (Selection(blocks={"mlp": torch.ones(4)}), r"block 'mlp': shape \[4\]"),
        (Selection(blocks={"layer": torch.ones(3)}), "block 'layer'"),
    ],
)
def test_fold_refuses_a_selection_of_another_model(selection, message):
    config = tiny_config(num_key_value_heads=2)
    with pytest.raises(ShearingError, match=message):
        fold(dict(random_model(config).state_dict()), table_for(config, "query"), selection)
