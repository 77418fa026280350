"""Layers of unequal sizes, by random selections: as a non-uniform model and padded to one size, the same function."""

import torch
from helpers_prune import calibration_of, model_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import NonUniformConfig, config_of
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.gating import attach
from llmshearing.fold.padding import padded
from llmshearing.fold.selection import Selection, Units

IDS = calibration_of(2).select


def some_units(kind, keep, generator):
    """``keep`` units of each group of a row, half of the time with soft gates."""
    rows = [torch.randperm(kind.size, generator=generator)[:keep].sort().values for _ in range(kind.rows)]
    index = torch.cat([row + group * kind.size for group, row in enumerate(rows)])
    soft = torch.rand(len(index), generator=generator) + 0.2
    return Units(index, soft if keep % 2 else None)


def some_selection(data, table):
    """Units of every kind that layers choose for themselves; sometimes a layer is gone."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    units = {
        name: tuple(
            some_units(kind, data.draw(st.integers(1, kind.size)), generator)
            for layer in range(table.layers)
            for kind in [table.at_layer(layer).kinds[name]]
        )
        for name in ("head", "intermediate")
    }
    layers = torch.tensor(data.draw(st.sampled_from([[1.0, 1, 1, 1], [1, 0, 1, 1]]))[: table.layers])
    return Selection(units, dict.fromkeys(("attention", "mlp"), layers))


def log_probabilities(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


@settings(max_examples=10)
@given(st.sampled_from(["llama", "qwen2", "qwen3"]), st.sampled_from(["group", "query"]), st.data())
def test_the_non_uniform_and_the_padded_model_are_the_gated_one(family, mode, data):
    model = model_of(family, num_key_value_heads=2)
    for _ in range(2):  # the second time from what came out, whose layers differ: in the other mode too
        table = table_for(model.config, mode)
        selection = some_selection(data, table)
        config = folded_config(model.config.to_dict(), table, selection)
        weights = fold(model.state_dict(), table, selection)
        small = build_model(weights, config_of(config))
        wide_weights, wide_config = padded(weights, config)
        wide = build_model(wide_weights, config_of(wide_config))
        assert not isinstance(wide.config, NonUniformConfig)
        sizes = {layer.mlp.down_proj.in_features for layer in small.model.layers}
        assert wide.config.intermediate_size == max(sizes)
        assert isinstance(small.config, NonUniformConfig) or len(sizes) == 1
        attach(model, table).set(selection)
        gated = log_probabilities(model)
        assert torch.allclose(gated, log_probabilities(small), atol=2e-4)
        assert torch.allclose(gated, log_probabilities(wide), atol=2e-4)
        model, mode = small, "query" if mode == "group" else "group"
