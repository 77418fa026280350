"""Where the elements of our tensors stand in Megatron's, and which of them each rank holds. Numbers only.

    rows          q [8 rows]   k [4]   v [4]               the table's, on their first dimension
    whole         q0-3 k0-1 v0-1 | q4-7 k2-3 v2-3          in runs; padded with zeros where the layout says so
    rank t of T   the t-th of T equal, contiguous parts

One list of pieces serves both directions: :meth:`Placed.gathered` copies them into a rank's tensor,
:meth:`Placed.scattered` copies them out of it.

Shape legend: T tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.megatron.layout import FIRST, GROUP, LAST, ONCE, RANK, Layout, MegatronTensor
from llmshearing.families.names import GROUPS
from llmshearing.families.table import EXPERT, Table


@dataclass(frozen=True)
class Piece:
    """``size`` elements of row number ``row`` from ``start`` on, which stand at ``at``."""

    row: int
    start: int
    at: int
    size: int


@dataclass(frozen=True)
class Placed:
    """One tensor of a Megatron model of T ranks: its layout with numbers.

    rows: names of our tensors. shapes: theirs. runs: how often they alternate. split: dimension that ranks share.
    padding: rows of zeros at the end.
    """

    name: str
    rows: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    runs: int
    split: int | None
    padding: int
    tp: int

    @cached_property
    def length(self) -> int:
        """Elements of the whole tensor on the dimension that is split (or joined)."""
        return sum(shape[self.split or 0] for shape in self.shapes) + self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part of one rank."""
        shape = list(self.shapes[0])
        shape[self.split or 0] = self.length // (1 if self.split is None else self.tp)
        return tuple(shape)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Of the whole tensor, in order."""
        found, at = [], 0
        for run in range(self.runs):
            for row, shape in enumerate(self.shapes):
                size = shape[self.split or 0] // self.runs
                found.append(Piece(row, run * size, at, size))
                at += size
        return found

    def of_rank(self, rank: int) -> list[Piece]:
        """What a rank holds; ``at`` counts within its part."""
        if self.split is None:
            return self.pieces
        width = self.length // self.tp
        low, high = rank * width, (rank + 1) * width
        return [
            Piece(piece.row, piece.start + begin - piece.at, begin - low, end - begin)
            for piece in self.pieces
            for begin, end in [(max(low, piece.at), min(high, piece.at + piece.size))]
            if begin < end
        ]

    def gathered(self, rank: int, row: Callable[[str], Tensor]) -> Tensor:
        """A rank's part. row: our tensor of a name."""
        sources = [row(name) for name in self.rows]
        part = sources[0].new_zeros(self.shape)
        for piece in self.of_rank(rank):
            source = sources[piece.row].narrow(self.split or 0, piece.start, piece.size)
            part.narrow(self.split or 0, piece.at, piece.size).copy_(source)
        return part

    def scattered(self, name: str, part: Callable[[int], Tensor]) -> Tensor:
        """One of our tensors. part: that of a rank.

        Raises:
            ShearingError: ranks that all hold the whole tensor hold different ones.
        """
        number = self.rows.index(name)
        if self.split is None:
            return self._agreed(part)
        row: Tensor | None = None
        for rank in range(self.tp):
            pieces = [piece for piece in self.of_rank(rank) if piece.row == number]
            source = part(rank) if pieces else None
            for piece in pieces:
                row = source.new_empty(self.shapes[number]) if row is None else row  # type: ignore[union-attr]
                row.narrow(self.split, piece.start, piece.size).copy_(
                    source.narrow(self.split, piece.at, piece.size)  # type: ignore[union-attr]
                )
        return row  # type: ignore[return-value]  # pieces cover every row

    def _agreed(self, part: Callable[[int], Tensor]) -> Tensor:
        first = part(0)
        for rank in range(1, self.tp):
            if not torch.equal(first, part(rank)):
                raise ShearingError(f"{self.name}: ranks 0 and {rank} hold different values of what all ranks share")
        return first


@dataclass(frozen=True)
class Spread:
    """How a model is spread, for all of its tensors.

    tp: tensor-parallel ranks. spec: whose names. padded: rows of a padded tensor; None: as few as the layout allows.
    """

    layout: Layout
    table: Table
    tp: int
    spec: str
    padded: int | None = None


def place(tensor: MegatronTensor, spread: Spread, layer: int | None, expert: int | None) -> Placed:
    """A tensor of the layout with numbers. layer: of the whole model; the name counts from it too.

    Raises:
        ShearingError: its parts would not be equal.
    """
    table, tp = spread.table, spread.tp
    rows = tuple(row.format(layer=layer, expert=expert) for row in tensor.rows)
    shapes = tuple(table.tensor_shape(*table.by_name[row]) for row in rows)
    runs = {ONCE: 1, GROUP: table.sizes()[GROUPS], RANK: tp}[tensor.runs]
    length = sum(shape[tensor.split or 0] for shape in shapes)
    padding = 0
    if tensor.padded:
        fewest = -length % (spread.layout.multiple * tp)
        padding = fewest if spread.padded is None else max(0, spread.padded - length)
    name = tensor.name(spread.spec).format(layer=layer, expert=expert)
    uneven = any(shape[tensor.split or 0] % runs for shape in shapes) or (length + padding) % tp
    if uneven and tensor.split is not None:
        raise ShearingError(
            f"{name}: {' + '.join(str(shape[tensor.split]) for shape in shapes)} elements make no equal parts for {tp} "
            "tensor-parallel ranks"
        )
    return Placed(name, rows, shapes, runs, tensor.split, padding, tp)


def place_all(spread: Spread, layers: Sequence[int], first: bool, last: bool) -> dict[str, Placed]:
    """Name in a stage -> tensor, of one pipeline stage. layers: of the whole model; the stage counts its own from 0."""
    found: dict[str, Placed] = {}
    table = spread.table
    tied = {row.name for row in table.tensors if row.alias}
    for tensor in spread.layout.tensors:
        if tensor.per_layer:
            numbers: Mapping[int, int | None] = dict(enumerate(layers))
        elif {FIRST: first, LAST: last}[tensor.stage or FIRST]:
            numbers = {0: None}
        else:
            continue
        if tied & {*tensor.rows} and first:
            continue  # one stage has both: the head is the embedding
        experts = range(table.kinds[EXPERT].size) if tensor.per_expert else (None,)
        for own, layer in numbers.items():
            for expert in experts:
                name = tensor.name(spread.spec).format(layer=own, expert=expert)
                found[name] = place(tensor, spread, layer, expert)
    return found
