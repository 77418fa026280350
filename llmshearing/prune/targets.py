"""What a target asks for: some keys of the config, layers by number, or a ratio -> the whole shape and the head mode.

    {KEY: 192, KEY: [688, 640, 512]}     keys of the config; a list is of each layer of the source
    {"drop_layers": [2, 5]}
    {"ratio": 0.25}                      a quarter fewer block parameters, or layers, or tokens, as the method cuts

Keys are those of the model's config; the names that most configs have stand for a family's own. Keys that are absent
stay. What fewer heads mean with grouped queries is said in `llmshearing.families.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.family import KEYS
from llmshearing.families.heads import complete_heads, head_modes, why_not
from llmshearing.families.names import GROUPS, HEADS, INTERMEDIATE, WIDTHS
from llmshearing.families.table import Kind, Table, axes_of
from llmshearing.prune.method import Method

DROP, RATIO = "drop_layers", "ratio"
FAIR = 0.5  # of its share, that attention or MLP keeps at least before whole groups give way to single query heads
# Of all layers, or of each layer of the source.
Size = int | list[int]


@dataclass(frozen=True)
class Target:
    """shape: every key of the source's shape. head_mode: of the table to choose in. drop_layers: None if not given."""

    shape: dict[str, Size]
    head_mode: str
    drop_layers: list[int] | None


def layer_shapes(shape: Mapping[str, Size], layers: int) -> list[dict[str, int]]:
    """The shape as each layer of the source has it."""
    return [
        {key: size[layer] if isinstance(size, list) else size for key, size in shape.items()} for layer in range(layers)
    ]


def layer_units(table: Table, shape: Mapping[str, Size]) -> list[dict[str, int]]:
    """For each layer of the source: kind -> units to keep of each row."""
    return [table.at_layer(layer).units(own) for layer, own in enumerate(layer_shapes(shape, table.layers))]


def rows_to_cut(table: Table, shape: Mapping[str, Size]) -> dict[str, list[tuple[Kind, int]]]:
    """Kinds that lose units -> of each layer (of one, where all share them) the kind and its units to keep of a row."""
    units, found = layer_units(table, shape), {}
    for name, kind in table.kinds.items():
        layers = range(table.layers) if kind.rows is not None else range(1)
        rows = [(table.at_layer(layer).kinds[name], units[layer][name]) for layer in layers]
        if any(number != own.size for own, number in rows):
            found[name] = rows
    return found


def joined(shapes: Sequence[Mapping[str, int]]) -> dict[str, Size]:
    """The shape of all layers; a list where they differ."""
    sizes = {key: [shape[key] for shape in shapes] for key in shapes[0]}
    return {key: size if len(set(size)) > 1 else size[0] for key, size in sizes.items()}


def resolve_target(asked_for: Mapping[str, Any], table: Table, method: Method) -> Target:
    """The whole target shape.

    Args:
        asked_for: as a user gave it; see above. table: the source's, in any head mode.

    Raises:
        ShearingError: listing every key that is unknown, that the method cannot change, or whose value does not fit;
            or the target is the source's own shape.
    """
    asked_for = {str(key): value for key, value in asked_for.items()}
    source = [table.at_layer(layer).shape() for layer in range(table.layers)]
    if not method.sizes:
        if asked_for:
            raise ShearingError(f"method {method.name} changes no size: leave out {', '.join(asked_for)}")
        return Target(joined(source), "group", None)
    wanted: dict[str, Any] = own_keys(asked_for, table)
    known = {*source[0], DROP, RATIO}
    problems = [
        f"target key {key} is unknown; there are {', '.join(sorted(known))}" for key in wanted if key not in known
    ]
    if RATIO in wanted and not problems:
        problems += [f"{RATIO} cannot be combined with {', '.join(set(wanted) - {RATIO})}"] if len(wanted) > 1 else []
        wanted = {} if problems else {**from_ratio(wanted[RATIO], table, method)}
    can = [table.keys[size] for size in method.sizes if size in table.keys]
    can += [DROP] if table.layers_key in can else []
    problems += [
        f"method {method.name} does not change {key}, only {', '.join(key for key in can if key != DROP)}"
        for key in wanted
        if key in known and key not in can
    ]
    for key in wanted:
        if key in source[0]:
            problems += _size(key, wanted[key], [shape[key] for shape in source], key in table.widths)
    problems += _drop_problems(wanted, table)
    if problems:
        raise ShearingError("\n".join(problems))
    asked = layer_shapes({key: wanted[key] for key in wanted if key in source[0]}, table.layers)
    layers = [{**shape, **own} for shape, own in zip(source, asked, strict=True)]
    if DROP in wanted:
        layers = [{**shape, table.layers_key: table.layers - len(wanted[DROP])} for shape in layers]
    head_mode = fill_heads(layers, source, wanted, table.keys)
    misfits = {say: None for layer, shape in enumerate(layers) for say in table.at_layer(layer).shape_problems(shape)}
    if misfits:
        raise ShearingError("\n".join(misfits))
    if layers == source:
        own = joined(source)
        raise ShearingError(f"the target is the source's own shape, {own}; ask for less on at least one axis")
    return Target(joined(layers), head_mode, wanted.get(DROP))


def own_keys(wanted: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """A target with the family's own keys in place of those that most configs have."""
    common = {key: table.keys[size] for size, key in KEYS.items() if size in table.keys}
    own = {*table.keys.values()}
    return {key if key in own else common.get(key, key): value for key, value in wanted.items()}


def _size(key: str, value: Any, source: Sequence[int], is_width: bool) -> list[str]:
    """Problems of one value. source: its size in each layer. is_width: whether each layer may have its own."""
    by_layer = value if isinstance(value, list) and is_width else [value] * len(source)
    fits = len(by_layer) == len(source) and all(
        isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= own
        for size, own in zip(by_layer, source, strict=True)
    )
    each = f", or a list of {len(source)} such numbers, one for each layer" if is_width else ""
    most = str(min(source)) if len(set(source)) == 1 else f"own size in every layer, {list(source)}"
    return [] if fits else [f"target {key} = {value}: must be a whole number from 1 to the source's {most}{each}"]


def _drop_problems(wanted: Mapping[str, Any], table: Table) -> list[str]:
    if DROP not in wanted:
        return []
    drop, layers = wanted[DROP], table.layers
    whole = isinstance(drop, (list, tuple)) and all(isinstance(i, int) and 0 <= i < layers for i in drop)
    if not whole or not drop or len(set(drop)) != len(drop) or len(drop) == layers:
        return [f"{DROP} = {drop}: must list layers of 0 to {layers - 1}, each once and not all of them"]
    if wanted.get(table.layers_key, layers - len(drop)) != layers - len(drop):
        left = f"{layers - len(drop)} of {layers} layers"
        return [f"{DROP} = {drop} leaves {left}, but {table.layers_key} = {wanted[table.layers_key]}"]
    return []


def fill_heads(
    layers: list[dict[str, int]],
    source: Sequence[Mapping[str, int]],
    wanted: Mapping[str, Any],
    keys: Mapping[str, str],
) -> str:
    """Complete the head counts of every layer's shape in place; the head mode.

    Raises:
        ShearingError: the counts cannot be reached by cutting whole groups, or the same number inside every group.
    """
    if GROUPS not in keys:
        return "group"
    modes = {"group", "query"}
    for number, (shape, own) in enumerate(zip(layers, source, strict=True)):
        where = f" of layer {number}" if len(set(map(str, layers))) > 1 else ""
        modes &= _fill_layer(shape, own, wanted, keys, where)
    if not modes:
        raise ShearingError(
            f"target {keys[HEADS]}: some layers cut whole groups, others heads inside them; do one first"
        )
    return "group" if "group" in modes else "query"


def _fill_layer(
    shape: dict[str, int], source: Mapping[str, int], wanted: Mapping[str, Any], keys: Mapping[str, str], where: str
) -> set[str]:
    """Complete one layer's head counts in place; the head modes that reach them."""
    of, in_groups = keys[HEADS], keys[GROUPS]
    counts = source[of], source[in_groups]
    given = (shape[of] if of in wanted else None), (shape[in_groups] if in_groups in wanted else None)
    heads, groups = shape[of], shape[in_groups] = complete_heads(*given, counts, keep_groups=True)
    modes = head_modes(heads, groups, counts)
    if not modes:
        raise ShearingError(f"target{where} {why_not(heads, groups, counts, (of, in_groups))}")
    return modes


def from_ratio(ratio: Any, table: Table, method: Method) -> dict[str, Size]:
    """The target that a ratio means: that part of the block parameters away (or of what else the method cuts).

    In every layer heads are cut, whole groups or the same number inside each, then intermediate units to meet the
    parameters.

    Raises:
        ShearingError: the ratio is no part, or no widths of a layer meet it.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ShearingError(f"{RATIO} = {ratio}: must be a number above 0 and below 1, the part to remove")
    if method.ratio != WIDTHS:
        return {table.keys[size]: max(1, round(table.shape()[table.keys[size]] * (1 - ratio))) for size in method.ratio}
    return joined(_narrower(table, ratio))


@dataclass(frozen=True)
class _Width:
    """One layer's way to a ratio. balance: the smaller of what attention and MLP keep, in parts of what they should."""

    shape: dict[str, int]
    balance: float


def _narrower(table: Table, ratio: float) -> list[dict[str, int]]:
    """Widths of every layer less a part of its parameters.

    Whole groups go where both branches then keep at least FAIR of their share in every layer. Where groups are too few
    for that, the MLP would pay for the attention: query heads inside the groups go instead.
    """
    ways: dict[str, list[_Width]] = {}
    problems: list[str] = []
    for mode, counts in (("group", _group_counts), ("query", _query_counts)):
        found = [_best(table, layer, ratio, counts(table.at_layer(layer))) for layer in range(table.layers)]
        problems += [way for way in found if isinstance(way, str)]
        if not any(isinstance(way, str) for way in found):
            ways[mode] = [way for way in found if isinstance(way, _Width)]
    if not ways:
        raise ShearingError(f"{RATIO} = {ratio}: {problems[0]}")
    fairness = {mode: min(way.balance for way in found) for mode, found in ways.items()}
    chosen = "group" if fairness.get("group", 0.0) >= FAIR else max(fairness, key=fairness.__getitem__)
    return [way.shape for way in ways[chosen]]


def _best(table: Table, layer: int, ratio: float, counts: Sequence[Mapping[str, int]]) -> _Width | str:
    """A layer's widths with the number of heads nearest to its share; or what stands against all of them."""
    here = table.at_layer(layer)
    source, key = here.shape(), here.keys[INTERMEDIATE]
    whole = layer_parameters(table, layer, source)
    bare = layer_parameters(table, layer, {**source, key: 0})
    unit = (whole - bare) / source[key]
    best: _Width | None = None
    fewest = whole
    for heads in counts:
        attention = layer_parameters(table, layer, {**source, **heads, key: 0})
        wanted = ((1 - ratio) * whole - attention) / unit
        number = min(source[key], max(1, round(wanted)))
        fewest = min(fewest, round(attention + unit))
        if abs(number - wanted) <= 0.5 + 1e-9:  # else no number of intermediate units makes up for these heads
            balance = min(attention / bare, number / source[key]) / (1 - ratio)
            if best is None or balance > best.balance:
                best = _Width({**heads, key: number}, balance)
    if best is None:
        return (
            f"layer {layer} cannot lose that part of its {whole:,} parameters. With one intermediate unit and the "
            f"fewest heads {fewest / whole:.1%} of them are left; cut hidden units or layers too"
        )
    return best


def _group_counts(table: Table) -> list[dict[str, int]]:
    """Numbers of heads in whole groups that a layer can be cut to by itself."""
    source, keys = table.shape(), table.keys
    heads = source[keys[HEADS]]
    groups = source[keys[GROUPS]] if GROUPS in keys else heads
    each = heads // groups
    return _possible(table, [(number * each, number) for number in range(groups, 0, -1)])


def _query_counts(table: Table) -> list[dict[str, int]]:
    """Numbers of heads, the same inside every group, that a layer can be cut to by itself."""
    source, keys = table.shape(), table.keys
    if GROUPS not in keys:
        return []
    groups = source[keys[GROUPS]]
    return _possible(table, [(number * groups, groups) for number in range(source[keys[HEADS]] // groups, 0, -1)])


def _possible(table: Table, counts: Sequence[tuple[int, int]]) -> list[dict[str, int]]:
    keys = table.keys
    shapes = [{keys[HEADS]: heads, **({keys[GROUPS]: groups} if GROUPS in keys else {})} for heads, groups in counts]
    return [shape for shape in shapes if not table.shape_problems({**table.shape(), **shape})]


def layer_parameters(table: Table, layer: int, shape: Mapping[str, int]) -> int:
    """Counted parameters of one layer in a shape (in the config's keys)."""
    here = table.at_layer(layer)
    lengths = {name: axis.length for name, axis in here.axes.items()}
    lengths |= {axis: shape[key] * per for key, (axis, per) in here.config_axes.items()}
    return sum(
        math.prod(sum(lengths[axis] for axis in axes_of(dimension)) for dimension in spec.axes)
        for spec in here.tensors
        if spec.per_layer and spec.counted and (spec.layers is None or layer in spec.layers)
    )
