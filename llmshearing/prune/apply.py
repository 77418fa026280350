"""A choice applied: the small model in memory, and its directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.card import model_card
from llmshearing.checkpoints.checkpoint import CheckpointInfo, plain_config
from llmshearing.checkpoints.generation import writable
from llmshearing.checkpoints.hf_read import build_model
from llmshearing.checkpoints.hf_write import copy_tokenizer, write_hf_directory
from llmshearing.checkpoints.output import PARITY, REPORT, SELECTION, new_directory
from llmshearing.checkpoints.parity import certify, hf_parity
from llmshearing.errors import ShearingError
from llmshearing.families import FAMILIES
from llmshearing.families.layers import kept_entries
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.table import Table
from llmshearing.fold.fold import fold_lazily, folded_config, renamed
from llmshearing.fold.padding import padded
from llmshearing.fold.selection import save_selection
from llmshearing.fold.zeros import zeroed
from llmshearing.prune.layers import check_followed
from llmshearing.prune.methods import Choice
from llmshearing.storage.dtypes import cast, main_dtype


@dataclass(frozen=True)
class Result:
    """model: float32, holding values of the stored dtypes; its config is the one to write. dtypes: of its tensors."""

    model: PreTrainedModel
    generation: GenerationConfig | None
    dtypes: dict[str, torch.dtype]


def folded(
    source: PreTrainedModel, table: Table, choice: Choice, dtypes: Mapping[str, torch.dtype], pad: bool
) -> Result:
    """The model that a choice folds to, each tensor rounded to the dtype that it was stored in.

    Args:
        dtypes: of the source's stored tensors, by name. pad: in layers of one size (see `llmshearing.fold.padding`).

    Raises:
        ShearingError: a value does not fit its dtype.
    """
    values = {**folded_config(source.config.to_dict(), table, choice.selection), **choice.config}
    main, kept = main_dtype(dtypes), {}
    for name, new_name, _, _ in renamed(table, choice.selection):
        kept[new_name] = dtypes.get(name, main)
    with torch.no_grad():
        makers = fold_lazily(source.state_dict(), table, choice.selection)
        stored = {name: cast(name, make(), kept[name]).float() for name, make in makers}
    if pad:
        stored, values = padded(stored, values)
    return Result(build_model(stored, config_of(values), torch.float32), _generation(source, choice), kept)


def zeroed_in_place(
    source: PreTrainedModel, table: Table, choice: Choice, dtypes: Mapping[str, torch.dtype]
) -> Result:
    """The model of the source's shape that computes what the folded one does: see `llmshearing.fold.zeros`.

    Raises:
        ShearingError: the choice cuts what cannot be zeroed, or a value does not fit its dtype.
    """
    main = main_dtype(dtypes)
    with torch.no_grad():
        weights = zeroed(source.state_dict(), table, choice.selection)
        kept = {name: dtypes.get(name, main) for name in weights}
        stored = {name: cast(name, value, kept[name]).float() for name, value in weights.items()}
    values = {**source.config.to_dict(), **choice.config}
    return Result(build_model(stored, config_of(values), torch.float32), _generation(source, choice), kept)


def check_layers(config: PretrainedConfig, table: Table, kept: list[int], path: str) -> None:
    """Refuse to keep layers of a decoder without a table that its config cannot describe.

    Raises:
        ShearingError: see :func:`llmshearing.prune.layers.check_followed`.
    """
    values = config.to_dict()
    followed = type(config).from_dict({**values, **kept_entries(values, kept, table.layers_key)})
    check_followed(config, followed, path, kept, table.layers_key)


def shortened(source: PreTrainedModel, table: Table, choice: Choice, dtypes: Mapping[str, torch.dtype]) -> Result:
    """A decoder without a table, less the closed layers, in the dtype of most of its tensors. Changes ``source``.

    Raises:
        ShearingError: the config cannot describe the layers that stay, or a value does not fit the dtype.
    """
    path = choice.about["model_decoder_layers"]
    kept = choice.selection.kept_layers(table.layers)
    check_layers(source.config, table, kept, path)
    parent, _, name = path.rpartition(".")
    layers = source.get_submodule(path)
    setattr(source.get_submodule(parent), name, nn.ModuleList([layers[layer] for layer in kept]))
    for key, value in kept_entries(source.config.to_dict(), kept, table.layers_key).items():
        setattr(source.config, key, value)
    dtype = main_dtype(dtypes)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.copy_(cast(name, parameter, dtype))
    return Result(source, _generation(source, choice), dict.fromkeys(source.state_dict(), dtype))


def _generation(source: PreTrainedModel, choice: Choice) -> GenerationConfig | None:
    given = source.generation_config
    return writable({**given.to_dict(), **choice.generation} if given is not None else None, source.config)


def write(
    result: Result,
    directory: Path,
    choice: Choice,
    record: Mapping[str, Any],
    *,
    tokenizer: Path | str,
    overwrite: bool,
    also: Callable[[Path], None] | None = None,
    check: bool = True,
) -> None:
    """Write model, tokenizer, selection and record under a temporary name, load them again, then rename.

    also: writes further files into the folder under its temporary name. check: whether to load them again
    (:mod:`llmshearing.checkpoints.parity`).

    Raises:
        ParityError: what was written is another function than the model; it is kept under another name.
    """

    def extra(folder: Path) -> None:
        save_selection(folder / SELECTION, choice.selection, {**choice.about, "method": record["method"]})
        (folder / REPORT).write_text(json.dumps(record, indent=1, default=str) + "\n")
        if also is not None:
            also(folder)

    required = choice.write_tokenizer is not None
    write_model(
        result, directory, record["history"], tokenizer=tokenizer, tokenizer_required=required, overwrite=overwrite,
        extra=extra, check=check,
    )  # fmt: skip


def write_model(
    result: Result,
    directory: Path,
    history: Sequence[str],
    *,
    tokenizer: Path | str,
    tokenizer_required: bool,
    overwrite: bool,
    extra: Callable[[Path], object],
    check: bool = True,
) -> None:
    """Write a model and its tokenizer under a temporary name, then `extra` into the same folder, then rename.

    Args:
        history: how it was made, for its card. check: whether to load it again.

    Raises:
        ParityError: what was written is another function than the model; it is kept under another name.
    """
    config = result.model.config
    if config.model_type not in FAMILIES:
        _write_plain(result, directory, tokenizer, overwrite, extra, check)
        return
    info = CheckpointInfo(plain_config(config), history=list(history))
    write_hf_directory(
        result.model.state_dict(),
        config,
        directory,
        dtype=result.dtypes,
        tokenizer=tokenizer,
        tokenizer_required=tokenizer_required,
        card=model_card(info, name=directory.resolve().name),
        generation_config=result.generation,
        overwrite=overwrite,
        extra=extra,
        check=check,
        model=result.model,
    )


def _write_plain(
    result: Result, directory: Path, tokenizer: Path | str, overwrite: bool, extra: Any, check: bool
) -> None:
    """A model without a table, by transformers' own writer."""
    model, buffers = result.model, {name: value.clone() for name, value in result.model.named_buffers()}
    for name in getattr(model.config, "_get_non_default_generation_parameters", dict)():
        setattr(model.config, name, None)  # transformers would move it to the settings that it then refuses to write
    model.generation_config = result.generation
    with new_directory(directory, overwrite) as folder:
        model.to(main_dtype(result.dtypes)).save_pretrained(folder)
        model.float()
        for name, value in model.named_buffers():  # such as rotary frequencies, which no dtype may round
            value.copy_(buffers[name])
        extra(folder)
        with contextlib.suppress(ShearingError):  # a model may have none
            copy_tokenizer(tokenizer, folder)
        if check:
            certify(hf_parity(folder, {}, model.config, model), folder, directory, folder / PARITY)
