"""The chunked cross-entropy against torch's own and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmshearing import loss
from llmshearing.loss import token_losses


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


def test_gradcheck():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 7, (2, 5))
    assert torch.autograd.gradcheck(lambda x: token_losses(x, ids), logits)


def test_bfloat16_logits_lose_no_more_than_their_own_rounding():
    logits = (10 * torch.randn(3, 6, 50)).bfloat16()
    ids = torch.randint(0, 50, (3, 6))
    want = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, -1)
    got = token_losses(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
