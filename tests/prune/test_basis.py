"""Directions by output error: the error against least squares, gradients in closed form, the command's model."""

import copy
import json

import pytest
import torch
from helpers_oracle import widen_norms
from helpers_prune import calibration_of, model_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.prune import basis
from llmshearing.prune.basis import NormStatistics, OutputError, norm_statistics, output_basis
from llmshearing.prune.energy import norm_covariance
from llmshearing.prune.methods.fisher import choose as fisher
from llmshearing.prune.methods.turn import absorb, choose, goes_by_order, principal_basis


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 999))
def test_the_error_is_that_of_the_best_linear_prediction(size, norms, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    keep = 1 + seed % (size - 1) if size > 2 else 1
    kept = torch.linalg.qr(draw(size, keep)).Q
    statistics, lost, whole = {}, 0.0, 0.0
    for number in range(norms):
        x, g = draw(40, size) @ draw(size, size), draw(40, size)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        residual = x - x @ kept @ torch.linalg.lstsq(x @ kept, x).solution
        gradients = g.T @ g
        lost += torch.trace(gradients @ (residual.T @ residual / 40))
        whole += torch.trace(gradients @ (x.T @ x / 40))
        statistics[str(number)] = NormStatistics(x.T @ x, gradients, 40)
    assert OutputError(statistics)(kept).item() == pytest.approx((lost / whole).item(), abs=1e-4)


def test_gradients_at_the_final_norm_are_the_head_s():
    model = model_of("llama").eval()
    absorb(model, table_for(model.config))
    data = calibration_of(4)
    sums = norm_statistics(model, table_for(model.config), data)
    assert len(sums) == 2 * model.config.num_hidden_layers + 1
    expected = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    read = torch.zeros_like(expected)
    for ids in data.select:
        with torch.no_grad():
            found = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        wrong = found.logits[0, :-1].softmax(-1)
        wrong[torch.arange(len(ids) - 1), ids[1:]] -= 1.0
        g = wrong @ model.lm_head.weight
        expected += g.T @ g
        x = found.hidden_states[-1][0]  # behind the final norm, whose weight is 1
        read += x.T @ x
    torch.testing.assert_close(sums["model.norm.weight"].gradients, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums["model.norm.weight"].states, read, rtol=1e-3, atol=1e-3)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_loses_less_than_the_directions_of_most_energy(family):
    model = model_of(family).eval()
    table, data = table_for(model.config), calibration_of(12)
    absorb(model, table)
    statistics, covariance = norm_statistics(model, table, data), norm_covariance(model, table, data)
    found = output_basis(statistics, covariance, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(len(found), dtype=torch.float64), rtol=1e-9, atol=1e-9)
    energy, _ = principal_basis(model, table, data)
    error = OutputError(statistics)
    assert error(found[:, :5].float()) < 0.95 * error(energy[:, :5].float())
    carried = (found * (covariance @ found)).sum(0)
    for part in (carried[:5], carried[5:]):  # each in order of energy
        assert (part.diff() <= 1e-9).all()


def test_it_ends_where_nothing_is_gained(monkeypatch):
    model = model_of("llama").eval()
    table, data = table_for(model.config), calibration_of(12)
    absorb(model, table)
    statistics, covariance = norm_statistics(model, table, data), norm_covariance(model, table, data)
    error = OutputError(statistics)
    early = error(output_basis(statistics, covariance, 5, steps=1_000_000)[:, :5].float())
    monkeypatch.setattr(basis, "PATIENCE", 1_000_000)
    late = error(output_basis(statistics, covariance, 5, steps=600)[:, :5].float())
    assert late <= early + 1e-6 and early <= 1.005 * late


def exact_logits(model, ids):
    """With norms in float64: transformers' own are in float32."""
    with torch.no_grad():
        return widen_norms(copy.deepcopy(model))(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_source_and_its_first_units_stay(tied, tmp_path):
    model = model_of("llama", torch.float64, tie_word_embeddings=tied).eval()
    ids = calibration_of(2).select
    before = exact_logits(model, ids)
    table, data = table_for(model.config), calibration_of(8)
    made = choose(model, table, {}, data, untie=tied, basis="output", keep=5)
    for key, value in made.config.items():
        setattr(model.config, key, value)
    torch.testing.assert_close(exact_logits(model, ids), before, rtol=1e-10, atol=1e-10)
    model.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert json.loads((tmp_path / "config.json").read_text())["hidden_units_by_order"] is True
    table = table_for(again.config)
    assert goes_by_order(again, table)
    target = {**table.shape(), "hidden_size": 5}
    kept = fisher(again, table, target, data).selection.units["hidden"][0].index
    assert kept.tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad():
        again.model.norm.weight.mul_(1.1)  # trained on: no turned model any more
    assert not goes_by_order(again, table)


def test_wrong_numbers_are_refused():
    model = model_of("llama").eval()
    table, data = table_for(model.config), calibration_of(8)
    with pytest.raises(ShearingError, match="--keep 5 with --basis energy"):
        choose(model, table, {}, data, keep=5)
    with pytest.raises(ShearingError, match="--keep 12: a number of hidden units to keep, 1 to 11"):
        choose(model, table, {}, data, basis="output", keep=12)
    with pytest.raises(ShearingError, match="directions"):
        choose(model, table, {}, calibration_of(1, length=4), basis="output")
