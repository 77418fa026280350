"""The table language: what a family's tensors are, and how they depend on one another. Plain data, no torch.

A :class:`Table` has a row (:class:`TensorSpec`) per tensor of a `transformers` model. A row says which axis each
dimension lies on, which dimension is read and which is written, the axes whose gate is multiplied in, the branch that
the tensor belongs to, and the class of the module that owns it:

    name                                      axes               gates             block
    model.embed_tokens.weight                 vocab  hidden      hidden            -
    model.layers.{layer}.self_attn.q_proj     query  hidden      -                 attention
    model.layers.{layer}.self_attn.o_proj     hidden query       hidden query      attention (scaled by its gate)

:func:`linear`, :func:`bias`, :func:`norm` and the others below write such rows. Counting, folding, gating, slicing and
shape checks are computed from them (`llmshearing.fold`); nothing else knows how a family's tensors hang together.

Shape legend: L layers; E experts; N units of a kind in one row; a row is what shares one target (one layer, one KV
group, or one expert).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.names import GROUPS, HEAD_DIM, HEADS, LAYERS, WIDTHS

EXPERT = "expert"
"""The kind of unit that a whole expert is, and the axis of a router's outputs."""


@dataclass(frozen=True)
class Kind:
    """A kind of unit that can be kept or cut, such as heads or hidden units."""

    name: str
    size: int
    """Units in one row."""
    rows: int | None
    """Rows in a layer. Each row meets the target by itself. Mostly 1; as many as KV groups, if query heads are cut
    inside each group; as many as experts. None: all layers share the units."""
    minimum: int = 0
    """The modules cannot run with fewer units in a row. If fewer are open, closed ones stay, with gate 0."""

    def shape(self, layers: int) -> tuple[int, ...]:
        """Shape of a full vector of gates: [N], or [L, rows * N]."""
        return (self.size,) if self.rows is None else (layers, self.rows * self.size)


@dataclass(frozen=True)
class Axis:
    """A dimension that tensors share."""

    length: int
    """Elements."""
    kind: str | None = None
    """Kind of the units that own them; None for an axis that is never cut."""
    per_unit: int = 1
    """Elements that one unit owns, one after another."""
    of_expert: bool = False
    """Whether the elements belong to one expert. Each expert is then a row of the kind."""


@dataclass(frozen=True)
class Segments:
    """Several axes that follow one another in one dimension. They do so once, or in each of ``runs`` equal runs.

        Segments(("query", "kv", "kv"))                 q q q q k k v v
        Segments(("query", "kv", "kv"), runs=2)         q q k v q q k v      by KV group
    """

    axes: tuple[str, ...]
    runs: int = 1


Dimension = str | Segments


def axes_of(dimension: Dimension) -> tuple[str, ...]:
    """The axes in a dimension."""
    return (dimension,) if isinstance(dimension, str) else dimension.axes


@dataclass(frozen=True)
class Module:
    """The module that owns a tensor. ``cls``: its exact class, since a subclass may compute something else.

    form: how its forward pass uses the tensor: linear, conv1d, embedding, rms_norm or layer_norm. eps: the attribute
    that a norm adds to its variance. offset: what a norm adds to its weight before it multiplies (Gemma: 1).
    """

    cls: str
    form: str
    eps: str = ""
    offset: float = 0.0


LINEAR = Module("torch.nn.modules.linear.Linear", "linear")
CONV1D = Module("transformers.pytorch_utils.Conv1D", "conv1d")
EMBEDDING = Module("torch.nn.modules.sparse.Embedding", "embedding")
LAYER_NORM = Module("torch.nn.modules.normalization.LayerNorm", "layer_norm", "eps")


@dataclass(frozen=True)
class TensorSpec:
    """One row of the table."""

    name: str
    """In the state dict; ``{layer}`` and ``{expert}`` stand for their numbers."""
    axes: tuple[Dimension, ...]
    """One a dimension."""
    gates: tuple[str, ...] = ()
    """Axes whose gate is multiplied in. ``expert``: the gate of the tensor's own expert."""
    block: str | None = None
    """Branch of the layer."""
    scaled: bool = False
    """Whether the branch's own gate is multiplied in."""
    counted: bool = False
    """Whether it is part of the expected parameters."""
    alias: str | None = None
    """The tensor that this one is (tied weights)."""
    reads: int | None = None
    """The dimension that the module sums over, or looks up in. None for biases and norms."""
    writes: int | None = None
    """The dimension of the module's output. None for norms: they write what they read."""
    module: Module = LINEAR
    rescale: float = 0.0
    """The fold multiplies the tensor by (hidden units before / after) ** rescale. Some modules multiply by a power of
    the config's hidden size. This makes up for the smaller one."""
    layers: tuple[int, ...] | None = None
    """Layers that have it; None: all."""
    expert: int | None = None
    """Number of the expert that it belongs to."""
    stacked: bool = False
    """Whether its first dimension counts experts. The others are then those of one expert's matrix."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def matrix(self) -> tuple[Dimension, ...]:
        """The dimensions without that of stacked experts."""
        return self.axes[1:] if self.stacked else self.axes

    def read(self) -> Dimension | None:
        """What it reads; None for biases and norms."""
        return None if self.reads is None else self.axes[self.reads]

    def written(self) -> Dimension | None:
        """What it writes; None for norms."""
        return None if self.writes is None else self.axes[self.writes]


def linear(name: str, out: Dimension, read: Dimension, **row: Any) -> TensorSpec:
    """The weight [out, in] of an ``nn.Linear``."""
    return TensorSpec(name, (out, read), reads=1, writes=0, **{"counted": True, **row})


def conv1d(name: str, read: Dimension, out: Dimension, **row: Any) -> TensorSpec:
    """The weight [in, out] of a ``Conv1D`` of transformers."""
    return TensorSpec(name, (read, out), reads=0, writes=1, **{"counted": True, "module": CONV1D, **row})


def bias(name: str, out: Dimension, **row: Any) -> TensorSpec:
    """The bias [out] of a projection."""
    return TensorSpec(name, (out,), writes=0, **{"counted": True, **row})


def embedding(name: str, rows: str, **row: Any) -> TensorSpec:
    """A table [rows, hidden] that the residual stream starts from; gated by hidden units."""
    return TensorSpec(name, (rows, "hidden"), reads=0, writes=1, **{"gates": ("hidden",), "module": EMBEDDING, **row})


def norm(name: str, axis: str, module: Module, **row: Any) -> TensorSpec:
    """Weight or bias [axis] of a norm."""
    return TensorSpec(name, (axis,), module=module, **row)


def of_experts(number: int, rows: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The same rows for every expert."""
    return [replace(row, expert=expert) for row in rows for expert in range(number)]


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that depends on a size. A smaller model has kept elements of ``axis`` // ``per``.

    module: path, with ``{layer}``. name: of the attribute; ``config.KEY`` for a key of the config that the module
    looks at. per: a number, or an axis: then the number of its kept elements.
    """

    module: str
    name: str
    axis: str
    per: int | str = 1


@dataclass(frozen=True)
class Experts:
    """Where the experts are: ``module`` (path, with ``{layer}``) keeps a list of them in its attribute ``list``.

    chosen: how many of them each token goes to.
    """

    module: str
    list: str = "experts"
    layers: tuple[int, ...] | None = None
    chosen: int = 1


@dataclass(frozen=True)
class Coupling:
    """Two axes that are equally long in every model of the family, and why."""

    one: str
    other: str
    reason: str


@dataclass(frozen=True)
class Table:
    """All that the package knows of how the tensors of one model depend on one another."""

    family: str
    layers: int
    kinds: Mapping[str, Kind]
    axes: Mapping[str, Axis]
    tensors: tuple[TensorSpec, ...]
    keys: Mapping[str, str]
    """Size (`families.names`) -> key of the model's config."""
    config_axes: Mapping[str, tuple[str, int]]
    """Key of the config -> (axis, elements for each unit of that key), as ``num_attention_heads`` -> (query, 64)."""
    head_dim: int = 0
    """Elements of a head; never cut. Written to the config where ``keys`` has a key for it."""
    attributes: tuple[Attribute, ...] = ()
    experts: Experts | None = None
    couplings: tuple[Coupling, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Sizes that cannot be cut in this model -> why."""
    mirrors: Mapping[str, str] = field(default_factory=dict)
    """Keys of the config that repeat another key -> that key."""
    layer_tuple: bool = False
    """Whether a decoder layer returns a tuple."""
    of_layer: tuple[Table, ...] = ()
    """For layers of different sizes: for each layer the table of a model whose layers are all like it. ``kinds`` and
    ``axes`` then hold the largest sizes."""

    def with_mirrors(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A config's values with the keys that repeat another one following it."""
        return {**values, **{mirror: values[key] for mirror, key in self.mirrors.items() if key in values}}

    @property
    def layers_key(self) -> str:
        """The config's key for the number of layers."""
        return self.keys[LAYERS]

    @property
    def head_dim_key(self) -> str | None:
        """The config's key for the width of a head; None where it is always hidden units / heads."""
        return self.keys.get(HEAD_DIM)

    @cached_property
    def widths(self) -> tuple[str, ...]:
        """Keys of the config of which every layer may have its own value."""
        return tuple(self.keys[size] for size in WIDTHS if size in self.keys)

    @property
    def layers_path(self) -> str:
        """Path of the list of layers in the model."""
        return next(spec.name for spec in self.tensors if spec.per_layer).partition(".{layer}")[0]

    def size_of(self, key: str) -> str:
        """The size (`families.names`) that a key of the config is."""
        return next(size for size, name in self.keys.items() if name == key)

    def at_layer(self, layer: int | None) -> Table:
        """The table whose kinds and axes hold for a layer (None: for what is outside the layers)."""
        return self.of_layer[layer] if self.of_layer and layer is not None else self

    def instances(self) -> Iterator[tuple[str, TensorSpec, int | None]]:
        """(tensor name, row, layer or None) of every tensor of the source model."""
        for spec in self.tensors:
            every = range(self.layers) if spec.layers is None else spec.layers
            for layer in every if spec.per_layer else (None,):
                yield spec.name.format(layer=layer, expert=spec.expert), spec, layer

    @cached_property
    def by_name(self) -> dict[str, tuple[TensorSpec, int | None]]:
        return {name: (spec, layer) for name, spec, layer in self.instances()}

    def length(self, dimension: Dimension, layer: int | None = None) -> int:
        """Elements of a dimension in a layer."""
        axes = self.at_layer(layer).axes
        return sum(axes[axis].length for axis in axes_of(dimension))

    def tensor_shape(self, spec: TensorSpec, layer: int | None = None) -> tuple[int, ...]:
        return tuple(self.length(dimension, layer) for dimension in spec.axes)

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

    def sizes(self) -> dict[str, int]:
        """The model's shape by the names of sizes; as many KV groups as heads where the family has no key for them."""
        shape = self.shape()
        sizes = {size: shape[key] for size, key in self.keys.items() if key in shape}
        if HEADS in sizes:
            sizes = {GROUPS: sizes[HEADS], **sizes, HEAD_DIM: self.head_dim}
        return sizes

    def units(self, shape: Mapping[str, int]) -> dict[str, int]:
        """kind -> open units in each row that a shape (in the config's keys) asks for."""
        units = {}
        for key, (name, per) in self.config_axes.items():
            axis = self.axes[name]
            if axis.kind is not None:
                rows = 1 if axis.of_expert else self.kinds[axis.kind].rows or 1
                units[axis.kind] = shape[key] * per // axis.per_unit // rows
        return units

    def multiple(self, kind: str, elements: int) -> int:
        """The number of units that sizes are rounded to, so that each axis of the kind has a multiple of ``elements``.

        It is 1 if a norm inside a branch runs over the kind. Such a norm would count the units that rounding adds.
        """
        if kind in self._normed:
            return 1
        per_unit = [axis.per_unit for axis in self.axes.values() if axis.kind == kind]
        return math.lcm(*(elements // math.gcd(elements, per) for per in per_unit))

    @cached_property
    def _normed(self) -> frozenset[str]:
        """Kinds that a norm inside a branch runs over. Not hidden units: closed ones are 0 where a norm reads them."""
        lengths = {axis for spec in self.tensors if spec.module.form.endswith("norm") for axis in axes_of(spec.axes[0])}
        kinds = {kind for axis in lengths if (kind := self.axes[axis].kind) is not None}
        return frozenset(kind for kind in kinds if self.kinds[kind].rows is not None) | {EXPERT}

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

    def shape_problems(self, shape: Mapping[str, int]) -> list[str]:
        """What keeps a model of the family from having this shape (in the config's keys)."""
        source = self.shape()
        problems = [
            f"{self.keys[size]} = {shape[self.keys[size]]}: must stay {source[self.keys[size]]}, {why}"
            for size, why in self.fixed.items()
            if shape[self.keys[size]] != source[self.keys[size]]
        ]
        for kind, units in self.units(shape).items():
            if units < self.kinds[kind].minimum:
                problems.append(f"{kind}: {units} units; the {self.family} family needs {self.kinds[kind].minimum}")
        for coupling in self.couplings:
            left, right = (self._described(axis, shape) for axis in (coupling.one, coupling.other))
            if left[1] != right[1]:
                problems.append(f"{left[0]} must be {right[0]}: {coupling.reason}")
        return problems

    def _described(self, axis: str, shape: Mapping[str, int]) -> tuple[str, int]:
        """An axis's length in a shape, in words and as a number."""
        key, per = next((key, per) for key, (name, per) in self.config_axes.items() if name == axis)
        times = f" x {per}" if per != 1 else ""
        return f"{key} = {shape[key]}{times}", shape[key] * per
