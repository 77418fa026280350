"""Selections on disk: one safetensors file that replays what a pruner chose.

    units.<kind>.<row>.index   int64 [k]     kept units; row: the source layer, 0 for kinds shared by all layers
    units.<kind>.<row>.gate    [k]           absent where all gates are 1
    blocks.<block>             [L]           gate of every layer's attention or mlp

The header's metadata lists kinds and rows as JSON, and whatever else the caller wants to tell (plain data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmshearing import durable
from llmshearing.axes import Selection, Units
from llmshearing.errors import ShearingError

FORMAT = "llmshearing-selection-1"


def save_selection(path: Path | str, selection: Selection, about: Mapping[str, Any] | None = None) -> Path:
    """Write a selection, whole or not at all. ``about``: anything that JSON can hold."""
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for kind, rows in selection.units.items():
        for row, units in enumerate(rows):
            tensors[f"units.{kind}.{row}.index"] = units.index
            if units.gate is not None:
                tensors[f"units.{kind}.{row}.gate"] = units.gate
    tensors |= {f"blocks.{block}": gate for block, gate in selection.blocks.items()}
    metadata = {
        "format": FORMAT,
        "kinds": json.dumps({kind: len(rows) for kind, rows in selection.units.items()}),
        "about": json.dumps(dict(about or {})),
    }
    # A clone each: safetensors refuses tensors that share memory, as the gates of blocks may.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with durable.whole(path) as temporary:
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
        units = {
            kind: tuple(_units(tensors, f"units.{kind}.{row}") for row in range(rows))
            for kind, rows in json.loads(metadata["kinds"]).items()
        }
        about = json.loads(metadata["about"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ShearingError(f"selection {path} is incomplete: {error!r}") from error
    blocks = {name.removeprefix("blocks."): gate for name, gate in tensors.items() if name.startswith("blocks.")}
    return Selection(units, blocks), about


def _units(tensors: Mapping[str, Tensor], name: str) -> Units:
    return Units(tensors[f"{name}.index"], tensors.get(f"{name}.gate"))
