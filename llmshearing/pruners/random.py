"""Random selection: the baseline that every other choice has to beat.

With a tensor-parallel balance every contiguous T-th of an axis keeps the same number of units, so that each of T ranks
holds a slice of one shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.axes import Kind, Selection, Table
from llmshearing.errors import ShearingError
from llmshearing.masks.l0 import selection_from_gates
from llmshearing.pruners.base import WIDTH, Choice, Method
from llmshearing.pruners.calibration import Calibration


def choose(
    model: PreTrainedModel | None,
    table: Table,
    target: Mapping[str, int],
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
    tp: int = 1,
    drop_layers: Sequence[int] | None = None,
) -> Choice:
    """See :func:`random_selection`; model and calibration are not looked at."""
    selection = random_selection(table, target, seed, tp, drop_layers)
    return Choice(selection, {"seed": seed, "tp": tp})


def random_selection(
    table: Table, target: Mapping[str, int], seed: int = 0, tp: int = 1, drop_layers: Sequence[int] | None = None
) -> Selection:
    """Seeded random units on every axis, for a shape in the config's keys; layers by number, or random ones.

    The first and the last layer stay wherever two can. tp: number of contiguous parts of every axis that keep equally
    many units; 1 for none.

    Raises:
        ShearingError: the target is larger than the source on an axis, or not divisible as ``tp`` needs (all such axes
            are named).
    """
    units, layers = table.units(target), target[table.layers_key]
    sizes = {kind: table.kinds[kind].size for kind in units} | {"layer": table.layers}
    wanted = {**units, "layer": layers}
    problems = [f"{kind}: {n} of {sizes[kind]}" for kind, n in wanted.items() if not 0 < n <= sizes[kind]]
    if problems:
        raise ShearingError("the target does not fit the source: " + ", ".join(problems))
    cut = {kind: number for kind, number in units.items() if number < sizes[kind]}
    parts = {kind: _parts(table.kinds[kind], tp) for kind in cut}
    problems = [
        f"{kind}: {number} of {sizes[kind]} units{' of each KV group' if (table.kinds[kind].rows or 1) > 1 else ''}"
        for kind, number in cut.items()
        if parts[kind] == 0 or number % parts[kind] or sizes[kind] % parts[kind]
    ]
    if problems or tp < 1:
        raise ShearingError(f"tp = {tp} needs numbers that it divides, before and after: " + ", ".join(problems))
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for kind, number in cut.items():
        shape, length = table.kinds[kind].shape(table.layers), sizes[kind] // parts[kind]
        score = torch.rand(shape, generator=generator).unflatten(-1, (-1, length))
        gates[kind] = keep_highest(score, number // parts[kind]).reshape(shape)
    if drop_layers is not None:
        gates["layer"] = layer_gates(table.layers, drop_layers)
    elif layers < table.layers:
        score = torch.rand(table.layers, generator=generator)
        score[[0, -1]] += 1
        gates["layer"] = keep_highest(score, layers)
    return selection_from_gates(table, gates)


def _parts(kind: Kind, tp: int) -> int:
    """Into how many parts each row of a kind falls; 0 where ranks and rows do not line up."""
    rows = kind.rows or 1
    if tp % rows == 0:
        return tp // rows
    return 1 if rows % tp == 0 else 0


def keep_highest(score: Tensor, number: int) -> Tensor:
    """1 at the ``number`` highest scores of each row [..., N], else 0."""
    return torch.zeros_like(score).scatter_(-1, score.topk(number, dim=-1).indices, 1.0)


def layer_gates(layers: int, drop: Sequence[int]) -> Tensor:
    """[L]: 0 at dropped layers, else 1."""
    gates = torch.ones(layers)
    gates[list(drop)] = 0.0
    return gates


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor-parallel ranks that shall each keep equally many units (%(default)s)"
    )


def _needs_calibration(options: Mapping[str, Any]) -> bool:
    return False


METHOD = Method(
    name="random",
    choose=choose,
    help="seeded random units on every axis, layers by number or random",
    keys=("hidden_size", *WIDTH, "num_hidden_layers"),
    add_options=_add_options,
    needs_calibration=_needs_calibration,
)
