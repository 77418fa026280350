"""Activation importance against the formula on activations computed by hand, and on planted dead units."""

import numpy as np
import torch
from helpers_prune import calibration_of, model_of

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, folded_config
from llmshearing.prune.methods.activation import choose, importance

CALIBRATION = calibration_of()


def test_scores_are_minitron_s_formula_in_a_loop_over_sequences_tokens_and_channels():
    model = model_of("llama", num_key_value_heads=2, num_hidden_layers=2)
    table = table_for(model.config, "query")
    scores = importance(model, table, CALIBRATION)
    squares, hidden = np.zeros(10), {"input": np.zeros(12), "final": np.zeros(12)}
    with torch.no_grad():
        for sequence in CALIBRATION.select:
            states = model(input_ids=sequence[None], output_hidden_states=True).hidden_states
            layer = model.model.layers[0]
            middle = layer(states[0], position_embeddings=model.model.rotary_emb(states[0], torch.arange(12)[None]))
            assert torch.allclose(middle, states[1], atol=1e-4)
            normed = layer.input_layernorm(states[0])
            attended, _ = layer.self_attn(
                normed, model.model.rotary_emb(states[0], torch.arange(12)[None]), attention_mask=None
            )
            inner = layer.post_attention_layernorm(states[0] + attended)
            inside = torch.nn.functional.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner)
            for channel in range(10):
                mean = sum(abs(inside[0, token, channel].item()) for token in range(12)) / 12
                squares[channel] += mean**2
            hidden["input"] += normed[0].abs().mean(0).double().numpy() ** 2
            hidden["final"] += states[-1][0].abs().mean(0).double().numpy() ** 2  # transformers' last state is normed
    np.testing.assert_allclose(scores["intermediate"][0].numpy(), np.sqrt(squares), rtol=1e-4)
    assert len(scores["hidden"]) == 1 and (scores["hidden"][0].numpy() > sum(map(np.sqrt, hidden.values()))).all()
    assert [score.shape for score in scores["head"]] == [(4,), (4,)]


def test_dead_units_go_first_and_the_function_stays():
    """Units that compute 0 are the least active, so that cutting as many as are dead changes nothing."""
    model = model_of("llama", num_key_value_heads=2)
    dead = {layer: sorted([layer, 5 + layer]) for layer in range(4)}
    with torch.no_grad():
        for layer, units in dead.items():
            model.model.layers[layer].mlp.up_proj.weight[units] = 0
            group = layer % 2
            model.model.layers[layer].self_attn.v_proj.weight[group * 4 : (group + 1) * 4] = 0
    table = table_for(model.config)
    target = {**table.shape(), "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    selection = choose(model, table, target, CALIBRATION).selection
    for layer, units in dead.items():
        assert not set(units) & set(selection.units["intermediate"][layer].index.tolist())
        assert selection.units["head"][layer].index.tolist() == [1 - layer % 2]
    config = type(model.config).from_dict(folded_config(model.config.to_dict(), table, selection))
    small = build_model(fold(model.state_dict(), table, selection), config)
    ids = CALIBRATION.report
    assert torch.allclose(model(ids).logits, small(ids).logits, atol=1e-3)


def test_depth_is_chosen_in_the_narrowed_model_and_the_model_is_left_as_it_was():
    model = model_of("qwen2")
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = model(CALIBRATION.report).logits
    table = table_for(model.config)
    target = {**table.shape(), "hidden_size": 8, "num_hidden_layers": 3}
    choice = choose(model, table, target, CALIBRATION)
    assert len(choice.about["block_influence"]) == 4 and len(choice.selection.kept_layers(4)) == 3
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    assert torch.equal(before, model(CALIBRATION.report).logits)
