"""The hard concrete distribution: gates in [0, 1] that are exactly 0 or 1 with positive probability.

    s    = sigmoid((scale (ln u - ln(1-u)) + log_alpha) / beta)        u ~ U(eps, 1-eps), scale 1
    gate = clip(s (r - l) + l, 0, 1)                           stretched to (l, r), then clipped

Louizos, Welling, Kingma 2018 (arXiv:1712.01312), with the constants of CoFi (arXiv:2204.00408) and Sheared LLaMA
(arXiv:2310.06694). Shape legend: any leading dimensions; the last one, N, is a row of units.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

LEFT, RIGHT = -0.1, 1.1  # stretch limits l, r
BETA = 2 / 3  # temperature
EPSILON = 1e-6  # keeps noise and probabilities off 0 and 1
MAGIC = 0.8  # sharpens the deterministic gate, as in CoFi's code
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(0.01), math.log(100.0)


def clamp(log_alpha: Tensor) -> Tensor:
    """Log alpha inside its range; outside of it the gradient is 0."""
    return log_alpha.clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)


def sample(log_alpha: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
    """Gates for uniform ``noise`` in (eps, 1-eps), both [..., N].

    scale: of the logit of the noise; 0 leaves none. The distribution, and P(open) with it, is that of scale 1.
    """
    s = torch.sigmoid((scale * (torch.log(noise) - torch.log1p(-noise)) + clamp(log_alpha)) / BETA)
    return (s * (RIGHT - LEFT) + LEFT).clamp(0.0, 1.0)


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(gate > 0), [..., N]."""
    closed = torch.sigmoid(BETA * math.log(-LEFT / RIGHT) - clamp(log_alpha))
    return 1 - closed.clamp(EPSILON, 1 - EPSILON)


def deterministic(log_alpha: Tensor, open_units: int | None = None) -> Tensor:
    """Gates without noise: soft values with the smallest of each row set to exactly 0.

    Args:
        log_alpha: [..., N].
        open_units: how many stay open in each row; None: as many as the row expects to be open, rounded.
    """
    gates = torch.sigmoid(MAGIC * clamp(log_alpha) / BETA)
    size = log_alpha.shape[-1]
    if open_units is None:
        closed = size - probability_open(log_alpha).sum(-1, keepdim=True)
        number = torch.round(closed)
    else:
        number = torch.full_like(log_alpha[..., :1], size - open_units)
    # Rank by log alpha itself (the gate is monotone in it); stable, so that ties fall alike everywhere.
    order = torch.argsort(log_alpha, dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=order.device).expand_as(order))
    return torch.where(rank < number, torch.zeros_like(gates), gates)


def uniform_noise(shape: tuple[int, ...], *, seed: int, step: int, kind: str, like: Tensor) -> Tensor:
    """Noise that depends on (seed, step, kind) alone, so that ranks, microbatches and resumed runs share it."""
    digest = hashlib.sha256(f"{seed}/{step}/{kind}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:7], "little"))
    noise = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise * (1 - 2 * EPSILON) + EPSILON
