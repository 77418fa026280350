"""A position's targets in bytes: what is lost, what is not, and how many bytes they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.training.cache.codec import NARROW, TAILS, Codec
from llmshearing.training.cache.index import sample_type
from llmshearing.training.sparse import content_keys, sparse_targets
from llmshearing.training.targets import Sparse

MARGIN = 2 ** (2 / 4096) - 1 + 1e-6  # a code's own rounding, and that of the sum it is divided by


def targets_of(vocab: int, k: int, tail: str, scale: float, seed: int) -> tuple[torch.Tensor, Sparse]:
    """Logits [12, V] and their sparse targets [12, k]."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 4, vocab, generator=generator)
    found = sparse_targets(logits, k, tail, content_keys(torch.arange(12).view(3, 4)))
    rest = None if found.rest is None else found.rest.flatten()
    return logits.flatten(0, 1), Sparse(found.ids.flatten(0, 1), found.probs.flatten(0, 1), rest)


def dense(targets: Sparse, vocab: int) -> torch.Tensor:
    """The mass of every id, and of the rest: float64 [N, V + 1]."""
    found = torch.zeros(len(targets.ids), vocab + 1, dtype=torch.float64)
    found.scatter_add_(1, targets.ids, targets.probs.double())
    if targets.rest is not None:
        found[:, -1] = targets.rest.double()
    return found


CASES = (
    st.sampled_from([(40, 1), (40, 2), (40, 7), (40, 39), (40, 40), (NARROW + 9, 32)]),
    st.sampled_from(TAILS), st.sampled_from([0.0, 1.0, 5.0, 60.0, 1000.0]), st.integers(0, 2**20),
)  # fmt: skip


@given(*CASES)
def test_each_probability_is_kept_to_a_thirtieth_of_a_percent_and_the_mass_is_one(size, tail, scale, seed):
    vocab, k = size
    _, given_ = targets_of(vocab, k, tail, scale, seed)
    codec = Codec(vocab, k, tail)
    back = codec.decode(codec.encode(given_))
    one, other = dense(given_, vocab), dense(back, vocab)
    torch.testing.assert_close(other.sum(-1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-6)
    kept = one > 2.0**-31  # of an entry; below, what is lost of the mass is less than k 2^-31
    torch.testing.assert_close(other[kept], one[kept], rtol=MARGIN, atol=k * 2.0**-31)
    assert (other[~kept] <= 2.0**-30).all() and (back.rest is None) == (given_.rest is None)


@given(*CASES)
def test_rounding_on_the_spot_gives_the_bits_that_bytes_give(size, tail, scale, seed):
    vocab, k = size
    _, given_ = targets_of(vocab, k, tail, scale, seed)
    codec = Codec(vocab, k, tail)
    back, shaped = codec.decode(codec.encode(given_)), Sparse(given_.ids.view(3, 4, -1), given_.probs.view(3, 4, -1))
    if given_.rest is not None:
        shaped = Sparse(shaped.ids, shaped.probs, given_.rest.view(3, 4))
    rounded = codec.rounded(shaped)
    assert rounded.ids.shape == (3, 4, k) and torch.equal(rounded.ids.flatten(0, 1), back.ids)
    assert torch.equal(rounded.probs.flatten(0, 1), back.probs)
    if back.rest is not None:
        assert torch.equal(rounded.rest.flatten(), back.rest)


@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_vocabulary_is_exact(tail):
    logits, given_ = targets_of(30, 30, tail, 3.0, 0)
    codec = Codec(30, 30, tail)
    back = codec.decode(codec.encode(given_))
    assert torch.equal(back.probs.gather(1, back.ids.argsort(-1)), logits.softmax(-1))


def test_a_token_that_is_ruled_out_stays_so():
    logits = torch.zeros(1, 1, 50)
    logits[..., 10:] = -torch.inf
    for tail in TAILS:
        codec = Codec(50, 20, tail)
        found = codec.rounded(sparse_targets(logits, 20, tail, torch.tensor([1])))
        assert found.probs[0, 0][found.ids[0, 0] >= 10].sum() == 0


@pytest.mark.parametrize(
    ("vocab", "tail", "size"),
    [(50_000, "sampled", 98), (151_936, "sampled", 130), (NARROW, "bucket", 130), (151_936, "bucket", 162)],
)
def test_bytes_of_a_position(vocab, tail, size):
    codec = Codec(vocab, 32, tail)
    assert codec.record.itemsize == size
    # Nothing follows the last position, and the checksums cost less than that saves.
    assert sample_type(codec, 4096).itemsize / 4096 < size and sample_type(codec, 2).itemsize / 2 < size


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 101, "bucket"), "top_k = 101: must be from 1 to the vocabulary, 100"),
        ((100, 0, "bucket"), "top_k = 0"),
        ((100, 8, "none"), "tail = 'none': must be one of sampled, bucket"),
        ((2**24 + 1, 8, "bucket"), "a vocabulary of 16777217"),
    ],
)
def test_sizes_out_of_range_are_refused(size, message):
    with pytest.raises(ShearingError, match=message):
        Codec(*size)
