"""Loss of long texts in windows: every token once, each seen with as much before it as the stride leaves.

    sequence   s_0 s_1 ... s_(n-1)           s_0 is given, s_1 ... s_(n-1) are scored: n - 1 tokens
    window 1   s_0 ... s_(W-1)               scores all but its first
    window k   ends `stride` tokens later (the last: where the sequence ends), holds W tokens, scores the new ones

With BOS the sequence is BOS and the document, so that each token of the document is scored. Without, its first token is
not: nothing comes before it. Later windows have no BOS of their own, their context is the text before. The largest
stride is W - 1: no token is left out at a border, the first of each window has one token before it.

Shape legend: B windows at once, W tokens in a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llmshearing.training.loss import token_losses


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a sequence; those from ``scored`` on are scored (at least one after begin)."""

    begin: int
    end: int
    scored: int


def windows_of(length: int, width: int, stride: int) -> Iterator[Window]:
    """The windows of a sequence of so many tokens; none where there is nothing to score."""
    end, scored = min(width, length), 1
    while scored < length:
        yield Window(max(0, end - width), end, scored)
        end, scored = min(end + stride, length), end


@torch.no_grad()
def sequence_losses(
    model: PreTrainedModel, sequences: Iterable[Sequence[int]], width: int, stride: int, batch_size: int
) -> Iterator[Tensor]:
    """For each sequence the losses of its scored tokens, float64 [n - 1] on the CPU, nats.

    Windows of like lengths run together, whichever sequence they are of; the order of the results is the sequences'.
    """
    for group in _grouped(sequences, width, stride, batch_size):
        losses = [torch.zeros(max(0, len(ids) - 1), dtype=torch.float64) for ids in group]
        places = [(at, window) for at, ids in enumerate(group) for window in windows_of(len(ids), width, stride)]
        places.sort(key=lambda place: place[1].end - place[1].begin)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            rows = [torch.tensor(group[at][window.begin : window.end]) for at, window in batch]
            # Filled up on the right: a causal model does not see it from what is scored.
            ids = pad_sequence(rows, batch_first=True).to(model.device)
            found = token_losses(model(input_ids=ids, use_cache=False).logits, ids).double().cpu()
            for (at, window), row in zip(batch, found, strict=True):
                scored = slice(window.scored - 1 - window.begin, window.end - 1 - window.begin)
                losses[at][window.scored - 1 : window.end - 1] = row[scored]
        yield from losses


AT_ONCE = 32
"""Batches whose windows are sorted by length together."""


def _grouped(
    sequences: Iterable[Sequence[int]], width: int, stride: int, batch_size: int
) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    number = 0
    for ids in sequences:
        group.append(ids)
        number += 1 + max(0, len(ids) - width) // stride
        if number >= AT_ONCE * batch_size:
            yield group
            group, number = [], 0
    if group:
        yield group
