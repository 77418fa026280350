"""The record of a training run, built from its configuration: what the page tells of source, target and result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from llmshearing.config import Config
from llmshearing.families import table_for
from llmshearing.families.cost import cost_of
from llmshearing.families.nonuniform.config import config_of
from llmshearing.fold.fold import config_of_shape
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.callbacks.record import RunRecord
from llmshearing.training.source import Source

log = logging.getLogger(__name__)


def build_record(
    cfg: Config, source: Source, masks: L0Masks | None, info: Mapping[str, Any], device: str, goes_on: bool
) -> list[RunRecord]:
    """One recorder; none for a run that saves nothing. goes_on: the run has folded itself before."""
    if not cfg.save_folder:
        return []
    step = "Pruning with learned masks" if masks is not None else "Continued pretraining"
    options = {
        "title": f"{step}: {cfg.model.path}",
        "about": {
            "source": cfg.model.path,
            "family": source.table.family,
            "data": cfg.data_local or cfg.data_remote,
            "length": cfg.max_duration,
            "sequences a batch": cfg.global_train_batch_size,
            "tokens a sequence": cfg.max_seq_len,
            "seed": cfg.seed,
            "device": torch.cuda.get_device_name()
            if device == "gpu"
            else f"{device}, {torch.get_num_threads()} threads",
            "ranks": dist.get_world_size(),
        },
        "history": info["history"],
        "config": info["run_config"],
    }
    names = cfg.callbacks.data_loading.set_names or []
    l0 = cfg.model.l0_module

    def table() -> tuple[list[str], list[list[Any]]]:
        return sizes(source, masks, cfg.max_seq_len)

    return [
        RunRecord(Path(cfg.save_folder), options, table, names, masks, l0.eval_target_model if l0 else False, goes_on)
    ]


def sizes(source: Source, masks: L0Masks | None, length: int) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: sizes, parameters and FLOPs of what is trained; with masks, of source and target too.

    length: tokens of the sequence that FLOPs are told for.
    """
    own, target = source.table, None
    if masks is not None and source.target is not None:
        target = table_for(config_of(config_of_shape(source.config.to_dict(), own, source.target)))
    tables = [own] if masks is None else [own, target]
    rows: list[list[Any]] = [[key, *(each and each.shape().get(key) for each in tables)] for key in own.shape()]
    rows.append(["parameters", *(each and each.count() for each in tables)])
    flops = [each and cost_of(each).sequence(length) / length for each in tables]
    rows.append([f"FLOPs/token at {length}", *flops])
    if masks is None:
        return ["model"], rows
    for row in rows:
        row.append(None)
    with torch.no_grad():
        rows += [
            [
                f"mask {kind}, units a row",
                masks.row_size(kind),
                (masks.target or {}).get(kind),
                (1 - gone).mean().item() * masks.row_size(kind),
            ]
            for kind, gone in masks.sparsity().items()
        ]
        expected = masks.expected_parameters().item()
    rows.append(["parameters that masks count", own.count(counted_only=True), masks.target_parameters(), expected])
    return ["source", "target", "masks expect"], rows
