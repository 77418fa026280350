"""What comes out: the merged model, folded where it was zeroed, as a plain Hugging Face directory with its card."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.checkpoints.output import FINETUNING, SELECTION
from llmshearing.checkpoints.parity import TOLERANCE, largest_difference, scores_of, token_ids
from llmshearing.errors import ShearingError
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.table import Table
from llmshearing.finetune.recording import record_finetuning
from llmshearing.fold.fold import fold_lazily, folded_config, renamed
from llmshearing.fold.selection import Selection, choice_of, save_selection
from llmshearing.fold.zeros import ZEROED, check_zeros
from llmshearing.prune.apply import Result, write_model
from llmshearing.storage.dtypes import cast

log = logging.getLogger(__name__)


def rounded(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round each tensor to the dtype that it will be stored in: what is compared is what is written."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(cast(name, value, dtypes[name]))


def folded_again(model: PreTrainedModel, table: Table, selection: Selection) -> PreTrainedModel:
    """A zeroed model -> the compact one, which computes the same.

    Raises:
        ShearingError: something that the selection closes is not 0, or the two differ.
    """
    weights: dict[str, Tensor] = model.state_dict()
    check_zeros(weights, table, selection)
    chosen = choice_of(selection)
    with torch.no_grad():
        small = {name: make() for name, make in fold_lazily(weights, table, chosen)}
    values = folded_config(model.config.to_dict(), table, chosen)
    compact = build_model(small, config_of(values), model.dtype)
    ids = token_ids(model.config)
    if (differ := largest_difference(scores_of(compact, ids), scores_of(model, ids))) > TOLERANCE:
        raise ShearingError(
            f"the folded model is another function than the zeroed one: log-probabilities differ by {differ:.3g} nats "
            f"(tolerance {TOLERANCE:g}). Nothing is kept"
        )
    return compact


def folded_dtypes(dtypes: Mapping[str, torch.dtype], table: Table, selection: Selection) -> dict[str, torch.dtype]:
    """The stored dtypes by the folded model's names."""
    return {new: dtypes[name] for name, new, _, _ in renamed(table, choice_of(selection))}


def write_finetuned(
    model: PreTrainedModel,
    generation: GenerationConfig | None,
    dtypes: dict[str, torch.dtype],
    directory: Path,
    record: Mapping[str, Any],
    *,
    tokenizer: Path | str,
    selection: Selection | None,
    overwrite: bool,
) -> None:
    """Write, load again and compare, then give the directory its name.

    Args:
        selection: of a zeroed model that is written as such.

    Raises:
        ParityError: what was written is another function than the model; it is kept under another name.
    """

    def extra(folder: Path) -> None:
        if selection is not None:
            save_selection(folder / SELECTION, choice_of(selection), {ZEROED: True})
        (folder / FINETUNING).write_text(json.dumps(dict(record), indent=1, default=str) + "\n")
        record_finetuning(folder, directory.resolve().name, record)

    write_model(
        Result(model, generation, dtypes), directory, record["history"], tokenizer=tokenizer, tokenizer_required=True,
        overwrite=overwrite, extra=extra,
    )  # fmt: skip
