"""Fisher scores against autograd on unfolded activations; the method's choices; turning as a command before it."""

import pytest
import torch
import torch.nn.functional as F
from helpers_oracle import oracle_logits, random_model, tiny_config
from helpers_prune import calibration_of
from transformers import AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.selection import load_selection
from llmshearing.prune import SequenceOptions, prune
from llmshearing.prune.methods.fisher import choose, fisher_scores
from llmshearing.prune.methods.turn import is_turned, turn_model

WAYS = ("energy", "fisher")
SEQUENCES = SequenceOptions(samples=4, report_samples=4, max_seq_len=12)


CASES = [("group", 4, False), ("group", 2, True), ("query", 2, False)]


@pytest.mark.parametrize(("head_mode", "groups", "tied"), CASES)
def test_scores_are_squared_gradients_of_gated_activations(head_mode, groups, tied):
    config = tiny_config(num_key_value_heads=groups, tie_word_embeddings=tied)
    table = table_for(config, head_mode)
    data = calibration_of(3)
    kinds = ["hidden", "head", "intermediate", "layer"]
    shapes = {kind: (3,) if kind == "layer" else table.kinds[kind].shape(3) for kind in kinds}
    want = {kind: torch.zeros(shape, dtype=torch.float64) for kind, shape in shapes.items()}
    for ids in data.select:
        gates = {kind: torch.ones(shape, dtype=torch.float64, requires_grad=True) for kind, shape in shapes.items()}
        logits = oracle_logits(random_model(config), gates, ids[None])[0, :-1]
        found = torch.autograd.grad(F.cross_entropy(logits, ids[1:]), gates.values())
        for kind, gradient in zip(kinds, found, strict=True):
            want[kind] += gradient.square()
    model = random_model(config)
    found = fisher_scores(model, table, data, kinds)
    for kind in kinds:
        torch.testing.assert_close(found[kind], want[kind], rtol=1e-9, atol=1e-14)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_units_of_highest_score_stay_and_the_layer_of_lowest_goes():
    config = tiny_config(num_key_value_heads=2)
    model, table = random_model(config), table_for(config)
    shape = {**table.shape(), "hidden_size": 7, "num_attention_heads": 2, "num_key_value_heads": 1}
    choice = choose(model, table, {**shape, "num_hidden_layers": 2}, calibration_of(3))
    scores = {name: torch.tensor(values) for name, values in choice.about["scores"].items()}
    assert set(choice.selection.units) == {"hidden", "head"}
    best = scores["hidden"].topk(7).indices.sort().values
    assert torch.equal(choice.selection.units["hidden"][0].index, best)
    for layer in range(3):
        assert choice.selection.units["head"][layer].index.tolist() == [int(scores["head"][layer].argmax())]
    assert choice.selection.blocks["mlp"].tolist().index(0.0) == int(scores["layer"].argmin())


def test_a_turned_model_is_known_and_its_hidden_units_go_by_energy():
    model = random_model(tiny_config())
    table, basis = table_for(model.config), torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert not is_turned(model, table)
    turn_model(model, table, basis)
    assert is_turned(model, table)
    shape = {**table.shape(), "hidden_size": 5}
    of = {way: choose(model, table, shape, calibration_of(3), hidden=way).about["scores"] for way in (None, *WAYS)}
    assert of[None]["hidden"] == of["energy"]["hidden"] != of["fisher"]["hidden"]


# Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tied and an untied model that were saved, and sequences as text."""
    from helpers_tokenizers import save_word_tokenizer

    root = tmp_path_factory.mktemp("turn")
    for name, tied in (("apart", False), ("tied", True)):
        random_model(tiny_config(tie_word_embeddings=tied)).float().save_pretrained(root / name)
        save_word_tokenizer(root / name)
    words = [f"w{i}" for i in range(20)]
    lines = [" ".join(words[(3 * i + j * j) % 20] for j in range(11)) for i in range(400)]
    (root / "text.txt").write_text("\n".join(lines))
    return root


def from_text(place):
    return {"calibration": place / "text.txt", "sequences": SEQUENCES}


def log_probabilities(path):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(calibration_of(2).select).logits.log_softmax(-1)


def test_turning_computes_the_same_and_chains_into_fisher(place, tmp_path):
    turned = prune("turn", place / "apart", tmp_path / "turned", {}, **from_text(place))
    assert (log_probabilities(turned.path) - log_probabilities(place / "apart")).abs().max() < 1e-4
    assert turned.after.perplexity == pytest.approx(turned.before.perplexity, rel=1e-4)
    assert turned.choice.about["energy"] == sorted(turned.choice.about["energy"], reverse=True)
    target = {"hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 2}
    small = prune("fisher", turned.path, tmp_path / "small", target, **from_text(place))
    selection, _ = load_selection(small.path / "selection.safetensors")
    assert set(selection.energy) and AutoModelForCausalLM.from_pretrained(small.path).config.hidden_size == 8


def test_a_tied_model_is_parted_when_asked(place, tmp_path):
    with pytest.raises(ShearingError, match="--untie"):
        prune("turn", place / "tied", tmp_path / "out", {}, **from_text(place))
    assert not (tmp_path / "out").exists()
    out = prune("turn", place / "tied", tmp_path / "out", {}, **from_text(place), untie=True)
    assert not AutoModelForCausalLM.from_pretrained(out.path).config.tie_word_embeddings
    assert (log_probabilities(out.path) - log_probabilities(place / "tied")).abs().max() < 1e-4


def test_too_few_tokens_are_refused(place, tmp_path):
    few = SequenceOptions(samples=1, report_samples=1, max_seq_len=8)
    with pytest.raises(ShearingError, match="8 tokens to find 12 directions"):
        prune("turn", place / "apart", tmp_path / "out", {}, calibration=place / "text.txt", sequences=few)
    with pytest.raises(ShearingError, match="changes no size: leave out hidden_size"):
        prune("turn", place / "apart", tmp_path / "out", {"hidden_size": 6}, calibration=place / "text.txt")
