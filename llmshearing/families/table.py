"""A model family as a table, a choice of units as a value, and the one fold. Family-blind.

A :class:`Table` has a row (:class:`TensorSpec`) per tensor of a `transformers` model. A row names the axis that each
dimension lies on, the axes whose gate is multiplied in, and the block (attention, MLP) the tensor belongs to:

    name                                      axes               gates             block
    model.embed_tokens.weight                 vocab  hidden      hidden            -
    model.layers.{layer}.self_attn.q_proj     query  hidden      -                 attention
    model.layers.{layer}.self_attn.o_proj     hidden query       hidden query      attention (scaled by its gate)

A pruner only chooses: a :class:`Selection` says for each kind of unit (and layer) which units stay and with what gate.
:func:`fold` multiplies the gates in, cuts the closed units out and renumbers the layers. :func:`gate_and_gather` does
so for one tensor, differentiably, and is also what a gated module computes in its forward pass.

Shape legend: L layers; N units of a kind in one row; a row is what shares one target (one layer, or one KV group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.gather import gate_and_gather_matrix

BLOCKS = ("attention", "mlp")


@dataclass(frozen=True)
class Kind:
    """A kind of unit that can be kept or cut, such as heads or hidden units.

    ``rows`` is None for units shared by all layers, else the number of rows per layer that each meet the target alone
    (1; or the KV groups, where query heads are cut inside each group). ``size``: units in one row.
    """

    name: str
    size: int
    rows: int | None

    def shape(self, layers: int) -> tuple[int, ...]:
        """Shape of a full vector of gates: [N], or [L, rows * N]."""
        return (self.size,) if self.rows is None else (layers, self.rows * self.size)


@dataclass(frozen=True)
class Axis:
    """A dimension shared by tensors: ``length`` elements, of which each unit of ``kind`` owns ``per_unit`` in a run.

    ``kind`` is None for an axis that is never cut.
    """

    length: int
    kind: str | None = None
    per_unit: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """One row of the table. ``name`` has ``{layer}`` where the tensor repeats per layer.

    gates: axes whose gate is multiplied in. block: the branch that it belongs to; ``scaled``: the block's own gate is
    multiplied in too. counted: part of the expected parameters. alias: the tensor that this one is (tied weights).
    """

    name: str
    axes: tuple[str, ...]
    gates: tuple[str, ...] = ()
    block: str | None = None
    scaled: bool = False
    counted: bool = False
    alias: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True)
class Units:
    """Kept units of one row of a kind: ``index`` int64 [k], ascending; ``gate`` [k] or None where all are 1.

    padding: how many of them are closed units with gate 0, there to make a legal or handy number.
    """

    index: Tensor
    gate: Tensor | None = None
    padding: int = 0


@dataclass(frozen=True)
class Selection:
    """What a pruner chose. Plain data.

    units: kind -> one :class:`Units` (kinds shared by all layers) or one per *source* layer; a kind that is absent
    stays whole. blocks: block -> gate [L]; 0 closes it; an absent block is open. A layer with all blocks closed is
    dropped. known_open: ``block_open``, where the maker has it at hand already.
    """

    units: Mapping[str, tuple[Units, ...]] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    known_open: Mapping[str, list[bool]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def block_open(self) -> Mapping[str, list[bool]]:
        """block -> whether it is open, by layer (a transfer from the device for each block, unless known already)."""
        if self.known_open is not None:
            return self.known_open
        return {block: (gate.detach() != 0).tolist() for block, gate in self.blocks.items()}

    def is_open(self, block: str, layer: int) -> bool:
        return self.block_open[block][layer] if block in self.blocks else True

    def layer_is_open(self, layer: int) -> bool:
        return any(self.is_open(block, layer) for block in BLOCKS)

    def kept_layers(self, layers: int) -> list[int]:
        return [layer for layer in range(layers) if self.layer_is_open(layer)]


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


@dataclass(frozen=True)
class Table:
    """All that the package knows of how the tensors of one model depend on one another.

    config_axes: key of the model's config -> (axis, elements per unit of that key), e.g. ``num_attention_heads`` ->
    ("query", head_dim). layers_key: the config's key for the number of layers. attention_axes: the axes of queries and
    of keys and values; their lengths' ratio is the number of query heads that share a KV head. of_layer: where layers
    differ in size, for each the table of a model of layers like it; ``kinds`` and ``axes`` then hold the largest sizes.
    """

    family: str
    layers: int
    kinds: Mapping[str, Kind]
    axes: Mapping[str, Axis]
    tensors: tuple[TensorSpec, ...]
    config_axes: Mapping[str, tuple[str, int]]
    layers_key: str = "num_hidden_layers"
    attention_axes: tuple[str, str] = ("query", "kv")
    of_layer: tuple[Table, ...] = ()

    def at_layer(self, layer: int | None) -> Table:
        """The table whose kinds and axes hold for a layer (None: for what is outside the layers)."""
        return self.of_layer[layer] if self.of_layer and layer is not None else self

    def instances(self) -> Iterator[tuple[str, TensorSpec, int | None]]:
        """(tensor name, row, layer or None) of every tensor of the source model."""
        for spec in self.tensors:
            for layer in range(self.layers) if spec.per_layer else (None,):
                yield spec.name.format(layer=layer), spec, layer

    @cached_property
    def by_name(self) -> dict[str, tuple[TensorSpec, int | None]]:
        return {name: (spec, layer) for name, spec, layer in self.instances()}

    def tensor_shape(self, spec: TensorSpec, layer: int | None = None) -> tuple[int, ...]:
        axes = self.at_layer(layer).axes
        return tuple(axes[axis].length for axis in spec.axes)

    def count(self, counted_only: bool = False) -> int:
        """Number of parameters; a tied tensor counts once. ``counted_only``: the rows that expected size counts."""
        return sum(
            math.prod(self.tensor_shape(spec, layer))
            for _, spec, layer in self.instances()
            if spec.alias is None and (spec.counted or not counted_only)
        )

    def shape(self) -> dict[str, int]:
        """The model's shape in its config's own keys; of layers that differ, the largest sizes."""
        shape = {key: self.axes[axis].length // per for key, (axis, per) in self.config_axes.items()}
        return {**shape, self.layers_key: self.layers}

    def units(self, shape: Mapping[str, int]) -> dict[str, int]:
        """kind -> open units in each row that a shape (in the config's keys) asks for."""
        units = {}
        for key, (name, per) in self.config_axes.items():
            axis = self.axes[name]
            if axis.kind is not None:
                units[axis.kind] = shape[key] * per // axis.per_unit // (self.kinds[axis.kind].rows or 1)
        return units

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of a state dict.

        Raises:
            ShearingError: naming every tensor that is missing, unknown to the table, or of another shape.
        """
        problems = [f"{name}: missing" for name in self.by_name if name not in shapes]
        for name, shape in shapes.items():
            if name not in self.by_name:
                problems.append(f"{name}: has no row in the table of the {self.family} family")
            elif tuple(shape) != (want := self.tensor_shape(*self.by_name[name])):
                problems.append(f"{name}: shape {list(shape)}, the table says {list(want)}")
        if problems:
            raise ShearingError("tensors do not match the table:\n  " + "\n  ".join(problems))

    def expected_parameters(self, open_units: Mapping[str, Tensor], open_blocks: Mapping[str, Tensor]) -> Tensor:
        """Expected size of the counted tensors: products of expected open counts along their axes.

        Args:
            open_units: kind -> expected number of open units, scalar or [L]; an absent kind is all open.
            open_blocks: block -> probability [L] that it is open; an absent block is open.
        """
        total = torch.zeros((), dtype=torch.float64)
        for spec in self.tensors:
            if spec.counted and spec.alias is None:
                factor: Tensor | float = 1.0
                for name in spec.axes:
                    axis = self.axes[name]
                    known = axis.kind is not None and axis.kind in open_units
                    factor = factor * (open_units[axis.kind] * axis.per_unit if known else axis.length)  # type: ignore[index]
                factor = factor * open_blocks.get(spec.block, 1.0) if spec.block else factor
                per_layer = torch.as_tensor(factor).expand(self.layers) if spec.per_layer else torch.as_tensor(factor)
                total = total.to(per_layer.device) + per_layer.sum()
        return total

    def multiple(self, kind: str, elements: int) -> int:
        """The number of units of a kind whose multiples are multiples of so many elements on every axis of the kind."""
        per_unit = [axis.per_unit for axis in self.axes.values() if axis.kind == kind]
        return math.lcm(*(elements // math.gcd(elements, per) for per in per_unit))

    def _axis_units(self, axis: Axis, layer: int | None, selection: Selection) -> Units | None:
        """The units that stay on an axis in a layer; None: all."""
        if axis.kind is None or axis.kind not in selection.units:
            return None
        per_row = selection.units[axis.kind]
        return per_row[0] if self.kinds[axis.kind].rows is None else per_row[layer]  # type: ignore[index]

    def length(self, axis_name: str, layer: int | None, selection: Selection) -> int:
        """Number of elements of an axis that stay in a layer."""
        axis = self.at_layer(layer).axes[axis_name]
        units = self._axis_units(axis, layer, selection)
        return axis.length if units is None else len(units.index) * axis.per_unit

    def part(self, axis_name: str, layer: int | None, selection: Selection) -> Part:
        """What of an axis stays in a layer."""
        axis = self.at_layer(layer).axes[axis_name]
        units = self._axis_units(axis, layer, selection)
        if units is None:
            return WHOLE
        if axis.per_unit == 1:
            return Part(units.index, units.gate, units.padding)
        offsets = torch.arange(axis.per_unit, device=units.index.device)
        index = (units.index[:, None] * axis.per_unit + offsets).flatten()
        gate = None if units.gate is None else units.gate.repeat_interleave(axis.per_unit)
        return Part(index, gate, units.padding * axis.per_unit)

    def resolve(self, selection: Selection) -> dict[str, Cut]:
        """tensor name -> its :class:`Cut`, with gates only where the row multiplies them in; none in closed layers."""
        memo: dict[tuple[str, int | None], Part] = {}
        scales = {block: gate.unbind() for block, gate in selection.blocks.items()}
        cuts = {}
        for name, spec, layer in self.instances():
            if layer is not None and not selection.layer_is_open(layer):
                continue
            parts = []
            for axis in spec.axes:
                kind = self.kinds.get(self.axes[axis].kind or "")
                key = (axis, layer if kind is not None and kind.rows is not None else None)
                part = memo[key] if key in memo else memo.setdefault(key, self.part(axis, layer, selection))
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
    cuts = table.resolve(selection)
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


def check_selection(table: Table, selection: Selection) -> None:
    """Refuse a selection that is not one of this table's model, such as one that was read from another model's file.

    Raises:
        ShearingError: naming each kind, row or block that is unknown, of the wrong length, out of order or out of
            range, and layers whose KV groups keep unequal numbers of query heads (these would pair with wrong keys).
    """
    problems = []
    for kind, rows in selection.units.items():
        if kind not in table.kinds:
            problems.append(f"{kind!r} is no kind of the {table.family} family ({', '.join(table.kinds)})")
        elif len(rows) != (want := 1 if table.kinds[kind].rows is None else table.layers):
            problems.append(f"{kind}: units of {len(rows)} layers, the model needs {want}")
        else:
            per_layer = table.kinds[kind].rows is not None
            problems += [
                f"{kind}, row {row}: {say}"
                for row, units in enumerate(rows)
                for say in _problems(table.at_layer(row if per_layer else None).kinds[kind], units)
            ]
    for block, gate in selection.blocks.items():
        if block not in BLOCKS or gate.shape != (table.layers,):
            problems.append(f"block {block!r}: shape {list(gate.shape)}; there are {BLOCKS}, of {table.layers} layers")
    if problems:
        raise ShearingError("the selection does not fit the model:\n  " + "\n  ".join(problems))


def _problems(kind: Kind, units: Units) -> Iterator[str]:
    index, size = units.index.tolist(), kind.size * (kind.rows or 1)
    if index != sorted(set(index)) or any(not 0 <= i < size for i in index):
        yield f"its units must ascend, each once, within 0 to {size - 1}"
    elif units.gate is not None and units.gate.shape != units.index.shape:
        yield f"{len(units.gate)} gates for {len(index)} units"
    elif kind.rows is None and units.padding:
        yield f"{units.padding} of its {len(index)} units are padding, which norms would count: select without rounding"
    elif len({sum(i // kind.size == row for i in index) for row in range(kind.rows or 1)}) > 1:
        yield f"its {kind.rows} groups of {kind.size} keep unequal numbers of units {index}"


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
        layer: {key: table.length(axis, layer, selection) // per for key, (axis, per) in table.config_axes.items()}
        for layer in selection.kept_layers(table.layers) or [0]
    }
