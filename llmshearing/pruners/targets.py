"""What a target asks for: some keys of the config, layers by number, or a ratio -> the whole shape and the head mode.

    {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 512, "num_hidden_layers": 6}
    {"drop_layers": [2, 5]}
    {"ratio": 0.25}        a quarter fewer block parameters (or layers, or vocabulary, if the method cuts those)

Keys that are absent stay. With grouped queries, fewer key-value heads cut whole groups; fewer attention heads alone cut
the same number of query heads inside every group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmshearing.axes import Table
from llmshearing.errors import ShearingError
from llmshearing.pruners.base import WIDTH, Method

DROP, RATIO = "drop_layers", "ratio"
HEADS, GROUPS, INTERMEDIATE = WIDTH


@dataclass(frozen=True)
class Target:
    """shape: every key of the source's shape. head_mode: of the table to choose in. drop_layers: None if not given."""

    shape: dict[str, int]
    head_mode: str
    drop_layers: list[int] | None


def resolve_target(wanted: Mapping[str, Any], table: Table, method: Method) -> Target:
    """The whole target shape.

    Args:
        wanted: as a user gave it; see above. table: the source's, in any head mode.

    Raises:
        ShearingError: listing every key that is unknown, that the method cannot change, or whose value does not fit;
            or the target is the source's own shape.
    """
    source = table.shape()
    known = {*source, DROP, RATIO}
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
    problems += [problem for key in wanted if key in source for problem in _size(key, wanted[key], source[key])]
    problems += _drop_problems(wanted, table)
    if problems:
        raise ShearingError("\n".join(problems))
    shape = {**source, **{key: wanted[key] for key in wanted if key in source}}
    if DROP in wanted:
        shape[table.layers_key] = table.layers - len(wanted[DROP])
    head_mode = fill_heads(shape, source, wanted)
    if shape == source:
        raise ShearingError(f"the target is the source's own shape, {source}; ask for less on at least one axis")
    return Target(shape, head_mode, wanted.get(DROP))


def _size(key: str, value: Any, source: int) -> list[str]:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= source:
        return [f"target {key} = {value}: must be a whole number from 1 to the source's {source}"]
    return []


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


def fill_heads(shape: dict[str, int], source: Mapping[str, int], wanted: Mapping[str, Any]) -> str:
    """Complete the head counts of ``shape`` in place; the head mode.

    Raises:
        ShearingError: the counts cannot be reached by cutting whole groups, or the same number inside every group.
    """
    if HEADS not in source:
        return "group"
    repeat = source[HEADS] // source[GROUPS]
    if GROUPS not in wanted and repeat == 1:
        shape[GROUPS] = shape[HEADS]
    elif HEADS not in wanted:
        shape[HEADS] = shape[GROUPS] * repeat
    heads, groups = shape[HEADS], shape[GROUPS]
    if heads == groups * repeat:
        return "group"
    if groups == source[GROUPS] and heads % groups == 0:
        return "query"
    raise ShearingError(
        f"target {HEADS} = {heads} with {GROUPS} = {groups} cannot be cut from {source[HEADS]} and {source[GROUPS]}: "
        f"cut whole groups ({repeat} attention heads for each key-value head), or keep {source[GROUPS]} key-value "
        f"heads and a multiple of {source[GROUPS]} attention heads"
    )


def from_ratio(ratio: Any, table: Table, method: Method) -> dict[str, int]:
    """The target that a ratio means: that part of the block parameters away (or of what else the method cuts).

    Whole groups of heads are cut to the nearest number, then intermediate units to meet the parameters.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ShearingError(f"{RATIO} = {ratio}: must be a number above 0 and below 1, the part to remove")
    source = table.shape()
    if method.ratio_keys != WIDTH:
        return {key: max(1, round(source[key] * (1 - ratio))) for key in method.ratio_keys}
    repeat = source[HEADS] // source[GROUPS]
    groups = max(1, round(source[GROUPS] * (1 - ratio)))
    attention, mlp = _block_parameters(table, "attention"), _block_parameters(table, "mlp")
    left = (1 - ratio) * (attention + mlp) - attention * groups / source[GROUPS]
    intermediate = min(source[INTERMEDIATE], max(1, round(left / mlp * source[INTERMEDIATE])))
    return {HEADS: groups * repeat, GROUPS: groups, INTERMEDIATE: intermediate}


def _block_parameters(table: Table, block: str) -> int:
    """Counted parameters of one layer's block."""
    sizes = [table.tensor_shape(spec) for spec in table.tensors if spec.block == block and spec.counted]
    total = 0
    for size in sizes:
        product = 1
        for length in size:
            product *= length
        total += product
    return total
