"""Random selection: the baseline that every other choice has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmshearing.axes import Selection, Table
from llmshearing.errors import ShearingError
from llmshearing.masks.l0 import selection_from_gates


def random_selection(table: Table, target: Mapping[str, int], seed: int = 0) -> Selection:
    """Seeded random units on every axis and random layers, for a shape in the config's keys.

    The first and the last layer stay wherever two can.

    Raises:
        ShearingError: the target is larger than the source on an axis (all such axes are named).
    """
    units, layers = table.units(target), target[table.layers_key]
    sizes = {kind: table.kinds[kind].size for kind in units} | {"layer": table.layers}
    wanted = {**units, "layer": layers}
    problems = [f"{kind}: {n} of {sizes[kind]}" for kind, n in wanted.items() if not 0 < n <= sizes[kind]]
    if problems:
        raise ShearingError("the target does not fit the source: " + ", ".join(problems))
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for kind, number in units.items():
        if number < sizes[kind]:
            shape = table.kinds[kind].shape(table.layers)
            gates[kind] = _choose(torch.rand(shape, generator=generator).unflatten(-1, (-1, sizes[kind])), number)
            gates[kind] = gates[kind].reshape(shape)
    if layers < table.layers:
        score = torch.rand(table.layers, generator=generator)
        score[[0, -1]] += 1
        gates["layer"] = _choose(score, layers)
    return selection_from_gates(table, gates)


def _choose(score: Tensor, number: int) -> Tensor:
    """1 at the ``number`` highest scores of each row [..., N], else 0."""
    return torch.zeros_like(score).scatter_(-1, score.topk(number, dim=-1).indices, 1.0)
