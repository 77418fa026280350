"""Sparse targets: exact where they can be, right in the mean where they are drawn; their loss against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.training import loss
from llmshearing.training.divergence import distillation_losses
from llmshearing.training.sparse import TAILS, content_keys, sparse_targets
from llmshearing.training.targets import Sparse


def draw(seed, *shape, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread_out(targets, vocabulary):
    """The whole vectors [B, T, V] that sparse targets stand for, without the rest."""
    whole = torch.zeros(*targets.ids.shape[:2], vocabulary, dtype=torch.float64)
    return whole.scatter_add_(-1, targets.ids, targets.probs.double())


def written_out(logits, targets, temperature):
    """T^2 times the divergence, each sum as it stands in the formula: [B, T]."""
    log_q = (logits / temperature).log_softmax(-1)
    p = spread_out(targets, logits.shape[-1])
    divergence = torch.special.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
    if targets.rest is not None:
        student = torch.where(p > 0, 0.0, log_q.exp()).sum(-1)
        rest = torch.where(targets.rest > 0, targets.rest * (targets.rest.log() - student.log()), 0.0)
        divergence = divergence + torch.where(targets.rest > 0, rest, 0.0)
    return temperature**2 * divergence


@given(
    st.integers(1, 3), st.integers(2, 5), st.integers(2, 25), st.integers(1, 25), st.sampled_from(TAILS),
    st.integers(1, 60), st.sampled_from([(1.0, 0.0, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5, 2.5)]), st.integers(0, 2**20),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_autograd(batch, length, vocab, k, tail, chunk, weights, seed):
    weight, ce, temperature = weights
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    targets = sparse_targets(draw(seed, batch, length, vocab), k, tail, content_keys(ids), temperature)
    ours, theirs = (draw(seed + 1, batch, length, vocab).requires_grad_() for _ in range(2))
    scale = torch.rand(batch, length - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        got = distillation_losses(1 * ours, targets, ids, weight=weight, ce=ce, temperature=temperature)
        (got[0] * scale).sum().backward()
    hard = -theirs.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    soft = written_out(theirs, targets, temperature)[:, :-1]
    ((weight * soft + ce * hard) * scale).sum().backward()
    for one, other in zip(got, (weight * soft + ce * hard, hard, soft), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [11, 40])
def test_all_of_the_vocabulary_is_the_teacher(tail, k):
    logits, ids = draw(1, 2, 6, 11), torch.randint(11, (2, 6))
    targets = sparse_targets(logits, k, tail, content_keys(ids))
    assert torch.equal(spread_out(targets, 11), logits.softmax(-1))
    ours, theirs = (draw(2, 2, 6, 11).requires_grad_() for _ in range(2))
    one, other = (
        distillation_losses(1 * student, given, ids, ce=0.3) for student, given in ((ours, targets), (theirs, logits))
    )
    for got, want in zip(one, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    one[0].sum().backward(), other[0].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_a_bucket_holds_what_is_left():
    logits = draw(3, 2, 5, 30)
    targets = sparse_targets(logits, 4, "bucket", torch.zeros(2, dtype=torch.int64))
    p = logits.softmax(-1)
    best = p.topk(4)
    assert torch.equal(targets.ids, best.indices)
    torch.testing.assert_close(targets.rest, 1 - best.values.sum(-1), rtol=1e-12, atol=1e-12)


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 2**20))
def test_a_sampled_tail_is_drawn_as_written(vocab, k, seed):
    """By a loop over the formula; every token once; sums to 1."""
    logits, keys = draw(seed, 2, 3, vocab), torch.tensor([seed, -seed])
    targets = sparse_targets(logits, k, "sampled", keys)
    k = min(k, vocab)
    assert targets.ids.shape == targets.probs.shape == (2, 3, k) and targets.rest is None
    torch.testing.assert_close(targets.probs.sum(-1), torch.ones(2, 3).double(), rtol=1e-12, atol=1e-12)
    for entries, probs, row in zip(
        targets.ids.view(-1, k), targets.probs.view(-1, k), logits.view(-1, vocab), strict=True
    ):
        present = entries[probs > 0].tolist()
        assert len(set(present)) == len(present)
        if k == vocab:
            continue
        p = row.softmax(-1)
        likeliest = p.topk(k // 2).indices.tolist()
        assert present[: k // 2] == likeliest
        tail = torch.where(torch.isin(torch.arange(vocab), torch.tensor(likeliest, dtype=torch.int64)), 0.0, p)
        whole, draws = tail.sum(), k - k // 2
        for token, share in zip(present[k // 2 :], probs[probs > 0][k // 2 :], strict=True):
            # between two draws lies m / n: so a token of probability r is drawn r n / m times, up or down to a whole
            times = (share / (whole / draws)).item()
            assert times == pytest.approx(round(times), abs=1e-6) and tail[token] > 0
            assert abs(times - (tail[token] / whole * draws).item()) < 1 + 1e-6


def test_the_mean_over_keys_is_the_teacher():
    logits = draw(5, 1, 1, 12, scale=1.5).expand(4000, 3, 12).contiguous()
    targets = spread_out(sparse_targets(logits, 4, "sampled", torch.arange(4000)), 12)
    wanted = logits[0, 0].softmax(-1)
    for position in range(3):  # of 4,000 draws the mean is within 0.25 sqrt(1 / 4000) in one standard deviation
        assert (targets[:, position].mean(0) - wanted).abs().max() < 0.015
    assert not torch.equal(targets[:, 0], targets[:, 1])  # positions draw apart


def test_draws_depend_on_the_key_alone():
    logits, ids = draw(6, 3, 4, 50), torch.randint(50, (3, 4))
    keys = content_keys(ids)
    whole = sparse_targets(logits, 6, "sampled", keys)
    alone = [sparse_targets(logits[at : at + 1], 6, "sampled", content_keys(ids[at : at + 1])) for at in (2, 0, 1)]
    for at, part in zip((2, 0, 1), alone, strict=True):
        assert torch.equal(part.ids[0], whole.ids[at]) and torch.equal(part.probs[0], whole.probs[at])
    other = sparse_targets(logits, 6, "sampled", keys + 1)
    assert not torch.equal(other.ids, whole.ids)
    changed = ids.clone()
    changed[1] = changed[1].flip(0) + 1
    assert (content_keys(changed) == keys).tolist() == [True, False, True]


def test_entries_without_probability_count_for_nothing():
    ids = torch.tensor([[0, 1]])
    logits = [draw(7, 1, 2, 5).requires_grad_() for _ in range(2)]
    entries, probs, rest = (
        torch.tensor([[[2, 4], [1, 3]]]),
        torch.tensor([[[0.5, 0.2], [0.6, 0.1]]]),
        torch.full((1, 2), 0.3),
    )
    padded = Sparse(torch.cat([entries, torch.zeros_like(entries)], -1), torch.cat([probs, 0 * probs], -1), rest)
    results = []
    for student, targets in zip(logits, (Sparse(entries, probs, rest), padded), strict=True):
        objective = distillation_losses(1 * student, targets, ids)[0]
        objective.sum().backward()
        results.append((objective, student.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("k", "tail"), [(0, "sampled"), (4, "none")])
def test_bad_arguments(k, tail):
    with pytest.raises(ValueError, match="at least 1 entry, and one of sampled, bucket"):
        sparse_targets(draw(8, 1, 2, 9), k, tail, torch.zeros(1, dtype=torch.int64))
