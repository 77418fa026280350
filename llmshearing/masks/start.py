"""An informed start of the masks: log alpha from what a one-shot pruner chose.

    r = rank in its row, 0 to N - 1: closed units below kept ones, then by score
    z = (r - (N - n) + 1/2) / N                           n units are kept; below 0: closed
    log_alpha = clamp(spread max z / max|z|)              max: the upper end of log alpha's range

Without scores nothing is known but kept or closed: log_alpha = +-(spread max / 2), which is the mean size of the above.
Then every row is shifted so that it expects exactly n units to be open (`masks.exact`).

Shape legend: L layers; a row of a kind has N units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.names import BLOCK_MASKS
from llmshearing.fold.selection import Selection, check_selection
from llmshearing.masks.exact import shifted
from llmshearing.masks.hard_concrete import LOG_ALPHA_MAX, clamp
from llmshearing.masks.l0 import L0Masks

INFLUENCE = "block_influence"
"""Where methods that choose width before depth tell the layers' scores."""


def ranked(kept: Tensor, score: Tensor, spread: float) -> Tensor:
    """Log alpha from ranks. kept: bool [..., N]; score: [..., N], higher is better. float64 [..., N]."""
    size = kept.shape[-1]
    order = score.argsort(dim=-1, stable=True)
    order = order.gather(-1, kept.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    places = torch.arange(size, device=order.device, dtype=torch.float64).expand_as(order)
    rank = torch.empty_like(places).scatter_(-1, order, places)
    z = (rank - (size - kept.sum(-1, keepdim=True)) + 0.5) / size
    return clamp(spread * LOG_ALPHA_MAX * z / z.abs().amax(-1, keepdim=True))


def decided(kept: Tensor, spread: float) -> Tensor:
    """Log alpha where only kept or closed is known. kept: bool [..., N]. float64 [..., N]."""
    return clamp((kept.double() * 2 - 1) * spread * LOG_ALPHA_MAX / 2)


@torch.no_grad()
def inform(masks: L0Masks, selection: Selection, about: Mapping[str, Any], spread: float = 2.0) -> None:
    """Set log alpha by a selection, and by the scores it was made by where ``about`` tells them.

    Raises:
        ShearingError: the selection is not one of the masks' model, cuts what no mask can, or keeps other numbers than
            the target (each kind is named).
    """
    check_selection(masks.table, selection)
    kept = {kind: kept_units(masks, selection, kind) for kind in masks.kinds}
    if problems := [*_uncovered(masks, selection), *_miscounted(masks, kept)]:
        raise ShearingError("\n".join(problems))
    for kind, is_kept in kept.items():
        score = scores_of(masks, about, kind)
        start = decided(is_kept, spread) if score is None else ranked(is_kept, score, spread)
        start = shifted(start, is_kept.sum(-1, keepdim=True))
        masks.log_alpha[kind].copy_(start.reshape(masks.shapes[kind]))


def kept_units(masks: L0Masks, selection: Selection, kind: str) -> Tensor:
    """Which units of a mask kind a selection keeps: bool [..., N], row by row."""
    layers = masks.table.layers
    if kind in BLOCK_MASKS:
        open_layers = [any(selection.is_open(block, i) for block in BLOCK_MASKS[kind]) for i in range(layers)]
        return masks.rows(kind, torch.tensor(open_layers))
    kept = torch.ones(masks.shapes[kind], dtype=torch.bool)
    if kind not in selection.units:  # it stays whole
        return masks.rows(kind, kept)
    for row, units in zip(kept.view(-1, kept.shape[-1]), selection.units[kind], strict=True):
        is_open = units.index if units.gate is None else units.index[units.gate != 0]
        row.zero_()
        row[is_open.cpu()] = True
    return masks.rows(kind, kept)


def scores_of(masks: L0Masks, about: Mapping[str, Any], kind: str) -> Tensor | None:
    """A kind's scores as a pruner tells them, float64 [..., N]; None where it tells none that fit."""
    told = about.get("scores")
    told = told.get(kind) if isinstance(told, Mapping) else None
    if told is None and kind in BLOCK_MASKS:
        told = about.get(INFLUENCE)
    try:
        score = torch.tensor(told, dtype=torch.float64).reshape(masks.shapes[kind])
    except (TypeError, ValueError, RuntimeError):
        return None
    return masks.rows(kind, score) if score.isfinite().all() else None


def _uncovered(masks: L0Masks, selection: Selection) -> list[str]:
    """Kinds and layers that the selection cuts and no mask could."""
    others = {kind: rows for kind, rows in selection.units.items() if kind not in masks.kinds}
    whole = {kind: masks.table.kinds[kind].size * (masks.table.kinds[kind].rows or 1) for kind in others}
    cut = [kind for kind, rows in others.items() if any(len(units.index) < whole[kind] for units in rows)]
    gated = {block for kind in masks.kinds for block in BLOCK_MASKS.get(kind, ())}
    open_by_block = selection.block_open.items()
    cut += [f"{block} of layers" for block, is_open in open_by_block if block not in gated and not all(is_open)]
    return [f"it cuts {', '.join(cut)}, of which there is no mask (pruning_modules)"] if cut else []


def _miscounted(masks: L0Masks, kept: Mapping[str, Tensor]) -> list[str]:
    """Kinds of which not every row keeps as many units as the target."""
    problems = []
    for kind, target in (masks.target or {}).items():
        counts = sorted(set(kept[kind].sum(-1).flatten().tolist()))
        if counts != [target]:
            found = ", ".join(map(str, counts))
            problems.append(f"{kind}: it keeps {found} of {masks.row_size(kind)}, the target is {target}")
    return problems
