"""Tables that are wrong on purpose: the conformance suite's checks see each of them, and each check can fail."""

from dataclasses import replace

import pytest
import torch
from conformance import (
    check_agreement,
    check_branches,
    check_counts_of_cut,
    check_depth,
    check_every_tensor_matters,
    check_gates,
    check_generation,
    check_round_trip,
    check_shapes,
    cut_kinds,
    ids_of,
    random_model,
    uniform_gates,
)
from huggingface_hub.errors import StrictDataclassError
from tiny import config_of

from llmshearing.errors import ShearingError
from llmshearing.families import FAMILIES, table_for
from llmshearing.families.table import EXPERT, Segments

# A check fails by its own words, or transformers and torch do by theirs: sizes that do not fit are loud there.
WRONG = (AssertionError, ShearingError, RuntimeError, KeyError)


def agree(table, model):
    check_agreement(table, model, uniform_gates(table, cut_kinds(table)))


def gates_alone(table, model):
    check_gates(table)


def with_rows(table, end, change):
    """The table with other rows where names end so; ``change`` returns None for rows that go."""
    rows = [change(spec) if spec.name.endswith(end) else spec for spec in table.tensors]
    assert [*table.tensors] != rows, f"no row ends in {end}"
    return replace(table, tensors=tuple(row for row in rows if row is not None))


def rows(end, **changes):
    return lambda table: with_rows(table, end, lambda spec: replace(spec, **changes))


def module(end, **changes):
    return lambda table: with_rows(table, end, lambda spec: replace(spec, module=replace(spec.module, **changes)))


def less(end, gate):
    def without(spec):
        return replace(spec, gates=tuple(axis for axis in spec.gates if axis != gate))

    return lambda table: with_rows(table, end, without)


def config_axis(key, axis, per=1):
    return lambda table: replace(table, config_axes={**table.config_axes, key: (axis, per)})


def fields(**changes):
    return lambda table: replace(table, **changes)


def per_unit(name, number):
    return lambda table: replace(table, axes={**table.axes, name: replace(table.axes[name], per_unit=number)})


# What is wrong -> (family, variant, head mode, changes of the config, the wrong table, the checks that each see it).
MISTAKES = {
    "a missing row": (
        "llama",
        "biases",
        "group",
        {},
        lambda table: with_rows(table, "k_proj.bias", lambda spec: None),
        [check_shapes],
    ),
    "a row too many": (
        "llama",
        "grouped",
        "group",
        {},
        lambda table: replace(table, tensors=(*table.tensors, replace(table.tensors[-1], name="model.more.weight"))),
        [check_shapes],
    ),
    "an axis of another length": (
        "llama",
        "grouped",
        "group",
        {},
        rows("q_proj.weight", axes=("kv", "hidden")),
        [check_shapes],
    ),
    "an axis of the same length": (
        "llama",
        "grouped",
        "group",
        {"intermediate_size": 16},
        rows("down_proj.weight", axes=("intermediate", "hidden")),
        [agree],
    ),
    "a norm that counts": (
        "llama",
        "grouped",
        "group",
        {},
        rows("input_layernorm.weight", counted=True),
        [check_shapes],
    ),
    "a projection that does not": (
        "llama",
        "grouped",
        "group",
        {},
        rows("up_proj.weight", counted=False),
        [check_shapes],
    ),
    "swapped segments": (
        "phi3",
        "tied",
        "group",
        {},
        rows("qkv_proj.weight", axes=(Segments(("query", "kv", "kv"), 4), "hidden")),
        [agree],
    ),
    "segments in one run": (
        "gpt_neox",
        "parallel",
        "group",
        {},
        rows("query_key_value.weight", axes=(Segments(("query", "kv", "kv")), "hidden")),
        [agree],
    ),
    "no gate of heads": ("llama", "grouped", "group", {}, less("o_proj.weight", "query"), [gates_alone, agree]),
    "no gate of MLP units": (
        "llama",
        "grouped",
        "group",
        {},
        less("down_proj.weight", "intermediate"),
        [gates_alone, agree],
    ),
    "no hidden gate on a branch": ("llama", "grouped", "group", {}, less("down_proj.weight", "hidden"), [gates_alone]),
    "no hidden gate on a norm": (
        "llama",
        "grouped",
        "group",
        {},
        less("input_layernorm.weight", "hidden"),
        [gates_alone],
    ),
    "no hidden gate on a bias": (
        "llama",
        "biases",
        "group",
        {},
        less("down_proj.bias", "hidden"),
        [gates_alone, agree],
    ),
    "no branch gate": (
        "llama",
        "grouped",
        "group",
        {},
        rows("down_proj.weight", scaled=False),
        [gates_alone, check_branches],
    ),
    "no branch gate on a bias": (
        "llama",
        "biases",
        "group",
        {},
        rows("o_proj.bias", scaled=False),
        [check_branches, agree],
    ),
    "another branch": ("llama", "grouped", "group", {}, rows("o_proj.weight", block="mlp"), [check_branches]),
    "a branch gate before a norm": ("olmo2", "grouped", "group", {}, rows("o_proj.weight", scaled=True), [gates_alone]),
    "another class": (
        "llama",
        "grouped",
        "group",
        {},
        module("norm.weight", cls="torch.nn.RMSNorm"),
        [agree, check_branches],
    ),
    "another offset": ("llama", "grouped", "group", {}, module("norm.weight", offset=1.0), [agree]),
    "another form": ("llama", "grouped", "group", {}, module("norm.weight", form="layer_norm"), [agree]),
    "no rescaling": ("gemma2", "untied", "group", {}, rows("embed_tokens.weight", rescale=0.0), [agree]),
    "another key": (
        "llama",
        "grouped",
        "group",
        {},
        config_axis("intermediate_size", "hidden"),
        [check_counts_of_cut, check_round_trip],
    ),
    "a size without a key": (
        "llama",
        "grouped",
        "group",
        {},
        lambda table: replace(
            table, config_axes={key: axis for key, axis in table.config_axes.items() if key != "num_attention_heads"}
        ),
        [check_counts_of_cut, check_round_trip],
    ),
    "a key that is not repeated": (
        "opt",
        "tied",
        "group",
        {},
        fields(mirrors={}),
        [check_counts_of_cut, check_round_trip],
    ),
    "no attributes": ("llama", "grouped", "query", {}, fields(attributes=()), [agree]),
    "no number of experts": (
        "mixtral",
        "grouped",
        "group",
        {},
        lambda table: replace(table, attributes=tuple(own for own in table.attributes if own.name != "num_experts")),
        [agree],
    ),
    "no gate of experts": ("mixtral", "grouped", "group", {}, less("w2.weight", EXPERT), [gates_alone]),
    "layers that return tuples": ("llama", "grouped", "group", {}, fields(layer_tuple=True), [agree, check_branches]),
    "heads of another width": ("llama", "grouped", "query", {}, per_unit("query", 2), [agree]),
}
PAIRS = [
    pytest.param(*case[:-1], check, id=f"{mistake} - {check.__name__}")
    for mistake, case in MISTAKES.items()
    for check in case[-1]
]


def run(check, table, model, folder):
    check(table, model, folder) if check is check_round_trip else check(table, model)


@pytest.mark.parametrize(("family", "variant", "head_mode", "changes", "mistake", "check"), PAIRS)
def test_a_wrong_table_is_seen(family, variant, head_mode, changes, mistake, check, tmp_path):
    config = config_of(family, variant, **changes)
    table = table_for(config, head_mode)
    run(check, table, random_model(config), tmp_path / "right")
    with pytest.raises(WRONG):
        run(check, mistake(table), random_model(config), tmp_path / "wrong")


@pytest.mark.parametrize(
    ("family", "variant", "lists"), [("smollm3", "tied", ("layer_types",)), ("qwen2", "slides above", ())]
)
def test_lists_of_layers_that_are_forgotten_are_seen(family, variant, lists, monkeypatch):
    config = config_of(family, variant)
    check_depth(table_for(config), random_model(config))
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], layer_lists=lists))
    with pytest.raises((*WRONG, ValueError, StrictDataclassError)):  # transformers refuses other lengths
        check_depth(table_for(config), random_model(config))


def test_a_dead_tensor_is_seen():
    config = config_of("opt", "tied")
    with pytest.raises(AssertionError, match=r"k_proj\.bias: the output changes"):
        check_every_tensor_matters(table_for(config), random_model(config))


def test_a_wrong_cache_is_seen():
    model = random_model(config_of("llama", "grouped"))
    check_generation(model, ids_of(model.config)[:1, :4])

    def from_zero(module, args, kwargs):
        length = kwargs["input_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(length)[None]}

    model.register_forward_pre_hook(from_zero, with_kwargs=True)
    with pytest.raises(AssertionError):
        check_generation(model, ids_of(model.config)[:1, :4])
