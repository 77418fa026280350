"""Pruning Megatron's shards: choose, fold, write shards of the same ranks.

    shards of T ranks -> tensors by name, lazy -> Choice -> the fold -> shards of T ranks
                            |                       ^
                            +-> model in memory, where a method looks at activations or gradients

Tensors pass one at a time. A balanced choice leaves every rank a part of one shape, cut from its own part alone; any
other choice is written for one rank. Beside the shards stand the selection and the record, as beside a model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmshearing.checkpoints.checkpoint import CheckpointInfo
from llmshearing.checkpoints.folding import fold_weights
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.hf_read import build_model
from llmshearing.checkpoints.output import REPORT, SELECTION
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.megatron import Parallel
from llmshearing.families.table import Table
from llmshearing.fold.fold import folded_shape
from llmshearing.fold.selection import load_selection, save_selection, table_of
from llmshearing.megatron.convert import read_megatron, write_megatron
from llmshearing.megatron.shards import check_output
from llmshearing.prune.calibration import SequenceOptions, read_calibration
from llmshearing.prune.method import Choice
from llmshearing.prune.methods import METHODS
from llmshearing.prune.run import Plan, counting_energy, make_plan, placed
from llmshearing.storage import LazyTensors
from llmshearing.storage.dtypes import cast_lazily

log = logging.getLogger(__name__)

BALANCE, UNBALANCE = "balance", "unbalance"
OF_SHARDS = ("random", "activation", "fisher")
"""Methods that only choose units, and can do so for each rank."""


def prune_shards(
    method: str,
    source: Path | str,
    output: Path | str,
    target: Mapping[str, Any],
    *,
    prune_type: str = BALANCE,
    calibration: Path | str | None = None,
    sequences: SequenceOptions = SequenceOptions(),  # noqa: B008 - frozen
    device: str = "cpu",
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Prune a checkpoint of Megatron and write the result as one.

    Args:
        method: of OF_SHARDS. prune_type: BALANCE keeps the ranks; UNBALANCE chooses freely and writes one rank.
        config: a Hugging Face directory to complete Megatron's arguments from. tokenizer: for calibration by text.
        target, calibration, sequences, device, options: as of :func:`llmshearing.prune.run.prune`. ``tp``: ranks to
            balance for; by default the shards' own.

    Raises:
        ShearingError: bad input, as the message says; nothing is written then.
    """
    output = Path(output)
    check_output(output, overwrite)
    weights, info, parallel = _read(source, output, config)
    if method not in OF_SHARDS:
        raise ShearingError(f"method {method} does not prune shards; {', '.join(OF_SHARDS)} do")
    free = prune_type != BALANCE
    ranks = options.get("tp", 1) if free or options.get("tp", 1) > 1 else parallel.tp
    plan = make_plan(method, info.config, {"save_gpu_memory": False, **target}, {**options, "tp": ranks})
    choice = _choose(plan, weights, info, device, (calibration, tokenizer or info.tokenizer, sequences))
    spread = replace(parallel, tp=1) if free else parallel
    record = {"method": method, "source": str(source), "target": dict(target), "options": plan.options}
    return _cut(weights, info, plan.table, choice, spread, output, record, overwrite)


def replay_shards(
    source: Path | str,
    output: Path | str,
    selection: Path | str,
    *,
    prune_type: str = BALANCE,
    config: Path | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Cut a checkpoint of Megatron by a saved selection, whichever way it was chosen.

    Raises:
        ShearingError: the selection is of another model, or bad input as of :func:`prune_shards`.
    """
    output = Path(output)
    check_output(output, overwrite)
    chosen, about = load_selection(selection)
    weights, info, parallel = _read(source, output, config)
    table = table_of(info.config, chosen)
    spread = parallel if prune_type == BALANCE else replace(parallel, tp=1)
    record = {"method": about.get("method"), "source": str(source), "selection": str(selection)}
    return _cut(weights, info, table, Choice(chosen, about), spread, output, record, overwrite)


def _read(source: Path | str, output: Path, config: Path | str | None) -> tuple[LazyTensors, CheckpointInfo, Parallel]:
    if output.exists() and output.resolve() == Path(source).resolve():
        raise ShearingError(f"output {output} is the source; give another directory")
    return read_megatron(source, config=None if config is None else read_config(config))


def _choose(
    plan: Plan, weights: LazyTensors, info: CheckpointInfo, device: str, looked_at: tuple[Any, Any, SequenceOptions]
) -> Choice:
    """The method's choice; the model is built only for one that looks at it."""
    if not METHODS[plan.method.name].needs_calibration(plan.options):
        return plan.method.choose(None, plan.table, plan.target.shape, None, **plan.options)
    calibration, tokenizer, sequences = looked_at
    if calibration is None:
        raise ShearingError(
            f"method {plan.method.name} chooses by sequences: give --calibration (MDS data, JSONL or text)"
        )
    config = info.config
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    data = read_calibration(calibration, tokenizer or "", config.vocab_size, longest, sequences)
    model = build_model(weights, config, torch.float32).eval()
    with placed(model, device, plan):
        choice = plan.method.choose(model, plan.table, plan.target.shape, data, **plan.options)
        return counting_energy(choice, model, plan.table, data)


def _cut(
    weights: LazyTensors,
    info: CheckpointInfo,
    table: Table,
    choice: Choice,
    spread: Parallel,
    output: Path,
    record: Mapping[str, Any],
    overwrite: bool,
) -> Path:
    """Fold in float32, round to the stored dtypes, write."""
    shape = folded_shape(table, choice.selection)  # says which layers differ, where some do
    wide = LazyTensors({name: cast_lazily(name, entry, torch.float32) for name, entry in weights.entries.items()})
    folded, config = fold_weights(wide, info.hf_config, table, choice.selection)
    stored = _rounded(folded, weights, info, config)
    after = replace(info, hf_config=config).then(f"{record['method']}: {json.dumps(shape)}, from {record['source']}")
    small = table_for(after.config)
    report = {**record, "parameters": [table.count(), small.count()], "history": after.history}

    def extra(folder: Path) -> None:
        save_selection(folder / SELECTION, choice.selection, {**choice.about, "method": record["method"]})
        (folder / REPORT).write_text(json.dumps(report, indent=1, default=str) + "\n")

    write_megatron(stored, after, output, spread, overwrite=overwrite, extra=extra)
    log.info(
        "pruned %s to %s parameters; wrote the shards and the selection to %s",
        *(f"{table.count():,}", f"{small.count():,}", output),
    )
    return output


def _rounded(folded: LazyTensors, weights: LazyTensors, info: CheckpointInfo, config: Mapping[str, Any]) -> LazyTensors:
    """The folded tensors in the dtypes of the source's: all layers of a row are of one dtype, or it is that of most."""
    source, small = table_for(info.config), table_for(CheckpointInfo(dict(config)).config)
    of_row: dict[str, torch.dtype] = {}
    for name, (spec, _) in source.by_name.items():
        of_row.setdefault(spec.name, weights.entries[name].dtype)
    made = {
        entry: cast_lazily(name, entry, of_row[small.by_name[name][0].name]) for name, entry in folded.entries.items()
    }
    return LazyTensors({name: made[entry] for name, entry in folded.entries.items()})
