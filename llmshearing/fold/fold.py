"""The one fold: gates multiplied in, closed units cut out, layers and experts renumbered.

    selection + table --resolve-->  a Cut for every tensor  --gate_and_gather-->  the smaller tensor

:func:`gate_and_gather` is also what a gated module computes in its forward pass (`llmshearing.fold.gating`): the gated
model and the folded one are the same computation.

Shape legend: L layers; E experts; N units of a kind in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families import family_of
from llmshearing.families.names import BLOCKS
from llmshearing.families.nonuniform.table import config_with_sizes
from llmshearing.families.portable import portable
from llmshearing.families.table import EXPERT, Axis, Dimension, Segments, Table, TensorSpec, axes_of
from llmshearing.fold.gather import gate_and_gather_matrix
from llmshearing.fold.selection import Selection, Units, check_selection


@dataclass(frozen=True)
class Part:
    """What of one dimension stays: elements ``index`` (None: all) times ``gate`` (None: 1), ``padding`` of them 0."""

    index: Tensor | None = None
    gate: Tensor | None = None
    padding: int = 0

    def ungated(self) -> Part:
        """The same elements, as they are."""
        return Part(self.index, None, self.padding)


WHOLE = Part()


@dataclass(frozen=True)
class Cut:
    """What stays of one tensor.

    parts: a :class:`Part` a dimension. scale: gates of the branch and of the expert that it belongs to (a scalar; None:
    1). offset: what its module adds before it multiplies, so that gates act on the sum. stack: for a tensor of stacked
    experts, the kept experts and the cut of each one's matrix; ``parts`` is then empty.
    """

    parts: tuple[Part, ...]
    scale: Tensor | float | None = None
    offset: float = 0.0
    stack: tuple[tuple[int, Cut], ...] = ()


# What stays of a dimension -----------------------------------------------------------------------------------------


def _axis_units(table: Table, axis: Axis, layer: int | None, selection: Selection) -> Units | None:
    """The units that stay on an axis in a layer; None: all."""
    if axis.kind is None or axis.kind not in selection.units:
        return None
    per_row = selection.units[axis.kind]
    return per_row[0] if table.kinds[axis.kind].rows is None else per_row[layer]  # type: ignore[index]


def length(table: Table, axis_name: str, layer: int | None, selection: Selection) -> int:
    """Number of elements of an axis that stay in a layer (of one expert, where it is an axis of experts)."""
    axis = table.at_layer(layer).axes[axis_name]
    units = _axis_units(table, axis, layer, selection)
    if units is None:
        return axis.length
    rows = table.kinds[axis.kind].rows or 1 if axis.of_expert else 1  # type: ignore[index]
    return len(units.index) // rows * axis.per_unit


def part_of(
    table: Table, dimension: Dimension, layer: int | None, selection: Selection, expert: int | None = None
) -> Part:
    """What of a dimension stays in a layer, with the gates of all its units."""
    if isinstance(dimension, Segments):
        parts = [part_of(table, axis, layer, selection, expert) for axis in dimension.axes]
        return _interleaved(table, dimension, layer, parts)
    here = table.at_layer(layer)
    axis = here.axes[dimension]
    units = _axis_units(table, axis, layer, selection)
    if units is None:
        return WHOLE
    if axis.of_expert and expert is not None:
        units = _of_expert(units, expert, here.kinds[axis.kind].rows or 1, here.kinds[axis.kind].size)  # type: ignore[index]
    if axis.per_unit == 1:
        return Part(units.index, units.gate, units.padding)
    offsets = torch.arange(axis.per_unit, device=units.index.device)
    index = (units.index[:, None] * axis.per_unit + offsets).flatten()
    gate = None if units.gate is None else units.gate.repeat_interleave(axis.per_unit)
    return Part(index, gate, units.padding * axis.per_unit)


def _of_expert(units: Units, expert: int, rows: int, size: int) -> Units:
    """The units of one expert, numbered within it. Every expert has equally many."""
    number = len(units.index) // rows
    own = slice(expert * number, (expert + 1) * number)
    return Units(units.index[own] - expert * size, None if units.gate is None else units.gate[own])


def _interleaved(table: Table, dimension: Segments, layer: int | None, parts: list[Part]) -> Part:
    """What of segments stays: each segment's elements at their places in the whole dimension, in order."""
    if all(part.index is None for part in parts):
        return WHOLE
    sizes = [table.length(axis, layer) // dimension.runs for axis in dimension.axes]  # elements of each in one run
    device = next(part.index.device for part in parts if part.index is not None)
    places, gates, start = [], [], 0
    for part, size in zip(parts, sizes, strict=True):
        index = torch.arange(size * dimension.runs, device=device) if part.index is None else part.index
        places.append(index // size * sum(sizes) + start + index % size)
        gates.append(part.gate)
        start += size
    place, order = torch.cat(places).sort()
    if all(gate is None for gate in gates):
        return Part(place)
    dtype = next(gate.dtype for gate in gates if gate is not None)
    known = [
        torch.ones(len(at), dtype=dtype, device=device) if gate is None else gate
        for at, gate in zip(places, gates, strict=True)
    ]
    return Part(place, torch.cat(known)[order])


# What stays of a tensor --------------------------------------------------------------------------------------------


def resolve(table: Table, selection: Selection, *, folding: bool = False) -> dict[str, Cut]:
    """tensor name -> its :class:`Cut`, with gates only where the row multiplies them in; none of what is closed.

    folding: also what makes up for modules that look at the hidden size of their config. A gated model's config is
    the source's.
    """
    resolver = _Resolver(table, selection, folding)
    cuts = {name: resolver.cut(spec, layer) for name, spec, layer in table.instances() if resolver.stays(spec, layer)}
    return cuts


class _Resolver:
    """Looks each dimension up once for all tensors that lie on it."""

    def __init__(self, table: Table, selection: Selection, folding: bool) -> None:
        self.table, self.selection = table, selection
        self.scales = {block: gate.unbind() for block, gate in selection.blocks.items()}
        self.parts: dict[tuple[Dimension, int | None, int | None], Part] = {}
        hidden = table.axes["hidden"].length if folding and "hidden" in table.axes else 0
        self.shrunk = hidden / max(1, length(table, "hidden", None, selection)) if hidden else 1.0

    def stays(self, spec: TensorSpec, layer: int | None) -> bool:
        if layer is not None and not self.selection.layer_is_open(layer):
            return False
        return spec.expert is None or spec.expert in kept_experts(self.table, layer, self.selection)

    def cut(self, spec: TensorSpec, layer: int | None) -> Cut:
        if spec.stacked:
            experts = kept_experts(self.table, layer, self.selection)
            return Cut((), stack=tuple((expert, self._matrix(spec, layer, expert)) for expert in experts))
        return self._matrix(spec, layer, spec.expert)

    def _matrix(self, spec: TensorSpec, layer: int | None, expert: int | None) -> Cut:
        parts = []
        for dimension in spec.matrix:
            part = self._part(dimension, layer, expert)
            gated = any(axis in spec.gates for axis in axes_of(dimension))
            parts.append(part if gated else part.ungated())
        return Cut(tuple(parts), self._scale(spec, layer, expert), spec.module.offset)

    def _part(self, dimension: Dimension, layer: int | None, expert: int | None) -> Part:
        axes = [self.table.axes[axis] for axis in axes_of(dimension)]
        shared = all(axis.kind is None or self.table.kinds[axis.kind].rows is None for axis in axes)
        own = expert if any(axis.of_expert for axis in axes) else None
        key = dimension, None if shared and not self.table.of_layer else layer, own
        if key not in self.parts:
            self.parts[key] = part_of(self.table, dimension, layer, self.selection, expert)
        return self.parts[key]

    def _scale(self, spec: TensorSpec, layer: int | None, expert: int | None) -> Tensor | float | None:
        scale: Tensor | float | None = None
        if spec.scaled and spec.block in self.scales:
            scale = self.scales[spec.block][layer]  # type: ignore[index]
        if EXPERT in spec.gates and expert is not None and EXPERT in self.selection.units:
            units = self.selection.units[EXPERT][layer]  # type: ignore[index]
            if units.gate is not None:
                gate = units.gate[units.numbers.index(expert)]
                scale = gate if scale is None else scale * gate
        if (counted := self._energy(spec, layer)) is not None:
            scale = counted if scale is None else scale * counted
        if spec.rescale and self.shrunk != 1.0:
            factor = self.shrunk**spec.rescale
            scale = factor if scale is None else scale * factor
        return scale

    def _energy(self, spec: TensorSpec, layer: int | None) -> Tensor | None:
        """What makes a norm count the energy that is left instead of the units: sqrt(n / |S|), n = d sum_S e_i.

        The module divides by the root of sum_S x^2 / |S|. Times this, that is the root of sum_S x^2 / n.
        """
        if not self.selection.energy or "hidden" not in self.selection.units:
            return None
        name = spec.name.format(layer=layer, expert=spec.expert)
        if name not in self.selection.energy:
            return None
        shares, units = self.selection.energy[name], self.selection.units["hidden"][0]
        left = shares.to(units.index.device).index_select(0, units.index)
        if units.padding and units.gate is not None:
            left = left * (units.gate != 0)
        number = max(1, len(units.index) - units.padding)
        return (left.sum() * (len(shares) / number)).sqrt()


def kept_experts(table: Table, layer: int | None, selection: Selection) -> tuple[int, ...]:
    """Numbers of the experts that stay in a layer."""
    if EXPERT in selection.units:
        return selection.units[EXPERT][layer].numbers  # type: ignore[index]
    return tuple(range(table.kinds[EXPERT].size)) if EXPERT in table.kinds else ()


# One tensor --------------------------------------------------------------------------------------------------------


def gate_and_gather(weight: Tensor, cut: Cut, dtype: torch.dtype | None = None) -> Tensor:
    """Cut one tensor and multiply its gates in, differentiably.

    Args:
        weight: a vector, a matrix, or stacked matrices where ``cut`` says so. dtype: of the result; None: the weight's.

    Returns:
        The smaller tensor; gradients reach the kept elements of ``weight`` (the others get zeros) and the gates.

    Raises:
        ShearingError: the cut is of a tensor with another number of dimensions.
    """
    if cut.stack:
        return torch.stack([gate_and_gather(weight[expert], own, dtype) for expert, own in cut.stack])
    if weight.dim() != len(cut.parts) or weight.dim() not in (1, 2):
        raise ShearingError(f"a tensor of {weight.dim()} dimensions met a cut of {len(cut.parts)}")
    out = _gathered(weight if weight.dim() == 2 else weight[None], cut, dtype or weight.dtype)
    out = out if weight.dim() == 2 else out[0]
    return _with_offset(out, cut) if cut.offset else out


def gather_columns(values: Tensor, cut: Cut) -> Tensor:
    """What of values [..., n] in the last dimension of a tensor stays, with its gates: [..., kept].

    Raises:
        ShearingError: an offset or stacked experts, which values have none of.
    """
    if cut.offset or cut.stack:
        raise ShearingError("values behind a table of embeddings have neither an offset nor experts")
    rows = _gathered(values.flatten(0, -2), Cut((WHOLE, cut.parts[-1]), cut.scale), values.dtype)
    return rows.unflatten(0, values.shape[:-1])


def _gathered(matrix: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    sizes = matrix.shape[-len(cut.parts) :]
    operands = [_operands(part, size, matrix.dtype) for part, size in zip(cut.parts, sizes, strict=True)]
    row_index, row_gate = operands[0] if len(operands) == 2 else (None, None)
    column_index, column_gate = operands[-1]
    if isinstance(cut.scale, Tensor):
        column_gate = _scaled(column_gate, cut.scale.to(matrix.dtype), column_index, matrix.shape[-1])
    out = gate_and_gather_matrix(matrix, row_index, row_gate, column_index, column_gate, dtype)
    return out * cut.scale if isinstance(cut.scale, float) else out


def _with_offset(out: Tensor, cut: Cut) -> Tensor:
    """gate * weight -> gate * (weight + offset) - offset: the gate acts on what the module multiplies by."""
    gate, scale = cut.parts[0].gate, cut.scale
    if gate is None and scale is None:
        return out
    factor = scale if gate is None else gate if scale is None else gate * scale
    return out + (torch.as_tensor(factor, dtype=out.dtype, device=out.device) - 1) * cut.offset


def _operands(part: Part, size: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Index and gate of a dimension; None where all stays, and where all gates are 1."""
    whole = part.index is None or len(part.index) == size
    return None if whole else part.index, None if part.gate is None else part.gate.to(dtype)


def _scaled(gate: Tensor | None, scale: Tensor, index: Tensor | None, size: int) -> Tensor:
    """The gates of a dimension, times a scalar."""
    return gate * scale if gate is not None else scale.expand(size if index is None else len(index))


# A whole model -----------------------------------------------------------------------------------------------------


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
    cuts = resolve(table, selection, folding=True)
    aliased = {spec.alias for spec in table.tensors if spec.alias}
    made: dict[str, Tensor] = {}

    def make(name: str, spec: TensorSpec) -> Tensor:
        if spec.alias is not None:
            return made[spec.alias]
        tensor = gate_and_gather(weights[name], cuts[name])
        if name in aliased:
            made[name] = tensor
        return tensor

    for name, new_name, spec, _ in renamed(table, selection):
        yield new_name, partial(make, name, spec)


def renamed(table: Table, selection: Selection) -> Iterator[tuple[str, str, TensorSpec, int | None]]:
    """(name in the source, name in the folded model, row, source layer) of every tensor that stays.

    Tied tensors come last, after the tensor that they are.
    """
    new_number = {layer: new for new, layer in enumerate(selection.kept_layers(table.layers))}
    for name, spec, layer in sorted(table.instances(), key=lambda item: item[1].alias is not None):
        if layer is not None and layer not in new_number:
            continue
        experts = kept_experts(table, layer, selection) if spec.expert is not None else ()
        if spec.expert is not None and spec.expert not in experts:
            continue
        numbers = {
            "layer": None if layer is None else new_number[layer],
            "expert": None if spec.expert is None else experts.index(spec.expert),
        }
        yield name, spec.name.format(**numbers), spec, layer


def check_foldable(table: Table, selection: Selection) -> None:
    """Refuse selections that close one block of a layer and keep the other, or keep no layer or no hidden unit."""
    for kind, rows in selection.units.items():
        if table.kinds[kind].rows is None and not len(rows[0].index):
            raise ShearingError(f"{kind}: no unit stays, and a model needs one at least")
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
        ShearingError: kept layers differ in the size of an axis (the layers and sizes are named), or the family has no
            model of this shape.
    """
    sizes = folded_sizes(table, selection)
    problems = []
    for key in table.config_axes:
        if len({size[key] for size in sizes.values()}) > 1:
            listed = ", ".join(f"layer {layer}: {size[key]}" for layer, size in sizes.items())
            problems.append(f"{key} differs between layers ({listed})")
    if problems:
        raise ShearingError("a uniform model needs one size for all layers: " + "; ".join(problems))
    layer, own = next(iter(sizes.items()))
    shape = {**own, table.layers_key: len(selection.kept_layers(table.layers))}
    if problems := table.at_layer(layer).shape_problems(shape):
        raise ShearingError("\n".join(problems))
    return shape


def folded_sizes(table: Table, selection: Selection) -> dict[int, dict[str, int]]:
    """Kept layer -> its shape after folding, in the config's keys (of layer 0 where none is kept)."""
    return {
        layer: {
            key: length(table, axis, layer, selection) // per for key, (axis, per) in table.config_axes.items()
        }
        for layer in selection.kept_layers(table.layers) or [0]
    }  # fmt: skip


def config_of_shape(config: Mapping[str, Any], table: Table, shape: Mapping[str, int]) -> dict[str, Any]:
    """A config of another shape (in its own keys), with as many layers as that says, whichever they are."""
    kept = list(range(shape[table.layers_key]))
    values = {**config, **family_of(table.family).kept_config(config, kept), **_head_dim(table), **shape}
    return table.with_mirrors(values)


def _head_dim(table: Table) -> dict[str, int]:
    """The width of a head, written out: no longer hidden / heads."""
    return {table.head_dim_key: table.head_dim} if table.head_dim_key else {}


def folded_config(config: Mapping[str, Any], table: Table, selection: Selection) -> dict[str, Any]:
    """The folded model's config, of the source's: its shape, head_dim (never cut), and what describes the kept layers.

    Layers that differ in size make it a non-uniform one (`llmshearing.families.nonuniform`); layers that agree, a
    plain one.

    Raises:
        ShearingError: the family has no model of this shape.
    """
    by_layer, kept = folded_sizes(table, selection), selection.kept_layers(table.layers)
    sizes, layers = list(by_layer.values()), {table.layers_key: len(kept)}
    problems = {
        say: None for layer, own in by_layer.items() for say in table.at_layer(layer).shape_problems({**own, **layers})
    }
    if problems:
        raise ShearingError("\n".join(problems))
    config = portable(config)
    values = {**config, **family_of(table.family).kept_config(config, kept), **_head_dim(table)}
    values = config_with_sizes(values, sizes)
    return table.with_mirrors(values)
