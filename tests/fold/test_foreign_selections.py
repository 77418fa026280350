"""Selections that others wrote: whatever a file holds, it is a selection of this model or one error."""

import json

import pytest
import torch
from helpers_oracle import random_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.fold.selection import FORMAT, load_selection

CONFIG = tiny_config()
TABLE, WEIGHTS = table_for(CONFIG), random_model(CONFIG).state_dict()
JSON = st.none() | st.integers(-1, 4) | st.text(max_size=3) | st.lists(st.integers(0, 3), max_size=2)
KINDS = st.dictionaries(st.sampled_from(["hidden", "head", "other"]), JSON, max_size=2) | JSON
TENSORS = st.builds(
    lambda values, dtype, shape: torch.tensor(values).to(dtype).reshape(shape),
    st.lists(st.integers(-1, 13), min_size=2, max_size=2),
    st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool, torch.bfloat16]),
    st.sampled_from([(2,), (1, 2), (2, 1)]),
) | st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True).map(lambda found: torch.tensor(sorted(found)))
NAMES = st.sampled_from(
    ["units.hidden.0.index", "units.hidden.0.gate", "units.head.0.index", "units.head.1.index", "units.head.2.index",
     "blocks.mlp", "blocks.attention", "blocks.other", "energy.model.norm.weight", "energy.x", "else"]
)  # fmt: skip


@settings(max_examples=400)
@given(
    kinds=KINDS | st.fixed_dictionaries({}, optional={"hidden": st.just(1), "head": st.just(3)}),
    tensors=st.dictionaries(NAMES, TENSORS, max_size=5),
    metadata=st.dictionaries(st.sampled_from(["about", "kinds"]), st.text(max_size=3), max_size=1),
)
def test_whatever_a_selection_holds_is_folded_or_one_error(tmp_path_factory, kinds, tensors, metadata):
    path = tmp_path_factory.mktemp("selection") / "selection.safetensors"
    told = {"format": FORMAT, "kinds": json.dumps(kinds), "about": "{}", **metadata}
    save_file(tensors, path, metadata=told)
    try:
        selection, _ = load_selection(path)
        folded = fold(WEIGHTS, TABLE, selection, zero_closed_blocks=True)
    except ShearingError:
        return
    width = len(selection.units["hidden"][0].index) if "hidden" in selection.units else CONFIG.hidden_size
    assert folded["model.norm.weight"].shape == (width,)


GOOD = {
    "units.hidden.0.index": torch.tensor([0, 1, 5]),
    "units.hidden.0.gate": torch.tensor([1.0, 0.5, 2.0]),
    "blocks.mlp": torch.ones(3),
    "energy.model.norm.weight": torch.full((12,), 1 / 12),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("units.hidden.0.index", torch.tensor([0.0, 1.0, 2.0])),
        *(("units.hidden.0.index", torch.tensor([0, 1, 5]).to(dtype)) for dtype in (torch.uint8, torch.bfloat16)),
        ("units.hidden.0.index", torch.tensor([[0, 1, 5]])),
        ("units.hidden.0.index", torch.tensor(1)),
        ("units.hidden.0.index", torch.tensor([], dtype=torch.int64)),
        ("units.hidden.0.gate", torch.tensor([True, False, True])),
        ("units.hidden.0.gate", torch.tensor([1j, 1, 1])),
        ("units.hidden.0.gate", torch.tensor([1.0, float("nan"), 1.0])),
        ("units.hidden.0.gate", torch.ones(2)),
        ("blocks.mlp", torch.tensor([1, 0, 1])),
        ("blocks.mlp", torch.tensor([1.0, float("inf"), 1.0])),
        ("energy.model.norm.weight", -torch.ones(12)),
        ("energy.model.norm.weight", torch.ones(11)),
    ],
)
def test_a_tensor_of_another_kind_is_refused_with_its_name(name, value, tmp_path):
    told = {"format": FORMAT, "kinds": '{"hidden": 1}', "about": "{}"}
    save_file(GOOD, tmp_path / "good", metadata=told)
    good = fold(WEIGHTS, TABLE, load_selection(tmp_path / "good")[0])
    assert good["model.norm.weight"].shape == (3,)
    save_file({**GOOD, name: value}, tmp_path / "bad", metadata=told)
    with pytest.raises(ShearingError, match=name.split(".")[1]):
        fold(WEIGHTS, TABLE, load_selection(tmp_path / "bad")[0])
