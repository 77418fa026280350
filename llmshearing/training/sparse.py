"""Sparse targets from a teacher's logits: the likeliest tokens, and what stands for the rest.

    bucket     the k likeliest tokens, and the mass of all others as one more class
    sampled    the k/2 likeliest tokens, and k/2 drawn from the tail, so that the mean of the targets is the teacher

The tail is drawn systematically. With r_v the probabilities without the likeliest ones, m = sum_v r_v, n draws and one
u in (0, 1) for each token:

    v_i = the smallest v with cumsum(r)_v >= (i + u) m / n,     i = 0 .. n - 1;     each v_i counts m / n

In the mean v gets r_v, so that the gradient of the divergence is unbiased (docs/distillation.md). The targets sum to 1.
A token that is drawn several times is one entry. Where k reaches the vocabulary the targets are the whole distribution.

u is a hash of a key and the position: no generator, no state, the same on every device and in every order of samples.

Shape legend: B sequences, T tokens, V vocabulary, k entries, R rows of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshearing.training.loss import chunks
from llmshearing.training.targets import Sparse

BUCKET, SAMPLED = "bucket", "sampled"
TAILS = (SAMPLED, BUCKET)


@torch.no_grad()
def sparse_targets(logits: Tensor, k: int, tail: str, keys: Tensor, temperature: float = 1.0) -> Sparse:
    """The sparse targets of a teacher's logits; a pure function of its arguments.

    The logits go by in chunks of rows: none but a chunk is widened.

    Args:
        logits: [B, T, V]. k: entries a token, at least 1. tail: ``sampled`` or ``bucket``. keys: int64 [B], one for
            each sequence, of which the draws of ``sampled`` depend (:func:`content_keys`).

    Returns:
        ids int64 and probs float32 (or wider, as the logits) [B, T, min(k, V)]; ``rest`` [B, T] for ``bucket`` alone.

    Raises:
        ValueError: k is below 1, or the tail is neither.
    """
    if k < 1 or tail not in TAILS:
        raise ValueError(f"k = {k}, tail = {tail!r}: at least 1 entry, and one of {', '.join(TAILS)}")
    batch, length, vocabulary = logits.shape
    k, flat = min(k, vocabulary), logits.flatten(0, 1)
    uniform = _uniform(keys.to(logits.device), length).flatten()
    wide = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.empty(len(flat), k, dtype=torch.int64, device=logits.device)
    probs, rest = ids.to(wide), torch.zeros(len(flat), dtype=wide, device=logits.device)
    for rows in chunks(flat):
        part = (flat[rows].to(wide) / temperature).softmax(-1)
        if k == vocabulary:
            ids[rows], probs[rows] = torch.arange(k, device=ids.device), part
        elif tail == BUCKET:
            probs[rows], ids[rows] = part.topk(k)
            rest[rows] = part.scatter_(1, ids[rows], 0.0).sum(-1)
        else:
            ids[rows], probs[rows] = _with_sampled_tail(part, k, uniform[rows])
    shape = (batch, length)
    return Sparse(ids.view(*shape, k), probs.view(*shape, k), rest.view(shape) if tail == BUCKET else None)


def _with_sampled_tail(part: Tensor, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """ids and probs [R, k]. part: probabilities [R, V], which are changed; uniform: float64 [R]."""
    likeliest, draws = k // 2, k - k // 2
    probs, ids = part.topk(likeliest)
    reached = part.scatter_(1, ids, 0.0).to(torch.float64).cumsum(-1)
    mass = reached[:, -1:]
    places = (torch.arange(draws, device=part.device) + uniform[:, None]) * (mass / draws)
    drawn = torch.searchsorted(reached, places).clamp_(max=part.shape[1] - 1)
    drawn, counts = merged(drawn)
    return torch.cat([ids, drawn], 1), torch.cat([probs, (counts * (mass / draws)).to(probs.dtype)], 1)


def merged(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending ids [R, n] each once and how often each came; places that are left over have id 0 and count 0."""
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, place, drawn)
    return ids, torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))


# Keys --------------------------------------------------------------------------------------------------------------


def content_keys(input_ids: Tensor) -> Tensor:
    """int64 [B]: a hash of each sequence of ``input_ids`` [B, T]; the same wherever the sequence comes from."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return _scrambled(_scrambled(places) ^ input_ids).sum(-1)  # int64 wraps


def _uniform(keys: Tensor, length: int) -> Tensor:
    """A number in (0, 1) for every key [B] and position: float64 [B, T]."""
    places = torch.arange(length, device=keys.device)
    bits = _scrambled(keys[:, None] ^ _scrambled(places)) & ((1 << 52) - 1)
    return (bits.to(torch.float64) + 0.5) / 2**52


def _scrambled(value: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014), in int64 that wraps."""
    value = value + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ _shifted(value, shift)) * _signed(factor)
    return value ^ _shifted(value, 31)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(value: Tensor, places: int) -> Tensor:
    """Logical shift to the right; that of int64 repeats the sign."""
    return (value >> places) & ((1 << (64 - places)) - 1)
