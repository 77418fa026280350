"""A run's checkpoint with masks -> the checkpoint that the same run goes on from at the compact size.

    weights, config      the one fold, as post_pruning_processing has it
    optimizer            moments through the same fold (moments.py); masks and multipliers gone
    schedule, time       as they were: the run is one
    data, mixture, RNG   as they were
    callbacks            as they were, and the selection, which hidden states of a teacher are mapped by

A pure function of the file: whoever is cut off while it works does it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshearing.checkpoints.checkpoint import INFO, CheckpointInfo, read_checkpoint
from llmshearing.checkpoints.folding import fold_checkpoint
from llmshearing.config import Config
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.selection import Selection, rows_of, save_selection, selection_of, tensors_of
from llmshearing.storage import LazyTensor, lazily, open_archive, write_torch_file
from llmshearing.training.moments import WEIGHTS, fold_optimizer
from llmshearing.training.resilience.resume import plain_data_only
from llmshearing.training.source import Source

log = logging.getLogger(__name__)

FOLDED = "FoldedInRun"  # in checkpoints: the state of the callback that keeps the selection
Refitting = Callable[[CheckpointInfo, Selection], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Folded:
    """What a run goes on from at the compact size.

    source: the compact model in ``path``. selection: what made it out of the run's own source.
    """

    path: Path
    source: Source
    selection: Selection


def hand_over(path: Path, target: Path, cfg: Config, refitting: Refitting | None = None) -> Path:
    """Write the compact checkpoint of a run's checkpoint with masks, whole or not at all, and its selection beside it.

    Args:
        path: one file, with masks and the state of training. target: is replaced.
        refitting: (description of the compact model, choice) -> its weights, out of the source's; the optimizer then
            begins anew, as it also does before the first batch, when nothing but the choice is known.

    Raises:
        ShearingError: the checkpoint is damaged, is in shards, or its masks fold to no model.
    """
    checkpoint = read_checkpoint(path)
    if path.is_dir():
        raise ShearingError(f"{path} is in shards: model.l0_module.fold_at goes with whole checkpoints")
    with plain_data_only(cfg.trust_checkpoint):
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = dict(whole["state"])
    begins = _batch(state) == 0
    fresh = begins or refitting is not None
    weights, info, selection = fold_checkpoint(checkpoint, choice_only=fresh)
    parts: Mapping[str, Tensor] = weights
    if refitting is not None:
        parts = refitting(info, selection)
        info = info.then("took the choice alone, cut the source by it and refitted it to the source")
    if fresh:
        info = replace(info, evaluation=None)  # which was of a model with gates
    kind, saved = next(iter(state["optimizers"].items()))
    optimizer, continued = fold_optimizer(saved, checkpoint.table, selection, info.config, cfg, fresh)
    there = {name.removeprefix("module.") for name in state["model"]}
    tied = {name for name, spec, _ in table_for(info.config).instances() if spec.alias is not None}
    kept = {name: value for name, value in lazily(parts).entries.items() if name not in tied or WEIGHTS + name in there}
    state |= {
        "model": {WEIGHTS + name: value for name, value in kept.items()},
        "optimizers": {kind: optimizer},
        "schedulers": {name: _schedule(value, continued) for name, value in state["schedulers"].items()},
        "algorithms": [entry for entry in state["algorithms"] if entry[0] != "Shearing"],
        "callbacks": {**state["callbacks"], INFO: _told(info), FOLDED: selection_state(selection)},
    }
    write_torch_file(target, _lazy({**whole, "state": state}))
    save_selection(target.with_suffix(".selection.safetensors"), selection, {"history": info.history})
    log.info("folded inside the run: %s -> %s", path, target)
    return target


def read_folded(path: Path) -> Folded:
    """A checkpoint of a run at its compact size.

    Raises:
        ShearingError: it was not folded by its own run.
    """
    checkpoint = read_checkpoint(path, verify=False)
    told = open_archive(path).subtree("state", "callbacks", FOLDED)
    if checkpoint.masks or not isinstance(told, dict) or "rows" not in told:
        raise ShearingError(
            f"{path} is of a run that did not fold itself, and this one has model.l0_module.fold_at: leave that out, "
            "or give the run a save_folder of its own"
        )
    tensors = {name: value.make() for name, value in told["tensors"]}
    config = checkpoint.info.config
    source = Source(config, table_for(config), "group", None, checkpoint, same_run=True)
    return Folded(path, source, selection_of(tensors, {name: int(rows) for name, rows in told["rows"]}))


def is_folded(path: Path) -> bool:
    """Whether a checkpoint of a run is of the compact size."""
    return open_archive(path).subtree("state", "callbacks", FOLDED) is not None


def without_masks(cfg: Config) -> Config:
    """The same run after its fold."""
    return replace(cfg, model=replace(cfg.model, l0_module=None))


def selection_state(selection: Selection) -> dict[str, Any]:
    """A selection as a callback's state: plain data, without mappings (see callbacks/checkpoint_info.py)."""
    tensors = {name: value.detach().cpu() for name, value in tensors_of(selection).items()}
    return {"rows": list(rows_of(selection).items()), "tensors": list(tensors.items())}


def _batch(state: Mapping[str, Any]) -> int:
    return int(state["timestamp"]["Timestamp"]["batch"])


def _told(info: CheckpointInfo) -> dict[str, Any]:
    """As `callbacks/checkpoint_info.py` writes it."""
    return {key: list(value.items()) if isinstance(value, dict) else value for key, value in asdict(info).items()}


def _schedule(saved: Mapping[str, Any], continued: list[int]) -> dict[str, Any]:
    """A schedule's state with one entry for each of the new groups."""
    by_group = ("base_lrs", "_last_lr", "lr_lambdas")
    return {key: [value[n] for n in continued] if key in by_group else value for key, value in saved.items()}


def _lazy(value: Any) -> Any:
    """Tensors in nested values as :class:`LazyTensor`, which are written one by one."""
    if isinstance(value, Tensor):
        return LazyTensor(tuple(value.shape), value.dtype, lambda: value)
    if isinstance(value, dict):
        return {key: _lazy(item) for key, item in value.items()}
    return type(value)(_lazy(item) for item in value) if type(value) in (list, tuple) else value
