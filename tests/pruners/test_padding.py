"""Padding to one size: the same function, by construction of random selections of unequal sizes."""

import torch
from helpers_prune import calibration_of, model_of
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.axes import Selection, Units, fold, folded_shape
from llmshearing.convert.hf import build_model
from llmshearing.families import folded_config, table_for
from llmshearing.gating import attach
from llmshearing.pruners.padding import padded

IDS = calibration_of(2).select


def some_units(kind, keep, generator):
    """``keep`` units of each group of a row, half of the time with soft gates."""
    rows = [torch.randperm(kind.size, generator=generator)[:keep].sort().values for _ in range(kind.rows)]
    index = torch.cat([row + group * kind.size for group, row in enumerate(rows)])
    soft = torch.rand(len(index), generator=generator) + 0.2
    return Units(index, soft if keep % 2 else None)


@given(st.sampled_from(["llama", "qwen2"]), st.sampled_from(["group", "query"]), st.data())
def test_the_padded_model_is_the_gated_one(family, mode, data):
    model = model_of(family, num_key_value_heads=2)
    table = table_for(model.config, mode)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    units = {
        name: tuple(
            some_units(table.kinds[name], data.draw(st.integers(1, table.kinds[name].size)), generator)
            for _ in range(table.layers)
        )
        for name in ("head", "intermediate")
    }
    layers = torch.tensor(data.draw(st.sampled_from([[1.0, 1, 1, 1], [1, 0, 1, 1]])))
    selection = Selection(units, dict.fromkeys(("attention", "mlp"), layers))
    uniform = padded(table, selection)
    shape = folded_shape(table, uniform)
    kept = selection.kept_layers(table.layers)
    assert shape["intermediate_size"] == max(len(units["intermediate"][layer].index) for layer in kept)
    config = type(model.config).from_dict(folded_config(model.config.to_dict(), table, uniform))
    small = build_model(fold(model.state_dict(), table, uniform), config)
    attach(model, table).set(selection)
    with torch.no_grad():
        one, other = (m(input_ids=IDS, use_cache=False).logits.log_softmax(-1) for m in (model, small))
    assert torch.allclose(one, other, atol=2e-4)
