"""RMSNorm against transformers' own, against finite differences, and with no unit left."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmshearing.fold.norm import rms_norm


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 1), (3, 7)])
def test_gradcheck(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6, torch.float64, shape[-1]), (x, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_agrees_with_transformers(dtype, tolerance):
    theirs = LlamaRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(theirs.weight, 1.0, 0.3)
    x = (3 * torch.randn(4, 9, 48)).to(dtype)
    weighing, gradients = torch.randn(4, 9, 48), []
    for norm in (theirs, lambda x: rms_norm(x, theirs.weight, 1e-5, dtype, 48)):
        theirs.weight.grad, leaf = None, x.clone().requires_grad_()
        out = norm(leaf)
        (out * weighing).sum().backward()
        gradients.append((out.float(), leaf.grad.float(), theirs.weight.grad))
    assert out.dtype == leaf.grad.dtype == dtype
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_result_in_the_dtype_that_is_asked_for():
    """Under autocast: the residual stream is float32, what the projections read is bfloat16."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    half = rms_norm(x, weight, 1e-6, torch.bfloat16, 8)
    assert half.dtype == torch.bfloat16 and torch.equal(half, rms_norm(x, weight, 1e-6, torch.float32, 8).bfloat16())
    half.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_padding_counts_for_nothing():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    padded = torch.cat([x[:, :3], torch.zeros(3, 4, dtype=torch.float64), x[:, 3:]], 1)
    wide = torch.cat([weight[:3], torch.full((4,), 9.0, dtype=torch.float64), weight[3:]])
    want = torch.nn.functional.rms_norm(x, (8,), weight, 1e-6)
    got = rms_norm(padded, wide, 1e-6, torch.float64, 8)
    torch.testing.assert_close(got[:, [0, 1, 2, 7, 8, 9, 10, 11]], want)
    assert not got[:, 3:7].any()


def test_no_unit_is_open():
    x, weight = torch.zeros(2, 3, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    rms_norm(x, weight, 1e-6, torch.float32, 0).sum().backward()
    assert x.grad.shape == (2, 3, 0) and weight.grad.shape == (0,)


def test_keeps_one_tensor_of_the_size_of_the_tokens():
    kept = []
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6, torch.bfloat16, 8)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()] == [x.data_ptr()]
