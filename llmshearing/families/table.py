"""A model family as a table. Family-blind.

A :class:`Table` has a row (:class:`TensorSpec`) per tensor of a `transformers` model. A row names the axis that each
dimension lies on, the axes whose gate is multiplied in, and the block (attention, MLP) the tensor belongs to:

    name                                      axes               gates             block
    model.embed_tokens.weight                 vocab  hidden      hidden            -
    model.layers.{layer}.self_attn.q_proj     query  hidden      -                 attention
    model.layers.{layer}.self_attn.o_proj     hidden query       hidden query      attention (scaled by its gate)

Shape legend: L layers; N units of a kind in one row; a row is what shares one target (one layer, or one KV group).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmshearing.errors import ShearingError

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
