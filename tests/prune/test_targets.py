"""Targets: shapes, layers by number and ratios -> whole shapes; every problem named at once."""

import math

import pytest
from helpers_oracle import tiny_config, tiny_table
from hypothesis import given, settings
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.prune.methods import METHODS
from llmshearing.prune.targets import resolve_target

RANDOM, DEPTH = METHODS["random"], METHODS["depth"]
MHA, GQA = table_for(tiny_config()), table_for(tiny_config(num_key_value_heads=2))


@pytest.mark.parametrize(
    ("table", "wanted", "heads", "mode"),
    [
        (MHA, {"num_attention_heads": 3}, (3, 3), "group"),
        (MHA, {"num_key_value_heads": 3}, (3, 3), "group"),
        (GQA, {"num_key_value_heads": 1}, (2, 1), "group"),
        (GQA, {"num_attention_heads": 2}, (2, 2), "query"),
        (GQA, {"num_attention_heads": 2, "num_key_value_heads": 1}, (2, 1), "group"),
        (GQA, {"hidden_size": 4}, (4, 2), "group"),
    ],
)
def test_heads_follow(table, wanted, heads, mode):
    target = resolve_target(wanted, table, RANDOM)
    assert (target.shape["num_attention_heads"], target.shape["num_key_value_heads"]) == heads
    assert target.head_mode == mode


@pytest.mark.parametrize(
    ("table", "wanted", "heads", "groups", "mode"),
    [
        (MHA, {"num_attention_heads": [4, 3, 1]}, [4, 3, 1], [4, 3, 1], "group"),
        (GQA, {"num_key_value_heads": [2, 1, 1]}, [4, 2, 2], [2, 1, 1], "group"),
        (GQA, {"num_attention_heads": [4, 2, 2]}, [4, 2, 2], 2, "query"),
        (GQA, {"num_attention_heads": [2, 2, 2]}, 2, 2, "query"),
    ],
)
def test_a_list_is_of_each_layer(table, wanted, heads, groups, mode):
    target = resolve_target(wanted, table, RANDOM)
    assert (target.shape["num_attention_heads"], target.shape["num_key_value_heads"]) == (heads, groups)
    assert target.head_mode == mode


def test_dropped_layers_set_the_number():
    target = resolve_target({"drop_layers": [1]}, MHA, DEPTH)
    assert target.shape["num_hidden_layers"] == 2 and target.drop_layers == [1]


def parts(table):
    """Counted parameters of a model's attention and of its MLP."""
    return [
        sum(
            math.prod(table.tensor_shape(spec, layer))
            for _, spec, layer in table.instances()
            if spec.block == block and spec.counted
        )
        for block in ("attention", "mlp")
    ]


@given(st.floats(0.05, 0.9), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(8, 300))
def test_a_ratio_meets_the_block_parameters_within_one_intermediate_unit_or_is_refused(
    ratio, groups, each, intermediate
):
    table = tiny_table(
        num_attention_heads=groups * each, num_key_value_heads=groups, intermediate_size=intermediate
    )
    wanted = (1 - ratio) * table.count(counted_only=True)
    unit = 3 * table.axes["hidden"].length * table.layers
    try:
        shape = resolve_target({"ratio": ratio}, table, RANDOM).shape
    except ShearingError as error:
        if "source's own shape" in str(error):
            assert ratio * table.count(counted_only=True) <= unit
            return
        # No shape of one or more heads and units is near enough: the smallest of all is larger, or heads jump past.
        assert "cannot lose that part" in str(error)
        smallest = tiny_table(num_attention_heads=1, num_key_value_heads=1, intermediate_size=1)
        assert smallest.count(counted_only=True) > wanted - unit / 2 or groups * each > 1
        return
    left = tiny_table(**shape).count(counted_only=True)
    assert abs(left - wanted) <= unit / 2 + 1e-6


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (16, 2), (9, 3)])
def test_a_ratio_is_shared_by_attention_and_mlp(ratio, heads, groups):
    """Few KV groups do not make the MLP pay: query heads inside the groups go too (the case of one unit a layer)."""
    sizes = {"hidden_size": 64 if heads != 9 else 72, "head_dim": 8}  # transformers 5 wants a multiple of heads
    table = table_for(
        tiny_config(**sizes, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=160)
    )
    shape = resolve_target({"ratio": ratio}, table, RANDOM).shape
    small = table_for(tiny_config(**{**sizes, **shape}))
    left = [after / before for after, before in zip(parts(small), parts(table), strict=True)]
    assert max(left) <= 2.5 * (1 - ratio) and min(left) >= 0.4 * (1 - ratio), left
    assert small.count(counted_only=True) / table.count(counted_only=True) == pytest.approx(1 - ratio, abs=0.01)


def test_a_ratio_that_no_widths_meet_is_refused_with_what_is_left():
    table = table_for(tiny_config(num_attention_heads=1, num_key_value_heads=1, intermediate_size=2))
    with pytest.raises(ShearingError, match="ratio = 0.9: layer 0 cannot lose that part.*are left"):
        resolve_target({"ratio": 0.9}, table, RANDOM)


def test_a_ratio_of_layers():
    table = table_for(tiny_config(num_hidden_layers=8))
    assert resolve_target({"ratio": 0.25}, table, DEPTH).shape["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    ("method", "wanted", "says"),
    [
        (RANDOM, {"hiden_size": 4, "intermediate_size": 11}, ["hiden_size is unknown", "1 to the source's 10"]),
        (RANDOM, {"hidden_size": 12}, ["source's own shape"]),
        (RANDOM, {"vocab_size": 12}, ["does not change vocab_size"]),
        (DEPTH, {"hidden_size": 4, "num_hidden_layers": 9}, ["does not change hidden_size", "1 to the source's 3"]),
        (RANDOM, {"num_attention_heads": 3, "num_key_value_heads": 2}, ["whole groups"]),
        (DEPTH, {"drop_layers": [0, 0]}, ["each once"]),
        (DEPTH, {"drop_layers": [3]}, ["0 to 2"]),
        (DEPTH, {"drop_layers": [0], "num_hidden_layers": 1}, ["leaves 2 of 3"]),
        (RANDOM, {"ratio": 1.5}, ["above 0 and below 1"]),
        (RANDOM, {"ratio": 0.5, "hidden_size": 3}, ["cannot be combined"]),
        (RANDOM, {"hidden_size": True}, ["whole number"]),
        (RANDOM, {"hidden_size": [3, 3, 3]}, ["whole number from 1 to the source's 12"]),
        (RANDOM, {"intermediate_size": [3, 3]}, ["or a list of 3 such numbers"]),
        (RANDOM, {"intermediate_size": [3, 3, 11]}, ["1 to the source's 10"]),
        (RANDOM, {"num_attention_heads": [2, 2, 4], "num_key_value_heads": [1, 2, 2]}, ["do one first"]),
    ],
)
def test_bad_targets_say_what_would_be_right(method, wanted, says):
    table = GQA if "num_key_value_heads" in wanted else MHA
    with pytest.raises(ShearingError) as error:
        resolve_target(wanted, table, method)
    assert all(say in str(error.value) for say in says), error.value


ANY = st.none() | st.booleans() | st.integers(-1, 12) | st.floats() | st.text(max_size=3)
ANY |= st.lists(ANY, max_size=4) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
NAMED = ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers",
         "drop_layers", "ratio", "vocab_size", "other", 3]  # fmt: skip


@settings(max_examples=300)
@given(wanted=st.dictionaries(st.sampled_from(NAMED), ANY, max_size=3), name=st.sampled_from(sorted(METHODS)))
def test_whatever_a_target_asks_for_is_a_shape_or_one_error(wanted, name):
    for table in (MHA, GQA):
        try:
            shape = resolve_target(wanted, table, METHODS[name]).shape
        except ShearingError:
            continue
        assert shape.keys() == table.shape().keys()
