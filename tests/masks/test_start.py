"""Informed starts: log alpha by ranks or by kept and closed, exactly the target open in expectation; bad selections."""

import math

import pytest
import torch
from helpers_prune import calibration_of, model_of
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.selection import Selection, Units
from llmshearing.masks import hard_concrete as hc
from llmshearing.masks.l0 import L0Masks
from llmshearing.masks.start import decided, inform, ranked
from llmshearing.prune.methods import METHODS
from llmshearing.prune.targets import resolve_target

TOP = math.log(100)


@given(st.integers(2, 40), st.data())
def test_ranks_written_out(size, data):
    """The formula of the prototype, unit by unit; kept units come above closed ones whatever their score."""
    number = data.draw(st.integers(1, size))
    spread = data.draw(st.sampled_from([0.5, 1.0, 2.0, 7.0]))
    scores = data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    kept = data.draw(st.permutations([True] * number + [False] * (size - number)))
    order = sorted(range(size), key=lambda i: (kept[i], scores[i]))  # ties: the first unit lowest
    z = {unit: (rank - (size - number) + 0.5) / size for rank, unit in enumerate(order)}
    most = max(map(abs, z.values()))
    want = [max(-TOP, min(TOP, spread * TOP * z[i] / most)) for i in range(size)]
    got = ranked(torch.tensor(kept), torch.tensor(scores, dtype=torch.float64), spread)
    assert got.tolist() == pytest.approx(want, abs=1e-12)
    assert [(value > 0) for value in got.tolist()] == list(kept)


def test_decided_is_as_sure_as_ranks_on_average():
    kept = torch.arange(1000) < 500
    for spread in (0.3, 1.0):
        mean = ranked(kept, kept.double(), spread).abs().mean()
        assert decided(kept, spread).abs().mean().item() == pytest.approx(mean.item(), rel=0.01)
        assert ((decided(kept, spread) > 0) == kept).all()
    assert decided(kept, 9.0).abs().max().item() == pytest.approx(TOP)


CASES = {
    "groups": ("llama", {"num_key_value_heads": 2}, "group", {"num_key_value_heads": 1, "num_attention_heads": 2}),
    "queries": ("llama", {"num_key_value_heads": 2}, "query", {"num_key_value_heads": 2, "num_attention_heads": 2}),
    "plain": ("mistral", {}, "group", {"num_attention_heads": 2, "num_key_value_heads": 2}),
}


def prepared(case, kinds=("hidden", "head", "intermediate", "layer"), layers=3):
    """(model, masks, whole target in the config's keys) of one case, every axis cut."""
    family, changes, mode, heads = CASES[case]
    model = model_of(family, **changes)
    table = table_for(model.config, mode)
    shape = table.shape() | {"hidden_size": 7, "intermediate_size": 4, "num_hidden_layers": layers} | heads
    units = table.units(shape)
    return model, L0Masks(table, list(kinds), {k: units.get(k, layers) for k in kinds}, seed=3), shape


def chosen(name, case):
    model, masks, shape = prepared(case)
    target = resolve_target({k: n for k, n in shape.items() if n != masks.table.shape()[k]}, masks.table, METHODS[name])
    assert target.shape == shape
    return masks, METHODS[name].choose(model, masks.table, shape, calibration_of())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["activation", "random", "fisher"])
def test_a_methods_choice_is_what_the_masks_would_fold_to(name, case):
    """From the start they expect the target, and sized by the target they select what the method selected."""
    masks, choice = chosen(name, case)
    inform(masks, choice.selection, choice.about)
    for kind, a in masks.log_alpha.items():
        found = hc.probability_open(masks.rows(kind, a.detach().double())).sum(-1)
        assert (found - masks.target[kind]).abs().max() < 1e-4, kind  # float32 log alphas
    selection = masks.selection(masks.deterministic(to_target=True))
    for kind, rows in choice.selection.units.items():
        assert [units.numbers for units in selection.units[kind]] == [units.numbers for units in rows], kind
    assert selection.kept_layers(masks.table.layers) == choice.selection.kept_layers(masks.table.layers)


def test_scores_decide_how_sure_a_start_is():
    masks, choice = chosen("activation", "groups")
    inform(masks, choice.selection, choice.about, spread=1.0)
    score = torch.tensor(choice.about["scores"]["hidden"][0])
    order = masks.log_alpha["hidden"].detach().argsort()
    assert (score[order].diff() >= 0).all() and masks.log_alpha["hidden"].unique().numel() == 12
    influence = torch.tensor(choice.about["block_influence"])
    assert (influence[masks.log_alpha["layer"].detach().argsort()].diff() >= 0).all()
    inform(masks, choice.selection, {}, spread=1.0)  # nothing told: kept or closed
    assert masks.log_alpha["hidden"].unique().numel() == 2


def test_layers_of_attention_and_mlp_apart():
    _, masks, _ = prepared("plain", kinds=("head_layer", "mlp"), layers=2)
    gates = {"attention": torch.tensor([1.0, 0, 0, 1]), "mlp": torch.tensor([0.0, 1, 0.5, 0])}
    inform(masks, Selection(blocks=gates), {})
    assert (masks.log_alpha["head_layer"] > 0).tolist() == [True, False, False, True]
    assert (masks.log_alpha["mlp"] > 0).tolist() == [False, True, True, False]


def test_padding_is_closed():
    _, masks, _ = prepared("plain", kinds=("intermediate",))
    gate = torch.tensor([1.0, 0.5, 1, 1, 0, 0])
    inform(masks, Selection({"intermediate": (Units(torch.arange(6), gate, padding=2),) * 4}), {})
    assert (masks.log_alpha["intermediate"][2] > 0).tolist() == [True] * 4 + [False] * 6


def test_a_sparsity_alone_takes_the_selections_sizes():
    _, masks, _ = prepared("plain")
    free = L0Masks(masks.table, ["intermediate"], target_sparsity=0.5)
    rows = [Units(torch.arange(number)) for number in (2, 5, 10, 1)]
    inform(free, Selection({"intermediate": tuple(rows)}), {})
    found = hc.probability_open(free.log_alpha["intermediate"].detach().double()).sum(-1)
    assert found.tolist() == pytest.approx([2, 5, 10 * hc.probability_open(torch.tensor(9.0)).item(), 1], abs=1e-4)


def layer(*closed):
    gates = torch.ones(4)
    gates[list(closed)] = 0
    return {"attention": gates, "mlp": gates}


def units(number, rows=4):
    return (Units(torch.arange(number)),) * rows


BAD = {
    "too many": (Selection({"hidden": units(8, 1)}, layer(1)), "hidden: it keeps 8 of 16, the target is 7"),
    "nothing cut": (Selection({}, layer(1)), "intermediate: it keeps 10 of 10, the target is 4"),
    "layers": (Selection({}, layer(1, 2)), "layer: it keeps 2 of 4, the target is 3"),
    "another model's": (Selection({"hidden": units(20, 1)}), "hidden, row 0: .* within 0 to 15"),
    "another depth": (Selection({"intermediate": units(4, 9)}), "units of 9 layers, the model needs 4"),
    "another family's": (Selection({"expert": units(1)}), "'expert' is no kind of the mistral family"),
    "no mask": (Selection({"vocab": units(5, 1)}, layer(1)), "it cuts vocab, of which there is no mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_selections_that_do_not_fit(case):
    selection, say = BAD[case]
    _, masks, _ = prepared("plain")
    before = {kind: a.detach().clone() for kind, a in masks.log_alpha.items()}
    with pytest.raises(ShearingError, match=say):
        inform(masks, selection, {})
    assert all(torch.equal(a, before[kind]) for kind, a in masks.log_alpha.items())


def test_blocks_without_a_mask():
    _, masks, _ = prepared("plain", kinds=("head_layer",), layers=3)
    with pytest.raises(ShearingError, match="it cuts mlp of layers, of which there is no mask"):
        inform(masks, Selection(blocks=layer(1)), {})
