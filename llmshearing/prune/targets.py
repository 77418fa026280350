"""What a target asks for: some keys of the config, layers by number, or a ratio -> the whole shape and the head mode.

    {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 512, "num_hidden_layers": 6}
    {"intermediate_size": [688, 640, 512]}   of each layer of the source
    {"drop_layers": [2, 5]}
    {"ratio": 0.25}        a quarter fewer block parameters (or layers, or vocabulary, if the method cuts those)

Keys that are absent stay. With grouped queries, fewer key-value heads cut whole groups; fewer attention heads alone cut
the same number of query heads inside every group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.table import Kind, Table
from llmshearing.prune.method import WIDTH, Method

DROP, RATIO = "drop_layers", "ratio"
HEADS, GROUPS, INTERMEDIATE = WIDTH
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


def resolve_target(wanted: Mapping[str, Any], table: Table, method: Method) -> Target:
    """The whole target shape.

    Args:
        wanted: as a user gave it; see above. table: the source's, in any head mode.

    Raises:
        ShearingError: listing every key that is unknown, that the method cannot change, or whose value does not fit;
            or the target is the source's own shape.
    """
    source = [table.at_layer(layer).shape() for layer in range(table.layers)]
    known = {*source[0], DROP, RATIO}
    problems = [
        f"target key {key} is unknown; there are {', '.join(sorted(known))}" for key in wanted if key not in known
    ]
    if RATIO in wanted and not problems:
        problems += [f"{RATIO} cannot be combined with {', '.join(set(wanted) - {RATIO})}"] if len(wanted) > 1 else []
        wanted = {} if problems else from_ratio(wanted[RATIO], table, method)
    can = {*method.keys, DROP} if table.layers_key in method.keys else {*method.keys}
    problems += [
        f"method {method.name} does not change {key}, only {', '.join(method.keys)}"
        for key in wanted
        if key in known and key not in can
    ]
    for key in wanted:
        if key in source[0]:
            problems += _size(key, wanted[key], [shape[key] for shape in source])
    problems += _drop_problems(wanted, table)
    if problems:
        raise ShearingError("\n".join(problems))
    asked = layer_shapes({key: wanted[key] for key in wanted if key in source[0]}, table.layers)
    layers = [{**shape, **own} for shape, own in zip(source, asked, strict=True)]
    if DROP in wanted:
        layers = [{**shape, table.layers_key: table.layers - len(wanted[DROP])} for shape in layers]
    head_mode = fill_heads(layers, source, wanted)
    if layers == source:
        own = joined(source)
        raise ShearingError(f"the target is the source's own shape, {own}; ask for less on at least one axis")
    return Target(joined(layers), head_mode, wanted.get(DROP))


def _size(key: str, value: Any, source: Sequence[int]) -> list[str]:
    """Problems of one value. source: its size in each layer."""
    by_layer = value if isinstance(value, list) and key in WIDTH else [value] * len(source)
    fits = len(by_layer) == len(source) and all(
        isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= own
        for size, own in zip(by_layer, source, strict=True)
    )
    each = f", or a list of {len(source)} such numbers, one for each layer" if key in WIDTH else ""
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


def fill_heads(layers: list[dict[str, int]], source: Sequence[Mapping[str, int]], wanted: Mapping[str, Any]) -> str:
    """Complete the head counts of every layer's shape in place; the head mode.

    Raises:
        ShearingError: the counts cannot be reached by cutting whole groups, or the same number inside every group.
    """
    modes = {"group", "query"}
    for number, (shape, own) in enumerate(zip(layers, source, strict=True) if HEADS in source[0] else ()):
        modes &= _fill_layer(shape, own, wanted, f" of layer {number}" if len(set(map(str, layers))) > 1 else "")
    if not modes:
        raise ShearingError(f"target {HEADS}: some layers cut whole groups, others heads inside them; do one first")
    return "group" if "group" in modes else "query"


def _fill_layer(shape: dict[str, int], source: Mapping[str, int], wanted: Mapping[str, Any], where: str) -> set[str]:
    """Complete one layer's head counts in place; the head modes that reach them."""
    repeat = source[HEADS] // source[GROUPS]
    if GROUPS not in wanted and repeat == 1:
        shape[GROUPS] = shape[HEADS]
    elif HEADS not in wanted:
        shape[HEADS] = shape[GROUPS] * repeat
    heads, groups = shape[HEADS], shape[GROUPS]
    reach = {"group": heads == groups * repeat, "query": groups == source[GROUPS] and heads % groups == 0}
    if any(reach.values()):
        return {mode for mode, does in reach.items() if does}
    raise ShearingError(
        f"target {HEADS} = {heads} with {GROUPS} = {groups} cannot be cut from {source[HEADS]} and {source[GROUPS]}"
        f"{where}: cut whole groups ({repeat} attention heads for each key-value head), or keep {source[GROUPS]} "
        f"key-value heads and a multiple of {source[GROUPS]} attention heads"
    )


def from_ratio(ratio: Any, table: Table, method: Method) -> dict[str, Size]:
    """The target that a ratio means: that part of the block parameters away (or of what else the method cuts).

    In every layer whole groups of heads are cut to the nearest number, then intermediate units to meet the parameters.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ShearingError(f"{RATIO} = {ratio}: must be a number above 0 and below 1, the part to remove")
    if method.ratio_keys != WIDTH:
        return {key: max(1, round(table.shape()[key] * (1 - ratio))) for key in method.ratio_keys}
    return joined([_narrower(table.at_layer(layer), ratio) for layer in range(table.layers)])


def _narrower(table: Table, ratio: float) -> dict[str, int]:
    """Width of a layer less a part of its parameters."""
    source = table.shape()
    repeat = source[HEADS] // source[GROUPS]
    groups = max(1, round(source[GROUPS] * (1 - ratio)))
    attention, mlp = _block_parameters(table, "attention"), _block_parameters(table, "mlp")
    left = (1 - ratio) * (attention + mlp) - attention * groups / source[GROUPS]
    intermediate = min(source[INTERMEDIATE], max(1, round(left / mlp * source[INTERMEDIATE])))
    return {HEADS: groups * repeat, GROUPS: groups, INTERMEDIATE: intermediate}


def _block_parameters(table: Table, block: str) -> int:
    """Counted parameters of one layer's block."""
    return sum(math.prod(table.tensor_shape(spec)) for spec in table.tensors if spec.block == block and spec.counted)
