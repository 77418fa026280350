"""What a pruner chose: for each kind of unit (and layer) which units stay, and with what gate. Plain data.

On disk it is one safetensors file that replays the choice:

    units.<kind>.<row>.index   int64 [k]     kept units; row: the source layer, 0 for kinds shared by all layers
    units.<kind>.<row>.gate    [k]           absent where all gates are 1
    blocks.<block>             [L]           gate of every layer's attention or mlp
    energy.<norm's weight>     [d]           shares of hidden units in a norm's energy

The header's metadata lists kinds and rows as JSON, and whatever else the caller wants to tell (plain data).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmshearing import files
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.names import BLOCKS
from llmshearing.families.table import EXPERT, Kind, Table

FORMAT = "llmshearing-selection-1"
HEAD_MODES = ("group", "query")


@dataclass(frozen=True)
class Units:
    """Kept units of one row of a kind: ``index`` int64 [k], ascending; ``gate`` [k] or None where all are 1.

    padding: how many of them are closed units with gate 0, there to make a legal or handy number. known: ``numbers``,
    where the maker has them at hand already.
    """

    index: Tensor
    gate: Tensor | None = None
    padding: int = 0
    known: tuple[int, ...] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The kept units as numbers (a transfer from the device, unless known already)."""
        return tuple(self.index.tolist()) if self.known is None else self.known


@dataclass(frozen=True)
class Selection:
    """What a pruner chose. Plain data.

    units: kind -> one :class:`Units` (kinds shared by all layers) or one per *source* layer; a kind that is absent
    stays whole. blocks: block -> gate [L]; 0 closes it; an absent block is open. A layer with all blocks closed is
    dropped. energy: name of a norm's weight -> share [d] of each hidden unit in its energy. Such a norm counts what is
    left of its energy (`llmshearing.fold.fold`), an absent one counts units. known_open: ``block_open``, where it is at
    hand already.
    """

    units: Mapping[str, tuple[Units, ...]] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    known_open: Mapping[str, list[bool]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def block_open(self) -> Mapping[str, list[bool]]:
        """block -> whether it is open, by layer (a transfer from the device for each block, unless known already)."""
        if self.known_open is not None:
            return self.known_open
        return {block: (gate.detach() != 0).tolist() for block, gate in self.blocks.items()}

    def is_open(self, block: str, layer: int) -> bool:
        return self.block_open[block][layer] if block in self.blocks else True

    def layer_is_open(self, layer: int) -> bool:
        return any(self.is_open(block, layer) for block in BLOCKS)

    def kept_layers(self, layers: int) -> list[int]:
        return [layer for layer in range(layers) if self.layer_is_open(layer)]


def keep_highest(score: Tensor, runs: int, number: int) -> Units:
    """The ``number`` units of highest score [n] in each of ``runs`` equal runs."""
    best = score.view(runs, -1).topk(number, dim=-1).indices.sort(dim=-1).values
    return Units((best + torch.arange(runs)[:, None] * (len(score) // runs)).flatten())


def layer_gates(layers: int, drop: Sequence[int] | None) -> dict[str, Tensor]:
    """Gates [L] of all blocks: 0 at dropped layers, else 1; none where no layer is dropped."""
    gates = torch.ones(layers)
    gates[list(drop or ())] = 0.0
    return dict.fromkeys(BLOCKS, gates) if drop else {}


def check_selection(table: Table, selection: Selection) -> None:
    """Refuse a selection that is not one of this table's model, such as one that was read from another model's file.

    Raises:
        ShearingError: naming each kind, row or block that is unknown, of the wrong length, out of order or out of
            range, and layers whose KV groups keep unequal numbers of query heads (these would pair with wrong keys).
    """
    problems = []
    for kind, rows in selection.units.items():
        if kind not in table.kinds:
            problems.append(f"{kind!r} is no kind of the {table.family} family ({', '.join(table.kinds)})")
        elif len(rows) != (want := 1 if table.kinds[kind].rows is None else table.layers):
            problems.append(f"{kind}: units of {len(rows)} layers, the model needs {want}")
        else:
            per_layer = table.kinds[kind].rows is not None
            problems += [
                f"{kind}, row {row}: {say}"
                for row, units in enumerate(rows)
                for say in _problems(table.at_layer(row if per_layer else None).kinds[kind], units)
            ]
    for block, gate in selection.blocks.items():
        if block not in BLOCKS or gate.shape != (table.layers,):
            problems.append(f"block {block!r}: shape {list(gate.shape)}; there are {BLOCKS}, of {table.layers} layers")
    for name, shares in selection.energy.items():
        spec = table.by_name[name][0] if name in table.by_name else None
        if spec is None or not spec.module.form.endswith("norm") or shares.shape != table.tensor_shape(spec):
            problems.append(f"energy of {name}: {list(shares.shape)} shares; it must be a norm of as many hidden units")
    if problems:
        raise ShearingError("the selection does not fit the model:\n  " + "\n  ".join(problems))


def table_of(config: Any, selection: Selection) -> Table:
    """The table of a model, in the head mode that a selection is of.

    Raises:
        ShearingError: the selection fits the model in neither.
    """
    problems: list[ShearingError] = []
    for mode in HEAD_MODES:
        table = table_for(config, mode)
        try:
            check_selection(table, selection)
        except ShearingError as error:
            problems.append(error)
        else:
            return table
    raise problems[0]


def _problems(kind: Kind, units: Units) -> Iterator[str]:
    index, size = units.index.tolist(), kind.size * (kind.rows or 1)
    if index != sorted(set(index)) or any(not 0 <= i < size for i in index):
        yield f"its units must ascend, each once, within 0 to {size - 1}"
    elif units.gate is not None and units.gate.shape != units.index.shape:
        yield f"{len(units.gate)} gates for {len(index)} units"
    elif kind.rows is None and units.padding:
        yield f"{units.padding} of its {len(index)} units are padding, which norms would count: select without rounding"
    elif kind.name == EXPERT and len(index) - units.padding < kind.minimum:
        yield f"{len(index) - units.padding} experts stay, and every token is sent to {kind.minimum}"
    elif len({sum(i // kind.size == row for i in index) for row in range(kind.rows or 1)}) > 1:
        yield f"its {kind.rows} groups of {kind.size} keep unequal numbers of units {index}"


def choice_of(selection: Selection) -> Selection:
    """Which units and blocks stay, without their gates."""
    units = {kind: tuple(replace(row, gate=None) for row in rows) for kind, rows in selection.units.items()}
    blocks = {block: (gate != 0).to(gate.dtype) for block, gate in selection.blocks.items()}
    return Selection(units, blocks, selection.energy)


def rows_of(selection: Selection) -> dict[str, int]:
    """Rows of each kind that is cut."""
    return {kind: len(rows) for kind, rows in selection.units.items()}


def tensors_of(selection: Selection) -> dict[str, Tensor]:
    """The tensors of the module's head; with :func:`rows_of` they say all, see :func:`selection_of`."""
    tensors: dict[str, Tensor] = {}
    for kind, rows in selection.units.items():
        for row, units in enumerate(rows):
            tensors[f"units.{kind}.{row}.index"] = units.index
            if units.gate is not None:
                tensors[f"units.{kind}.{row}.gate"] = units.gate
    tensors |= {f"blocks.{block}": gate for block, gate in selection.blocks.items()}
    return tensors | {f"energy.{name}": shares for name, shares in selection.energy.items()}


def selection_of(tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> Selection:
    """The selection of these tensors; KeyError where one is missing."""
    units = {
        kind: tuple(_units(tensors, f"units.{kind}.{row}") for row in range(number)) for kind, number in rows.items()
    }
    blocks = {name.removeprefix("blocks."): gate for name, gate in tensors.items() if name.startswith("blocks.")}
    energy = {name.removeprefix("energy."): shares for name, shares in tensors.items() if name.startswith("energy.")}
    return Selection(units, blocks, energy)


def save_selection(path: Path | str, selection: Selection, about: Mapping[str, Any] | None = None) -> Path:
    """Write a selection, whole or not at all. ``about``: anything that JSON can hold."""
    path = Path(path)
    tensors = tensors_of(selection)
    metadata = {
        "format": FORMAT,
        "kinds": json.dumps(rows_of(selection)),
        "about": json.dumps(dict(about or {})),
    }
    # A clone each: safetensors refuses tensors that share memory, as the gates of blocks may.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with files.whole(path) as temporary:
        save_file(copies, temporary, metadata=metadata)
    return path


def load_selection(path: Path | str) -> tuple[Selection, dict[str, Any]]:
    """Read a selection and what its writer told about it.

    Raises:
        ShearingError: the file is missing, damaged, or no selection.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ShearingError(f"selection {path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ShearingError(f"{path} is no selection: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    try:
        selection = selection_of(tensors, json.loads(metadata["kinds"]))
        about = json.loads(metadata["about"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ShearingError(f"selection {path} is incomplete: {error!r}") from error
    if wrong := [say for name, tensor in tensors.items() for say in _odd(name, tensor)]:
        raise ShearingError(f"selection {path}: {'; '.join(wrong)}")
    return selection, about


def _odd(name: str, tensor: Tensor) -> Iterator[str]:
    """What is wrong with one tensor of a file, whatever the model."""
    if not name.startswith(("units.", "blocks.", "energy.")):
        return
    is_index = name.startswith("units.") and name.endswith(".index")
    if tensor.dim() != 1 or (tensor.dtype != torch.int64 if is_index else not tensor.is_floating_point()):
        kind = "int64" if is_index else "floating-point"
        yield f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be a row of {kind} numbers"
    elif not tensor.isfinite().all() or (name.startswith("energy.") and bool((tensor < 0).any())):
        yield f"{name} has values that are not finite, or shares below 0"


def _units(tensors: Mapping[str, Tensor], name: str) -> Units:
    return Units(tensors[f"{name}.index"], tensors.get(f"{name}.gate"))
