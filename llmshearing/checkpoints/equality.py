"""Whether two models are the same function: full log-probabilities at every position, and every tensor.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.checkpoints.hf_read import build_model, load_hf_model
from llmshearing.checkpoints.hf_write import refuse_masks
from llmshearing.errors import ShearingError
from llmshearing.progress import trange

BATCH = 4  # sequences at once: two [B, T, V] in float32 are the largest tensors


@dataclass(frozen=True)
class Comparison:
    """What two models have in common."""

    max_difference: float
    """Largest absolute difference of any log-probability, in nats; inf where one is NaN."""
    unequal: list[str]
    """Tensors whose values or dtypes differ, or that only one side has."""
    tensors: int
    """Tensors of the Hugging Face model."""
    tolerance: float
    """In nats."""

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.tolerance


def compare(
    hf: Path | str,
    checkpoint: Path | str,
    *,
    sequences: int = 8,
    length: int = 128,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Comparison:
    """Compare a Hugging Face model and a checkpoint on random token ids, in float32.

    Args:
        sequences, length: how many sequences of how many tokens. tolerance: in nats.

    Raises:
        ShearingError: either cannot be read, their vocabularies differ, or nothing would be compared.
    """
    if sequences < 1 or length < 1:
        raise ShearingError(f"sequences={sequences} of length={length} compare nothing; both must be at least 1")
    stored = read_checkpoint(checkpoint, verify=False)  # each tensor is verified as it is read
    refuse_masks(stored)
    source = load_hf_model(hf)
    unequal = _unequal(source.state_dict(), stored.weights)
    first, second = source.float().eval(), build_model(stored.weights, stored.info.config, torch.float32)
    sizes = first.config.vocab_size, second.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ShearingError(f"vocab_size of {hf} is {sizes[0]}, of {checkpoint} {sizes[1]}: they cannot be compared")
    generator = torch.Generator().manual_seed(seed)
    length = min(length, first.config.max_position_embeddings)
    worst = 0.0
    for start in trange(0, sequences, BATCH, desc="comparing", unit="batch"):
        ids = torch.randint(sizes[0], (min(BATCH, sequences - start), length), generator=generator)
        difference = (_log_probabilities(first, ids) - _log_probabilities(second, ids)).abs().max().item()
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return Comparison(worst, unequal, len(source.state_dict()), tolerance)


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V]."""
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def _unequal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    alone = one.keys() ^ other.keys()
    return sorted(alone | {name for name in one.keys() & other.keys() if not _equal(one[name], other[name])})


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
