"""A GGUF file read back: its keys, and its tensors by our names, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.gguf import layout_of
from llmshearing.gguf.arrange import from_file, plan
from llmshearing.gguf.package import gguf
from llmshearing.storage import LazyTensor


def open_gguf(path: Path) -> Any:
    """A reader of the package gguf.

    Raises:
        ShearingError: the file is missing or no GGUF.
    """
    try:
        return gguf().GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ShearingError(f"{path} is no readable GGUF file: {error}") from None


def keys_of(path: Path) -> dict[str, Any]:
    """Key -> value."""
    return {key: field.contents() for key, field in open_gguf(path).fields.items()}


def tensors_of(path: Path) -> dict[str, LazyTensor]:
    """Name in the file -> tensor in float32, made when asked for."""
    return {tensor.name: _lazy(tensor) for tensor in open_gguf(path).tensors}


def _lazy(stored: Any) -> LazyTensor:
    shape = tuple(reversed(stored.shape.tolist()))

    def make() -> Tensor:
        values = gguf().dequantize(stored.data, stored.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)

    return LazyTensor(shape, torch.float32, make)


def read_weights(path: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    """Our tensors by name, in float32, tied ones under both names. config: of the model.

    Raises:
        ShearingError: a tensor is missing, unknown, or of another shape than the config says.
    """
    table = table_for(config)
    layout, found = layout_of(table), tensors_of(path)
    planned = {tensor.name: tensor.shape for tensor in plan(table, layout)}
    problems = [f"{name} is missing" for name in planned if name not in found]
    problems += [
        f"{name} has the shape {list(found[name].shape)}, not {list(shape)}"
        for name, shape in planned.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ShearingError(f"{path}: " + "; ".join(problems[:8]))
    weights = dict(from_file({name: found[name].make() for name in planned}, table, layout))
    for name, (row, _) in table.by_name.items():
        if row.alias is not None:
            weights[name] = weights[row.alias]
    return weights
