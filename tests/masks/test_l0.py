"""The masks of a model: shapes, penalty and expected size by loops, selections, errors; and they reach a target."""

import itertools

import pytest
import torch
from helpers_oracle import tiny_config

from llmshearing.compat import FEWEST_HEADS
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.masks import hard_concrete as hc
from llmshearing.masks.l0 import L0Masks, selection_from_gates

CONFIG = tiny_config(num_key_value_heads=2)
TARGET = {"hidden": 6, "head": 1, "intermediate": 5, "layer": 2}


def build(head_mode="group", target=TARGET, **options):
    kinds = options.pop("kinds", list(TARGET))
    return L0Masks(table_for(CONFIG, head_mode), kinds, target, **options)


def randomized(masks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = masks.double()
    for parameter in masks.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return masks


@pytest.mark.parametrize("head_mode", ["group", "query"])
def test_shapes_and_start(head_mode):
    masks = build(head_mode, seed=3)
    heads = 2 if head_mode == "group" else 4
    shapes = {kind: tuple(a.shape) for kind, a in masks.log_alpha.items()}
    assert shapes == {"hidden": (12,), "head": (3, heads), "intermediate": (3, 10), "layer": (3,)}
    for a in masks.log_alpha.values():  # inside the clamp, so that units differ and gradients flow
        assert a.dtype == torch.float32
        assert (a > hc.LOG_ALPHA_MIN).all() and (a < hc.LOG_ALPHA_MAX).all() and a.unique().numel() > 1
    for pair in itertools.chain(masks.lambda_1.values(), masks.lambda_2.values()):
        assert pair.shape == (1,) and pair.item() == 0
    torch.manual_seed(99)
    assert all(
        torch.equal(a, b) for a, b in zip(masks.parameters(), build(head_mode, seed=3).parameters(), strict=True)
    )


@pytest.mark.parametrize(("head_mode", "heads_open"), [("group", 1), ("query", 1)])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0, 7.0])
def test_penalty_written_out(head_mode, heads_open, progress):
    masks = randomized(build(head_mode, {**TARGET, "head": heads_open}, start_sparsity=0.05))
    masks.progress = progress
    want = 0.0
    for kind, (rows, size) in {
        "hidden": (1, 12),
        "head": (6 if head_mode == "query" else 3, 2),
        "intermediate": (3, 10),
        "layer": (1, 3),
    }.items():
        p = hc.probability_open(masks.log_alpha[kind]).detach().reshape(rows, size)
        final = 1 - masks.target[kind] / size
        target = 0.05 + (final - 0.05) * min(1.0, progress)
        for row in p.tolist():
            gap = 1 - sum(row) / size - target
            want += (masks.lambda_1[kind].item() * gap + masks.lambda_2[kind].item() * gap**2) / rows
    assert masks.penalty().item() == pytest.approx(want, abs=1e-12)
    assert masks.penalty(ascending=False).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("head_mode", ["group", "query"])
@pytest.mark.parametrize(
    "kinds", [["hidden", "head", "intermediate", "layer"], ["hidden", "head_layer", "mlp", "layer"], ["mlp"]]
)
def test_expected_parameters_written_out(head_mode, kinds):
    masks = randomized(build(head_mode, dict.fromkeys(kinds, 1), kinds=kinds))
    p = {kind: hc.probability_open(a).detach() for kind, a in masks.log_alpha.items()}
    hidden = p["hidden"].sum() if "hidden" in p else 12
    ones = torch.ones(3, dtype=torch.float64)
    want = 0.0
    for layer in range(3):
        head = p["head"][layer].sum() if "head" in p else (2 if head_mode == "group" else 4)
        query = head * 8 if head_mode == "group" else head * 4
        kv = head * 4 if head_mode == "group" else 8
        f = p["intermediate"][layer].sum() if "intermediate" in p else 10
        is_open = p.get("layer", ones)[layer]
        want += is_open * p.get("head_layer", ones)[layer] * (2 * hidden * query + 2 * hidden * kv)
        want += is_open * p.get("mlp", ones)[layer] * 3 * hidden * f
    assert masks.expected_parameters().item() == pytest.approx(float(want), rel=1e-12)


def test_one_total_target_instead_of_a_shape():
    masks = randomized(build(target=None, target_sparsity=0.6, start_sparsity=0.1))
    masks.progress = 0.5
    whole = masks.table.count(counted_only=True)
    gap = 1 - masks.expected_parameters().item() / whole - 0.35
    want = masks.lambda_1["total"].item() * gap + masks.lambda_2["total"].item() * gap**2
    assert masks.penalty().item() == pytest.approx(want, abs=1e-12)
    assert masks.target_parameters() == pytest.approx(0.4 * whole)
    assert set(masks.lambda_1) == set(masks.lambda_2) == {"total"}
    with pytest.raises(ShearingError, match="no target shape"):
        masks.deterministic(to_target=True)
    assert set(masks.deterministic(to_target=False)) == set(TARGET)


@pytest.mark.parametrize("head_mode", ["group", "query"])
def test_target_parameters_are_those_of_the_selection(head_mode):
    masks = randomized(build(head_mode))
    selection = masks.selection(masks.deterministic(to_target=True))
    query, kv = (8, 4) if head_mode == "group" else (8, 8)
    assert masks.target_parameters() == pytest.approx(2 * (6 * (2 * query + 2 * kv) + 3 * 6 * 5))
    assert len(selection.kept_layers(3)) == 2


def test_gates_of_a_step_are_shared_and_change_with_the_step():
    masks = randomized(build())
    first, again = masks.sample(), masks.sample()
    masks.step = 1
    other = masks.sample()
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert not any(torch.equal(first[kind], other[kind]) for kind in ("hidden", "intermediate"))
    assert all(gate.requires_grad for gate in first.values())


def test_selection_rows_are_equally_long_and_hold_every_open_unit():
    table = table_for(CONFIG, "query")
    head = torch.tensor([[0.5, 0.0, 0.3, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    hidden = torch.tensor([0.5, 0, 0, 0.1] * 3)
    selection = selection_from_gates(table, {"head": head, "hidden": hidden})
    fewest = [0, 2][: 2 * FEWEST_HEADS]  # of each KV group, with gates of 0
    assert [units.index.tolist() for units in selection.units["head"]] == [[0, 1, 2, 3], fewest, [0, 1, 2, 3]]
    assert not selection.units["head"][1].gate.any()
    assert selection.units["head"][0].gate.tolist() == head[0].tolist()
    assert selection.units["hidden"][0].index.tolist() == [0, 3, 4, 7, 8, 11]


@pytest.mark.parametrize(("round_to", "sizes"), [(1, [3, 0, 10]), (4, [4, 0, 10]), (8, [8, 0, 10]), (64, [10, 0, 10])])
def test_rounding_up_adds_closed_units(round_to, sizes):
    gate = torch.zeros(3, 10)
    gate[0, [1, 5, 9]], gate[2] = 0.5, 1.0
    selection = selection_from_gates(table_for(CONFIG), {"intermediate": gate}, round_to)
    assert [len(units.index) for units in selection.units["intermediate"]] == sizes
    for layer, units in enumerate(selection.units["intermediate"]):
        assert units.index.tolist() == sorted(set(units.index.tolist()))
        assert units.gate.sum() == gate[layer].sum()


@pytest.mark.parametrize(("round_to", "heads"), [(1, 1), (4, 1), (6, 3), (8, 2), (12, 3), (16, 4)])
def test_rounding_counts_elements_and_not_units(round_to, heads):
    """One open head of 4 elements: 8 elements are two heads, 6 divide 12."""
    gate = torch.zeros(3, 4)
    gate[:, 2] = 0.5
    selection = selection_from_gates(table_for(tiny_config()), {"head": gate}, round_to)
    assert [len(units.index) for units in selection.units["head"]] == [heads] * 3
    assert [units.padding for units in selection.units["head"]] == [heads - 1] * 3


def test_project_puts_log_alpha_back():
    masks = build()
    masks.log_alpha["hidden"].data[:3] = torch.tensor([-50.0, 50.0, 0.0])
    masks.project()
    assert masks.log_alpha["hidden"][:3].tolist() == pytest.approx([hc.LOG_ALPHA_MIN, hc.LOG_ALPHA_MAX, 0.0])


@pytest.mark.parametrize("target", [TARGET, None])
def test_training_reaches_the_target(target):
    """Units have values to defend; the multipliers pull until the target is met, and the valuable units stay."""
    total = None if target else 0.5
    masks = build(target=target, target_sparsity=total)
    value = {kind: torch.linspace(0.1, 1, a.shape[-1]).expand(a.shape) for kind, a in masks.log_alpha.items()}
    groups = [
        {"params": list(masks.log_alpha.parameters())},
        {"params": [*masks.lambda_1.parameters(), *masks.lambda_2.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.0)
    for step in range(800):
        masks.step, masks.progress = step, step / 100
        gates = masks.sample()
        loss = sum(0.2 * (value[kind] * (1 - gate)).mean() for kind, gate in gates.items()) + masks.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        masks.project()
    if target is None:
        whole = masks.table.count(counted_only=True)
        assert 1 - masks.expected_parameters().item() / whole == pytest.approx(0.5, abs=0.05)
        return
    for kind, sparsity in masks.sparsity().items():
        want = 1 - target[kind] / masks.row_size(kind)
        assert sparsity.mean().item() == pytest.approx(want, abs=0.05), kind
    gates = masks.deterministic(to_target=True)
    assert gates["hidden"].ne(0).sum() == 6
    assert gates["hidden"].nonzero().float().mean() > 6  # mostly of the valuable half


def test_state_dict_round_trip_is_strict():
    masks, other = randomized(build(seed=1)), build(seed=2).double()
    other.load_state_dict(masks.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(masks.parameters(), other.parameters(), strict=True))
    keys = {f"log_alpha.{k}" for k in TARGET} | {f"lambda_{i}.{k}" for k in TARGET for i in (1, 2)}
    assert set(masks.state_dict()) == keys
    with pytest.raises(RuntimeError, match="lambda_1.hidden"):
        build(target=None, target_sparsity=0.5).load_state_dict(masks.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["hiden"], "target": {"hiden": 3}}, "'hiden' is unknown.*head.*hidden.*intermediate.*layer.*mlp"),
        ({"kinds": ["vocab"], "target": {"vocab": 3}}, "'vocab' is unknown"),
        ({"target": None}, "either a target shape or target_sparsity"),
        ({"target_sparsity": 0.5}, "not both"),
        ({"target": {**TARGET, "hidden": 13}}, "'hidden' is 13; it must be 1 to 12"),
        ({"target": {**TARGET, "layer": 0}}, "'layer' is 0; it must be 1 to 3"),
        ({"target": {"hidden": 3}}, "'head' is None"),
        ({"kinds": ["hidden"], "target": TARGET}, "head, intermediate, layer, of which there is no mask"),
        ({"target": None, "target_sparsity": 1.5}, "target_sparsity is 1.5"),
    ],
)
def test_errors_name_the_kind_and_what_would_be_right(options, message):
    with pytest.raises(ShearingError, match=message):
        build(**options)
