"""The exact constraint: shift a row of log alpha until it expects exactly as many open units as are asked for.

    find t:   sum over the row of P(open | clamp(log_alpha + t)) = open units asked for
    then      log_alpha <- clamp(log_alpha + t)

The sum rises with t, so that there is one answer: Newton's method within a bracket, a bisection where it would leave
it. A fixed number of steps and no look at the values: nothing is transferred from the device.

A row of N units can expect from N P(open | lowest log alpha) to N P(open | highest) open ones, 0.047 N to 0.998 N.

    all N asked for      every unit at the upper end, which is as near as it gets
    out of reach         the units expected of a row that has made up its mind: n P(highest) + (N - n) P(lowest). A row
                         pressed against one end would forget its order, and with it the choice

Shape legend: any leading dimensions; the last one, N, is a row of units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmshearing.masks.hard_concrete import BETA, LEFT, LOG_ALPHA_MAX, LOG_ALPHA_MIN, RIGHT, clamp, probability_open

STEPS = 32
"""Evaluations of the sum. Newton needs about 8; the rest is for rows on which it has to bisect."""


# P(open) at the ends of log alpha's range
LOWEST, HIGHEST = (1 / (1 + math.exp(BETA * math.log(-LEFT / RIGHT) - end)) for end in (LOG_ALPHA_MIN, LOG_ALPHA_MAX))


def reachable(open_units: Tensor, size: int) -> Tensor:
    """What is aimed at for a number of open units in a row of ``size``; see the module's head."""
    decided = open_units * HIGHEST + (size - open_units) * LOWEST
    beyond = (open_units < size * LOWEST) | (open_units > size * HIGHEST)
    return torch.where(beyond, decided, open_units)


@torch.no_grad()
def shifted(log_alpha: Tensor, open_units: Tensor | float) -> Tensor:
    """Log alpha [..., N] shifted so that every row expects ``open_units`` ([..., 1] or a number) to be open.

    Order within a row stays; units that meet an end of the range become equal there. Computed in float64, returned in
    the dtype of ``log_alpha``.
    """
    rows = clamp(log_alpha.double())
    asked = torch.zeros_like(rows[..., :1]) + open_units
    wanted = reachable(asked, rows.shape[-1])
    whole = LOG_ALPHA_MAX - LOG_ALPHA_MIN
    low = torch.full_like(wanted, -whole)
    high, shift = -low, torch.zeros_like(low)
    for _ in range(STEPS):
        moved = rows + shift
        open_now = probability_open(moved)
        # d P(open) / d log alpha = P (1 - P), and 0 beyond the ends
        inside = (moved > LOG_ALPHA_MIN) & (moved < LOG_ALPHA_MAX)
        slope = (open_now * (1 - open_now) * inside).sum(-1, keepdim=True)
        excess = open_now.sum(-1, keepdim=True) - wanted
        high, low = torch.where(excess >= 0, shift, high), torch.where(excess <= 0, shift, low)
        newton = shift - excess / slope
        # not a number where nothing moves: such a comparison is false
        fits = (newton >= low) & (newton <= high)
        shift = torch.where(fits, newton, (low + high) / 2)
    moved = torch.where(asked >= rows.shape[-1], LOG_ALPHA_MAX, rows + shift)
    return clamp(moved).to(log_alpha.dtype)
