"""Random selection: exact counts, and the tensor-parallel balance, as properties."""

import pytest
import torch
from helpers_oracle import tiny_config, tiny_table
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, folded_shape, part_of
from llmshearing.prune.methods.random import random_selection


@st.composite
def problems(draw):
    """(table, target, tp): everything a multiple of tp, before and after."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    mode = draw(st.sampled_from(["group", "query"]))
    groups = tp * draw(st.integers(1, 2)) if mode == "group" or draw(st.booleans()) else 1
    repeat = draw(st.integers(1, 3)) * (1 if groups % tp == 0 else tp)
    size = {"hidden_size": draw(st.integers(1, 4)) * tp, "intermediate_size": draw(st.integers(1, 5)) * tp}
    size |= {"num_key_value_heads": groups, "num_attention_heads": groups * repeat, "num_hidden_layers": 3}
    table = tiny_table(mode, head_dim=2, **size)
    target = {**table.shape(), "num_hidden_layers": draw(st.integers(1, 3))}
    for key in ("hidden_size", "intermediate_size"):
        target[key] = draw(st.integers(1, size[key] // tp)) * tp
    if mode == "group":
        left = draw(st.integers(1, groups // tp)) * tp
        target |= {"num_key_value_heads": left, "num_attention_heads": left * repeat}
    else:
        step = groups if groups % tp == 0 else tp
        target["num_attention_heads"] = draw(st.integers(1, groups * repeat // step)) * step
    return table, target, tp


@given(problems(), st.integers(0, 5))
def test_counts_are_exact_and_every_slice_of_every_axis_keeps_as_many(problem, seed):
    table, target, tp = problem
    selection = random_selection(table, target, seed, tp)
    assert folded_shape(table, selection) == target
    for layer in selection.kept_layers(table.layers):
        for axis in ("hidden", "intermediate", "query"):
            index = part_of(table, axis, layer, selection).index
            if index is not None:
                slices = torch.bincount(index * tp // table.axes[axis].length, minlength=tp)
                assert slices.unique().numel() == 1, (axis, slices)


def test_each_rank_of_a_sliced_model_has_the_weights_that_its_slice_of_the_source_keeps():
    table = table_for(tiny_config(hidden_size=8, intermediate_size=8, num_attention_heads=4))
    target = {**table.shape(), "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    marks = {
        name: torch.arange(shape.numel(), dtype=torch.float64).view(shape)
        for name, spec, _ in table.instances()
        for shape in [torch.Size(table.tensor_shape(spec))]
    }
    folded = fold(marks, table, random_selection(table, target, 3, tp=2))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        for whole, cut in zip(marks[name].chunk(2), folded[name].chunk(2), strict=True):
            assert torch.isin(cut, whole).all()


def test_seeds_repeat_and_differ():
    table = table_for(tiny_config(hidden_size=32))
    target = {**table.shape(), "hidden_size": 16}
    same, again, other = (random_selection(table, target, seed).units["hidden"][0].index for seed in (1, 1, 2))
    assert torch.equal(same, again) and not torch.equal(same, other)


@pytest.mark.parametrize(
    ("target", "tp", "say"),
    [
        ({"hidden_size": 13}, 1, "hidden: 13 of 12"),
        ({"hidden_size": 9}, 2, "hidden: 9 of 12"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, 2, "head: 3 of 4"),
        ({"intermediate_size": 6}, 3, "intermediate: 6 of 10"),
    ],
)
def test_what_does_not_fit_is_named(target, tp, say):
    table = table_for(tiny_config())
    with pytest.raises(ShearingError, match=say):
        random_selection(table, {**table.shape(), **target}, tp=tp)
