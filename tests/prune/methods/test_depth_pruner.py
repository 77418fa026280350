"""Depth against brute force: models from which layers were really deleted, scored by transformers' own loss."""

import copy

import pytest
import torch
from helpers_prune import calibration_of, model_of
from torch import nn

from llmshearing.errors import ShearingError
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.methods.decoder import find_decoder, layer_by_layer
from llmshearing.prune.methods.depth import block_influence, choose, greedy, window_losses

CALIBRATION = calibration_of(number=5, batch_size=2)
PATHS = {
    "llama": ("model.layers", "model.norm"),
    "qwen2": ("model.layers", "model.norm"),
    "mixtral": ("model.layers", "model.norm"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
}


def loss_without(model, path, drop):
    """Delete the layers from a copy and ask transformers for the loss."""
    model = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(path)
    kept = [layer for number, layer in enumerate(layers) if number not in drop]
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    model.config.num_hidden_layers = len(kept)
    if (kinds := getattr(model.config, "layer_types", None)) is not None:  # transformers 5 looks at these, by place
        model.config.layer_types = [kind for number, kind in enumerate(kinds) if number not in drop]
    ids = CALIBRATION.select
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_window_is_the_best_of_all(family, number):
    model = model_of(family)
    path, norm = PATHS[family]
    brute = [loss_without(model, path, range(start, start + number)) for start in range(4 - number + 1)]
    decoder = find_decoder(model, path, norm)
    assert window_losses(decoder, CALIBRATION, number).tolist() == pytest.approx(brute, rel=1e-5)
    target = {"num_hidden_layers": 4 - number}
    choice = choose(model, None, target, CALIBRATION, model_decoder_layers=path, layer_norm_field=norm)
    best = min(range(len(brute)), key=brute.__getitem__)
    assert choice.about["drop_layers"] == list(range(best, best + number))
    assert choice.selection.kept_layers(4) == [layer for layer in range(4) if not best <= layer < best + number]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_takes_the_best_layer_each_time(family):
    model, path = model_of(family, num_hidden_layers=5), PATHS[family][0]
    dropped, losses = greedy(find_decoder(model), CALIBRATION, 2)
    left = {1, 2, 3}
    for step in range(2):
        brute = {layer: loss_without(model, path, [*dropped[:step], layer]) for layer in left}
        assert dropped[step] == min(brute, key=brute.__getitem__)
        assert losses[step] == pytest.approx(brute[dropped[step]], rel=1e-5)
        left.remove(dropped[step])
    with pytest.raises(ShearingError, match="protects the first and last"):
        greedy(find_decoder(model), CALIBRATION, 4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_block_influence_is_one_minus_the_mean_cosine_of_hidden_states(family):
    model = model_of(family)
    model.model.norm = nn.Identity()  # the last of transformers' hidden states is normed
    ids = CALIBRATION.select
    with torch.no_grad():
        states = [state.double() for state in model(input_ids=ids, output_hidden_states=True).hidden_states]
    for layer, score in enumerate(block_influence(model, CALIBRATION)):
        x, y = states[layer].flatten(0, 1), states[layer + 1].flatten(0, 1)
        cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
        assert score.item() == pytest.approx(1 - cosine.mean().item(), abs=1e-6)


def test_only_what_selects_is_looked_at():
    model = model_of("llama")
    other = Calibration(CALIBRATION.select, CALIBRATION.report.flip(0, 1) * 0, "some", "others", 2)
    for by in ("window", "greedy", "influence"):
        first, second = (choose(model, None, {"num_hidden_layers": 2}, c, by=by).about for c in (CALIBRATION, other))
        assert first == second


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_layer_at_a_time_is_the_same_model(family):
    model = model_of(family)
    decoder = find_decoder(model)
    whole = window_losses(decoder, CALIBRATION, 2)
    with layer_by_layer(model, decoder.layers, torch.device("cpu")):
        assert torch.equal(window_losses(decoder, CALIBRATION, 2), whole)
    assert all("forward" not in layer.__dict__ for layer in decoder.layers)


def test_one_layer_at_a_time_has_one_layer_on_the_device():
    """The meta device stands in for a GPU: a layer's weights are there only while it runs."""
    model = model_of("llama")
    seen = []

    def look(module, args, kwargs):
        seen.append([next(layer.parameters()).device.type for layer in layers])
        raise InterruptedError

    layers = list(model.model.layers)
    layers[2].mlp.register_forward_pre_hook(look, with_kwargs=True)
    outside = model.model.embed_tokens
    with pytest.raises((InterruptedError, NotImplementedError)), layer_by_layer(model, layers, torch.device("meta")):
        assert outside.weight.device.type == "meta" and layers[0].mlp.up_proj.weight.device.type == "cpu"
        layers[2](torch.zeros(1, 2, 12, device="meta"), position_embeddings=(torch.zeros(1, 2, 4, device="meta"),) * 2)
    assert seen == [["cpu", "cpu", "meta", "cpu"]]


@pytest.mark.parametrize(
    ("fields", "say"),
    [
        (("model.decoder.layers", None), "there are model.layers"),
        (("model.layers", "model.final_norm"), "there are model.norm"),
        (("model.layers", None, "n_layer"), "it has num_hidden_layers"),
    ],
)
def test_fields_that_the_model_does_not_have_are_named_with_those_it_has(fields, say):
    with pytest.raises(ShearingError, match=say):
        find_decoder(model_of("llama"), *fields)
