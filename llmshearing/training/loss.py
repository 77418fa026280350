"""Next-token cross-entropy that holds nothing of the logits' size but the logits.

    loss_t = logsumexp_v(logits_tv) - logits_t,label        d loss_t / d logits_tv = softmax_tv - [v = label]

Both passes go over the logits [N, V] in chunks of rows: only one chunk at a time is widened to float32. The backward
pass writes the gradient over the logits, which nobody needs any more.

A loss mask leaves positions out of the means, and so out of the gradient.

Shape legend: B sequences, T tokens, N = B T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmshearing.data.mds.masks import COLUMN

CHUNK_ELEMENTS = 2**20
"""Elements widened at a time on a CPU: 4 MB of float32, about what a core's cache holds."""
DEVICE_CHUNK_ELEMENTS = 2**26
"""The same on a GPU: 256 MB. Small chunks are thousands of launches: with those of a CPU, dense steps of 135M and 1B
models on an H200 took 2.0 times as long, steps of plain models of half their widths up to 3.7 times (docs/step.md)."""


def chunks(logits: Tensor) -> list[slice]:
    """Rows [N, V] in parts that are small enough to be widened."""
    elements = CHUNK_ELEMENTS if logits.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    rows = max(1, elements // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


class _CrossEntropy(torch.autograd.Function):
    """Per-row cross-entropy. logits: [N, V]; labels: int64 [N]; result: [N], float32 or wider."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.empty(len(logits), dtype=wide, device=logits.device)
        chosen = logits.gather(1, labels[:, None]).squeeze(1).to(wide)
        for rows in chunks(logits):
            normaliser[rows] = logits[rows].to(wide).logsumexp(-1)
        ctx.save_for_backward(logits, labels, normaliser)
        return normaliser - chosen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, labels, normaliser = ctx.saved_tensors
        # In place; the version counter of autograd refuses whoever still wants to use the logits after this.
        for rows in chunks(logits):
            part = (logits[rows].to(normaliser.dtype) - normaliser[rows, None]).exp_()
            part.scatter_add_(1, labels[rows, None], part.new_full((len(part), 1), -1.0))
            logits[rows] = part.mul_(gradient[rows, None])
        return logits, None


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Next-token cross-entropy, [B, T-1], in float32 or wider. logits: [B, T, V]; input_ids: [B, T].

    The backward pass overwrites ``logits`` with their gradient: it can run once.
    """
    batch, length = input_ids.shape
    # The last position has no next token: it is computed with any label and dropped, which copies no logits.
    labels = input_ids.roll(-1, dims=1)
    losses = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten())
    return losses.view(batch, length)[:, :-1]


def predicts(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Positions whose prediction counts, bool [B, T-1]: those before a token that `loss_mask` [B, T] marks.

    None: the batch has no mask, and all count.
    """
    mask = batch.get(COLUMN)
    return None if mask is None else mask[:, 1:]


def sequence_means(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Mean loss of each sequence, [B], over the positions that count; 0 where none does. losses, counted: [B, T-1]."""
    if counted is None:
        return losses.mean(-1)
    return torch.where(counted, losses, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def batch_mean(means: Tensor, counts: Tensor | None) -> Tensor:
    """Mean over a batch of its sequences' means [B], each weighed by its count [B]; 0 where nothing counts.

    None: all weigh alike. Of counts of tokens the result is the mean over all tokens that count.
    """
    if counts is None:
        return means.mean()
    return (means * counts).sum() / counts.sum().clamp(min=1)
