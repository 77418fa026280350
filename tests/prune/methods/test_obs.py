"""OBS on whole models: weights are the least-squares fit on pruned inputs, exact fold, ratios by layer, bad input."""

import contextlib
import math
from collections import Counter

import pytest
import torch
from helpers_oracle import random_model, tiny_config
from helpers_prune import model_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, folded_shape
from llmshearing.fold.gating import attach
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.methods.decoder import layer_by_layer
from llmshearing.prune.methods.obs.layers import _room
from llmshearing.prune.methods.obs.method import choose, projections
from llmshearing.prune.methods.obs.plan import layer_counts, layer_ratios


def sequences(count=5, length=16, vocab=23, batch_size=2):
    ids = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, ids, "select", "report", batch_size)


def case(target, head_mode="group", **config):
    config = tiny_config(**config)
    table = table_for(config, head_mode)
    return random_model(config), table, {**table.shape(), **target}


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 6}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 3}
CASES = [
    (HEADS, "group", {}),
    (HEADS, "group", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ({"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 7}, "group", GROUPED),
    ({"num_attention_heads": 3}, "query", GROUPED),
]


@pytest.mark.parametrize(("target", "head_mode", "config"), CASES)
def test_fold_is_the_model_with_the_columns_set_to_zero(target, head_mode, config):
    model, table, target = case(target, head_mode, **config)
    choice = choose(model, table, target, sequences())
    assert folded_shape(table, choice.selection) == target
    ids = sequences().select
    whole = model(ids).logits
    small = LlamaForCausalLM(type(model.config).from_dict({**model.config.to_dict(), **target})).double()
    small.load_state_dict(fold(model.state_dict(), table, choice.selection), strict=True)
    # transformers' norms compute in float32
    torch.testing.assert_close(small(ids).logits, whole, atol=1e-5, rtol=1e-5)
    gating = attach(model, table)
    gating.set(choice.selection)
    torch.testing.assert_close(model(ids).logits, whole, atol=1e-5, rtol=1e-5)


def inputs_of(model, linear, ids):
    """All that a module reads, [n, tokens], in the plain forward of the whole model."""
    seen = []
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).T))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return torch.cat(seen, -1)


@pytest.mark.parametrize(("target", "head_mode", "config"), CASES)
def test_each_weight_is_the_least_squares_fit_on_pruned_inputs(target, head_mode, config):
    """The last removal leaves the columns that stay at the minimum of the calibration error, whatever was chosen."""
    model, table, target = case(target, head_mode, **config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = choose(model, table, target, sequences(), percdamp=0.0)
    ids = sequences().select
    for projection in projections(table):
        for layer in range(table.layers if projection.kind.name in choice.selection.units else 0):
            linear, units = projection.module(model, layer), choice.selection.units[projection.kind.name][layer].index
            kept = (units[:, None] * projection.width + torch.arange(projection.width)).flatten()
            # What it reads depends on the layers before, which are final, and not on itself.
            inputs, old = inputs_of(model, linear, ids), before[projection.name(layer)]
            best = torch.linalg.lstsq(inputs[kept].T, (old @ inputs).T).solution.T
            torch.testing.assert_close(linear.weight.data[:, kept], best, atol=1e-4, rtol=1e-4)
            plain = old[:, kept] @ inputs[kept] - old @ inputs
            assert (linear.weight @ inputs - old @ inputs).square().sum() <= plain.square().sum()
            assert linear.weight[:, sorted(set(range(linear.in_features)) - set(kept.tolist()))].count_nonzero() == 0
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


def test_states_on_disk_and_other_batches_give_the_same_model(tmp_path):
    results = []
    for options, batch_size in (({}, 2), ({"offload": tmp_path}, 2), ({}, 5)):
        model, table, target = case(HEADS)
        choose(model, table, target, sequences(batch_size=batch_size), **options)
        results.append(model.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-6)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_named(tmp_path):
    with pytest.raises(ShearingError, match=r"activations \[1099511627776, 8, 16\] need 562,949,953,421,312"):
        _room(torch.Size((1 << 40, 8)), torch.float32, tmp_path, 16)


def test_log_increase_and_a_range_of_layers():
    model, table, target = case({"intermediate_size": 5}, num_hidden_layers=6)
    choice = choose(model, table, target, sequences(), ratios="log_increase", minlayer=1, maxlayer=5)
    sizes = [len(units.index) for units in choice.selection.units["intermediate"]]
    assert sizes[0] == sizes[5] == 10
    assert sum(sizes[1:5]) == 4 * 5
    assert sizes[1:5] == sorted(sizes[1:5], reverse=True)
    assert sizes[1] > sizes[4]
    assert choice.about["removed"]["intermediate"] == [10 - size for size in sizes]


@given(
    mean=st.floats(0.0, 0.95), layers=st.integers(1, 100), part=st.one_of(st.none(), st.floats(0, 1)),
    room=st.floats(0, 1), strategy=st.sampled_from(["uniform", "log_increase"]),
)  # fmt: skip
def test_ratios_have_the_mean_asked_for(mean, layers, part, room, strategy):
    high = mean + (1 - mean) * room
    ratios = layer_ratios(strategy, mean, layers, None if part is None else part * mean, high)
    assert math.isclose(sum(ratios) / layers, mean, abs_tol=1e-9)
    assert all(-1e-9 <= ratio <= high + 1e-9 for ratio in ratios)
    assert all(b >= a - 1e-9 for a, b in zip(ratios, ratios[1:], strict=False))


def test_slimgpts_own_numbers_come_out_for_32_layers():
    ratios = layer_ratios("log_increase", 0.2, 32)
    assert ratios[0] == 0.0625
    assert math.isclose(ratios[-1], 0.25, abs_tol=1e-3)


@given(units=st.integers(2, 3000), layers=st.integers(1, 64), data=st.data())
def test_counts_add_up_and_leave_a_unit(units, layers, data):
    remove = data.draw(st.integers(1, units - 1))
    for strategy in ("uniform", "log_increase"):
        counts = layer_counts(strategy, units, remove, layers)
        assert sum(counts) == remove * layers
        assert all(0 <= count < units for count in counts)


def test_bad_input_is_named():
    model, table, target = case(HEADS)
    with pytest.raises(ShearingError, match="minlayer 2, maxlayer 9.*\n.*'steep'.*\n.*percdamp -1"):
        choose(model, table, target, sequences(), minlayer=2, maxlayer=9, ratios="steep", percdamp=-1)
    with pytest.raises(ShearingError, match="min_ratio 0.9"):
        choose(model, table, target, sequences(), ratios="log_increase", min_ratio=0.9)
    with pytest.raises(ShearingError, match="obs cannot change hidden_size, num_hidden_layers"):
        choose(model, table, {**target, "hidden_size": 8, "num_hidden_layers": 2}, sequences())
    with pytest.raises(ShearingError, match="calibration"):
        choose(model, table, target, None)
    with pytest.raises(ShearingError, match="no directory"):
        choose(model, table, target, sequences(), offload="/nowhere")
    few = sequences(count=1, length=4)
    with pytest.raises(ShearingError, match="layer 0, model.layers.0.self_attn.o_proj.weight.*singular.*percdamp"):
        choose(model, table, target, few, percdamp=0.0)


def test_dead_inputs_are_removed_first():
    model, table, target = case({"intermediate_size": 8})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[[1, 4]] = 0
    ids = sequences().select
    before = model(ids).logits
    choice = choose(model, table, target, sequences(), percdamp=0.0)
    assert all(not {1, 4} & set(units.index.tolist()) for units in choice.selection.units["intermediate"])
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


def test_one_layer_at_a_time_on_the_device_gives_the_same_model():
    results = []
    for alone in (False, True):
        model, table, target = case(HEADS)
        layers = list(model.model.layers)
        with layer_by_layer(model, layers, torch.device("cpu")) if alone else contextlib.nullcontext():
            choose(model, table, target, sequences())
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_a_layer_runs_once_and_only_what_was_pruned_runs_again(family):
    model = model_of(family, num_key_value_heads=2)
    runs = Counter()
    for name in ("q_proj", "o_proj", "up_proj", "down_proj"):
        for layer in model.model.layers:
            module = layer.get_submodule(("self_attn." if name in ("q_proj", "o_proj") else "mlp.") + name)
            module.register_forward_hook(lambda module, args, out, name=name: runs.update([name]))
    table = table_for(model.config)
    target = {**table.shape(), "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6}
    choose(model, table, target, sequences(batch_size=5))
    # First all layers but the last, while their arguments are recorded. What the last layer writes nobody reads.
    assert runs == {"q_proj": 3 + 4, "o_proj": 3 + 4 + 3, "up_proj": 3 + 4, "down_proj": 3 + 3}
