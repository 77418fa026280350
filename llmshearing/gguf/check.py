"""The certificate of a GGUF file: read back tensor by tensor, and computed by llama.cpp where it can be imported.

    weights --> file --> gguf's reader --> our tensors again     each within the rounding of its dtype
                  |                            |
              llama.cpp                   transformers           log-probabilities of the same tokens

The second comparison is of the values that the file holds, so that it measures the programs and not the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.checkpoints.parity import (
    FUNCTIONS,
    TENSORS,
    TOLERANCE,
    Parity,
    fits,
    largest_difference,
    scores_of,
    token_ids,
)
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.gguf import layout_of
from llmshearing.families.gguf.metadata import context
from llmshearing.families.table import Table
from llmshearing.gguf.arrange import from_file, ours, plan
from llmshearing.gguf.read import open_gguf, tensors_of
from llmshearing.storage import LazyTensor

LLAMA_CPP = "llama_cpp"
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127}
"""Dtype -> largest error of rounding, relative to the largest element of a tensor."""
ROUNDED = 2.0
"""llama.cpp rounds activations to the dtype of the matrix that they are multiplied by. So log-probabilities may differ
by as much as in a model that runs in bfloat16, this many times."""
TABLE = 1e-2
"""Nats, where llama.cpp takes its activation from a table of float16."""
TINY = 2.0**-24
"""Half of the smallest number of float16."""


def has_llama_cpp() -> bool:
    """Whether llama.cpp's package is installed."""
    return find_spec(LLAMA_CPP) is not None


def gguf_parity(path: Path, weights: Mapping[str, LazyTensor], config: PretrainedConfig) -> Parity:
    """Check a file.

    Args:
        weights: what was to be written, by name.

    Raises:
        ShearingError: the file or llama.cpp cannot be read or run.
    """
    table = table_for(config)
    worst = _tensors_differ(path, weights, table)
    if worst > 1 or not has_llama_cpp() or not fits(config, models=2):
        return Parity("gguf", version("gguf"), TENSORS, worst, 1.0, [])
    ids = token_ids(config, context(config, table))
    model = build_model(_values(path, table), config, torch.float32)
    wanted = scores_of(model, ids)
    tolerance = TABLE if layout_of(table).from_a_table else TOLERANCE
    if any(tensor.tensor_type.name != "F32" for tensor in open_gguf(path).tensors if len(tensor.shape) > 1):
        tolerance += ROUNDED * largest_difference(wanted, scores_of(model.bfloat16(), ids))
    found = llama_cpp_scores(path, ids)
    differ, used = largest_difference(wanted, found), str(import_module(LLAMA_CPP).__version__)
    return Parity("llama.cpp", used, FUNCTIONS, differ, tolerance, ids.tolist())


def _values(path: Path, table: Table) -> dict[str, Tensor]:
    """Our tensors with the values that the file holds."""
    found = {name: entry.make() for name, entry in tensors_of(path).items()}
    weights = dict(from_file(found, table, layout_of(table)))
    return {name: weights[row.alias or name] for name, (row, _) in table.by_name.items()}


def _tensors_differ(path: Path, weights: Mapping[str, LazyTensor], table: Table) -> float:
    """Largest error of any tensor, in what rounding to its dtype may do; inf where one is missing or misshapen."""
    layout, worst = layout_of(table), 0.0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(path).tensors}
    stored = tensors_of(path)
    for planned in plan(table, layout):
        if planned.name not in stored or stored[planned.name].shape != planned.shape:
            return float("inf")
        made = stored[planned.name].make()
        parts = made.unbind(0) if planned.row.expert is not None else (made,)
        for source, part in zip(planned.sources, parts, strict=True):
            wanted = weights[table.by_name[source][0].alias or source].make().float()
            back = ours(part, planned.row, planned.layer, table, layout)
            worst = max(worst, _in_rounding(back, wanted, kinds[planned.name], planned.row.module.offset))
    return worst


def _in_rounding(found: Tensor, wanted: Tensor, kind: str, offset: float) -> float:
    """The error in parts of what rounding may do: 0 where they are equal."""
    error = largest_difference(found, wanted)
    largest = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 0.0
    allowed = ROUNDING[kind] * largest + (TINY if kind in ("F16", "Q8_0") else 0.0)
    allowed += 2.0**-23 * (abs(offset) + largest) if offset else 0.0
    if error == 0:
        return 0.0
    return error / allowed if allowed else float("inf")


def llama_cpp_scores(path: Path, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] of token ids [B, T] by llama.cpp, on the CPU with a cache in float32.

    Raises:
        ShearingError: llama.cpp is not installed, or does not load the file.
    """
    model = llama_cpp(path, context=ids.shape[1])
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(torch.from_numpy(model.scores[: len(row)].copy()))
    model.close()
    return torch.stack(rows).float().log_softmax(-1)


def llama_cpp(path: Path, context: int = 64) -> Any:
    """A model of llama.cpp's package. context: tokens that it can look at.

    Raises:
        ShearingError: it is not installed, or does not load the file.
    """
    if not has_llama_cpp():
        raise ShearingError("llama.cpp's package is not installed: pip install llama-cpp-python")
    package = import_module(LLAMA_CPP)
    precise = package.GGML_TYPE_F32
    try:
        return package.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
            type_k=precise, type_v=precise, n_gpu_layers=0,
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ShearingError(f"llama.cpp does not load {path}: {error}") from error
