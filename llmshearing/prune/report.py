"""What a model costs and how well it predicts: before, after, and the table of both."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.progress import tqdm
from llmshearing.prune.calibration import IGNORED, Calibration
from llmshearing.prune.flops import counted_flops
from llmshearing.prune.methods.decoder import batch_loss, weight

CONTEXT = 128  # tokens of the sequence that FLOPs are told for
SHORT = (2, 4)  # tokens of the sequences that they are counted on


@dataclass(frozen=True)
class Measures:
    """Of one model. bytes: of its weights as stored. flops_per_token: forward, 2 a multiply-add, at CONTEXT tokens."""

    parameters: int
    bytes: int
    flops_per_token: float
    perplexity: float | None


def measure(
    model: PreTrainedModel,
    dtype: torch.dtype,
    calibration: Calibration | None,
    reencode: Callable[[list[int]], list[int]] | None = None,
) -> Measures:
    """Count and, with a calibration, evaluate on its reporting part.

    Args:
        dtype: in which the weights are stored. reencode: see :func:`perplexity_of`.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    perplexity = None if calibration is None else perplexity_of(model, calibration, reencode)
    return Measures(parameters, parameters * dtype.itemsize, flops_per_token(model), perplexity)


def flops_per_token(model: PreTrainedModel) -> float:
    """FLOPs of a forward pass of one sequence of CONTEXT tokens, by token.

    A token's FLOPs are a constant and attention, which grows with the length: two short sequences tell both.
    """
    short, longer = (counted_flops(model, length) / length for length in SHORT)
    return short + (longer - short) / (SHORT[1] - SHORT[0]) * (CONTEXT - SHORT[0])


def perplexity_of(
    model: PreTrainedModel, calibration: Calibration, reencode: Callable[[list[int]], list[int]] | None = None
) -> float:
    """exp of the mean loss on the reporting part, by token of the source's tokenizer.

    reencode: ids of the source's tokenizer -> the model's, where it has another; lengths then differ, and a loss still
    counts for the source's tokens, so that perplexities before and after can be compared.
    """
    batches = [*calibration.labelled("report")]
    counted = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches)
    if reencode is not None:
        batches = [_reencoded(*row, reencode) for batch in batches for row in zip(*batch, strict=True)]
    total = 0.0  # nats
    for batch, labels in tqdm(batches, desc="perplexity", unit="batch"):
        total += batch_loss(model, batch, labels) * weight(labels) * (batch.shape[1] - 1)
    return math.exp(total / counted)


def _reencoded(ids: Tensor, labels: Tensor, reencode: Callable[[list[int]], list[int]]) -> tuple[Tensor, Tensor]:
    """A batch of one sequence and its labels in the other tokenizer: what counts and what does not, each by itself."""
    tokens: list[int] = []
    wanted: list[int] = []
    pairs = zip(ids.tolist(), (labels != IGNORED).tolist(), strict=True)
    for counts, run in groupby(pairs, key=lambda pair: pair[1]):
        made = reencode([token for token, _ in run])
        tokens += made
        wanted += made if counts else [IGNORED] * len(made)
    return torch.tensor([tokens]), torch.tensor([wanted])


def peak_memory() -> int:
    """Bytes: of the GPU where one was used, else of this process since its start."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table_of(before: Measures, after: Measures, seconds: float, memory: int, split: str | None) -> str:
    """The closing table."""
    rows = [
        ("parameters", before.parameters, after.parameters, "{:,}"),
        ("bytes", before.bytes, after.bytes, "{:,}"),
        (f"FLOPs/token at {CONTEXT}", before.flops_per_token, after.flops_per_token, "{:,.0f}"),
    ]
    if before.perplexity is not None and after.perplexity is not None:
        rows.append(("perplexity", before.perplexity, after.perplexity, "{:,.3f}"))
    lines = [f"{'':20}{'before':>18}{'after':>18}{'change':>9}"]
    for name, old, new, form in rows:
        lines.append(f"{name:20}{form.format(old):>18}{form.format(new):>18}{new / old - 1:>+9.1%}")
    lines += [f"{'seconds':20}{seconds:>36.1f}", f"{'peak memory, bytes':20}{memory:>36,}"]
    return "\n".join(lines + ([f"perplexity on {split}"] if split and before.perplexity is not None else []))


def as_plain(before: Measures, after: Measures) -> dict[str, Any]:
    """For JSON."""
    return {"before": asdict(before), "after": asdict(after)}
