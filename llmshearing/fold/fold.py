"""The one fold: gates multiplied in, closed units cut out, layers renumbered.

:func:`gate_and_gather` does so for one tensor, differentiably, and is also what a gated module computes in its forward
pass. Which units stay on which dimension of a tensor is computed from the table (:func:`resolve`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.nonuniform.config import config_with_sizes
from llmshearing.families.table import BLOCKS, Axis, Table, TensorSpec
from llmshearing.fold.gather import gate_and_gather_matrix
from llmshearing.fold.selection import Selection, Units, check_selection

# Keys of a config that hold a list with an entry per layer.
PER_LAYER_KEYS = ("layer_types",)


@dataclass(frozen=True)
class Part:
    """What of one dimension stays: elements ``index`` (None: all) times ``gate`` (None: 1), ``padding`` of them 0."""

    index: Tensor | None = None
    gate: Tensor | None = None
    padding: int = 0


WHOLE = Part()


@dataclass(frozen=True)
class Cut:
    """What stays of one tensor: a :class:`Part` a dimension, and its block's gate (a scalar; None: 1)."""

    parts: tuple[Part, ...]
    scale: Tensor | None = None


def _axis_units(table: Table, axis: Axis, layer: int | None, selection: Selection) -> Units | None:
    """The units that stay on an axis in a layer; None: all."""
    if axis.kind is None or axis.kind not in selection.units:
        return None
    per_row = selection.units[axis.kind]
    return per_row[0] if table.kinds[axis.kind].rows is None else per_row[layer]  # type: ignore[index]


def length(table: Table, axis_name: str, layer: int | None, selection: Selection) -> int:
    """Number of elements of an axis that stay in a layer."""
    axis = table.at_layer(layer).axes[axis_name]
    units = _axis_units(table, axis, layer, selection)
    return axis.length if units is None else len(units.index) * axis.per_unit


def part_of(table: Table, axis_name: str, layer: int | None, selection: Selection) -> Part:
    """What of an axis stays in a layer."""
    axis = table.at_layer(layer).axes[axis_name]
    units = _axis_units(table, axis, layer, selection)
    if units is None:
        return WHOLE
    if axis.per_unit == 1:
        return Part(units.index, units.gate, units.padding)
    offsets = torch.arange(axis.per_unit, device=units.index.device)
    index = (units.index[:, None] * axis.per_unit + offsets).flatten()
    gate = None if units.gate is None else units.gate.repeat_interleave(axis.per_unit)
    return Part(index, gate, units.padding * axis.per_unit)


def resolve(table: Table, selection: Selection) -> dict[str, Cut]:
    """tensor name -> its :class:`Cut`, with gates only where the row multiplies them in; none in closed layers."""
    memo: dict[tuple[str, int | None], Part] = {}
    scales = {block: gate.unbind() for block, gate in selection.blocks.items()}
    cuts = {}
    for name, spec, layer in table.instances():
        if layer is not None and not selection.layer_is_open(layer):
            continue
        parts = []
        for axis in spec.axes:
            kind = table.kinds.get(table.axes[axis].kind or "")
            key = (axis, layer if kind is not None and kind.rows is not None else None)
            part = memo[key] if key in memo else memo.setdefault(key, part_of(table, axis, layer, selection))
            parts.append(part if axis in spec.gates else Part(part.index, padding=part.padding))
        scaled = spec.scaled and spec.block in scales
        cuts[name] = Cut(tuple(parts), scales[spec.block][layer] if scaled else None)  # type: ignore[index]
    return cuts


def gate_and_gather(weight: Tensor, cut: Cut, dtype: torch.dtype | None = None) -> Tensor:
    """Cut one tensor and multiply its gates in, differentiably.

    Args:
        weight: a vector or matrix; or, where ``cut`` has a single part, any tensor whose last dimension it describes.
        dtype: of the result; None: the weight's.
    Returns:
        The smaller tensor; gradients reach the kept elements of ``weight`` (the others get zeros) and the gates.
    """
    rows = weight if weight.dim() == len(cut.parts) else weight.flatten(0, -2)
    *row, column = [_operands(part, size, rows.dtype) for part, size in _sized(rows, cut)]
    row_index, row_gate = row[0] if row else (None, None)
    column_index, column_gate = column
    if cut.scale is not None:
        column_gate = _scaled(column_gate, cut.scale.to(rows.dtype), column_index, rows.shape[-1])
    matrix = rows if rows.dim() == 2 else rows[None]
    out = gate_and_gather_matrix(matrix, row_index, row_gate, column_index, column_gate, dtype or rows.dtype)
    if weight.dim() == 1:
        return out[0]
    return out if weight.dim() == len(cut.parts) else out.unflatten(0, weight.shape[:-1])


def _sized(rows: Tensor, cut: Cut) -> list[tuple[Part, int]]:
    return list(zip(cut.parts, rows.shape[rows.dim() - len(cut.parts) :], strict=True))


def _operands(part: Part, size: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Index and gate of a dimension; None where all stays, and where all gates are 1."""
    whole = part.index is None or len(part.index) == size
    return None if whole else part.index, None if part.gate is None else part.gate.to(dtype)


def _scaled(gate: Tensor | None, scale: Tensor, index: Tensor | None, size: int) -> Tensor:
    """The gates of a dimension, times a scalar."""
    return gate * scale if gate is not None else scale.expand(size if index is None else len(index))


def fold(
    weights: Mapping[str, Tensor], table: Table, selection: Selection, *, zero_closed_blocks: bool = False
) -> dict[str, Tensor]:
    """The compact model's state dict: gates multiplied in, closed units cut out, layers renumbered.

    Differentiable. Tied tensors stay one tensor. Arguments and errors as in :func:`fold_lazily`.
    """
    tensors = fold_lazily(weights, table, selection, zero_closed_blocks=zero_closed_blocks)
    return {name: make() for name, make in tensors}


def fold_lazily(
    weights: Mapping[str, Tensor], table: Table, selection: Selection, *, zero_closed_blocks: bool = False
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(new name, function that makes the tensor) for every tensor of the folded model, to be called in this order.

    Args:
        weights: the source's tensors; may load each on access.
        zero_closed_blocks: a closed block of a kept layer becomes zeros (exact, but saves nothing) instead of an error.

    Raises:
        ShearingError: the selection is of another model (:func:`check_selection`), or a kept layer has a closed block
            (the layer is named), which no uniform model can leave out.
    """
    check_selection(table, selection)
    if not zero_closed_blocks:
        check_foldable(table, selection)
    new_number = {layer: new for new, layer in enumerate(selection.kept_layers(table.layers))}
    cuts = resolve(table, selection)
    aliased = {spec.alias for spec in table.tensors if spec.alias}
    made: dict[str, Tensor] = {}

    def make(name: str, spec: TensorSpec) -> Tensor:
        if spec.alias is not None:
            return made[spec.alias]
        tensor = gate_and_gather(weights[name], cuts[name])
        if name in aliased:
            made[name] = tensor
        return tensor

    # Tied tensors come last, after the tensor that they are.
    for name, spec, layer in sorted(table.instances(), key=lambda item: item[1].alias is not None):
        if layer is None or layer in new_number:
            new_name = spec.name.format(layer=None if layer is None else new_number[layer])
            yield new_name, partial(make, name, spec)


def check_foldable(table: Table, selection: Selection) -> None:
    """Refuse selections that close one block of a layer and keep the other, or that keep no layer."""
    kept = selection.kept_layers(table.layers)
    problems = [] if kept else ["every layer is closed"]
    for layer in kept:
        closed = [block for block in BLOCKS if not selection.is_open(block, layer)]
        problems += [f"layer {layer}: its {block} block is closed and the other is kept" for block in closed]
    if problems:
        raise ShearingError(
            "; ".join(problems) + ". A uniform model needs both blocks of every kept layer: prune whole layers (mask "
            "kind 'layer'), choose the same layers for head_layer and mlp, or write closed blocks as zeros."
        )


def folded_shape(table: Table, selection: Selection) -> dict[str, int]:
    """Shape of the folded model in its config's keys.

    Raises:
        ShearingError: kept layers differ in the size of an axis (the layers and sizes are named).
    """
    sizes = folded_sizes(table, selection)
    problems = []
    for key in table.config_axes:
        if len({size[key] for size in sizes.values()}) > 1:
            listed = ", ".join(f"layer {layer}: {size[key]}" for layer, size in sizes.items())
            problems.append(f"{key} differs between layers ({listed})")
    if problems:
        raise ShearingError("a uniform model needs one size for all layers: " + "; ".join(problems))
    return {**next(iter(sizes.values())), table.layers_key: len(selection.kept_layers(table.layers))}


def folded_sizes(table: Table, selection: Selection) -> dict[int, dict[str, int]]:
    """Kept layer -> its shape after folding, in the config's keys (of layer 0 where none is kept)."""
    return {
        layer: {key: length(table, axis, layer, selection) // per for key, (axis, per) in table.config_axes.items()}
        for layer in selection.kept_layers(table.layers) or [0]
    }


def folded_config(config: Mapping[str, Any], table: Table, selection: Selection) -> dict[str, Any]:
    """The folded model's config, of the source's: its shape, head_dim (never cut), and the kept layers' entries.

    Layers that differ in size make it a non-uniform one (`llmshearing.families.nonuniform`); layers that agree, a
    plain one.
    """
    kept = selection.kept_layers(table.layers)
    head_dim = table.config_axes["num_attention_heads"][1]  # no longer hidden / heads: written out
    values = {**config, **kept_entries(config, kept), "head_dim": head_dim, table.layers_key: len(kept)}
    return config_with_sizes(values, list(folded_sizes(table, selection).values()))


def kept_entries(config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Those keys of a config that list something for each layer, for the kept layers."""
    return {key: [config[key][layer] for layer in kept] for key in PER_LAYER_KEYS if config.get(key)}
