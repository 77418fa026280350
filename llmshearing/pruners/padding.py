"""Selections of different sizes by layer -> one size, by closed units: exact in a uniform model, but nothing is saved.

A closed unit that stays has gate 0, so the fold writes zeros where it would be read from.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmshearing.axes import Kind, Selection, Table, Units


def padded(table: Table, selection: Selection) -> Selection:
    """Give every kept layer the size of the largest, kind by kind. Unchanged where the sizes agree."""
    kept = selection.kept_layers(table.layers)
    units = dict(selection.units)
    for name, rows in selection.units.items():
        kind = table.kinds[name]
        if kind.rows is not None and kept:
            width = max(len(rows[layer].index) for layer in kept) // kind.rows
            units[name] = tuple(_widened(row, kind, width) for row in rows)
    return replace(selection, units=units)


def _widened(row: Units, kind: Kind, width: int) -> Units:
    """At least ``width`` units in each group of a row: open ones, and the first of the closed ones with gate 0."""
    groups = kind.rows or 1
    if len(row.index) >= width * groups:
        return row
    ones = torch.ones(len(row.index), device=row.index.device)
    gate = row.gate if row.gate is not None else ones
    full = torch.zeros(groups * kind.size, dtype=gate.dtype, device=gate.device).scatter(0, row.index, gate)
    closed = torch.ones_like(full).scatter(0, row.index, 0.0).view(groups, -1)
    order = closed.argsort(dim=-1, stable=True)[:, :width].sort(-1).values
    index = (order + torch.arange(groups, device=order.device)[:, None] * kind.size).flatten()
    return Units(index, full[index])
