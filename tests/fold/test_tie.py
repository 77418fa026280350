"""A head tied again after a turn: the rotation against least squares written out; turned, cut and tied models."""

import copy

import numpy as np
import pytest
import torch
from helpers_oracle import random_model, tiny_config, widen_norms
from helpers_runs import VOCAB, make_model, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.selection import Selection, Units
from llmshearing.fold.tie import tied, tying_rotation
from llmshearing.fold.turn import turn
from llmshearing.prune import SequenceOptions, prune


def random_basis(size):
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(values).Q


@torch.no_grad()
def logits(model):
    return model(torch.arange(14).view(2, 7), use_cache=False).logits


def slow_symmetric(embedding, head):
    """The symmetric M of least |E M - H|, by least squares over its w (w + 1) / 2 entries."""
    width = embedding.shape[1]
    entries = [(i, j) for i in range(width) for j in range(i, width)]
    columns = []
    for i, j in entries:
        unit = np.zeros((width, width))
        unit[i, j] = unit[j, i] = 1
        columns.append((embedding @ unit).ravel())
    found = np.linalg.lstsq(np.stack(columns, 1), head.ravel(), rcond=None)[0]
    symmetric = np.zeros((width, width))
    for (i, j), value in zip(entries, found, strict=True):
        symmetric[i, j] = symmetric[j, i] = value
    return symmetric


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100))
def test_the_rotation_makes_the_best_symmetric_matrix_diagonal(width, seed):
    generator = torch.Generator().manual_seed(seed)
    embedding, head = (torch.randn(20, width, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation = tying_rotation(embedding, head)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(width, dtype=torch.float64))
    best = torch.from_numpy(slow_symmetric(embedding.numpy(), head.numpy()))
    inner = rotation.T @ best @ rotation
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=1e-8, atol=1e-8)


class Cut:
    """A tied LLaMA, turned by a random Q and cut to its first columns. spread: of the final norm's weight about 1."""

    def __init__(self, spread, rotate=True, width=8):
        model = random_model(tiny_config(tie_word_embeddings=True))
        table, generator = table_for(model.config), torch.Generator().manual_seed(1)
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        factor = 1 + spread * torch.randn(12, generator=generator, dtype=torch.float64)
        weights["model.norm.weight"] = factor
        basis, embedding = random_basis(12), weights["model.embed_tokens.weight"]
        if rotate:
            kept = basis[:, :width]
            basis[:, :width] = kept @ tying_rotation(embedding @ kept, (embedding * factor) @ kept)
        apart = tiny_config(tie_word_embeddings=False)
        table_apart = table_for(apart)
        selection = Selection({"hidden": (Units(torch.arange(width)),)})
        self.weights = fold(turn(weights, table, basis, untie=True), table_apart, selection)
        self.config = config_of(folded_config(apart.to_dict(), table_apart, selection))
        self.table = table_for(self.config)

    def logits(self, weights, tie):
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = tie
        model = AutoModelForCausalLM.from_config(config).double().eval()
        model.load_state_dict(weights, strict=True)
        return logits(widen_norms(model))


def test_a_constant_final_norm_is_tied_again_exactly():
    cut = Cut(spread=0.0)
    weights, missed = tied(cut.weights, cut.table)
    assert missed < 1e-25
    torch.testing.assert_close(cut.logits(weights, True), cut.logits(cut.weights, False), rtol=1e-10, atol=1e-10)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_the_rotation_is_what_lets_a_model_be_tied():
    with_it, without = (tied(cut.weights, cut.table)[1] for cut in (Cut(0.3), Cut(0.3, rotate=False)))
    assert with_it < 0.9 * without


def test_no_factors_are_better():
    cut = Cut(0.3)
    weights, missed = tied(cut.weights, cut.table)
    embedding, head = (cut.weights[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    wanted = head * cut.weights["model.norm.weight"]
    for scale in (0.99, 1.01):
        other = (embedding * weights["model.norm.weight"] * scale - wanted).square().sum() / wanted.square().sum()
        assert other > missed
    found = np.linalg.lstsq(embedding[:, :1].numpy(), wanted[:, 0].numpy(), rcond=None)[0]
    assert weights["model.norm.weight"][0].item() == pytest.approx(found.item(), rel=1e-10)


def test_what_cannot_be_tied_is_refused():
    tied_model, apart = (random_model(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    with pytest.raises(ShearingError, match="lm_head.weight is model.embed_tokens.weight already"):
        tied(tied_model.state_dict(), table_for(tied_model.config))
    with pytest.raises(ShearingError, match="lm_head.weight is not model.embed_tokens.weight times.*%.*--tie_at"):
        tied(apart.state_dict(), table_for(apart.config))
    with pytest.raises(ShearingError, match="gpt_neox family does not have one.*final RMSNorm"):
        tied({}, table_for(AutoConfig.for_model("gpt_neox", tie_word_embeddings=False)))


def test_turned_cut_and_tied_by_the_commands(lab, tmp_path):
    source = tmp_path / "source"
    model = make_model(tie_word_embeddings=True, initializer_range=0.1)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 0.1 * torch.randn(32))
    model.save_pretrained(source)
    save_tokenizer(source)
    options = {"calibration": lab.data, "sequences": SequenceOptions(samples=8, report_samples=8)}
    with pytest.raises(ShearingError, match="--tie_at 33: a number of hidden units to keep, 1 to 32"):
        prune("turn", source, tmp_path / "no", {}, untie=True, tie_at=33, **options)
    turned = prune("turn", source, tmp_path / "turned", {}, untie=True, tie_at=20, **options)
    assert turned.after.perplexity == pytest.approx(turned.before.perplexity, rel=1e-4)
    half = prune("fisher", tmp_path / "turned", tmp_path / "half", {"hidden_size": 20}, **options)
    [kept] = half.choice.selection.units["hidden"]
    assert kept.numbers == tuple(range(20))  # the rotation stays among the units with the most energy
    small = prune("tie", tmp_path / "half", tmp_path / "tied", {}, **options)
    assert small.after.perplexity == pytest.approx(small.before.perplexity, rel=5e-2)
    assert small.after.parameters == small.before.parameters - VOCAB * 20
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", output_loading_info=True)
    assert loaded.config.tie_word_embeddings and not any(report.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
