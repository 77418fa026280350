"""The Lagrangian that pulls expected sparsity to its target.

    sparsity of a row:  s = 1 - sum(p)/N
    target now:         t = start + (final - start) min(1, progress)
    penalty:            sum over kinds of the mean over rows of  lambda_1 (s - t) + lambda_2 (s - t)^2

Weights and log alpha descend on cross-entropy + penalty, the multipliers ascend (Wang et al. 2020, arXiv:1910.04732;
Sheared LLaMA, arXiv:2310.06694).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def target_now(final: float, start: float, progress: float) -> float:
    """Target sparsity at ``progress`` = elapsed / warm-up (1 or more: the final one)."""
    return start + (final - start) * min(1.0, progress)


def penalty(sparsity: Tensor, target: float, lambda_1: Tensor, lambda_2: Tensor) -> Tensor:
    """Penalty of one kind. sparsity: [...] one value a row; lambda_*: [1]. Returns a scalar."""
    gap = sparsity - target
    return (lambda_1 * gap + lambda_2 * gap.square()).mean()


class _Ascend(torch.autograd.Function):
    """Identity whose gradient changes sign: a descending optimizer then ascends."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def ascend(value: Tensor) -> Tensor:
    """Make any optimizer that descends ascend on ``value``. DecoupledAdamW ignores its group's ``maximize``."""
    return _Ascend.apply(value)
