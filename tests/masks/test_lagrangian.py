"""The penalty against loops written out, and ascent under every optimizer that the training may use."""

import pytest
import torch
from composer.optim import DecoupledAdamW, DecoupledSGDW
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.masks import lagrangian


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 3))
def test_target_rises_straight_and_stays(final, start, progress):
    want = final if progress >= 1 else start + (final - start) * progress
    assert lagrangian.target_now(final, start, progress) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("progress", [1.0, 1e9, float("inf"), float("nan")])
def test_no_warmup_means_the_final_target_at_once(progress):
    """Warm-up 0 is progress 1; neither 0/0 nor n/0 may reach the penalty."""
    assert lagrangian.target_now(0.75, 0.1, progress) == pytest.approx(0.75, abs=1e-15)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), *[st.floats(-2, 2)] * 3)
def test_penalty_is_the_mean_over_rows(sparsity, target, first, second):
    want = sum(first * (s - target) + second * (s - target) ** 2 for s in sparsity) / len(sparsity)
    pair = (torch.tensor([x], dtype=torch.float64) for x in (first, second))
    assert lagrangian.penalty(torch.tensor(sparsity, dtype=torch.float64), target, *pair).item() == pytest.approx(want)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
        lambda p: DecoupledAdamW(p, lr=0.1, weight_decay=0.0),
        lambda p: DecoupledSGDW(p, lr=0.1, weight_decay=0.0),
    ],
    ids=["sgd", "momentum", "adamw", "decoupled_adamw", "decoupled_sgdw"],
)
def test_ascend_climbs_while_the_rest_descends(optimizer):
    """(x - 1)^2 - (y - 2)^2 in one optimizer: x finds its minimum and y its maximum."""
    x, y = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    steps = optimizer([x, y])
    for _ in range(300):
        steps.zero_grad()
        ((x - 1).square() - (lagrangian.ascend(y) - 2).square()).sum().backward()
        steps.step()
    assert x.item() == pytest.approx(1, abs=0.05)
    assert y.item() == pytest.approx(2, abs=0.05)


def test_ascend_keeps_the_value_and_turns_the_gradient():
    y = torch.tensor([3.0], requires_grad=True)
    value = lagrangian.ascend(y)
    assert value.item() == 3
    (value * 2).sum().backward()
    assert y.grad.item() == -2
