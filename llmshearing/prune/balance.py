"""Choosing under tensor parallelism: every contiguous T-th of an axis keeps equally many units.

Each of T ranks holds one of these parts. So the parts have one shape after the cut too, and each rank cuts its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.table import Kind, Table
from llmshearing.fold.selection import Units, keep_highest


def check_balance(table: Table, cut: Mapping[str, Sequence[tuple[Kind, int]]], tp: int) -> None:
    """Whether ranks can keep equally many. cut: of each kind, and each row, the units that stay.

    Raises:
        ShearingError: naming every kind whose units, before or after, do not fall into equal parts.
    """
    problems = [
        f"{name}: {number} of {size} units{' of each KV group' if grouped else ''}"
        for name, rows in cut.items()
        for size, number, parts, grouped in dict.fromkeys(
            (kind.size, number, parts_of(table, kind, tp), (kind.rows or 1) > 1) for kind, number in rows
        )
        if parts == 0 or number % parts or size % parts
    ]
    if problems or tp < 1:
        raise ShearingError(f"tp = {tp} needs numbers that it divides, before and after: {', '.join(problems)}")


def keep_balanced(table: Table, score: Tensor, kind: Kind, number: int, tp: int) -> Units:
    """The ``number`` units of highest score [rows * N] in each row of a kind, and as many of them in each part."""
    parts = parts_of(table, kind, tp)
    return keep_highest(score, (kind.rows or 1) * parts, number // parts)


def parts_of(table: Table, kind: Kind, tp: int) -> int:
    """Into how many parts each row of a kind falls; 0 where ranks and rows do not line up.

    Experts are rows that every rank has a part of. KV groups are rows that ranks share out: several ranks a group, or
    several groups a rank. Where fewer whole groups than ranks are units, no rank has one of its own.
    """
    rows = kind.rows or 1
    if any(axis.of_expert and axis.kind == kind.name for axis in table.axes.values()):
        return tp
    if rows == 1 and kind.size < tp and tp % kind.size == 0:
        return 1
    if tp % rows == 0:
        return tp // rows
    return 1 if rows % tp == 0 else 0


def add_tp(parser: argparse.ArgumentParser) -> None:
    """The option of methods that can balance."""
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        help="tensor-parallel ranks that shall each keep equally many units (%(default)s; with --megatron: its own)",
    )
