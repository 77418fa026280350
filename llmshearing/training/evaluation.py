"""Evaluate plain transformers models on an evaluation split: loss by domain, tokens per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from llmshearing.data.mixture.loader import build_eval_dataloader
from llmshearing.progress import tqdm
from llmshearing.training.loss import predicts, sequence_means, token_losses
from llmshearing.training.model import DomainLoss


def eval_batches(
    data: str, split: str, set_names: Sequence[str], max_seq_len: int, vocab_size: int, batch_size: int = 16
) -> Any:
    """Batches of an evaluation split of the data command's directory ``data``; every sample once."""
    return build_eval_dataloader(
        local=data, split=split, set_names=set_names, batch_size=batch_size, max_seq_len=max_seq_len,
        vocab_size=vocab_size,
    ).dataloader  # fmt: skip


@torch.no_grad()
def domain_losses(
    model: PreTrainedModel, batches: Any, set_names: Sequence[str], autocast: torch.dtype | None = None
) -> dict[str, float]:
    """Loss of each domain, and ``mean`` over all samples; nats per token. autocast: dtype on the CPU, None: none."""
    model.eval()
    metric = DomainLoss(len(set_names))
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False):
        with torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext():
            logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
        counted = predicts(batch)
        losses = token_losses(logits, batch["input_ids"].to(model.device))
        means = sequence_means(losses, None if counted is None else counted.to(model.device)).cpu()
        metric.update(means, batch["set"], None if counted is None else counted.sum(-1))
    mean = metric.compute().item()
    values = metric.by_domain.tolist() if metric.by_domain is not None else []
    return {**dict(zip(set_names, values, strict=True)), "mean": mean}


@torch.no_grad()
def tokens_per_second(
    models: Mapping[str, PreTrainedModel], shape: tuple[int, int] = (8, 256), repeats: int = 5
) -> dict[str, float]:
    """Forward speed of each model: medians of alternating repetitions, so that a noisy machine is noisy to all."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            input_ids = torch.randint(0, model.config.vocab_size, shape, device=model.device)
            start = time.perf_counter()
            model.eval()(input_ids=input_ids, use_cache=False).logits.sum().item()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: shape[0] * shape[1] / statistics.median(values) for name, values in seconds.items()}
