"""The hard concrete distribution against its closed forms, Monte Carlo, and rules written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.masks import hard_concrete as hc

SAMPLES = 400_000
LOG_ALPHAS = [-10.0, math.log(0.01), -2.0, -0.5, 0.0, 1.0, 3.0, math.log(100), 10.0]


def draw(log_alpha):
    a = torch.full((SAMPLES,), log_alpha, dtype=torch.float64)
    return hc.sample(a, hc.uniform_noise((SAMPLES,), seed=1, step=2, kind="head", like=a))


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_probability_open_is_the_frequency_of_open_gates(log_alpha):
    p = hc.probability_open(torch.tensor(log_alpha, dtype=torch.float64)).item()
    frequency = (draw(log_alpha) > 0).double().mean().item()
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / SAMPLES) + 1e-6


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_mean_gate_by_quadrature(log_alpha):
    """E[gate] = integral of P(gate > x) over [0, 1], with P(gate > x) from the inverse of the formula by hand."""
    a = min(max(log_alpha, math.log(0.01)), math.log(100))
    cells = 20_000
    integral = 0.0
    for i in range(cells):
        s = ((i + 0.5) / cells + 0.1) / 1.2
        integral += 1 / (1 + math.exp(2 / 3 * math.log(s / (1 - s)) - a)) / cells
    gates = draw(log_alpha)
    assert abs(gates.mean().item() - integral) < 5 * gates.std().item() / math.sqrt(SAMPLES) + 1e-5


def test_sample_is_the_formula():
    for u in (1e-6, 0.2, 0.5, 0.77, 1 - 1e-6):
        for a in (-4.0, -1.0, 0.0, 2.0, 4.0):
            s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) * 1.5))
            want = min(1.0, max(0.0, s * 1.2 - 0.1))
            got = hc.sample(torch.tensor([a], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))
            assert got.item() == pytest.approx(want, abs=1e-12)


def test_gates_reach_both_ends_exactly_and_the_ends_pass_no_gradient():
    a = torch.zeros(20_000, requires_grad=True)
    gates = hc.sample(a, hc.uniform_noise((20_000,), seed=0, step=0, kind="x", like=a))
    (gradient,) = torch.autograd.grad(gates.sum(), a)
    for end in (gates == 0, gates == 1):
        assert end.any() and (gradient[end] == 0).all()
    assert (gradient[(gates > 0) & (gates < 1)] > 0).all()


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from(["hidden", "head", "mlp"]))
def test_noise_is_a_function_of_seed_step_and_kind_alone(seed, step, kind):
    like = torch.empty(0)

    def noise(**changes):
        return hc.uniform_noise((4, 3), **{"seed": seed, "step": step, "kind": kind, "like": like, **changes})

    torch.manual_seed(1)
    first = noise()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, noise())
    torch.manual_seed(1)
    noise()
    assert torch.equal(state, torch.get_rng_state())  # the global generator is neither read nor moved
    for other in (noise(seed=seed + 1), noise(step=step + 1), noise(kind=kind + "_")):
        assert not torch.equal(first, other)


def test_noise_is_uniform_inside_its_limits():
    noise = hc.uniform_noise((200_000,), seed=3, step=4, kind="hidden", like=torch.empty(0))
    assert noise.dtype == torch.float32
    assert noise.min() > 0 and noise.max() < 1
    counts = torch.histc(noise, 20, 0, 1)
    assert ((counts - 10_000).abs() < 5 * math.sqrt(10_000)).all()


rows_of_values = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-9.0, -4.0, -1.0, 0.0, 0.5, 4.0, 9.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@given(rows_of_values, st.data())
def test_exactly_k_open_in_every_row_ties_included(values, data):
    a = torch.tensor(values, dtype=torch.float64)
    k = data.draw(st.integers(0, a.shape[-1]))
    gates = hc.deterministic(a, k)
    assert ((gates > 0).sum(-1) == k).all()
    for row, gate in zip(a, gates, strict=True):
        is_open = gate > 0
        if is_open.any() and not is_open.all():  # what stays is no smaller than what goes
            assert row[is_open].min() >= row[~is_open].max()
        soft = torch.sigmoid(0.8 * row.clamp(math.log(0.01), math.log(100)) * 1.5)
        torch.testing.assert_close(gate[is_open], soft[is_open])
    assert torch.equal(gates, hc.deterministic(a, k))


@given(rows_of_values)
def test_without_a_target_as_many_close_as_are_expected_to_be(values):
    gates = hc.deterministic(torch.tensor(values, dtype=torch.float64))
    for row, gate in zip(values, gates, strict=True):
        expected_open = 0.0
        for a in row:
            a = min(max(a, math.log(0.01)), math.log(100))
            closed = 1 / (1 + math.exp(-(2 / 3 * math.log(0.1 / 1.1) - a)))
            expected_open += 1 - min(max(closed, 1e-6), 1 - 1e-6)
        assert (gate == 0).sum().item() == round(len(row) - expected_open)
