"""A choice applied: the small model in memory, and its directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.card import model_card
from llmshearing.checkpoints.checkpoint import CheckpointInfo
from llmshearing.checkpoints.hf_read import build_model, load_hf_model
from llmshearing.checkpoints.hf_write import copy_tokenizer, write_hf_directory
from llmshearing.checkpoints.output import REPORT, SELECTION, new_directory
from llmshearing.errors import ShearingError
from llmshearing.families import DEFAULT, FAMILIES
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.table import Table
from llmshearing.fold.fold import fold_lazily, folded_config
from llmshearing.fold.padding import padded
from llmshearing.fold.selection import save_selection
from llmshearing.prune.methods import Choice


@dataclass(frozen=True)
class Result:
    """model: float32, holding values of the stored dtype; its config is the one to write."""

    model: PreTrainedModel
    generation: GenerationConfig | None


def folded(source: PreTrainedModel, table: Table, choice: Choice, dtype: torch.dtype, pad: bool) -> Result:
    """The model that a choice folds to; pad: in layers of one size (see `llmshearing.fold.padding`)."""
    values = {**folded_config(source.config.to_dict(), table, choice.selection), **choice.config}
    with torch.no_grad():
        makers = fold_lazily(source.state_dict(), table, choice.selection)
        stored = {name: make().to(dtype).float() for name, make in makers}
    if pad:
        stored, values = padded(stored, values)
    return Result(build_model(stored, config_of(values), torch.float32), _generation(source, choice))


def shortened(source: PreTrainedModel, table: Table, choice: Choice) -> Result:
    """A decoder without a table, less the closed layers. Changes ``source``."""
    path = choice.about["model_decoder_layers"]
    kept = choice.selection.kept_layers(table.layers)
    parent, _, name = path.rpartition(".")
    layers = source.get_submodule(path)
    setattr(source.get_submodule(parent), name, nn.ModuleList([layers[layer] for layer in kept]))
    entries = DEFAULT.kept_config(source.config.to_dict(), kept)
    for key, value in {**entries, table.layers_key: len(kept)}.items():
        setattr(source.config, key, value)
    return Result(source, _generation(source, choice))


def _generation(source: PreTrainedModel, choice: Choice) -> GenerationConfig | None:
    if source.generation_config is None:
        return None
    return GenerationConfig.from_dict({**source.generation_config.to_dict(), **choice.generation})


def write(
    result: Result,
    directory: Path,
    dtype: torch.dtype,
    choice: Choice,
    record: Mapping[str, Any],
    *,
    tokenizer: Path | str,
    overwrite: bool,
) -> None:
    """Write model, tokenizer, selection and record under a temporary name, then rename."""

    def extra(folder: Path) -> None:
        save_selection(folder / SELECTION, choice.selection, {**choice.about, "method": record["method"]})
        (folder / REPORT).write_text(json.dumps(record, indent=1, default=str) + "\n")

    config = result.model.config
    if config.model_type not in FAMILIES:
        _write_plain(result, directory, dtype, tokenizer, overwrite, extra)
        return
    info = CheckpointInfo(_plain(config), history=list(record["history"]))
    write_hf_directory(
        result.model.state_dict(),
        config,
        directory,
        dtype=dtype,
        tokenizer=tokenizer,
        tokenizer_required=choice.write_tokenizer is not None,
        card=model_card(info, name=directory.resolve().name),
        generation_config=result.generation,
        overwrite=overwrite,
        extra=extra,
    )


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=str))


def _write_plain(
    result: Result, directory: Path, dtype: torch.dtype, tokenizer: Path | str, overwrite: bool, extra: Any
) -> None:
    """A model without a table, by transformers' own writer; loaded again, strictly, before it gets its name."""
    with new_directory(directory, overwrite) as folder:
        result.model.to(dtype).save_pretrained(folder)
        extra(folder)
        load_hf_model(folder)
        with contextlib.suppress(ShearingError):  # a model may have none
            copy_tokenizer(tokenizer, folder)
