"""Our tensors in the form that a GGUF file has them, and back.

    ours                                                 file
    [in, out] of a Conv1D                                [out, in]
    q q k v q q k v      segments by group               q q q q k k v v
    w of a norm that multiplies by 1 + w                 1 + w
    x0 x1 .. | y0 y1 ..  the halves of a rotated head    x0 y0 x1 y1 ..
    [out, in] of each expert                             [expert, out, in]

Shape legend: G groups in which segments alternate; D elements of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmshearing.families.gguf import Layout
from llmshearing.families.table import Segments, Table, TensorSpec


@dataclass(frozen=True)
class Planned:
    """One tensor of the file. sources: names of ours, more than one for experts, which are stacked."""

    name: str
    sources: tuple[str, ...]
    row: TensorSpec
    layer: int | None
    shape: tuple[int, ...]
    """In the file, the outermost dimension first."""


def plan(table: Table, layout: Layout) -> list[Planned]:
    """The tensors of the file, in the order of the table."""
    groups: dict[str, list[tuple[str, TensorSpec, int | None]]] = {}
    for source, row, layer in table.instances():
        if row.alias is None or layout.head_apart:
            name = layout.name(row.name).format(layer=layer)
            groups.setdefault(name, []).append((source, row, layer))
    return [_planned(name, parts, table) for name, parts in groups.items()]


def _planned(name: str, parts: list[tuple[str, TensorSpec, int | None]], table: Table) -> Planned:
    _, row, layer = parts[0]
    shape = table.tensor_shape(row, layer)
    shape = shape[::-1] if row.module.form == "conv1d" else shape
    experts = (len(parts),) if row.expert is not None else ()
    return Planned(name, tuple(source for source, _, _ in parts), row, layer, (*experts, *shape))


def arranged(tensor: Tensor, row: TensorSpec, layer: int | None, table: Table, layout: Layout) -> Tensor:
    """One of our tensors (of one expert) as the file has it."""
    if row.module.form == "conv1d" and tensor.ndim == 2:
        tensor = tensor.T
    if order := _order(row, layer, table):
        tensor = tensor[torch.tensor(order)]
    if layout.rotated(row.name):
        halves = tensor.unflatten(0, (-1, 2, table.head_dim // 2))  # [heads, 2, D / 2, ...]
        tensor = halves.transpose(1, 2).flatten(0, 2)
    if offset := row.module.offset:
        tensor = tensor.float() + offset
    return tensor.contiguous()


def ours(tensor: Tensor, row: TensorSpec, layer: int | None, table: Table, layout: Layout) -> Tensor:
    """The inverse of :func:`arranged`."""
    if offset := row.module.offset:
        tensor = tensor - offset
    if layout.rotated(row.name):
        pairs = tensor.unflatten(0, (-1, table.head_dim // 2, 2))  # [heads, D / 2, 2, ...]
        tensor = pairs.transpose(1, 2).flatten(0, 2)
    if order := _order(row, layer, table):
        back = torch.empty_like(tensor)
        back[torch.tensor(order)] = tensor
        tensor = back
    if row.module.form == "conv1d" and tensor.ndim == 2:
        tensor = tensor.T
    return tensor.contiguous()


def _order(row: TensorSpec, layer: int | None, table: Table) -> list[int]:
    """Where the elements of one run of segments are in those that alternate by group; empty where none alternate."""
    dimension = row.axes[0]
    if not isinstance(dimension, Segments) or dimension.runs == 1:
        return []
    widths = [table.length(axis, layer) // dimension.runs for axis in dimension.axes]
    run = sum(widths)
    starts = [sum(widths[:at]) for at in range(len(widths))]
    return [
        group * run + start + at
        for start, width in zip(starts, widths, strict=True)
        for group in range(dimension.runs)
        for at in range(width)
    ]


def from_file(found: Mapping[str, Tensor], table: Table, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, of those of a file. Tied ones come once, under the name that the table has them by."""
    for planned in plan(table, layout):
        tensor = found[planned.name]
        parts = tensor.unbind(0) if planned.row.expert is not None else (tensor,)
        for source, part in zip(planned.sources, parts, strict=True):
            yield source, ours(part, planned.row, planned.layer, table, layout)


def elements(planned: Planned) -> int:
    """How many numbers it has."""
    return math.prod(planned.shape)
