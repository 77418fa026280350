"""The chunked cross-entropy against torch's own and against finite differences."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.training import loss
from llmshearing.training.loss import token_losses


@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 40), st.integers(1, 200), st.integers(0, 2**20))
def test_equals_torch_with_any_chunk(batch, length, vocab, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    weights = torch.rand(batch, length - 1, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        got = token_losses(ours, ids)
        (got * weights).sum().backward()
    want = F.cross_entropy(theirs[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(batch, -1)
    (want * weights).sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    ids, weights = torch.randint(0, 7, (2, 5)), torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def objective(values):
        return (token_losses(values, ids) * weights).sum()

    leaf = logits.clone().requires_grad_()
    objective(leaf).backward()
    for at in range(0, logits.numel(), 3):
        step = torch.zeros_like(logits).view(-1).index_fill_(0, torch.tensor(at), 1e-5).view_as(logits)
        slope = (objective(logits + step) - objective(logits - step)) / 2e-5
        assert leaf.grad.view(-1)[at].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_place_of_the_logits(dtype):
    logits = torch.randn(2, 5, 7).to(dtype).requires_grad_()
    losses = token_losses(logits, torch.randint(0, 7, (2, 5)))
    losses.sum().backward(retain_graph=True)
    assert logits.grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # and not a wrong gradient in silence
        losses.sum().backward()


def test_bfloat16_logits_lose_no_more_than_their_own_rounding():
    logits = (10 * torch.randn(3, 6, 50)).bfloat16()
    ids = torch.randint(0, 50, (3, 6))
    want = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, -1)
    got = token_losses(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


MEASURE = """
import sys, torch
from llmshearing.training.loss import token_losses
torch.set_num_threads(1)
logits = torch.zeros(1, 4096, 32_000).normal_().requires_grad_()
ids = torch.randint(0, 32_000, (1, 4096))
token_losses(torch.zeros(1, 8, 32_000, requires_grad=True), ids[:, :8]).mean().backward()
def peak():
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
token_losses(logits, ids).mean().backward()
sys.stdout.write(f"{(peak() - before) / (logits.numel() * 4)}")
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_holds_no_second_tensor_of_the_logits_size():
    """At vocabulary 32,000, forward and backward: a process of its own, in units of the float32 logits."""
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 0.125
