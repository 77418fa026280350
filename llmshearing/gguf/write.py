"""A model as a GGUF file: keys first, then one tensor after another."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.gguf import Layout, layout_of, metadata_of, problems_of, rope_factors
from llmshearing.families.table import Table
from llmshearing.gguf.arrange import Planned, arranged, plan
from llmshearing.gguf.package import gguf
from llmshearing.progress import tqdm
from llmshearing.storage import lazily
from llmshearing.storage.dtypes import cast, main_dtype

log = logging.getLogger(__name__)

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What the command calls a dtype -> name in `gguf.GGMLQuantizationType` (with MOSTLY_ before it, in LlamaFileType)."""
STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
FACTORS = "rope_freqs.weight"
"""The tensor that divides the frequencies of rotary positions."""


def check_held(config: PretrainedConfig, table: Table) -> Layout:
    """The layout of a model.

    Raises:
        ShearingError: listing everything that keeps llama.cpp from computing it.
    """
    if problems := problems_of(config, table):
        raise ShearingError("llama.cpp cannot hold this model: " + "; ".join(problems))
    return layout_of(table)


def write_gguf(
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    output: Path,
    *,
    name: str,
    dtype: str | None = None,
    tokenizer: Mapping[str, Any],
) -> None:
    """Write the file. It is not renamed at the end: give a temporary name.

    Args:
        weights: every tensor of the model by its name in transformers; of lazy ones, one at a time is made.
        name: of the model. dtype: one of DTYPES, of matrices; None: what most tensors are stored in. tokenizer: its
            keys (:mod:`llmshearing.gguf.tokenizer`).

    Raises:
        ShearingError: llama.cpp cannot hold the model, the dtype is unknown, a value does not fit it, or the package
            gguf is missing.
    """
    table, entries = table_for(config), lazily(weights).entries
    layout = check_held(config, table)
    stored = main_dtype({name: entry.dtype for name, entry in entries.items()})
    dtype = dtype or STORED.get(stored, "f32")
    if dtype not in DTYPES:
        raise ShearingError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    kinds, planned = gguf().GGMLQuantizationType, plan(table, layout)
    types = {tensor.name: _type(tensor, layout, kinds[DTYPES[dtype]]) for tensor in planned}
    factors = rope_factors(config, table)
    writer = gguf().GGUFWriter(output, layout.architecture)
    try:
        keys = {**metadata_of(config, table, layout.architecture), **_general(name, dtype), **tokenizer}
        for key, value in keys.items():
            _add(writer, key, value)
        if factors is not None:
            writer.add_tensor_info(FACTORS, (len(factors),), np.dtype(np.float32), 4 * len(factors), kinds.F32)
        for tensor in planned:
            _announce(writer, tensor, types[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(np.array(factors, dtype=np.float32))
        for tensor in tqdm(planned, desc="writing", unit="tensor"):
            parts = [arranged(entries[of].make(), tensor.row, tensor.layer, table, layout) for of in tensor.sources]
            value = torch.stack(parts) if tensor.row.expert is not None else parts[0]
            writer.write_tensor_data(encoded(tensor.name, value, types[tensor.name]))
    finally:
        writer.close()
    rounded = [tensor.name for tensor in planned if types[tensor.name].name == "F16" and dtype == "q8_0"]
    if rounded:
        log.warning(
            "warning: %d tensors are f16, not q8_0, since their rows are no multiple of 32: %s, ...",
            *(len(rounded), rounded[0]),
        )
    log.info("%d tensors of the architecture %s in %s", len(planned), layout.architecture, dtype)


FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
"""Types that numpy has; of others the bytes are written."""


def _type(tensor: Planned, layout: Layout, asked: Any) -> Any:
    """The type of a tensor: of matrices what is asked for, in blocks where these fit; of all others float32."""
    if len(tensor.shape) == 1 or layout.precise(tensor.row.name):
        return type(asked).F32
    block, _ = gguf().GGML_QUANT_SIZES[asked]
    return asked if tensor.shape[-1] % block == 0 else type(asked).F16


def _announce(writer: Any, tensor: Planned, kind: Any) -> None:
    """What is going to be written of a tensor."""
    dtype, shape = FLOATS.get(kind.name, np.dtype(np.uint8)), tensor.shape
    shape = shape if kind.name in FLOATS else gguf().quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)


def encoded(name: str, tensor: Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """A tensor as the file keeps it; numbers are rounded to the nearest.

    Raises:
        ShearingError: a value does not fit the dtype.
    """
    if kind.name == "F16":
        return cast(name, tensor, torch.float16).numpy()
    if kind.name == "BF16":
        return cast(name, tensor, torch.bfloat16).contiguous().view(torch.uint8).numpy()
    values = tensor.float().numpy()
    return values if kind.name == "F32" else gguf().quantize(values, kind)


def _general(name: str, dtype: str) -> dict[str, Any]:
    kinds = gguf().LlamaFileType
    kind = kinds.ALL_F32 if dtype == "f32" else kinds[f"MOSTLY_{DTYPES[dtype]}"]
    values = {"general.type": "model", "general.name": name, "general.file_type": int(kind)}
    return {**values, **({"general.quantization_version": 2} if dtype == "q8_0" else {})}


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with its value, in the type that the value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)
