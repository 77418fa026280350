"""The linear algebra of optimal brain surgery on the columns of a linear layer. Pure functions of tensors.

A layer computes W x. H = 2 X X^T over the calibration inputs. Remove the set S of columns, and move the others to
where the squared error |W X - W' X|^2 is least. Then (Hassibi & Stork 1993; SlimGPT, arXiv 2412.18110)

    score(S) = tr(W_S (H^-1_SS)^-1 W_S^T)                      twice the squared error
    W'       = W - W_S (H^-1_SS)^-1 H^-1_S:
    H'^-1    = H^-1 - H^-1_:S (H^-1_SS)^-1 H^-1_S:             the inverse of H without S, by block elimination

The last line is the inverse of the smaller H. So nothing is inverted again, and a round costs n^2 |S|, not n^3.

Shape legend: o outputs; n columns (inputs) that are left; u units of w columns each, n = u w; s removed columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmshearing.errors import ShearingError

# A group takes this share of what is still to be removed: the more is gone, the finer the steps.
SHARE = 1 / 8
# If a pivot is not above this many roundings of its diagonal, the column depends on the others.
SINGULAR = 8


def damped_inverse(hessian: Tensor, percdamp: float) -> Tensor:
    """Inverse [n, n] of H with ``percdamp`` of the mean of its diagonal added to the diagonal.

    Inputs that are always 0 get next to nothing instead, so that removing their columns costs next to nothing.

    Raises:
        ShearingError: H has values that are not finite, or is singular (inputs that depend on one another).
    """
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all():
        raise ShearingError("the Hessian has values that are not finite: the calibration inputs overflow")
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    rounding = torch.finfo(hessian.dtype).eps
    damped = hessian + torch.diag(mean * torch.where(dead, rounding, percdamp))
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    if failed or (pivots <= SINGULAR * rounding * damped.diagonal()).any():
        raise ShearingError(
            f"the Hessian is singular: of {len(hessian)} inputs, some depend on the others ({int(dead.sum())} are "
            f"always 0, which does no harm); give more calibration text, or raise percdamp ({percdamp})"
        )
    return torch.cholesky_inverse(factor)


def unit_scores(weight: Tensor, inverse: Tensor, width: int = 1) -> Tensor:
    """score(S) [u] of every unit of ``width`` columns, each taken alone. weight: [o, n]; inverse: [n, n]."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [u, w, w]
    columns = weight.t().reshape(units, width, -1)  # [u, w, o]
    return torch.linalg.solve_triangular(_cholesky(blocks), columns, upper=False).square().sum((1, 2))


def eliminate(weight: Tensor, inverse: Tensor, removed: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """W' [o, n - s] and H'^-1 [n - s, n - s] of the columns ``kept``, after removal of the columns ``removed``."""
    rows = inverse.index_select(0, removed)  # [s, n]
    factor = _cholesky(rows.index_select(1, removed))
    across = torch.linalg.solve_triangular(factor, rows.index_select(1, kept), upper=False)  # [s, n - s]
    moved = torch.linalg.solve_triangular(factor, weight.index_select(1, removed).t(), upper=False)  # [s, o]
    weight = weight.index_select(1, kept).addmm_(moved.t(), across, alpha=-1)
    inverse = inverse.index_select(0, kept).index_select(1, kept).addmm_(across.t(), across, alpha=-1)
    return weight, inverse


def _cholesky(blocks: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(blocks)
    if failed.any():
        raise ShearingError("the inverse Hessian lost its positive diagonal by rounding; raise percdamp")
    return factor


def shrinking_groups(remove: int, largest: int, smallest: int) -> Iterator[int]:
    """Sizes of groups that add up to ``remove``, from coarse to fine."""
    while remove > 0:
        size = min(remove, largest, max(smallest, math.ceil(remove * SHARE)))
        yield size
        remove -= size


def remove_units(
    weight: Tensor, inverse: Tensor, remove: int, *, width: int = 1, rows: int = 1, largest: int = 1, smallest: int = 1
) -> tuple[Tensor, Tensor]:
    """Remove the units whose removal costs least, in groups, and move the weights that stay.

    Args:
        weight: [o, n]. inverse: [n, n], inverse Hessian of its inputs. remove: units to remove of every row.
        width: columns of a unit. rows: equal runs of units that each lose as many (KV groups).
        largest, smallest: sizes of the groups of units that go at once; both 1: one at a time.

    Returns:
        kept units, int64, ascending; the new weight [o, n], 0 in the removed columns.
    """
    device = weight.device
    units = torch.arange(weight.shape[1] // width, device=device)
    per_row, left, new = len(units) // rows, [remove] * rows, weight
    for size in shrinking_groups(remove * rows, largest, smallest):
        order = unit_scores(new, inverse, width).argsort(stable=True)
        chosen = _first_allowed(order.tolist(), (units // per_row).tolist(), left, size)
        keep = torch.ones(len(units), dtype=torch.bool)
        keep[chosen] = False
        columns = keep.repeat_interleave(width).to(device)
        new, inverse = eliminate(new, inverse, (~columns).nonzero().flatten(), columns.nonzero().flatten())
        units = units[keep.to(device)]
    full = torch.zeros_like(weight)
    full[:, (units[:, None] * width + torch.arange(width, device=device)).flatten()] = new
    return units, full


def _first_allowed(order: list[int], row_of: list[int], left: list[int], size: int) -> list[int]:
    """The first ``size`` units in order of score whose rows may still lose some; lowers ``left``."""
    chosen = []
    for unit in order:
        if left[row_of[unit]]:
            left[row_of[unit]] -= 1
            chosen.append(unit)
            if len(chosen) == size:
                break
    return chosen
