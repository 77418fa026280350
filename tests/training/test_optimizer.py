"""The fused optimizer against Composer's own, step by step, with a schedule; and its state in both directions."""

import copy

import pytest
import torch
from composer.optim import DecoupledAdamW

from llmshearing.training.optimizer import FusedDecoupledAdamW


def groups(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [[(5, 7), (7,), ()], [(3,)]]
    made = [[torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in group] for group in shapes]
    return [{"params": made[0]}, {"params": made[1], "lr": 0.5, "weight_decay": 0.0}]


def run(optimizer, steps, first=0):
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for group, peak in zip(optimizer.param_groups, (3e-2, 0.5), strict=True):
            group["lr"] = peak * min(1.0, step / 3) * 0.9**step
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def values(optimizer):
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_equals_composers(dtype, tolerance, amsgrad):
    options = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 7e-4, "amsgrad": amsgrad}
    ours, theirs = FusedDecoupledAdamW(groups(dtype), **options), DecoupledAdamW(groups(dtype), **options)
    run(ours, 12), run(theirs, 12)
    for got, want in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for got, want in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert got.keys() == want.keys()
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=tolerance, atol=tolerance)


def test_goes_on_from_a_state_of_composers():
    options = {"lr": 3e-2, "weight_decay": 7e-4}
    theirs = DecoupledAdamW(groups(torch.float64), **options)
    run(theirs, 5)
    ours = FusedDecoupledAdamW(groups(torch.float64), **options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for got, value in zip(values(ours), values(theirs), strict=True):
        got.copy_(value)
    run(ours, 9, first=5), run(theirs, 9, first=5)
    for got, want in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_parameters_without_a_gradient_stay():
    optimizer = FusedDecoupledAdamW([{"params": [torch.ones(3, requires_grad=True)]}], lr=0.1)
    optimizer.step()
    assert values(optimizer)[0].tolist() == [1, 1, 1] and not optimizer.state
