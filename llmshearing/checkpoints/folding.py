"""After pruning: the compact model of a checkpoint with masks.

masks -> deterministic gates -> selection -> fold, tensor by tensor -> checkpoint without masks
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshearing.checkpoints.arguments import check_facts
from llmshearing.checkpoints.checkpoint import Checkpoint, CheckpointInfo, load_masks, read_checkpoint, save_checkpoint
from llmshearing.checkpoints.output import check_file
from llmshearing.families import table_for
from llmshearing.families.table import Table
from llmshearing.fold.fold import fold_lazily, folded_config, folded_shape, renamed
from llmshearing.fold.selection import Selection, choice_of, save_selection
from llmshearing.masks.l0 import final_selection
from llmshearing.progress import tqdm
from llmshearing.storage import LazyTensor, LazyTensors

log = logging.getLogger(__name__)


def fold_checkpoint(
    checkpoint: Checkpoint, *, uniform: bool = False, zero_closed_blocks: bool = False, choice_only: bool = False
) -> tuple[LazyTensors, CheckpointInfo, Selection]:
    """Weights of the compact model, each folded on access; its description; and the selection that makes it.

    choice_only: cut only; leave the gates out.

    Raises:
        ShearingError: no masks, or masks that fold to no uniform model.
    """
    masks = load_masks(checkpoint)
    selection = final_selection(masks, uniform=uniform, zero_closed_blocks=zero_closed_blocks)
    selection = choice_of(selection) if choice_only else selection
    weights, config = fold_weights(
        checkpoint.weights, checkpoint.info.hf_config, masks.table, selection, zero_closed_blocks=zero_closed_blocks
    )
    shape = folded_shape(masks.table, selection)
    done = f"folded {checkpoint.path.name}: {_describe(masks.table.shape())} -> {_describe(shape)}"
    info = replace(checkpoint.info, hf_config=config, masks=None).then(done)
    return weights, info, selection


def fold_weights(
    weights: LazyTensors,
    config: Mapping[str, Any],
    table: Table,
    selection: Selection,
    *,
    zero_closed_blocks: bool = False,
) -> tuple[LazyTensors, dict[str, Any]]:
    """Weights of the folded model, each folded on access, and its config.

    Raises:
        ShearingError: as :func:`llmshearing.fold.fold.fold_lazily`.
    """
    makers = fold_lazily(weights, table, selection, zero_closed_blocks=zero_closed_blocks)
    folded = folded_config(config, table, selection)
    source_of = {new: name for name, new, _, _ in renamed(table, selection)}
    small = table_for(CheckpointInfo(folded).config)
    return _folded(dict(makers), weights, small, source_of), folded


def _folded(
    makers: Mapping[str, Callable[[], Tensor]], weights: LazyTensors, table: Table, source_of: Mapping[str, str]
) -> LazyTensors:
    """Shapes as the folded model's table tells them, dtypes of the source; tied tensors stay one.

    makers: the folded model's tensors. weights: the source's. source_of: what a folded tensor is called there.
    """
    entries: dict[str, LazyTensor] = {}
    for name in sorted(makers, key=lambda name: table.by_name[name][0].alias is not None):
        spec, layer = table.by_name[name]
        source = weights.entries[source_of[name]]
        shape, make = table.tensor_shape(spec, layer), torch.no_grad()(makers[name])
        entries[name] = entries[spec.alias] if spec.alias else LazyTensor(shape, source.dtype, make)
    return LazyTensors(entries)


def _describe(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {size}" for key, size in shape.items())


def prune_and_save_model(
    path: Path | str,
    output: Path | str | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    uniform: bool = False,
    zero_closed_blocks: bool = False,
    overwrite: bool = False,
) -> Path:
    """Fold a pruning run's checkpoint and save it (and, beside it, the selection).

    Args:
        path: checkpoint file, or a directory with `latest-rank0.pt`.
        output: default `pruned-<name of the checkpoint>` in the same directory.
        given: facts about the compact model's config, to be checked.
        uniform, zero_closed_blocks: see :func:`final_gates` and :func:`llmshearing.families.table.fold_lazily`.
        overwrite: replace an output that exists.

    Raises:
        ShearingError: as in :func:`fold_checkpoint`; the output exists; or a stated fact is wrong.
    """
    checkpoint = read_checkpoint(path, verify=False)  # each tensor is verified as it is read
    target = Path(output) if output is not None else _beside(checkpoint.path)
    check_file(target, overwrite)
    weights, info, selection = fold_checkpoint(checkpoint, uniform=uniform, zero_closed_blocks=zero_closed_blocks)
    check_facts(given or {}, info.hf_config, f"the model that {checkpoint.path} folds to")
    with tqdm(total=len(weights), desc="folding", unit="tensor") as bar:
        save_checkpoint(target, weights, info, progress=bar.update)
    chosen = save_selection(target.with_suffix(".selection.safetensors"), selection, {"history": info.history})
    source, folded = checkpoint.table, table_for(info.config)
    log.info("source  %s: %s parameters", _describe(source.shape()), f"{source.count():,}")
    log.info("folded  %s: %s parameters", _describe(folded.shape()), f"{folded.count():,}")
    log.info("wrote the selection to %s", chosen)
    log.info("wrote the folded model (%s -> %s parameters) to %s", f"{source.count():,}", f"{folded.count():,}", target)
    return target


def _beside(path: Path) -> Path:
    """pruned-<name>.pt in the checkpoint's directory; the name of a sharded folder has no ending."""
    return path.with_name(f"pruned-{path.name.removesuffix('.pt')}.pt")
