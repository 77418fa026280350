"""Zero padding: layers of different sizes -> layers of one size that compute the same. Exact, but nothing is saved.

Every dimension of a tensor is [rows, units of a row, elements of a unit], and rows and units grow at their ends:

    intermediate   [1, f_l, 1]                       ->  [1, max f, 1]
    query          [groups_l, repeat_l, head_dim]    ->  [max groups, max repeat, head_dim]
    kv             [1, 1, groups_l head_dim]         ->  [1, 1, max groups head_dim]

Units that read zeros, or are multiplied by zeros, add nothing: such are the new inputs of the projections out of the
branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.nonuniform.table import config_with_sizes
from llmshearing.families.table import Dimension, Table

View = tuple[int, int, int]


def padded(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of the uniform model, in the sizes of the largest; unchanged where all layers agree."""
    small = _table(config)
    if not small.of_layer:
        return dict(weights), dict(config)
    wide = config_with_sizes(config, [_largest_shape(small)])
    large = _table(wide)
    result: dict[str, Tensor] = {}
    for name, spec, layer in small.instances():
        tensor = weights[name]
        large_spec = large.by_name[name][0]
        for dim in reversed(range(len(spec.axes))):
            tensor = _grown_dimension(tensor, dim, (small, spec.axes[dim]), (large, large_spec.axes[dim]), layer)
        result[name] = result[spec.alias] if spec.alias is not None else tensor
    return result, wide


def _table(config: Mapping[str, Any]) -> Table:
    """In the mode that tells the query heads of a KV group apart, so that none comes to read another group."""
    return table_for(config_of(config), "query")


def _largest_shape(table: Table) -> dict[str, int]:
    shape = {}
    for key, (axis, per) in table.config_axes.items():
        views = [_view(table, axis, layer) for layer in range(table.layers)]
        shape[key] = math.prod(map(max, *views)) // per
    return shape


def _view(table: Table, axis_name: str, layer: int | None) -> View:
    """The three parts of an axis in a layer."""
    here = table.at_layer(layer)
    axis = here.axes[axis_name]
    if axis.kind is None:
        return 1, 1, axis.length
    return here.kinds[axis.kind].rows or 1, here.kinds[axis.kind].size, axis.per_unit


def _grown_dimension(
    tensor: Tensor, dim: int, old: tuple[Table, Dimension], new: tuple[Table, Dimension], layer: int | None
) -> Tensor:
    """One dimension of a tensor, grown; segments are taken apart, grown, and put together again."""
    (small, dimension), (large, wide) = old, new
    if isinstance(dimension, str) or isinstance(wide, str):
        axis = str(dimension)
        return _grown(tensor, dim, _view(small, axis, layer), _view(large, axis, layer))
    sizes = [small.length(axis, layer) // dimension.runs for axis in dimension.axes]
    pieces = tensor.unflatten(dim, (dimension.runs, -1)).split(sizes, dim + 1)
    grown = [
        _grown_dimension(piece.flatten(dim, dim + 1), dim, (small, axis), (large, axis), layer)
        for piece, axis in zip(pieces, dimension.axes, strict=True)
    ]
    return torch.cat([piece.unflatten(dim, (wide.runs, -1)) for piece in grown], dim + 1).flatten(dim, dim + 1)


def _grown(tensor: Tensor, dim: int, old: View, new: View) -> Tensor:
    if old == new:
        return tensor
    full = tensor.new_zeros(*tensor.shape[:dim], *new, *tensor.shape[dim + 1 :])
    full[(slice(None),) * dim + tuple(map(slice, old))] = tensor.unflatten(dim, old)
    return full.flatten(dim, dim + 2)
