"""Random selection: the baseline that every other choice has to beat.

With a tensor-parallel balance every contiguous T-th of an axis keeps the same number of units, so that each of T ranks
holds a slice of one shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, keep_highest, layer_gates
from llmshearing.prune.balance import add_tp, check_balance, keep_balanced
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import ALL_SIZES, Choice, Method
from llmshearing.prune.targets import rows_to_cut


def choose(
    model: PreTrainedModel | None,
    table: Table,
    target: Mapping[str, Any],
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
    table: Table, target: Mapping[str, Any], seed: int = 0, tp: int = 1, drop_layers: Sequence[int] | None = None
) -> Selection:
    """Seeded random units on every axis, for a shape in the config's keys; layers by number, or random ones.

    The first and the last layer stay wherever two can. tp: number of contiguous parts of every axis that keep equally
    many units; 1 for none.

    Raises:
        ShearingError: the target is larger than the source on an axis, or not divisible as ``tp`` needs (all such axes
            are named).
    """
    cut, layers = rows_to_cut(table, target), target[table.layers_key]
    wanted = {name: {(kind.size, number) for kind, number in rows} for name, rows in cut.items()}
    wanted["layer"] = {(table.layers, layers)}
    problems = [f"{name}: {n} of {size}" for name, pairs in wanted.items() for size, n in pairs if not 0 < n <= size]
    if problems:
        raise ShearingError("the target does not fit the source: " + ", ".join(problems))
    check_balance(table, cut, tp)
    generator = torch.Generator().manual_seed(seed)
    units = {
        name: tuple(
            keep_balanced(table, torch.rand(kind.size * (kind.rows or 1), generator=generator), kind, number, tp)
            for kind, number in rows
        )
        for name, rows in cut.items()
    }
    if drop_layers is None and layers < table.layers:
        score = torch.rand(table.layers, generator=generator)
        score[[0, -1]] += 1
        kept = keep_highest(score, 1, layers).index.tolist()
        drop_layers = [layer for layer in range(table.layers) if layer not in kept]
    return Selection(units, layer_gates(table.layers, drop_layers))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    add_tp(parser)


def _needs_calibration(options: Mapping[str, Any]) -> bool:
    return False


METHOD = Method(
    name="random",
    choose=choose,
    help="seeded random units on every axis, layers by number or random",
    sizes=ALL_SIZES,
    add_options=_add_options,
    needs_calibration=_needs_calibration,
)
