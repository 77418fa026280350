"""What is judged: a Hugging Face model, a compact checkpoint, or a pruning run's checkpoint as it stands.

Hugging Face directory, name    the model
checkpoint without masks        the model
checkpoint with masks           two: "now", of the size that its masks expect, and "target", of the shape it aims at
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmshearing.checkpoints.checkpoint import Checkpoint, is_checkpoint, load_masks, read_checkpoint
from llmshearing.checkpoints.folding import fold_weights
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.hf_read import build_model, load_hf_model, load_hf_weights, looks_local
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.table import Table
from llmshearing.masks.l0 import L0Masks, final_selection
from llmshearing.storage import LazyTensors, open_weights

log = logging.getLogger(__name__)

NOW, TARGET, MODEL, COMPACT = "now", "target", "model", "compact checkpoint"


@dataclass(frozen=True)
class Subject:
    """One model to judge, not loaded yet."""

    name: str
    path: str
    kind: str
    config: PretrainedConfig
    table: Table | None
    """None: its family has none."""
    stored_bytes: int
    load: Callable[[torch.dtype], PreTrainedModel] = field(repr=False)
    tokenizer_path: str | None = None

    def shape(self) -> dict[str, int]:
        """In the config's keys."""
        return self.table.shape() if self.table is not None else {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            ShearingError: there is none.
        """
        return load_text_tokenizer(self.tokenizer_path, self.path)


def load_text_tokenizer(path: str | None, of: str) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers, from a directory or the hub.

    Raises:
        ShearingError: it is absent or cannot be loaded; the message names what to do.
    """
    if path is None:
        raise ShearingError(f"{of} does not tell its tokenizer: give --tokenizer DIRECTORY")
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if looks_local(path) and not any((Path(path) / name).is_file() for name in files):
        raise ShearingError(f"{path} has no tokenizer (none of {', '.join(files)}): give --tokenizer DIRECTORY")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for broken or foreign directories
        raise ShearingError(f"tokenizer {path} cannot be loaded: {error}; give --tokenizer DIRECTORY") from error


def subjects_of(path: str, tokenizer: str | None = None) -> list[Subject]:
    """The models that a path or name means; one, or two for a checkpoint with masks.

    Args:
        tokenizer: in place of the model's own.

    Raises:
        ShearingError: there is no such model, or it cannot be read.
    """
    if not is_checkpoint(path):
        return [_of_directory(path, tokenizer)]
    checkpoint = read_checkpoint(path)
    tokenizer = tokenizer or checkpoint.info.tokenizer
    if not checkpoint.masks:
        return [_of_weights(path, path, COMPACT, checkpoint.weights, checkpoint.info.config, tokenizer)]
    return _of_masks(path, checkpoint, tokenizer)


def _of_directory(path: str, tokenizer: str | None) -> Subject:
    if looks_local(path) and not (Path(path) / "config.json").is_file():
        raise ShearingError(f"{path} is no model: neither a checkpoint nor a directory with config.json")
    config = read_config(path)
    table = _table(config)
    entries = load_hf_weights(path)[0].entries if table is not None else open_weights(path).entries
    stored = _bytes(entries, table)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        return load_hf_model(path, dtype).eval()

    return Subject(path, path, MODEL, config, table, stored, load, tokenizer or path)


def _table(config: PretrainedConfig) -> Table | None:
    try:
        return table_for(config)
    except ShearingError as error:
        log.info("cost by torch's counter: %s", str(error).partition(";")[0])
        return None


def _of_weights(
    name: str, path: str, kind: str, weights: LazyTensors, config: PretrainedConfig, tokenizer: str | None
) -> Subject:
    def load(dtype: torch.dtype) -> PreTrainedModel:
        return build_model(weights, config, dtype)

    table = table_for(config)
    return Subject(name, path, kind, config, table, _bytes(weights.entries, table), load, tokenizer)


def _bytes(entries: Mapping[str, Any], table: Table | None) -> int:
    """Of the stored tensors; a tied one counts once."""
    tied = {name for name, (spec, _) in table.by_name.items() if spec.alias} if table is not None else set()
    sizes = [
        tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for name, tensor in entries.items() if name not in tied
    ]
    return sum(sizes)


def _of_masks(path: str, checkpoint: Checkpoint, tokenizer: str | None) -> list[Subject]:
    """The model as the masks have it now, and the one that they aim at."""
    masks = load_masks(checkpoint)
    found = []
    try:
        selection = masks.selection(masks.deterministic(to_target=False))
        found.append(_folded(path, NOW, checkpoint, masks, selection, tokenizer))
    except ShearingError as error:  # on its way a model may have a shape that transformers does not build
        if masks.target is None:
            raise
        log.warning("warning: %s [%s] is left out: %s", path, NOW, error)
    if masks.target is not None:
        found.append(_folded(path, TARGET, checkpoint, masks, final_selection(masks), tokenizer))
    return found


def _folded(
    path: str, kind: str, checkpoint: Checkpoint, masks: L0Masks, selection: Any, tokenizer: str | None
) -> Subject:
    weights, values = fold_weights(
        checkpoint.weights, checkpoint.info.hf_config, masks.table, selection, zero_closed_blocks=kind == NOW
    )
    config = replace(checkpoint.info, hf_config=values).config
    return _of_weights(f"{path} [{kind}]", path, kind, weights, config, tokenizer)


def short_names(names: list[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, 1 + max(name.count("/") for name in names) + 1):
        short = ["/".join(name.rstrip("/").split("/")[-parts:]) for name in names]
        if len(set(short)) == len(set(names)):
            return short
    return names
